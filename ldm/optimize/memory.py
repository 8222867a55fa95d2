"""What a run takes of a device's memory, and how many images at once that leaves room for."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipeline.generate import Settings, generate
from ldm.pipeline.host import host_memory
from ldm.sampling.batches import plan


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: of a CUDA device since the start or `reset_peak_memory`, else of this process ever.

    On a GPU those that tensors took; the CUDA context and unused parts of torch's pool come on top.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new peak, where that can be done: on a CUDA device."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def taken(device: torch.device) -> int:
    """Bytes that this process holds: on CUDA the most since `reset_peak_memory`, else now, as Linux tells."""
    status = Path("/proc/self/statm")
    if device.type == "cuda" or not status.exists():
        return peak_memory(device)
    import resource

    return int(status.read_text().split()[1]) * resource.getpagesize()


def left(device: torch.device) -> float:
    """Bytes that this process could take beyond what it holds, or, on CUDA, beyond its peak."""
    if device.type != "cuda":
        return host_memory()[1]
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)


MARGIN = 0.85  # of the memory that is left: other processes, and memory in pieces that do not fit together


def largest_batch(model: LatentDiffusion, settings: Settings, most: int) -> int:
    """How many images of these settings fit into memory at once, at most `most`, found by making some.

    One step of one image and of two, decoding included, tells what each further one takes.
    """
    one_step = replace(
        settings,
        sampler="ddim",
        steps=1,
        schedule=None,
        timesteps=None,
        sigmas=None,
        options={},
        strength=None,
        guidance_start=0.0,
        guidance_end=1.0,
    )
    readings = []
    for images in (1, 2):
        reset_peak_memory(model.device)
        list(generate(model, plan([""] * images, 1, images), one_step))
        readings.append(taken(model.device))
    each = max(readings[1] - readings[0], 1)
    return max(1, min(most, 2 + int((MARGIN * left(model.device)) // each)))
