"""Samplers that solve the linear part of the ODE exactly and approximate the rest: DPM-Solver, UniPC.

Their time is lambda = -log sigma, in which a step is h = log(sigma / sigma_next) long. Those on x0
(DPM-Solver++, Lu et al. 2022, https://arxiv.org/abs/2211.01095) are DDIM steps toward a better x0.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from ldm.sampling.facts import sampler
from ldm.sampling.steps import ancestral_step, steps, toward

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from ldm.sampling.steps import Callback, Denoise, Noise, Sigmas

# DPM-Solver (Lu et al. 2022, https://arxiv.org/abs/2206.00927), on eps: single steps of order 1 to 3


class SingleStep:
    """DPM-Solver-1, -2 and -3 from sigma: algorithms 1 and 2 and equation 3.7, in sigma.

    A model call within the step is kept: the third order uses the second one's at the same place.
    """

    def __init__(self, denoise: Denoise, x: Tensor, sigma: float):
        self.denoise, self.x, self.sigma = denoise, x, sigma
        self.x0 = denoise(x, sigma)
        self.eps = (x - self.x0) / sigma
        self._inner: dict[float, Tensor] = {}

    def _change(self, part: float, sigma_next: float, x: Tensor) -> Tensor:
        """eps at x, `part` of the way to sigma_next, less eps at the start."""
        if part not in self._inner:
            sigma = self._level(part, sigma_next)
            self._inner[part] = (x - self.denoise(x, sigma)) / sigma - self.eps
        return self._inner[part]

    def _level(self, part: float, sigma_next: float) -> float:
        return self.sigma * (sigma_next / self.sigma) ** part

    def first(self, sigma_next: float) -> Tensor:
        return self.x + self.eps * (sigma_next - self.sigma)

    def second(self, sigma_next: float, r: float = 1 / 2) -> Tensor:
        change = self._change(r, sigma_next, self.first(self._level(r, sigma_next)))
        return self.first(sigma_next) + change * ((sigma_next - self.sigma) / (2 * r))

    def third(self, sigma_next: float) -> Tensor:
        r1, r2 = 1 / 3, 2 / 3
        h = math.log(self.sigma / sigma_next)
        change = self._change(r1, sigma_next, self.first(self._level(r1, sigma_next)))
        level = self._level(r2, sigma_next)
        weight = (self.sigma - level) / (r2 * h) - level
        change = self._change(r2, sigma_next, self.first(level) - change * (weight * r2 / r1))
        weight = (self.sigma - sigma_next) / h - sigma_next
        return self.first(sigma_next) - change * (weight / r2)


def fast_orders(calls: int) -> list[int]:
    """Third-order steps, and lower ones at the end, that take exactly `calls` model calls."""
    rest = [2, 1] if calls % 3 == 0 else [calls % 3]
    return [3] * ((calls - sum(rest)) // 3) + rest


def ancestral_level(sigma: float, sigma_next: float, end: float, eta: float) -> tuple[float, float]:
    """`ancestral_step` that does not go below the end of the run."""
    down = max(end, ancestral_step(sigma, sigma_next, eta)[0])
    return down, math.sqrt(max(0.0, sigma_next**2 - down**2))


@sampler(
    "DPM fast",
    order=3, calls="N in all", schedule="linspace", paper="2206.00927", noise="plain", ends_only=True,
)  # fmt: skip
def dpm_fast(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None, callback: Callback = None,
             eta: float = 0.0, s_noise: float = 1.0) -> Tensor:  # fmt: skip
    """DPM-Solver-fast, appendix D.2: as many model calls as `sigmas` has steps, its levels even in lambda.

    Of `sigmas` only the ends count. A run that ends at 0 spends its last call on getting there.
    """
    import numpy as np

    calls, end = len(sigmas) - 1, float(sigmas[-1])
    to_zero = end == 0
    if to_zero:
        calls, end = calls - 1, float(sigmas[-2])
    orders = fast_orders(calls) if calls else []
    levels = np.geomspace(float(sigmas[0]), end, len(orders) + 1).tolist()  # its ends are exact
    done = 0
    for order, (sigma, sigma_next) in zip(orders, pairwise(levels), strict=True):
        step = SingleStep(denoise, x, sigma)
        down, up = ancestral_level(sigma, sigma_next, end, eta) if eta else (sigma_next, 0.0)
        x = (step.first, step.second, step.third)[order - 1](down)
        if up > 0:
            x = x + noise(sigma, sigma_next) * (s_noise * up)
        for _ in range(order):  # as many of the run's steps have passed
            done += 1
            if callback:
                callback(done, step.x0)
    if to_zero:
        x = denoise(x, end)
        if callback:
            callback(done + 1, x)
    return x


PURE_NOISE = 15.0  # above v1's first level hardly anything of an image shows in x
LONGEST_IN_NOISE = 1.0  # h


@sampler(
    "DPM adaptive", "dpm_ad",
    order=3, calls="adaptive", schedule="linspace", paper="2206.00927", noise="plain",
    ends_only=True, adaptive=True,
)  # fmt: skip
def dpm_adaptive(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None,
                 callback: Callback = None, eta: float = 0.0, s_noise: float = 1.0, order: int = 3,
                 rtol: float = 0.05, atol: float = 0.0078) -> Tensor:  # fmt: skip
    """Steps as long as the difference of order, 2 or 3, and the one below allows (appendix C).

    The controller of the length is k-diffusion's, but for the limit on steps in pure noise: there x0 hardly
    changes and the error is next to none, so from zero terminal SNR's 4096 the length grew until one step,
    its error measured by the noise that it began with, leapt over all levels at which an image forms.

    Of `sigmas` only the ends count. The difference has to come from the device, once a step, and is that of
    the whole batch: images that shall not depend on others come one at a time.
    """
    first, *_, last_but_one, final = map(float, (sigmas[0], *sigmas[-2:]))
    end = final or last_but_one
    sigma, h, last, done = first, 0.05, x, 0
    while math.log(sigma / end) > 1e-5:
        sigma_next = max(end, sigma * math.exp(-h))
        down, up = ancestral_level(sigma, sigma_next, end, eta) if eta else (sigma_next, 0.0)
        step = SingleStep(denoise, x, sigma)
        if order == 2:
            low, high = step.first(down), step.second(down)
        else:
            low, high = step.second(down, r=1 / 3), step.third(down)
        allowed = (rtol * low.abs().maximum(last.abs())).clamp(min=atol)
        error = ((low - high) / allowed).square().mean().sqrt().item()
        if not math.isfinite(error):  # no step size can help; such an image is reported and left out
            return high
        factor = (1 / (1e-8 + error)) ** (1 / (1.5 if eta else order))
        factor = 1 + math.atan(factor - 1)  # soft limits
        h *= factor
        if sigma > PURE_NOISE:
            h = min(h, LONGEST_IN_NOISE)
        if factor < 0.81:
            continue
        x, last, sigma, done = high, low, sigma_next, done + 1
        if up > 0:
            x = x + noise(step.sigma, sigma) * (s_noise * up)
        if callback:
            callback(done, step.x0)
    if final == 0:
        x = denoise(x, end)
        if callback:
            callback(done + 1, x)
    return x


# DPM-Solver++ (Lu et al. 2022, https://arxiv.org/abs/2211.01095), on x0


@sampler(
    "DPM++ 2S a", "DPM++ 2S Ancestral", "dpmpp_2s_a", "k_dpmpp_2_a",
    order=2, calls="2", schedule="linspace", paper="2211.01095", noise="plain", automatic="karras",
)  # fmt: skip
def dpmpp_2s_ancestral(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None,
                       callback: Callback = None, eta: float = 1.0, s_noise: float = 1.0,
                       ) -> Tensor:  # fmt: skip
    """DPM-Solver++(2S), algorithm 1 with r = 1/2, and fresh noise (k-diffusion, `sample_dpmpp_2s_ancestral`).

    Toward the x0 half way on, or at once to sigma 0.
    """
    for i, sigma, sigma_next in steps(sigmas):
        x0 = estimate = denoise(x, sigma)
        down, up = ancestral_step(sigma, sigma_next, eta)
        if down > 0:
            middle = math.sqrt(sigma * down)
            estimate = denoise(toward(x, x0, sigma, middle), middle)
        x = toward(x, estimate, sigma, down)
        if up > 0:
            x = x + noise(sigma, sigma_next) * (s_noise * up)
        if callback:
            callback(i + 1, x0)
    return x


@sampler(
    "DPM++ SDE", "dpmpp_sde_gpu", "DPMSolverSDEScheduler",
    order=2, calls="2", schedule="linspace", paper="2211.01095", noise="brownian", automatic="karras",
)  # fmt: skip
def dpmpp_sde(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None,
              callback: Callback = None, eta: float = 1.0, s_noise: float = 1.0) -> Tensor:  # fmt: skip
    """DPM-Solver++ for the SDE, two calls a step, r = 1/2 (k-diffusion, `sample_dpmpp_sde`).

    Both draws of a step are of one interval, so the noise should be that of one Brownian path.
    """
    for i, sigma, sigma_next in steps(sigmas):
        x0 = estimate = denoise(x, sigma)
        if sigma_next > 0:
            middle = math.sqrt(sigma * sigma_next)
            down, up = ancestral_step(sigma, middle, eta)
            x_middle = toward(x, x0, sigma, down)
            if up > 0:
                x_middle = x_middle + noise(sigma, middle) * (s_noise * up)
            estimate = denoise(x_middle, middle)
        down, up = ancestral_step(sigma, sigma_next, eta)
        x = toward(x, estimate, sigma, down)
        if up > 0:
            x = x + noise(sigma, sigma_next) * (s_noise * up)
        if callback:
            callback(i + 1, x0)
    return x


def log_step(sigma: float, sigma_next: float) -> float:
    """h, infinite to sigma 0."""
    return math.log(sigma / sigma_next) if sigma_next > 0 else math.inf


@sampler(
    "DPM++ 2M", "dpm_solver", "DPMSolver", "DPM-Solver++", "k_dpmpp_2", "DPMSolverMultistepScheduler",
    order=2, calls="1", schedule="uniform", paper="2211.01095", automatic="karras",
)  # fmt: skip
def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None, callback: Callback = None,
             lower_order_final: bool | None = None) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M), algorithm 2: toward an x0 that goes on as it went in the last step.

    `lower_order_final` makes the last step first-order; None is the original's rule, below 15 steps.
    """
    final = len(sigmas) - 2
    if lower_order_final is None:
        lower_order_final = len(sigmas) - 1 < 15
    last_x0, last_h = None, 0.0
    for i, sigma, sigma_next in steps(sigmas):
        x0 = estimate = denoise(x, sigma)
        h = log_step(sigma, sigma_next)
        if last_x0 is not None and sigma_next > 0 and not (lower_order_final and i == final):
            estimate = x0 + (x0 - last_x0) * (h / (2 * last_h))
        x = toward(x, estimate, sigma, sigma_next)
        last_x0, last_h = x0, h
        if callback:
            callback(i + 1, x0)
    return x


