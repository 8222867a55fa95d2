"""Which device computes, and in which precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ldm.errors import FieldError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """The device of a name such as "auto", "cpu" or "cuda:1"; FieldError if this machine has none such."""
    import torch

    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise FieldError(
            "{device} {name} is not there; this machine has {available}",
            name=name,
            available=", ".join(available),
        )
    return torch.device(name)


def precision_on(device: torch.device, precision: str | None) -> str:
    """The precision that is asked for, or what is best on the device: half on a GPU, full elsewhere.

    autocast is for GPUs, as in the original: on a CPU it is full.
    """
    if precision == "autocast" and device.type == "cpu":
        return "full"
    return precision or ("half" if device.type == "cuda" else "full")


def precision_of(model: torch.nn.Module) -> str:
    """The precision that the weights of a built model are in; full if it has none."""
    import torch

    weight = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
    return {torch.float16: "half", torch.bfloat16: "bf16"}.get(getattr(weight, "dtype", None), "full")


def weights_dtype(precision: str) -> torch.dtype | None:
    """The type of weights in a precision; None is float32."""
    import torch

    return {"half": torch.float16, "bf16": torch.bfloat16}.get(precision)


@contextmanager
def arithmetic(device: torch.device) -> Iterator[None]:
    """How a CUDA device computes inside; elsewhere, and for the process afterwards, nothing is changed.

    float32 is IEEE float32 in matrix products and convolutions, in every precision: torch's own setting lets
    cuDNN round the factors of convolutions to TF32, 10 bits
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices).

    cuDNN measures which of its kernels is fastest when a shape first comes, and keeps to it, with `--eager`
    and without: so both have the same bits in one process. Another process may choose other kernels, so there
    the same image, made again or by a run that is resumed, may differ in rounding. Who sets torch to be
    deterministic keeps cuDNN's choice as it is
    (https://docs.pytorch.org/docs/stable/notes/randomness.html#cuda-convolution-benchmarking).
    """
    import torch

    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    # the old setting, too: torch raises where one that it reads contradicts the new ones
    allowed = cudnn.conv.fp32_precision == "tf32"
    settings = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    matmul, benchmark = torch.get_float32_matmul_precision(), cudnn.benchmark
    try:
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        for setting in settings:
            setting.fp32_precision = "ieee"
        if not (cudnn.deterministic or torch.are_deterministic_algorithms_enabled()):
            cudnn.benchmark = True
        yield
    finally:
        cudnn.benchmark = benchmark
        torch.set_float32_matmul_precision(matmul)
        cudnn.allow_tf32 = allowed
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
