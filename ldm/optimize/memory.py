"""Memory on a CPU: that of freed tensors is kept for the next ones, and given back around a large decode."""

import ctypes
import sys

from torch import Tensor, nn

from ldm.machine import host_memory
from ldm.modules.diffusionmodules import model as first_stage

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

# sizes from which on giving memory back is worth its time
LARGE_IMAGE = 64 * 64  # latents
LARGE_INPUT = {first_stage.Upsample: 64 * 2**20, nn.GroupNorm: 128 * 2**20}  # bytes, of a layer's input


def glibc() -> ctypes.CDLL | None:
    """The C library of this process, where it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def keep_memory() -> bool:
    """Keep the memory of freed tensors for the next ones; False where this process cannot be set so.

    glibc gives large blocks back to the system at once, and takes them anew, page by page and zeroed: a
    quarter of the time of a decoder's call. The process then keeps what its largest call needs (mallopt(3)).
    Called before a model is loaded, weights in 16 bits are packed into the memory of those packed before.
    """
    libc = glibc()
    return libc is not None and bool(
        libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1) and libc.mallopt(M_TRIM_THRESHOLD, -1)
    )


def return_memory(model: nn.Module) -> None:
    """Give memory that is kept, but free, back around a large decode and within it, unless it is used again.

    A decoder's tensors grow from level to level and fit no hole that smaller ones left: without this an image
    of the v1 layout took 1 GB more in float32. But to take that memory anew is a quarter of the time of a
    decode. So the first decode gives it back, and those after it, which are no larger, keep what they need:
    a process that makes one image stays small, and one that makes many loses no time. Where less than half of
    this machine's memory is available every decode gives it back.

    Does nothing where `keep_memory` does not.
    """
    libc = glibc()
    if libc is None:
        return
    largest = 0  # bytes of the latents of the largest decode so far
    gives_back = True

    def before(decoder: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal gives_back
        total, available = host_memory()
        gives_back = inputs[0].nbytes > largest or available < total / 2
        around(inputs[0])

    def after(decoder: nn.Module, inputs: tuple[Tensor], output: Tensor | None) -> None:
        nonlocal largest
        around(inputs[0])
        if output is not None:  # it did not fail
            largest = max(largest, inputs[0].nbytes)

    def around(z: Tensor) -> None:
        if gives_back and z.numel() // z.shape[1] >= LARGE_IMAGE:
            libc.malloc_trim(0)

    def within(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        if gives_back and inputs[0].nbytes >= LARGE_INPUT[type(layer)]:
            libc.malloc_trim(0)

    for decoder in model.modules():
        if not isinstance(decoder, first_stage.Decoder):
            continue
        decoder.register_forward_pre_hook(before)
        decoder.register_forward_hook(after, always_call=True)
        for layer in decoder.modules():
            if type(layer) in LARGE_INPUT:
                layer.register_forward_pre_hook(within)
