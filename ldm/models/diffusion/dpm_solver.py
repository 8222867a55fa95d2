"""DPMSolverSampler as the original's notebooks call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.sampling import SAMPLERS, Denoiser

if TYPE_CHECKING:
    from ldm.sampling.denoiser import Conditioning


class DPMSolverSampler(DDIMSampler):
    """DDIMSampler's calls with the DPM-Solver++ (2M) update; eta is ignored, as in the original."""

    name = "dpmpp_2m"

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Conditioning,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning | None = None,
        use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
    ) -> Tensor:
        """DDIMSampler's `decode`, which the original has for DDIM only, on the same grid."""
        if t_start == 0:
            return x_latent
        denoiser = Denoiser(self.model, cond, unconditional_conditioning, unconditional_guidance_scale)
        grid = self._grid(use_original_steps)[:t_start]
        sigmas = [float(denoiser.discretization.sigma(t)) for t in reversed(grid)]
        sigmas.append(float(denoiser.discretization.sigma(0)) if grid[0] > 0 else 0.0)
        x = x_latent * (1.0 + sigmas[0] ** 2) ** 0.5
        on_step = None if callback is None else lambda step, x0: callback(step - 1)
        x = SAMPLERS[self.name](denoiser, x, sigmas, callback=on_step)
        return x * (1.0 + sigmas[-1] ** 2) ** -0.5
