"""Samplers that follow the derivative dx / dsigma = eps (Karras et al. 2022, https://arxiv.org/abs/2206.00364)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ldm.sampling.facts import sampler
from ldm.sampling.steps import ancestral_step, churn, steps, toward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ldm.sampling.steps import Callback, Denoise, Noise, Sigmas


@sampler(
    "DDIM", "DDIMScheduler",
    order=1, calls="1", schedule="leading", paper="2010.02502", noise="plain",
    unused_draws=lambda steps_run, eta: 0 if eta else steps_run,
)  # fmt: skip
def ddim(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None, callback: Callback = None,
         eta: float = 0.0) -> Tensor:  # fmt: skip
    """DDIM (Song et al. 2020, https://arxiv.org/abs/2010.02502): in sigma Euler, ancestral for eta > 0."""
    for i, sigma, sigma_next in steps(sigmas):
        x0 = denoise(x, sigma)
        down, up = ancestral_step(sigma, sigma_next, eta)
        x = toward(x, x0, sigma, down)
        if up > 0:
            x = x + noise(sigma, sigma_next) * up
        if callback:
            callback(i + 1, x0)
    return x


ADAMS_BASHFORTH = ([1.0], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])


@sampler(
    "PLMS", "PNDM", "PNDMScheduler",
    order=4, calls="1 (first: 2)", schedule="leading", paper="2202.09778",
    unused_draws=lambda steps_run, eta: steps_run + 1,
)  # fmt: skip
def plms(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None, callback: Callback = None
) -> Tensor:
    """PLMS (Liu et al. 2022, https://arxiv.org/abs/2202.09778, 3.3): Adams-Bashforth as if steps were even.

    The first step, which has no history, is Heun's: one model call more than there are steps.
    """
    history: list[Tensor] = []  # eps of the last four steps, newest first
    for i, sigma, sigma_next in steps(sigmas):
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


@sampler("DDPM", "DDPMScheduler", order=1, calls="1", schedule="leading", paper="2006.11239", noise="plain")
def ddpm(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None, callback: Callback = None
) -> Tensor:
    """DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239), the posterior's variance: DDIM with eta 1."""
    return ddim(denoise, x, sigmas, noise=noise, callback=callback, eta=1.0)


@sampler(
    "Euler", "EulerDiscreteScheduler",
    order=1, calls="1", schedule="linspace", paper="2206.00364", noise="plain",
)  # fmt: skip
def euler(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None, callback: Callback = None,
          s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
          ) -> Tensor:  # fmt: skip
    """Karras et al.'s algorithm 2 without its second-order correction."""
    for i, sigma, sigma_next in steps(sigmas):
        if s_churn > 0 and s_tmin <= sigma <= s_tmax:
            x, sigma = churn(x, sigma, s_churn / (len(sigmas) - 1), s_noise, noise)
        x0 = denoise(x, sigma)
        x = toward(x, x0, sigma, sigma_next)
        if callback:
            callback(i + 1, x0)
    return x


@sampler(
    "Euler a", "euler_a", "EulerAncestralDiscreteScheduler",
    order=1, calls="1", schedule="linspace", paper="2006.11239", noise="plain",
)  # fmt: skip
def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None,
                    callback: Callback = None, eta: float = 1.0, s_noise: float = 1.0) -> Tensor:  # fmt: skip
    """Euler's method with fresh noise in each step: DDIM with eta 1, its noise scaled by `s_noise`."""
    for i, sigma, sigma_next in steps(sigmas):
        x0 = denoise(x, sigma)
        down, up = ancestral_step(sigma, sigma_next, eta)
        x = toward(x, x0, sigma, down)
        if up > 0:
            x = x + noise(sigma, sigma_next) * (s_noise * up)
        if callback:
            callback(i + 1, x0)
    return x


