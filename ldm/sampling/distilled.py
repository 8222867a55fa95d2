"""The sampler of trajectory consistency models, which reach any level of a trajectory in one step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ldm.sampling.facts import sampler
from ldm.sampling.steps import steps, toward

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.sampling.schedule import Discretization
    from ldm.sampling.steps import Callback, Denoise, Noise, Sigmas


@sampler(
    "TCD", "TCDScheduler",
    order=1, calls="1", schedule="lcm", paper="2402.19159", noise="plain", by_timesteps=True,
)  # fmt: skip
def tcd(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None, callback: Callback = None,
        eta: float = 0.3, s_noise: float = 1.0, discretization: Discretization | None = None,
        ) -> Tensor:  # fmt: skip
    """Strategic stochastic sampling, for models distilled to it (Zheng et al. 2024, algorithm 4).

    https://arxiv.org/abs/2402.19159. Down to 1 - eta times the next level's timestep, and back up with fresh
    noise. `discretization` has the timesteps; without one they are v1's and v2's.
    """
    from ldm.sampling.schedule import published

    timesteps = discretization or published()
    for i, sigma, sigma_next in steps(sigmas):
        x0 = denoise(x, sigma)
        down = sigma_next
        if eta > 0 and sigma_next > 0:
            timestep = math.floor(round((1 - eta) * timesteps.timestep(sigma_next), 6))
            down = min(float(timesteps.sigma(timestep)), sigma_next)
        x = toward(x, x0, sigma, down)
        if down < sigma_next:
            x = x + noise(sigma, sigma_next) * (s_noise * math.sqrt(sigma_next**2 - down**2))
        if callback:
            callback(i + 1, x0)
    return x
