"""Conditions that change over the steps of a run, and conditions that are a weighted sum of several.

Both are a model around the model, so that a `Denoiser` and all that guides in it need not know of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm.sampling.denoiser import (
    Conditioning,
    DiffusionModel,
    has_equal_halves,
    same_length,
    stack,
    timestep_of,
    timesteps,
)
from ldm.sampling.schedule import Discretization
from ldm.sampling.trajectory import Trajectory


@dataclass(frozen=True)
class Composition:
    """uncond + the sum of weight (part - uncond), in the model's outputs.

    Composable diffusion, Liu et al. 2022, https://arxiv.org/abs/2206.01714, eq. 11. `weights` [parts, b] has
    one for each image.
    """

    parts: Sequence[Conditioning]
    weights: Tensor


Condition = Conditioning | Composition


def first_part(cond: Condition) -> Conditioning:
    """A condition that has the composed one's shape, for whoever passes it on."""
    return cond.parts[0] if isinstance(cond, Composition) else cond


def joined(conds: Sequence[Conditioning]) -> Conditioning:
    """Conditions of the same form as one batch; a single row of one stands for all images."""
    last = conds[-1]
    if isinstance(last, Mapping):
        return {name: joined([cond[name] for cond in conds]) for name in last}
    if not isinstance(last, Tensor):
        return [joined(each) for each in zip(*conds, strict=True)]
    if last.ndim == 3:
        conds = same_length(conds)
    return torch.cat([cond.expand(len(last), *cond.shape[1:]) for cond in conds])


class Stage:
    """The conditions of a batch in some steps; each stays one object, so what is made of it can be kept."""

    def __init__(self, cond: Condition, uncond: Conditioning | None):
        self.weights: Tensor | None = None
        if isinstance(cond, Composition):
            self.weights = cond.weights[:, :, None, None, None]  # [parts, b, 1, 1, 1]
            self.rows = joined([uncond, *cond.parts])
        else:
            self.alone = cond
            self.both = None if uncond is None else stack(uncond, cond)

    def cond(self, guided: bool) -> Conditioning:
        return self.both if guided else self.alone

    def apply(self, model: DiffusionModel, x: Tensor, t: Tensor, guided: bool) -> Tensor:
        """The model's outputs for latents x [b, …], or with `guided` [2 b, …], whose halves are equal."""
        if self.weights is None:
            return model.apply_model(x, t, self.cond(guided))
        parts = 1 + len(self.weights)
        x = x.chunk(2)[0] if guided else x
        equal_halves = has_equal_halves(t) and parts % 2 == 0
        times = timesteps(timestep_of(t), parts * len(x), x.device, equal_halves)
        uncond, *conds = model.apply_model(torch.cat([x] * parts), times, self.rows).float().chunk(parts)
        composed = uncond + sum(w * (cond - uncond) for w, cond in zip(self.weights, conds, strict=True))
        return torch.cat([uncond, composed]) if guided else composed


class StagedModel:
    """A model that is given the conditions of the step that a call's timestep belongs to.

    `order` has the stage of each step and `levels` the timestep, falling, at which each begins. A call
    between two levels belongs to the upper one's step. What a caller gives as the condition is passed over.
    """

    def __init__(
        self,
        model: DiffusionModel,
        stages: Sequence[Stage],
        order: Sequence[int],
        levels: Sequence[float],
        images: int,
    ):
        self.model, self.stages, self.order, self.images = model, stages, order, images
        self.levels = [-level for level in levels]  # ascending, for bisection
        self.parameterization, self.alphas_cumprod = model.parameterization, model.alphas_cumprod
        self.conditioning_key = getattr(model, "conditioning_key", "crossattn")
        self.whole_step = getattr(model, "denoise_step", None)
        if self.whole_step is not None and stages[0].weights is None:
            self.denoise_step = self._denoise_step

    def stage(self, t: Tensor) -> Stage:
        """Of the last step that begins at timestep t or above it; a sampler may begin above the first."""
        step = bisect_right(self.levels, -timestep_of(t)) - 1
        return self.stages[self.order[max(0, step)]]

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """As `LatentDiffusion.apply_model`, for latents of all images, or of all of them twice."""
        return self.stage(t).apply(self.model, x_noisy, t, len(x_noisy) == 2 * self.images)

    def _denoise_step(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        c_in: float,
        sigma: float,
        scale: float | Tensor | None,
        rescale: float,
    ) -> Tensor:
        own = self.stage(t).cond(guided=scale is not None)
        return self.whole_step(x, t, own, c_in, sigma, scale, rescale)


def staged(
    model: DiffusionModel,
    stages: Sequence[tuple[Condition, Conditioning | None]],
    order: Sequence[int],
    images: int,
    run: Trajectory,
    discretization: Discretization,
) -> DiffusionModel:
    """The model with these conditions of `images` in a run; itself, if there is one that never changes."""
    if len(stages) == 1 and not isinstance(stages[0][0], Composition):
        return model
    levels = [float(np.float32(discretization.timestep(sigma))) for sigma in run.sigmas[:-1]]
    return StagedModel(model, [Stage(*stage) for stage in stages], order, levels, images)