@sampler(
    "Heun", "HeunDiscreteScheduler",
    order=2, calls="2", schedule="linspace", paper="2206.00364", noise="plain",
)  # fmt: skip
def heun(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None, callback: Callback = None,
         s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
         ) -> Tensor:  # fmt: skip
    """Karras et al.'s algorithm 2: along the mean of the derivatives at both ends; to sigma 0 as Euler."""
    for i, sigma, sigma_next in steps(sigmas):
        if s_churn > 0 and s_tmin <= sigma <= s_tmax:
            x, sigma = churn(x, sigma, s_churn / (len(sigmas) - 1), s_noise, noise)
        x0 = denoise(x, sigma)
        x_next = toward(x, x0, sigma, sigma_next)
        if sigma_next > 0:
            eps, eps_next = (x - x0) / sigma, (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (eps + eps_next) * ((sigma_next - sigma) / 2)
        x = x_next
        if callback:
            callback(i + 1, x0)
    return x


def midpoint(denoise: Denoise, x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Along the derivative half way in log sigma; Euler's step to sigma 0, to which there is no half way."""
    if sigma_next == 0:
        return x0
    middle = math.sqrt(sigma * sigma_next)
    x_middle = toward(x, x0, sigma, middle)
    return x + (x_middle - denoise(x_middle, middle)) * ((sigma_next - sigma) / middle)


@sampler(
    "DPM2", "KDPM2DiscreteScheduler",
    order=2, calls="2", schedule="linspace", paper="2206.00364", noise="plain",
)  # fmt: skip
def dpm_2(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None, callback: Callback = None,
          s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
          ) -> Tensor:  # fmt: skip
    """DPM-Solver-2's midpoint in Karras et al.'s algorithm 2 (k-diffusion, `sample_dpm_2`)."""
    for i, sigma, sigma_next in steps(sigmas):
        if s_churn > 0 and s_tmin <= sigma <= s_tmax:
            x, sigma = churn(x, sigma, s_churn / (len(sigmas) - 1), s_noise, noise)
        x0 = denoise(x, sigma)
        x = midpoint(denoise, x, x0, sigma, sigma_next)
        if callback:
            callback(i + 1, x0)
    return x


@sampler(
    "DPM2 a", "dpm_2_a", "KDPM2AncestralDiscreteScheduler",
    order=2, calls="2", schedule="linspace", paper="2206.00364", noise="plain",
)  # fmt: skip
def dpm_2_ancestral(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None,
                    callback: Callback = None, eta: float = 1.0, s_noise: float = 1.0) -> Tensor:  # fmt: skip
    """`dpm_2` with fresh noise in each step instead of churn."""
    for i, sigma, sigma_next in steps(sigmas):
        x0 = denoise(x, sigma)
        down, up = ancestral_step(sigma, sigma_next, eta)
        x = midpoint(denoise, x, x0, sigma, down)
        if up > 0:
            x = x + noise(sigma, sigma_next) * (s_noise * up)
        if callback:
            callback(i + 1, x0)
    return x


def adams_weights(sigmas: Sequence[float], sigma_next: float) -> list[float]:
    """Of the derivatives at sigmas, newest first: their Lagrange polynomials, integrated to sigma_next."""
    from numpy.polynomial import Polynomial

    places = [sigma - sigmas[0] for sigma in sigmas]  # from sigma 0 the integrals' difference would cancel
    weights = []
    for j, place in enumerate(places):
        others = [other for k, other in enumerate(places) if k != j]
        basis = Polynomial.fromroots(others) if others else Polynomial([1.0])
        scale = math.prod(place - other for other in others)
        weights.append(float(basis.integ()(sigma_next - sigmas[0])) / scale)
    return weights


@sampler("LMS", "LMSDiscreteScheduler", order=4, calls="1", schedule="linspace", paper="2204.13902")
def lms(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None, callback: Callback = None,
        order: int = 4) -> Tensor:  # fmt: skip
    """Linear multistep: Adams-Bashforth for the steps as they are, uneven (k-diffusion, `sample_lms`)."""
    levels: list[float] = []  # of the last steps, newest first
    history: list[Tensor] = []  # eps at these
    for i, sigma, sigma_next in steps(sigmas):
        x0 = denoise(x, sigma)
        levels, history = [sigma, *levels[: order - 1]], [(x - x0) / sigma, *history[: order - 1]]
        weights = adams_weights(levels, sigma_next)
        x = x + sum(weight * eps for weight, eps in zip(weights, history, strict=True))
        if callback:
            callback(i + 1, x0)
    return x
