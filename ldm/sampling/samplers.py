"""Samplers: plain functions from noise to latents, in the sigma space of `ldm.sampling.schedule`.

Each takes `denoise(x, sigma) -> x0`, the noised latents x [b, c, h, w] at `sigmas[0]`, and the descending
`sigmas` [steps + 1] of the run, and returns the latents at `sigmas[-1]`. Stochastic ones draw a standard
normal tensor like x with `noise(sigma, sigma_next)`. `callback(step, x0)` comes after every step, from 1.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[float, float], Tensor]
Callback = Callable[[int, Tensor], None]


def ancestral_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """How far to go down without noise, and how much noise to add, to arrive at sigma_next (DDIM, eq. 16)."""
    up = eta * sigma_next * max(0.0, 1.0 - (sigma_next / sigma) ** 2) ** 0.5
    return max(0.0, sigma_next**2 - up**2) ** 0.5, up


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2020, https://arxiv.org/abs/2010.02502): Euler's method, ancestral for eta > 0."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        down, up = ancestral_step(sigma, sigma_next, eta)
        x = x0 + (x - x0) * (down / sigma)
        if up > 0:
            x = x + noise(sigma, sigma_next) * up
        if callback:
            callback(i + 1, x0)
    return x


ADAMS_BASHFORTH = ([1.0], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])


def plms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """PLMS (Liu et al. 2022, https://arxiv.org/abs/2202.09778, 3.3): Adams-Bashforth of order four on eps.

    The first step, which has no history, is Heun's: one model call more than there are steps.
    """
    history: list[Tensor] = []  # eps of the last four steps, newest first
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        history = [(x - x0) / sigma, *history[:3]]
        eps = sum(c * e for c, e in zip(ADAMS_BASHFORTH[len(history) - 1], history, strict=True))
        if i == 0 and sigma_next > 0:
            x_next = x + eps * (sigma_next - sigma)
            eps = (eps + (x_next - denoise(x_next, sigma_next)) / sigma_next) / 2
        x = x + eps * (sigma_next - sigma)
        if callback:
            callback(i + 1, x0)
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    lower_order_final: bool = False,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 2).

    `lower_order_final` makes the last step first-order; the original does so below 15 steps.
    """
    last_x0, last_h = None, 0.0
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        first_order = last_x0 is None or sigma_next == 0 or (lower_order_final and i == len(sigmas) - 2)
        h = np.log(sigma / sigma_next) if sigma_next > 0 else np.inf  # step in lambda = -log sigma
        estimate = x0 if first_order else x0 + (x0 - last_x0) * (h / (2 * last_h))
        x = x * (sigma_next / sigma) - estimate * float(np.expm1(-h))
        last_x0, last_h = x0, h
        if callback:
            callback(i + 1, x0)
    return x


SAMPLERS = {"ddim": ddim, "plms": plms, "dpmpp_2m": dpmpp_2m}
