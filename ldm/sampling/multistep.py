"""Multistep samplers of recent years: one model call a step, and the predictions of the steps before.

All are ours written from the papers in sigma space; what each is good for stands in docs/samplers.md.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

from ldm.sampling.euler import ADAMS_BASHFORTH
from ldm.sampling.facts import sampler
from ldm.sampling.steps import steps, toward

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from ldm.sampling.steps import Callback, Denoise, Noise, Sigmas


def deis_weights(levels: Sequence[float], sigma_next: float) -> list[float]:
    """Of eps at levels, newest first: Lagrange polynomials in log sigma, integrated over sigma to sigma_next.

    They are exact for 1, u, u^2, … where u = log(sigma / levels[0]), which is the system that is solved.
    """
    import numpy as np

    sigma, end = levels[0], math.log(sigma_next / levels[0])
    moments = [sigma_next - sigma]
    for k in range(1, len(levels)):  # by parts
        moments.append(sigma_next * end**k - k * moments[-1])
    places = [math.log(level / sigma) for level in levels]
    return np.linalg.solve(np.vander(places, increasing=True).T, moments).tolist()


@sampler(
    "DEIS", "DEISMultistepScheduler",
    order=3, calls="1", schedule="linspace", paper="2204.13902",
)  # fmt: skip
def deis(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None, callback: Callback = None,
         order: int = 3) -> Tensor:  # fmt: skip
    """DEIS (Zhang & Chen 2022, https://arxiv.org/abs/2204.13902), in log sigma, as diffusers has it.

    The step to sigma 0, where that has no end, is Euler's.
    """
    levels: list[float] = []  # of the last steps, newest first
    history: list[Tensor] = []  # eps at these
    for i, sigma, sigma_next in steps(sigmas):
        x0 = denoise(x, sigma)
        levels, history = [sigma, *levels[: order - 1]], [(x - x0) / sigma, *history[: order - 1]]
        if sigma_next > 0:
            weights = deis_weights(levels, sigma_next)
            x = x + sum(weight * eps for weight, eps in zip(weights, history, strict=True))
        else:
            x = x0
        if callback:
            callback(i + 1, x0)
    return x


@sampler("IPNDM", "IPNDMScheduler", order=4, calls="1", schedule="linspace", paper="2204.13902")
def ipndm(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None, callback: Callback = None
) -> Tensor:
    """iPNDM (Zhang & Chen 2022, https://arxiv.org/abs/2204.13902, appendix H.2).

    PLMS that begins with Euler's step in place of Heun's, and so saves its second call.
    """
    history: list[Tensor] = []  # eps of the last four steps, newest first
    for i, sigma, sigma_next in steps(sigmas):
        x0 = denoise(x, sigma)
        history = [(x - x0) / sigma, *history[:3]]
        eps = sum(c * e for c, e in zip(ADAMS_BASHFORTH[len(history) - 1], history, strict=True))
        x = x + eps * (sigma_next - sigma) if sigma_next > 0 else x0
        if callback:
            callback(i + 1, x0)
    return x


@sampler("Res Multistep", order=2, calls="1", schedule="linspace", paper="2308.02157")
def res_multistep(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None, callback: Callback = None
) -> Tensor:
    """RES multistep (Zhang et al. 2023, https://arxiv.org/abs/2308.02157).

    `dpmpp_2m` with the exact integral of an x0 that goes on, linear in log sigma, as in the last step.
    """
    last_x0, last_h = None, 0.0
    for i, sigma, sigma_next in steps(sigmas):
        x0 = denoise(x, sigma)
        x = toward(x, x0, sigma, sigma_next)
        if sigma_next > 0:
            h = math.log(sigma / sigma_next)
            if last_x0 is not None:
                x = x + (x0 - last_x0) * ((h + math.expm1(-h)) / last_h)
            last_x0, last_h = x0, h
        if callback:
            callback(i + 1, x0)
    return x


@sampler(
    "Gradient Estimation",
    order=1, calls="1", schedule="linspace", paper="2306.04848",
)  # fmt: skip
def gradient_estimation(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None,
                        callback: Callback = None, gamma: float = 2.0) -> Tensor:  # fmt: skip
    """Gradient estimation (Permenter & Yuan 2023, https://arxiv.org/abs/2306.04848, algorithm 3).

    Along gamma times the derivative less gamma - 1 times the last one: the denoiser's error, which changes
    slowly, cancels.
    """
    last = None
    for i, sigma, sigma_next in steps(sigmas):
        x0 = denoise(x, sigma)
        eps = (x - x0) / sigma
        along = eps if last is None else eps + (eps - last) * (gamma - 1)
        x = x + along * (sigma_next - sigma) if sigma_next > 0 else x0
        last = eps
        if callback:
            callback(i + 1, x0)
    return x


@cache
def quadrature() -> tuple[list[float], list[float]]:
    """Gauss and Legendre's places and weights on -1 … 1."""
    import numpy as np

    places, weights = np.polynomial.legendre.leggauss(24)
    return places.tolist(), weights.tolist()


def integral(f: Callable[[float], float], low: float, high: float) -> float:
    """Of f from low to high, both above 0, with its places even in the logarithm."""
    middle, half = math.log(low * high) / 2, math.log(high / low) / 2
    levels = [math.exp(middle + half * place) for place in quadrature()[0]]
    return half * sum(w * f(level) * level for w, level in zip(quadrature()[1], levels, strict=True))


@sampler(
    "ER SDE",
    order=3, calls="1", schedule="karras", paper="2309.06169", noise="brownian",
)  # fmt: skip
def er_sde(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None, callback: Callback = None,
           eta: float = 1.0, s_noise: float = 1.0, order: int = 3) -> Tensor:  # fmt: skip
    """ER-SDE-Solver-3 (Cui et al. 2023, https://arxiv.org/abs/2309.06169, algorithm 3).

    The noise scale is the authors' phi(sigma) = sigma (exp(sigma^0.3) + 10), whose second factor is raised to
    `eta` here: 0 is the ODE.
    """

    def phi(level: float) -> float:
        return level * (math.exp(level**0.3) + 10.0) ** eta

    past: list[tuple[float, Tensor]] = []  # sigma and x0 of the last two steps, newest first
    slope = None  # of x0 over sigma
    for i, sigma, sigma_next in steps(sigmas):
        x0 = denoise(x, sigma)
        ratio = phi(sigma_next) / phi(sigma)
        x_next = x0 + (x - x0) * ratio
        if past and order > 1 and sigma_next > 0:
            step, last_slope = sigma_next - sigma, slope
            slope = (x0 - past[0][1]) / (sigma - past[0][0])
            inverse = integral(lambda level: 1 / phi(level), sigma_next, sigma)
            x_next = x_next + slope * (step + phi(sigma_next) * inverse)
            if last_slope is not None and order > 2:
                bend = (slope - last_slope) * (2 / (sigma - past[1][0]))
                first = integral(lambda level: level / phi(level), sigma_next, sigma) - sigma * inverse
                x_next = x_next + bend * (step**2 / 2 + phi(sigma_next) * first)
        up = math.sqrt(max(0.0, sigma_next**2 - (sigma * ratio) ** 2))
        if eta > 0 and up > 0:
            x_next = x_next + noise(sigma, sigma_next) * (s_noise * up)
        x, past = x_next, [(sigma, x0), *past[:1]]
        if callback:
            callback(i + 1, x0)
    return x
