"""v1's noise schedule and a diffusion model whose every answer is known exactly."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.modules.diffusionmodules.util import make_beta_schedule
from ldm.sampling import Discretization
from ldm.sampling.noise import CompvisNoise, ImageNoise, ImageSeeds

V1_ALPHAS = np.cumprod(1.0 - make_beta_schedule("linear", 1000, 0.00085, 0.012))
V1 = Discretization(V1_ALPHAS)


class NormalData:
    """The exact model of data that are normal around `cond` [b, c, 1, 1] with standard deviation `std`.

    Stands in for LatentDiffusion; `batches` lists the sizes of the calls.
    """

    def __init__(self, std: float = 0.5, parameterization: str = "eps", alphas: np.ndarray = V1_ALPHAS):
        self.std = std
        self.parameterization = parameterization
        self.alphas_cumprod = torch.tensor(alphas, dtype=torch.float32)
        self.discretization = Discretization(alphas)
        self.batches: list[int] = []

    def apply_model(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        self.batches.append(len(x))
        sigma = torch.tensor(self.discretization.sigma(t.double().numpy()))[:, None, None, None]
        alpha = 1.0 / (1.0 + sigma**2)
        x = x.double()
        x0 = self.x0(x / alpha.sqrt(), sigma, cond)
        eps = (x - alpha.sqrt() * x0) / (1.0 - alpha).sqrt()
        if self.parameterization == "v":
            return alpha.sqrt() * eps - (1.0 - alpha).sqrt() * x0
        return eps

    def x0(self, x: Tensor, sigma: Tensor | float, mean: Tensor | float) -> Tensor:
        """What is best predicted for x0 + sigma eps."""
        return (self.std**2 * x + sigma**2 * mean) / (self.std**2 + sigma**2)

    def solution(self, x: Tensor, sigma: float, sigma_end: float, mean: Tensor | float) -> Tensor:
        """Where the probability-flow ODE takes x from sigma to sigma_end."""
        return mean + (x - mean) * math.sqrt((self.std**2 + sigma_end**2) / (self.std**2 + sigma**2))


def compvis_noise(seed: int, shape: Sequence[int], start: Tensor | None = None) -> CompvisNoise:
    return CompvisNoise(torch.Generator().manual_seed(seed), shape, start)


def image_noise(*seeds: int, shape: Sequence[int] = (4, 8, 8), brownian: bool = False) -> ImageNoise:
    """Noise of one image for each seed, [b, *shape], on the CPU."""
    return ImageNoise([ImageSeeds(seed) for seed in seeds], shape, torch.device("cpu"), brownian)
