"""Weights in float8 that have a scale beside them, as ComfyUI and other tools write them.

The values of `a.weight` are to be multiplied by `a.scale_weight`, which newer files call `a.weight_scale`:
one number for the tensor (ComfyUI) or one for each output channel (other tools). Files may also have scales
of the layer's input, for products that are computed in float8, and a note on the layer's format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ldm.errors import InputError
from ldm.weights.header import let_go

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")  # a tensor, or a header's entry for one

SCALE = re.compile(r"(?P<layer>.+)\.(scale_weight|weight_scale)", re.S)
OF_A_LAYER = ("scale_weight", "weight_scale", "scale_input", "input_scale", "comfy_quant")
MARK = re.compile(r"(.+\.)?scaled_fp8", re.S)  # of a file with such weights


def split_scales(tensors: Mapping[str, T], path: str | Path) -> tuple[dict[str, T], dict[str, T]]:
    """The tensors of a file without all that belongs to scales; and the scales, by the name of their weight.

    InputError for a scale of another shape, such as that of blocks, or of a dtype that a scale cannot have.
    """
    rest, scales = dict(tensors), {}
    for name, scale in tensors.items():
        match = SCALE.fullmatch(name)
        weight = f"{match['layer']}.weight" if match else ""
        if weight not in tensors or not _dtype(tensors[weight]).startswith("float8"):
            continue
        shape, wanted = tuple(scale.shape), tuple(tensors[weight].shape)
        if not _fits(shape, wanted) or not _dtype(scale).startswith(("float", "bfloat")):
            shapes = [str(list(each))[:60] for each in (shape, wanted)]
            raise InputError(
                f"{path}: the scale {name[:200]!r} has shape {shapes[0]} and dtype {_dtype(scale)}, for a "
                f"weight of shape {shapes[1]}; one number, or one for each output channel, can be used"
            )
        scales[weight] = scale
        for other in OF_A_LAYER:
            rest.pop(f"{match['layer']}.{other}", None)
    return {name: t for name, t in rest.items() if not MARK.fullmatch(name)}, scales


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a scale is one number, or n or n x 1 x … for a weight of n output channels."""
    return set(scale) <= {1} or (scale[:1] == weight[:1] and set(scale[1:]) <= {1})


def multiplied(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in float8 times its scale, computed in float32, in `dtype`; the file's pages are let go."""
    of_channels = (-1, *[1] * (values.ndim - 1))
    product = values.float() * scale.float().reshape(() if scale.numel() == 1 else of_channels)
    let_go(values)
    return product.to(dtype)


def without_scales(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a file or folder, those in float8 that have a scale multiplied by it, in float32.

    InputError as `split_scales`, and for a file in which names share their values, so that the products would
    take more memory than four times its size.
    """
    import torch

    state, scales = split_scales(tensors, path)
    files = path.rglob("*") if path.is_dir() else [path]
    if sum(state[name].numel() for name in scales) > sum(file.stat().st_size for file in files):
        raise InputError(f"{path} is damaged: its weights in float8 have more values than are stored of them")
    return state | {name: multiplied(state[name], scale, torch.float32) for name, scale in scales.items()}
