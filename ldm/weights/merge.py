"""Two checkpoints become one: a weighted sum, or one plus the difference of two others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.log import notice
from ldm.weights.checkpoint import COMPUTED, EMA_COUNTERS, averages_in
from ldm.weights.families import UNET_INPUT, identify
from ldm.weights.header import let_go

State = dict[str, Tensor]


def merge(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    ratio: float,
    base: Mapping[str, Tensor] | None = None,
    *,
    paths: tuple[str | Path, ...],
) -> State:
    """a (1 - ratio) + b ratio, or with a `base` a + ratio (b - base), of every floating-point weight.

    Computed in float32, rounded to a's dtypes. A weight that one of the others lacks stays as it is in a, and
    one that only they have is left out, each with a notice; so do schedules, which no merging may change.
    Where one of the others lacks an average (`model_ema.*`), all of a's are left out: they would be those of
    the model before the merge. With a `base`, a may be an inpainting model and the others plain ones: the
    channels that only a's first convolution has stay as they are. `paths` name the state dicts in messages.

    InputError where the model families differ, where a weight's shapes do, or where nothing is in common.
    """
    others = [b] if base is None else [b, base]
    grows = _check_families(a, others, paths)
    averages = averages_in(a)
    has_raw = any(name.startswith("model.") for name in a)
    if has_raw and not all(averages <= other.keys() for other in others):
        notice(f"{paths[0]}: its averaged weights are left out, as not all of the files have such")
        a = {name: tensor for name, tensor in a.items() if not name.startswith("model_ema.")}
    merged, kept = {}, []
    for name, tensor in a.items():
        parts = [other.get(name) for other in others]
        if not tensor.is_floating_point() or COMPUTED.fullmatch(name) or name in EMA_COUNTERS:
            merged[name] = tensor
        elif any(part is None for part in parts):
            merged[name] = tensor
            kept.append(name)
        else:
            merged[name] = _merged(name, tensor, parts, ratio, grows, paths)
            for read in (tensor, *parts):
                let_go(read)
    if kept:
        notice(
            f"{len(kept)} of {len(a)} weights are in {paths[0]} alone and stay as they are (first {kept[0]})"
        )
    left_out = [name for name in b if name not in a.keys() | EMA_COUNTERS and not COMPUTED.fullmatch(name)]
    if left_out:
        notice(f"{len(left_out)} weights are in {paths[1]} alone and are left out (first {left_out[0]})")
    return merged


def _check_families(
    a: Mapping[str, Tensor], others: list[Mapping[str, Tensor]], paths: tuple[str | Path, ...]
) -> bool:
    """Whether the others are the plain models of which `a` has more input channels; InputError if they are
    other models altogether."""
    own = identify(a)
    foreign = [
        (path, identify(other))
        for path, other in zip(paths[1:], others, strict=True)
        if identify(other) != own
    ]
    if not foreign:
        return False
    first = [state.get(UNET_INPUT) for state in (a, *others)]
    if len(others) == 2 and all(t is not None and t.ndim == 4 for t in first):
        channels = [t.shape[1] for t in first]
        if channels[0] > channels[1] == channels[2]:
            return True
    path, name = foreign[0]
    raise InputError(
        f"{paths[0]} is {own} and {path} is {name}: models of one family can be merged, and one with more "
        "input channels can take the difference of two plain ones (--add_difference)"
    )


def _merged(
    name: str,
    a: Tensor,
    others: list[Tensor],
    ratio: float,
    grows: bool,
    paths: tuple[str | Path, ...],
) -> Tensor:
    target = a.float()
    part = target
    if grows and name == UNET_INPUT:
        target = target.clone()
        part = target[:, : others[0].shape[1]]
    for path, other in zip(paths[1:], others, strict=True):
        if other.shape != part.shape:
            raise InputError(
                f"{paths[0]} and {path} cannot be merged: {name} is {list(a.shape)} and {list(other.shape)}"
            )
    if len(others) == 1:
        result = torch.lerp(part, others[0].float(), ratio)
    else:
        result = part + ratio * (others[0].float() - others[1].float())
    if part is not target:
        part.copy_(result)
        result = target
    return result.to(a.dtype)
