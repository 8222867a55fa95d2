"""The processes that train together: Lightning Fabric starts them, or torchrun or srun has done so."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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

PRECISIONS = {"full": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class Autocast(MixedPrecision):
    """Mixed precision without a cache of weights in 16 bits: a pass reads each of them once.

    The cache is held until the loss is there: 1.7 GB for the UNet of v1.
    """

    def forward_context(self) -> AbstractContextManager:
        dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16
        return torch.autocast(self.device, dtype, cache_enabled=False)

    def convert_input(self, data: Any) -> Any:
        """A batch stays as it is: several processes would round its images and latents to 16 bits."""
        return data


def start_processes(config: TrainingConfig) -> Fabric:
    """All processes of a training, connected. Each goes on from here with its own device.

    Processes that Fabric starts run the command anew up to this call. InputError where devices, launcher and
    batch contradict each other.
    """
    place = find_place(config.devices or None, config.nodes or None)
    config.accumulation(place.devices, place.nodes)
    for name in ("lightning_fabric", "lightning.fabric", "pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    on_cpu, wanted = device == "cpu", config.precision_on(device)
    if on_cpu and wanted == "fp16":
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
    precision = PRECISIONS[wanted]
    # It is given, not detected: Lightning would warn whoever has an `srun` command, and does not use it.
    plugins: list[Any] = [LightningEnvironment()]
    if wanted != "full" and config.strategy != "fsdp":  # which has a precision of its own
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
        _wait_for_leader(fabric)
        fabric.broadcast(False)
        raise
    _wait_for_leader(fabric)
    if not fabric.broadcast(True):
        raise SystemExit(1)


def _wait_for_leader(fabric: Fabric) -> None:
    """Return once the leader has called this as often as this process, and so has done its work.

    In a collective torch lets the others wait half an hour or less, and class images may take longer. Here
    they ask the store by which the processes found each other. It lives in the leader or in its launcher:
    where these have ended SystemExit ends the others, too.
    """
    if fabric.world_size == 1:
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    try:
        turn = store.add(f"led by {fabric.global_rank}", 1)
        if fabric.global_rank == 0:
            store.set(f"led {turn}", "")
        pause = 0.001
        while not store.check([f"led {turn}"]):
            time.sleep(pause)  # a call that waits would keep the process's other threads from the store
            pause = min(2 * pause, 1.0)
    except torch.distributed.DistError as error:  # the store has gone
        if fabric.global_rank == 0:
            raise
        raise SystemExit(1) from error


def strategy_of(name: str, fsdp: type[FSDPStrategy] = FSDPStrategy) -> Strategy:
    """Lightning's strategy for several devices.

    FSDP shards each block of the UNet and each layer of the text encoder on its own. Parameters keep their
    identity, so that the optimiser can be given some of them, and their precision: autocast alone decides in
    which they are used, and the noise schedule is not rounded.
    """
    if name == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True)
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
    )
