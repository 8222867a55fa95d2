"""Guidance beyond the classifier-free one, all of it on predictions of x0 [b, c, h, w].

For a model of eps or v those differ from its outputs by a factor and x, so that what is linear is the same
on either.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.sampling.steps import ancestral_step

PER_IMAGE = (1, 2, 3)  # dimensions


class AdaptiveProjection:
    """Adaptive projected guidance (Sadat et al. 2024, https://arxiv.org/abs/2410.02416, algorithm 1).

    Of the difference between the two predictions the part along the conditional one, which oversaturates, is
    multiplied by `eta`. Before that the difference is made at most `norm` long, 0 for any length, and goes
    against (`momentum` below 0) its running sum over the calls of a run: an instance is for one run.
    """

    def __init__(self, eta: float = 1.0, norm: float = 0.0, momentum: float = 0.0):
        self.eta, self.norm, self.momentum = eta, norm, momentum
        self.running: Tensor | None = None

    def __call__(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """In place of cond - uncond."""
        difference = cond - uncond
        if self.momentum:
            if self.running is not None:
                difference = difference + self.momentum * self.running
            self.running = difference
        if self.norm:
            length = difference.square().sum(PER_IMAGE, True).sqrt()
            difference = difference * (self.norm / length).clamp(max=1.0)
        share = (difference * cond).sum(PER_IMAGE, True) / cond.square().sum(PER_IMAGE, True)
        return difference - (1.0 - self.eta) * share * cond


def threshold(guided: Tensor, like: Tensor, percentile: float = 1.0) -> Tensor:
    """`guided` with each channel's range brought down to that of `like`, which was guided less.

    Values beyond the percentile, 0 … 1, of their distance from the channel's mean are cut off first. After
    dynamic thresholding (Saharia et al. 2022, https://arxiv.org/abs/2205.11487, 2.3), for latents, which have
    no fixed range (https://github.com/mcmonkeyprojects/sd-dynamic-thresholding).
    """
    mean = guided.mean((2, 3), keepdim=True)
    centred = guided - mean
    wanted = (like - like.mean((2, 3), keepdim=True)).abs().amax((2, 3), keepdim=True)
    reach = centred.abs().flatten(2).quantile(percentile, dim=2)[..., None, None]
    reach = torch.maximum(reach, wanted)
    return mean + centred.clamp(-reach, reach) * (wanted / reach)


@dataclass
class FurtherGuidance:
    """What a `Denoiser` does with a model's predictions besides classifier-free guidance, in one run.

    `projection` changes what guides. `mimic_scale` is the guidance scale whose range `threshold` keeps; None
    leaves it.
    """

    projection: AdaptiveProjection | None = None
    mimic_scale: float | None = None
    percentile: float = 1.0

    def combine(self, uncond: Tensor, cond: Tensor, scale: float | Tensor) -> Tensor:
        """The guided x0 of the two predictions of it."""
        difference = self.projection(uncond, cond) if self.projection else cond - uncond
        guided = cond + (scale - 1.0) * difference
        if self.mimic_scale is None:
            return guided
        return threshold(guided, cond + (self.mimic_scale - 1.0) * difference, self.percentile)


def plus_plus(sigmas: Sequence[float], eta: float = 0.0) -> Callable[[float], float]:
    """sigma -> the factor on the guidance scale that makes CFG++ of a run of Euler's steps down `sigmas`.

    CFG++ (Chung et al. 2024, https://arxiv.org/abs/2406.08070, algorithm 2) goes to the guided x0 plus the
    next level's share of the unconditional eps. With the scale s that is x (d / sigma) + g - u (d / sigma),
    g = u + s (c - u), where d is how far a step goes down before it adds noise. A plain step toward
    u + w (c - u) arrives there, too, if w = s / (1 - d / sigma): so it is guidance whose scale falls.
    """
    levels, factors = [], []
    for sigma, sigma_next in pairwise(map(float, sigmas)):
        levels.append(-sigma)  # ascending, for bisection
        factors.append(1.0 / (1.0 - ancestral_step(sigma, sigma_next, eta)[0] / sigma))

    def factor(sigma: float) -> float:
        """Of the step that `sigma` belongs to: its level, or one between that and the next."""
        return factors[max(0, bisect_left(levels, -sigma * (1 - 1e-9)) - 1)]

    return factor
