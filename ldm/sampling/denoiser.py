"""From a diffusion model to `denoise(x, sigma) -> x0`: parameterization, guidance, conditioning."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.sampling.schedule import Discretization

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import Conditioning, LatentDiffusion


def stack(uncond: "Conditioning", cond: "Conditioning") -> "Conditioning":
    """Unconditional and conditional inputs as one batch of twice the size; tensors, lists and dicts alike."""
    if isinstance(cond, Mapping):
        return {name: stack(uncond[name], cond[name]) for name in cond}
    if isinstance(cond, Tensor):
        return torch.cat([uncond.expand_as(cond), cond])
    return [stack(u, c) for u, c in zip(uncond, cond, strict=True)]


@lru_cache(maxsize=4096)
def timesteps(timestep: float, count: int, device: torch.device) -> Tensor:
    """`timestep`, [count] times, not to be written to.

    The same object for the same arguments, so that what is computed from it can be kept (`keep_timesteps`).
    """
    with torch.inference_mode(False):  # it outlives the caller's mode
        return torch.full((count,), timestep, device=device)


def rescale_guidance(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """`guided` with, to the share phi, the deviation of `cond`: large scales no longer overexpose.

    Both are model outputs [b, c, h, w]. Lin et al. 2023, https://arxiv.org/abs/2305.08891, eq. 15-16.
    """
    deviation = cond.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    return guided * (phi * deviation + (1.0 - phi))


class Denoiser:
    """Predicts clean latents with classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598).

    `cond` and `uncond` go to `model.apply_model`, in one batch; a scale of exactly 1 leaves `uncond` out, and
    so do sigmas outside `interval`, (above, up to) (Kynkäänniemi et al. 2024, https://arxiv.org/abs/2404.07724).
    `rescale` is `rescale_guidance`'s phi. `discretization` replaces the model's own schedule.
    """

    def __init__(
        self,
        model: "LatentDiffusion",
        cond: "Conditioning",
        uncond: "Conditioning | None",
        scale: float,
        *,
        rescale: float = 0.0,
        interval: tuple[float, float] = (-math.inf, math.inf),
        discretization: Discretization | None = None,
    ):
        self.model = model
        self.guided = uncond is not None and scale != 1.0
        self.cond = cond
        self.both = stack(uncond, cond) if self.guided else None
        self.scale = scale
        self.rescale = rescale
        self.interval = interval
        self.discretization = discretization or Discretization(model.alphas_cumprod.cpu().numpy())

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """x0 [b, c, h, w] for latents x = x0 + sigma eps."""
        c_in = (1.0 + sigma**2) ** -0.5  # sqrt(alpha): back to the model's variance-preserving form
        x_in = x * c_in
        output = self._model_output(x_in, sigma)
        if self.model.parameterization == "v":
            return (x_in - sigma * output) * c_in
        return x - sigma * output

    def _model_output(self, x: Tensor, sigma: float) -> Tensor:
        guided = self.guided and self.interval[0] < sigma <= self.interval[1]
        x_model = torch.cat([x, x]) if guided else x
        t = timesteps(self.discretization.timestep(sigma), len(x_model), x.device)
        output = self.model.apply_model(x_model, t, self.both if guided else self.cond).float()
        if not guided:
            return output
        uncond, cond = output.chunk(2)
        output = uncond + self.scale * (cond - uncond)
        return rescale_guidance(output, cond, self.rescale) if self.rescale else output
