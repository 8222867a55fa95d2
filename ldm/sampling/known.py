"""Keeping a known part of the latents while the rest is sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ldm.sampling.steps import Denoise


@dataclass(frozen=True)
class KnownRegion:
    """Latents that are known at high noise levels and free at low ones.

    Before each model call the known ones are put into x, noised to the call's level, as the original
    sampler's `mask` and `x0` do; the noise is the same at all levels, so that x stays on one path. What the
    model makes of them is replaced, too. Every sampler works so, as each goes from x and x0 latent by latent.

    latents: [b, c, h, w], the image's, at the model's scale
    noise: [b, c, h, w], standard normal
    levels: [b, 1, h, w], the sigma from which downwards a latent is free: infinite for always, -1 for never
    """

    latents: Tensor
    noise: Tensor
    levels: Tensor

    def put(self, x: Tensor, sigma: float) -> Tensor:
        """Latents x = x0 + sigma eps with what is known at this level in its place."""
        return torch.where(self._free(sigma), x, self.latents + sigma * self.noise)

    def restore(self, latents: Tensor) -> Tensor:
        """The finished latents, at the model's scale, with those that were never free as they are known."""
        return torch.where(self.levels >= 0, latents, self.latents)

    def denoiser(self, denoise: Denoise) -> Denoise:
        """`denoise` for which the known latents are certain."""

        def keeping(x: Tensor, sigma: float) -> Tensor:
            return torch.where(self._free(sigma), denoise(self.put(x, sigma), sigma), self.latents)

        return keeping

    def _free(self, sigma: float) -> Tensor:
        return self.levels >= sigma * (1 - 1e-6)  # float32 cannot hold all levels


def joining_levels(strength: Tensor, sigmas: Sequence[float]) -> Tensor:
    """`KnownRegion.levels` of strengths [b, 1, h, w] in 0 … 1, for a run down `sigmas`, [steps + 1].

    At step k of n those are free that have a strength of at least 1 - k / n: 1 from the beginning, 0 never
    (differential diffusion, Levin & Fried 2023, https://arxiv.org/abs/2306.00950).
    """
    steps = len(sigmas) - 1
    levels = strength.new_tensor([math.inf, *map(float, sigmas[1:-1]), -1.0])
    first = torch.ceil(steps * (1.0 - strength) - 1e-4).long().clamp(0, steps)
    return torch.where(strength >= 1.0, math.inf, levels[first])