def sde_level(sigma: float, sigma_next: float, eta: float) -> float:
    """The level to which a step of the SDE takes x without its noise: h is 1 + eta times as long."""
    return sigma_next * (sigma_next / sigma) ** eta


def sde_noise(sigma_next: float, h: float, eta: float) -> float:
    """The standard deviation of the noise that a step of the SDE adds."""
    return sigma_next * math.sqrt(-math.expm1(-2 * eta * h))


@sampler(
    "DPM++ 2M SDE", "dpmpp_2m_sde_gpu",
    order=2, calls="1", schedule="exponential", paper="2211.01095", noise="brownian", automatic="exponential",
)  # fmt: skip
def dpmpp_2m_sde(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None,
                 callback: Callback = None, eta: float = 1.0, s_noise: float = 1.0) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) for the SDE, midpoint (k-diffusion, `sample_dpmpp_2m_sde`)."""
    last_x0, last_h = None, 0.0
    for i, sigma, sigma_next in steps(sigmas):
        x0 = estimate = denoise(x, sigma)
        h = log_step(sigma, sigma_next)
        if last_x0 is not None and sigma_next > 0:
            estimate = x0 + (x0 - last_x0) * (h / (2 * last_h))
        x = toward(x, estimate, sigma, sde_level(sigma, sigma_next, eta))
        if eta > 0 and sigma_next > 0:
            x = x + noise(sigma, sigma_next) * (s_noise * sde_noise(sigma_next, h, eta))
        last_x0, last_h = x0, h
        if callback:
            callback(i + 1, x0)
    return x


@sampler(
    "DPM++ 3M SDE", "dpmpp_3m_sde_gpu",
    order=3, calls="1", schedule="exponential", paper="2211.01095", noise="brownian", automatic="exponential",
)  # fmt: skip
def dpmpp_3m_sde(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None,
                 callback: Callback = None, eta: float = 1.0, s_noise: float = 1.0) -> Tensor:  # fmt: skip
    """DPM-Solver++(3M) for the SDE (k-diffusion, `sample_dpmpp_3m_sde`).

    The integral of x0's Taylor series in lambda, whose derivatives are divided differences of past x0.
    """
    past: list[tuple[Tensor, float]] = []  # x0 and the h that followed it, newest first
    for i, sigma, sigma_next in steps(sigmas):
        x0 = denoise(x, sigma)
        h = log_step(sigma, sigma_next)
        x_next = toward(x, x0, sigma, sde_level(sigma, sigma_next, eta))
        if past and sigma_next > 0:
            length = h * (1 + eta)
            phi_2 = math.expm1(-length) / length + 1
            (x0_1, h_1), *older = past
            slope = (x0 - x0_1) * (h / h_1)
            if older:
                ((x0_2, h_2),) = older
                bend = (slope - (x0_1 - x0_2) * (h / h_2)) * (h / (h_1 + h_2))
                slope = slope + bend * (h_1 / h)
                x_next = x_next - bend * (phi_2 / length - 0.5)
            x_next = x_next + slope * phi_2
        if eta > 0 and sigma_next > 0:
            x_next = x_next + noise(sigma, sigma_next) * (s_noise * sde_noise(sigma_next, h, eta))
        x, past = x_next, [(x0, h), *past[:1]]
        if callback:
            callback(i + 1, x0)
    return x


# UniPC (Zhao et al. 2023, https://arxiv.org/abs/2302.04867)


def unipc_system(places: Sequence[float], h: float) -> tuple[np.ndarray, np.ndarray]:
    """R and b of equation 8 with B(h) = e^h - 1; the weights solve R rho = b. `places`: of x0 in h."""
    import numpy as np

    order = len(places)
    phi, factorial, b = -math.expm1(-h) / h - 1, 1, []
    for k in range(1, order + 1):
        b.append(phi * factorial / math.expm1(-h))
        factorial *= k + 1
        phi = -phi / h - 1 / factorial
    return np.vander(places, order, increasing=True).T, np.array(b)


@sampler(
    "UniPC", "uni_pc", "uni_pc_bh2", "UniPCMultistepScheduler",
    order=2, calls="1", schedule="uniform", paper="2302.04867",
)  # fmt: skip
def unipc(denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None, callback: Callback = None,
          order: int = 2) -> Tensor:  # fmt: skip
    """UniPC on x0 with B_2: a multistep predictor, corrected by the very model call that the next step needs.

    The last steps are of lower order, as in the authors' code.
    """
    x_last, past = x, []  # past: (x0, sigma), newest first
    for i, sigma, sigma_next in steps(sigmas):
        x0 = denoise(x, sigma)
        if past:  # the last step again, now that its end is known
            x = unipc_step(x_last, past, sigma, x0)
        past = [(x0, sigma), *past][: min(order, i + 1, len(sigmas) - 1 - i)]
        x_last = x
        x = unipc_step(x, past, sigma_next)
        if callback:
            callback(i + 1, x0)
    return x


def unipc_step(
    x: Tensor, past: Sequence[tuple[Tensor, float]], sigma_next: float, x0_next: Tensor | None = None
) -> Tensor:
    """From the newest of `past`, (x0, sigma), to sigma_next: predicted, or corrected if x0 there is known."""
    import numpy as np

    (x0, sigma), *older = past
    x_next = toward(x, x0, sigma, sigma_next)
    if sigma_next == 0 or (not older and x0_next is None):
        return x_next
    h = math.log(sigma / sigma_next)
    places = [math.log(sigma / other) / h for _, other in older] + [1.0]
    slopes = [(other - x0) / place for (other, _), place in zip(older, places, strict=False)]
    R, b = unipc_system(places, h)
    if x0_next is not None:
        slopes.append(x0_next - x0)
        weights = np.linalg.solve(R, b) if older else [0.5]
    else:
        weights = np.linalg.solve(R[:-1, :-1], b[:-1]) if len(older) > 1 else [0.5]
    change = sum(float(weight) * slope for weight, slope in zip(weights, slopes, strict=True))
    return x_next - change * math.expm1(-h)


@sampler("LCM", "LCMScheduler", order=1, calls="1", schedule="lcm", paper="2310.04378", noise="plain")
def lcm(
    denoise: Denoise, x: Tensor, sigmas: Sigmas, *, noise: Noise = None, callback: Callback = None
) -> Tensor:
    """Consistency sampling, for models distilled to it (Luo et al. 2023, https://arxiv.org/abs/2310.04378).

    All the way to x0 in one step, and back up with fresh noise.
    """
    for i, sigma, sigma_next in steps(sigmas):
        x = x0 = denoise(x, sigma)
        if sigma_next > 0:
            x = x0 + noise(sigma, sigma_next) * sigma_next
        if callback:
            callback(i + 1, x0)
    return x
