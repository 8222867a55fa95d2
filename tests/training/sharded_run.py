"""Trains with FSDP on two CPU processes, which torch and Lightning allow on GPUs alone: YAML FOLDER STOP."""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import FSDPStrategy
from torch.distributed.fsdp import fully_sharded_data_parallel
from torch.distributed.fsdp._common_utils import _FSDPDeviceHandle

from ldm.training.loop import train
from ldm.training.processes import end_processes, strategy_of
from ldm.training.sections import read_sections
from ldm.training.start import new_task


class OnCpu(FSDPStrategy):
    """Lightning refuses its own class on CPUs."""


def use_cpu(state: Any, *_: Any) -> Any:
    state._device_handle = _FSDPDeviceHandle.from_device(torch.device("cpu"))
    return state


if __name__ == "__main__":
    base, folder, stop = sys.argv[1:]
    fully_sharded_data_parallel._init_device_handle = use_cpu
    sections = read_sections([Path(base)], ["training.strategy=fsdp"])
    strategy = strategy_of("fsdp", OnCpu)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, precision="32-true")
    fabric.launch()
    task = new_task(sections.model, sections.training, sections.data)
    train(task, Path(folder), int(stop), fabric)
    end_processes(fabric)
