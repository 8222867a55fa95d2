"""Images larger than a model draws well: overlapping windows of its own size, averaged at every step.

MultiDiffusion, Bar-Tal et al. 2023, https://arxiv.org/abs/2302.08113: the windows agree on what they share
before the next step, so that they become one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ldm.sampling.denoiser import Conditioning, DiffusionModel

SPATIAL = ("c_concat", "c_control")  # of a condition, the lists of tensors [b, c, h, w]
SHARED = 1 / 2  # of a window, at least, that is shared with each of its neighbours


@dataclass(frozen=True)
class Window:
    """The part of one side that a window covers: places [n], and its weight in the average at each, [n]."""

    places: Tensor
    weights: Tensor


def windows(length: int, side: int, around: bool = False) -> list[Window]:
    """The fewest windows of `side` latents that cover `length` and share what they must, spread evenly.

    With `around` the last continues in the first. Weights fall towards a window's ends, where it sees least
    of the image, and add up to 1 at each place.
    """
    if length <= side:
        return [Window(torch.arange(length), torch.ones(length))]
    step = max(1, int(side * (1 - SHARED)))
    if around:
        count = -(-length // step)
        starts = [i * length // count for i in range(count)]
    else:
        count = -(-(length - side) // step)
        starts = [i * (length - side) // count for i in range(count + 1)]
    ramp = torch.arange(side) + 0.5
    falling = torch.minimum(ramp, ramp.flip(0))
    places = [(start + torch.arange(side)) % length for start in starts]
    total = torch.zeros(length)
    for inside in places:
        total[inside] += falling
    return [Window(inside, falling / total[inside]) for inside in places]


class WindowedModel:
    """A model whose UNet works on windows of `side` latents; along `around` (2, 3) the image continues."""

    def __init__(self, model: DiffusionModel, side: int, around: Sequence[int] = ()):
        self.model, self.side, self.around = model, side, tuple(around)
        self.parameterization, self.alphas_cumprod = model.parameterization, model.alphas_cumprod
        self.conditioning_key = model.conditioning_key

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """As `LatentDiffusion.apply_model`; what is concatenated is cut as the latents are."""
        result = None
        for at, weights in placed(tuple(x_noisy.shape[2:]), self.side, self.around, x_noisy.device):
            part = self.model.apply_model(x_noisy[:, :, *at], t, cut(cond, at)).float()
            if result is None:
                result = part.new_zeros(*part.shape[:2], *x_noisy.shape[2:])
            result[:, :, *at] += part * weights
        return result


@lru_cache(maxsize=16)
def placed(
    size: tuple[int, int], side: int, around: tuple[int, ...], device: torch.device
) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    """The windows of latents of `size`, (h, w): rows [n, 1] and columns [m], and weights [n, m]."""
    with torch.inference_mode(False):  # they outlive the caller's mode
        rows, columns = (windows(size[dim - 2], side, dim in around) for dim in (2, 3))
        return [
            (
                (row.places.to(device)[:, None], column.places.to(device)),
                torch.outer(row.weights, column.weights).to(device),
            )
            for row in rows
            for column in columns
        ]


def cut(cond: Conditioning, at: tuple[Tensor, Tensor]) -> Conditioning:
    """A condition as a window's UNet takes it: `at` are its rows [n, 1] and columns [m]."""
    if not isinstance(cond, Mapping):
        return cond
    own = {name: [each[:, :, *at] for each in cond[name]] for name in SPATIAL if name in cond}
    return {**cond, **own}


def windowed(model: DiffusionModel, side: int, size: Sequence[int], around: Sequence[int]) -> DiffusionModel:
    """The model as a denoiser calls it for latents of `size`, (h, w): itself, if one window covers them."""
    return model if max(size) <= side else WindowedModel(model, side, around)


def within_windows(side: int, size: Sequence[int], dims: Sequence[int]) -> tuple[int, ...]:
    """Those of `dims` (2, 3) along which one window covers latents of `size`, (h, w)."""
    return tuple(dim for dim in dims if size[dim - 2] <= side)
