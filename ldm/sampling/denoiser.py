"""From a diffusion model to `denoise(x, sigma) -> x0`: parameterization, guidance, conditioning."""

from collections.abc import Mapping
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


class Denoiser:
    """Predicts clean latents with classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598).

    `cond` and `uncond` go to `model.apply_model`, in one batch; a scale of exactly 1 leaves `uncond` out.
    """

    def __init__(
        self, model: "LatentDiffusion", cond: "Conditioning", uncond: "Conditioning | None", scale: float
    ):
        self.model = model
        self.guided = uncond is not None and scale != 1.0
        self.cond = stack(uncond, cond) if self.guided else cond
        self.scale = scale
        self.discretization = Discretization(model.alphas_cumprod.cpu().numpy())

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """x0 [b, c, h, w] for latents x = x0 + sigma eps."""
        c_in = (1.0 + sigma**2) ** -0.5  # sqrt(alpha): back to the model's variance-preserving form
        x_in = x * c_in
        x_model = torch.cat([x_in, x_in]) if self.guided else x_in
        t = torch.full((len(x_model),), self.discretization.timestep(sigma), device=x.device)
        output = self.model.apply_model(x_model, t, self.cond).float()
        if self.guided:
            out_uncond, out_cond = output.chunk(2)
            output = out_uncond + self.scale * (out_cond - out_uncond)
        if self.model.parameterization == "v":
            return (x_in - sigma * output) * c_in
        return x - sigma * output
