"""The most memory that a run used, for the modes that save it to print."""

import sys

import torch


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
