"""What samplers share: their arguments' types, the way between levels, and runs of steps with noise."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[float, float], Tensor]
Callback = Callable[[int, Tensor], None]
Step = Callable[[Denoise, Tensor, Tensor, float, float], Tensor]  # (denoise, x, x0, sigma, sigma_next) -> x


def toward(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """x at sigma_next if x0 is where it all leads: Euler's step, DDIM's, and DPM-Solver++'s first order."""
    return x0 + (x - x0) * (sigma_next / sigma)


def ancestral_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """How far to go down without noise, and how much noise to add, to arrive at sigma_next (DDIM, eq. 16)."""
    up = min(sigma_next, eta * sigma_next * max(0.0, 1.0 - (sigma_next / sigma) ** 2) ** 0.5)
    return max(0.0, sigma_next**2 - up**2) ** 0.5, up


def run_ancestral(
    step: Step,
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise | None,
    callback: Callback | None,
    eta: float,
    s_noise: float,
) -> Tensor:
    """Steps that go below each level and come back up with fresh noise."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        down, up = ancestral_step(sigma, sigma_next, eta)
        x = step(denoise, x, x0, sigma, down)
        if up > 0:
            x = x + noise(sigma, sigma_next) * (s_noise * up)
        if callback:
            callback(i + 1, x0)
    return x


def run_churned(
    step: Step,
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise | None,
    callback: Callback | None,
    s_churn: float,
    s_tmin: float,
    s_tmax: float,
    s_noise: float,
) -> Tensor:
    """Steps from above each level (Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 2)."""
    gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        if gamma > 0 and s_tmin <= sigma <= s_tmax:
            level, sigma = sigma, sigma * (1 + gamma)
            x = x + noise(sigma, level) * (s_noise * (sigma**2 - level**2) ** 0.5)
        x0 = denoise(x, sigma)
        x = step(denoise, x, x0, sigma, sigma_next)
        if callback:
            callback(i + 1, x0)
    return x
