"""The processes that train together: Lightning Fabric starts them, or torchrun or srun has done so."""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.plugins.precision import MixedPrecision
from lightning_fabric.strategies import DDPStrategy, FSDPStrategy, Strategy

from ldm.errors import InputError
from ldm.log import LOG
from ldm.runs.processes import find_place, has_own_device, in_srun, in_torchrun, set_srun_variables
from ldm.training.config import TrainingConfig

# How long the others wait for the first one, which makes DreamBooth's class images, samples and checkpoints.
# By itself torch waits half an hour or less. A process that ends is noticed by its launcher.
PATIENCE = timedelta(hours=12)
PRECISIONS = {"full": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class Autocast(MixedPrecision):
    """Mixed precision without a cache of weights in 16 bits: a pass reads each of them once.

    The cache is held until the loss is there: 1.7 GB for the UNet of v1.
    """

    def forward_context(self) -> AbstractContextManager:
        dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16
        return torch.autocast(self.device, dtype, cache_enabled=False)


def start_processes(config: TrainingConfig) -> Fabric:
    """All processes of a training, connected. Each goes on from here with its own device.

    Processes that Fabric starts run the command anew up to this call. InputError where devices, launcher and
    batch contradict each other.
    """
    place = find_place(config.devices or None, config.nodes or None)
    config.accumulation(place.devices, place.nodes)
    for name in ("lightning_fabric", "lightning.fabric", "pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if on_cpu and config.precision == "fp16":
        raise InputError("training: precision: fp16 needs a GPU; choose bf16 or full")
    if on_cpu and config.strategy == "fsdp":
        raise InputError("training: strategy: fsdp needs GPUs; choose ddp")
    devices = place.devices
    if torch.cuda.is_available() and not in_srun() and torch.cuda.device_count() < devices:
        raise InputError(f"training: devices: {devices}, but there are {torch.cuda.device_count()} GPUs")
    if in_srun() and not in_torchrun():
        set_srun_variables()
        if has_own_device("cuda" if torch.cuda.is_available() else "cpu", devices):
            devices, os.environ["LOCAL_RANK"] = 1, "0"
    precision = PRECISIONS[config.precision]
    # It is given, not detected: Lightning would warn whoever has an `srun` command, and does not use it.
    plugins: list[Any] = [LightningEnvironment()]
    if config.precision != "full" and config.strategy != "fsdp":  # which has a precision of its own
        device = "cpu" if on_cpu else "cuda" if torch.cuda.is_available() else "mps"
        plugins.append(Autocast(precision, device))
        precision = None
    fabric = Fabric(
        accelerator="auto",
        devices=devices,
        num_nodes=place.nodes,
        precision=precision,
        strategy="auto" if place.size == 1 and config.strategy == "ddp" else strategy_of(config.strategy),
        plugins=plugins,
    )
    fabric.launch()
    if not fabric.is_global_zero:
        LOG.setLevel(logging.ERROR)  # the leader gives the same notices
    return fabric


def end_processes(fabric: Fabric) -> None:
    """Let go of the connection between the processes. All of them call it once nothing is shared any more.

    Where it was left to the end of Python, a thread of gloo's now and then aborted a process that had
    finished. Lightning does this for NCCL alone.
    """
    if fabric.world_size > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def gathered(fabric: Fabric, value: Any) -> list[Any]:
    """A plain value of each process, by rank. All of them have to call it."""
    if fabric.world_size == 1:
        return [value]
    values = [None] * fabric.world_size
    torch.distributed.all_gather_object(values, value)
    return values


@contextmanager
def led(fabric: Fabric) -> Iterator[None]:
    """For a block in which the leader alone does something: where that fails, the others end silently.

    All processes have to enter it, and wait for the leader at its end.
    """
    try:
        yield
    except Exception:
        fabric.broadcast(False)
        raise
    if not fabric.broadcast(True):
        raise SystemExit(1)


def strategy_of(name: str, fsdp: type[FSDPStrategy] = FSDPStrategy) -> Strategy:
    """Lightning's strategy for several devices.

    FSDP shards each block of the UNet and each layer of the text encoder on its own. Parameters keep their
    identity, so that the optimiser can be given some of them, and their precision: autocast alone decides in
    which they are used, and the noise schedule is not rounded.
    """
    if name == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True, timeout=PATIENCE)
    from torch.distributed.fsdp import MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    from ldm.modules.diffusionmodules.openaimodel import Block
    from ldm.modules.encoders.clip import Layer
    from ldm.modules.encoders.openclip import Block as OpenCLIPBlock

    return fsdp(
        auto_wrap_policy=ModuleWrapPolicy({Block, Layer, OpenCLIPBlock}),
        mixed_precision=MixedPrecision(),
        use_orig_params=True,
        state_dict_type="full",
        timeout=PATIENCE,
    )
