"""Which device computes, and in which precision."""

from __future__ import annotations

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
    """The precision that is asked for, or what is best on the device: half on a GPU, full elsewhere."""
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
