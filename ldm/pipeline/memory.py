"""Memory of the device, what this process takes of it, and how many images at once it has room for."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.machine import host_memory

if TYPE_CHECKING:
    import torch

# the usable share of free memory: other processes take some of it, and some is in pieces too small to use
MARGIN = 0.85


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: of a CUDA device since the start or `reset_peak_memory`, else of this process ever.

    On a GPU those that tensors took; the CUDA context and unused parts of torch's pool come on top.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    # Linux's own figure first: getrusage's begins with the peak of the process that started this one.
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE):
            return 1024 * int(found[1])
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new peak, where that can be done: on a CUDA device."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def taken(device: torch.device) -> int:
    """Bytes that this process holds: on CUDA the most since `reset_peak_memory`, on a CPU now.

    On a CPU that is a figure of Linux; elsewhere it is the process's peak.
    """
    status = Path("/proc/self/statm")
    if device.type == "cuda" or not status.exists():
        return peak_memory(device)
    import resource

    return int(status.read_text().split()[1]) * resource.getpagesize()


def all_memory(device: torch.device) -> float:
    """Bytes of the device's memory, or of this machine's, whoever uses them at the moment."""
    if device.type != "cuda":
        return host_memory()[0]
    import torch

    return torch.cuda.get_device_properties(device).total_memory


def left(device: torch.device) -> float:
    """Bytes that this process could take beyond what it holds, or, on CUDA, beyond its peak."""
    if device.type != "cuda":
        return host_memory()[1]
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)


def largest_batch(run_batch: Callable[[int], object], device: torch.device, most: int) -> int:
    """How many images fit into memory at once, 1 … `most`.

    `run_batch` makes a batch of n images, decoding included; one step of sampling is enough. It is called for
    one image and for two, and the difference is what each further image takes. On CUDA the first call of each
    is not read: cuDNN tries its kernels in it, some of which want more memory than the one that it chooses.
    """
    if device.type == "cpu":
        from ldm.optimize.memory import keep_memory

        keep_memory()  # else the memory of a batch would be given back before it can be read
    readings = []
    for images in (1, 2):
        if device.type == "cuda":
            run_batch(images)
        reset_peak_memory(device)
        run_batch(images)
        readings.append(taken(device))
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
    each = max(readings[1] - readings[0], 1)
    return max(1, min(most, 2 + int((MARGIN * left(device)) // each)))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or this machine, has no more memory; only CUDA has a class for it."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or bool(
        re.search("out of memory|can't allocate memory|not enough memory", str(error))
    )
