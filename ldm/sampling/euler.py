"""Samplers that follow the derivative dx / dsigma = eps (Karras et al. 2022, https://arxiv.org/abs/2206.00364)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from ldm.sampling.steps import Callback, Denoise, Noise, run_ancestral, run_churned, toward


def euler_step(denoise: Denoise, x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Along the derivative at sigma."""
    return toward(x, x0, sigma, sigma_next)


def heun_step(denoise: Denoise, x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Along the mean of the derivatives at both ends; Euler's step to sigma 0, where there is none."""
    x_next = toward(x, x0, sigma, sigma_next)
    if sigma_next == 0:
        return x_next
    eps, eps_next = (x - x0) / sigma, (x_next - denoise(x_next, sigma_next)) / sigma_next
    return x + (eps + eps_next) * ((sigma_next - sigma) / 2)


def midpoint_step(denoise: Denoise, x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Along the derivative half way in log sigma; Euler's step to sigma 0, to which there is no half way."""
    if sigma_next == 0:
        return x0
    middle = math.sqrt(sigma * sigma_next)
    x_middle = toward(x, x0, sigma, middle)
    return x + (x_middle - denoise(x_middle, middle)) * ((sigma_next - sigma) / middle)


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2020, https://arxiv.org/abs/2010.02502): in sigma Euler, ancestral for eta > 0."""
    return run_ancestral(euler_step, denoise, x, sigmas, noise, callback, eta, 1.0)


def ddpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239), the posterior's variance: DDIM with eta 1."""
    return run_ancestral(euler_step, denoise, x, sigmas, noise, callback, 1.0, 1.0)


def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Euler's method with fresh noise in each step: DDIM with eta 1, its noise scaled by `s_noise`."""
    return run_ancestral(euler_step, denoise, x, sigmas, noise, callback, eta, s_noise)


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Karras et al.'s algorithm 2 without its second-order correction."""
    return run_churned(euler_step, denoise, x, sigmas, noise, callback, s_churn, s_tmin, s_tmax, s_noise)


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Karras et al.'s algorithm 2."""
    return run_churned(heun_step, denoise, x, sigmas, noise, callback, s_churn, s_tmin, s_tmax, s_noise)


def dpm_2(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """DPM-Solver-2's midpoint in Karras et al.'s algorithm 2 (k-diffusion, `sample_dpm_2`)."""
    return run_churned(midpoint_step, denoise, x, sigmas, noise, callback, s_churn, s_tmin, s_tmax, s_noise)


def dpm_2_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """`dpm_2` with fresh noise in each step instead of churn."""
    return run_ancestral(midpoint_step, denoise, x, sigmas, noise, callback, eta, s_noise)


def adams_weights(sigmas: Sequence[float], sigma_next: float) -> list[float]:
    """Of the derivatives at sigmas, newest first: their Lagrange polynomials, integrated to sigma_next."""
    places = [sigma - sigmas[0] for sigma in sigmas]  # from sigma 0 the integrals' difference would cancel
    weights = []
    for j, place in enumerate(places):
        others = [other for k, other in enumerate(places) if k != j]
        basis = np.polynomial.Polynomial.fromroots(others) if others else np.polynomial.Polynomial([1.0])
        scale = math.prod(place - other for other in others)
        weights.append(float(basis.integ()(sigma_next - sigmas[0])) / scale)
    return weights


def lms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    order: int = 4,
) -> Tensor:
    """Linear multistep: Adams-Bashforth for the steps as they are, uneven (k-diffusion, `sample_lms`)."""
    history: list[Tensor] = []  # eps of the last steps, newest first
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        history = [(x - x0) / sigma, *history[: order - 1]]
        weights = adams_weights(sigmas[i::-1][: len(history)], sigma_next)
        x = x + sum(weight * eps for weight, eps in zip(weights, history, strict=True))
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
    """PLMS (Liu et al. 2022, https://arxiv.org/abs/2202.09778, 3.3): Adams-Bashforth as if steps were even.

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


def lcm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Consistency sampling, for models distilled to it (Luo et al. 2023, https://arxiv.org/abs/2310.04378)."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x = x0 = denoise(x, sigma)
        if sigma_next > 0:
            x = x0 + noise(sigma, sigma_next) * sigma_next
        if callback:
            callback(i + 1, x0)
    return x
