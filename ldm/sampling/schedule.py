"""Noise schedules: alphas, and the grids of sigmas for a run. All of it float64 on the host.

A latent at timestep t is `sqrt(a_t) x0 + sqrt(1 - a_t) eps` in the variance-preserving form of the model.
Samplers work on the same latent divided by `sqrt(a_t)`, that is `x0 + sigma eps` with
`sigma = sqrt((1 - a) / a)` (Karras et al. 2022, https://arxiv.org/abs/2206.00364, C.3.3).
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import numpy as np

from ldm.sampling import facts
from ldm.sampling.facts import schedule


def zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """The alphas, [timesteps], shifted and scaled so that the last timestep is nothing but noise.

    Lin et al. 2023, https://arxiv.org/abs/2305.08891, algorithm 1. The last alpha is 2^-24 instead of 0, so
    that its sigma, 4096, is still a number.
    """
    roots = np.sqrt(np.asarray(alphas_cumprod, dtype=np.float64))
    alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return np.maximum(alphas, 2.0**-24)


class Discretization:
    """The sigmas of a model's discrete timesteps, and the way between the two.

    Between timesteps, log alpha is linear in t, as in DPM-Solver's discrete schedule
    (Lu et al. 2022, https://arxiv.org/abs/2206.00927).
    """

    def __init__(self, alphas_cumprod: np.ndarray):
        self.log_alphas = np.log(np.asarray(alphas_cumprod, dtype=np.float64))
        self.num_timesteps = len(self.log_alphas)

    def sigma(self, timestep: float | np.ndarray) -> float | np.ndarray:
        """Sigma at a (possibly fractional) timestep in 0 … num_timesteps - 1."""
        log_alpha = np.interp(timestep, np.arange(self.num_timesteps), self.log_alphas)
        return np.sqrt(np.expm1(-log_alpha))

    def timestep(self, sigma: float) -> float:
        """The fractional timestep of a sigma, clamped to the schedule's ends."""
        log_alpha = -np.log1p(sigma**2)
        return float(np.interp(-log_alpha, -self.log_alphas, np.arange(self.num_timesteps)))


@cache
def published() -> Discretization:
    """Of Stable Diffusion v1 and v2: 1000 timesteps, the roots of the betas even in 0.00085 … 0.012."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return Discretization(np.cumprod(1.0 - betas))


def leading_timesteps(steps: int, num_timesteps: int = 1000) -> np.ndarray:
    """The original's DDIM and PLMS grid, descending: floor(i * 1000 / steps) + 1.

    Exactly `steps` timesteps for every count; the original's own numbers wherever `steps` divides 1000.
    """
    timesteps = np.arange(steps) * num_timesteps // steps + 1
    return np.minimum(timesteps, timesteps - 1 + (timesteps[-1] < num_timesteps))[::-1]


def to_first_alpha(discretization: Discretization, timesteps: Sequence[float]) -> np.ndarray:
    """Sigmas of falling timesteps; as in the original the last one leads to timestep 0, not to no noise."""
    end = discretization.sigma(0.0) if timesteps[-1] > 0 else 0.0
    return np.append(discretization.sigma(timesteps), end)


@schedule(
    "the original's DDIM and PLMS grid",
    level_above=True,
    a1111="DDIM",  # ends at no noise, not at timestep 0; runs more steps where they do not divide 1000
)
def leading(d: Discretization, steps: int) -> np.ndarray:
    """The original's DDIM and PLMS grid."""
    return to_first_alpha(d, leading_timesteps(steps, d.num_timesteps))


@schedule("the original's DPM-Solver grid: fractional timesteps from the last one to 0", "time_uniform")
def uniform(d: Discretization, steps: int) -> np.ndarray:
    """DPM-Solver's grid: even, fractional timesteps from the last one to timestep 0."""
    return d.sigma(np.linspace(d.num_timesteps - 1, 0, steps + 1))


@schedule(
    "k-diffusion's: even timesteps, both ends included",
    "normal",
    a1111="Uniform",  # interpolates log sigma instead of log alpha between timesteps: 2e-4 of sigma
)
def linspace(d: Discretization, steps: int) -> np.ndarray:
    """k-diffusion's grid: even, fractional timesteps from the last one to timestep 0, then no noise."""
    return np.append(d.sigma(np.linspace(d.num_timesteps - 1, 0, steps)), 0.0)


@schedule(
    "even timesteps that start at the last one",
    "simple",
    a1111="Simple",  # rounds timesteps up: one apart where steps do not divide 1000
)
def trailing(d: Discretization, steps: int) -> np.ndarray:
    """Even timesteps from the last one on (Lin et al. 2023, https://arxiv.org/abs/2305.08891, table 2)."""
    timesteps = np.round(d.num_timesteps - np.arange(steps) * d.num_timesteps / steps) - 1
    return np.append(d.sigma(timesteps), 0.0)


@schedule("even in sigma^(1/rho), rho 7", a1111="Karras", even_rho=math.inf)
def karras(d: Discretization, steps: int, rho: float = 7.0) -> np.ndarray:
    """Even in sigma^(1/rho) (Karras et al. 2022, https://arxiv.org/abs/2206.00364, eq. 5)."""
    low, high = d.sigma(0) ** (1 / rho), d.sigma(d.num_timesteps - 1) ** (1 / rho)
    return np.append(np.linspace(high, low, steps) ** rho, 0.0)


@schedule("even in log sigma", a1111="Exponential")
def exponential(d: Discretization, steps: int) -> np.ndarray:
    """Even in log sigma."""
    return polyexponential(d, steps)


@schedule("log sigma along a power rho, here 1: exponential", a1111="Polyexponential", even_rho=1.0)
def polyexponential(d: Discretization, steps: int, rho: float = 1.0) -> np.ndarray:
    """log sigma falls along a power: for rho above 1 more steps are spent at low noise."""
    low, high = np.log(d.sigma(0)), np.log(d.sigma(d.num_timesteps - 1))
    return np.append(np.exp(low + np.linspace(1, 0, steps) ** rho * (high - low)), 0.0)


@schedule(
    "generative-models': linspace without its last timestep",
    a1111="SGM Uniform",  # interpolates log sigma instead of log alpha between timesteps: 2e-4 of sigma
)
def sgm_uniform(d: Discretization, steps: int) -> np.ndarray:
    """The grid of Stability's generative-models: even, fractional timesteps without timestep 0."""
    return np.append(d.sigma(np.linspace(d.num_timesteps - 1, 0, steps + 1)[:-1]), 0.0)


def beta_quantile(q: np.ndarray, a: float = 0.6) -> np.ndarray:
    """Quantiles, for q in 0 … 1, of the symmetric beta distribution whose parameters both are a.

    Its distribution function's power series converges fast up to 1/2, where bisection inverts it.
    """
    n = np.arange(64)
    terms = np.cumprod(np.append(1.0, (n[1:] - a) / n[1:])) / (a + n)
    scale = math.gamma(2 * a) / math.gamma(a) ** 2
    small = np.minimum(q, 1 - q)
    low, high = np.zeros_like(small), np.full_like(small, 0.5)
    for _ in range(80):  # halvings of the interval: quantiles near 0 are tiny
        middle = (low + high) / 2
        below = scale * middle**a * (middle[:, None] ** n @ terms) < small
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(q <= 0.5, high, 1 - high)


@schedule(
    "timesteps of a beta distribution: more steps at both ends than in the middle",
    a1111="Beta",  # of Forge and ComfyUI; the web UI's own, 1.10, places sigmas by the same quantiles
)
def beta(d: Discretization, steps: int) -> np.ndarray:
    """Quantiles of Beta(0.6, 0.6) as timesteps (Lee et al. 2024, https://arxiv.org/abs/2407.12173).

    As in ComfyUI, which rounds them to whole timesteps and drops those that coincide.
    """
    return np.append(d.sigma(_beta_quantiles(steps) * (d.num_timesteps - 1)), 0.0)


@lru_cache(maxsize=16)  # 20 ms for 1000 steps, and a run has thousands of requests like each other
def _beta_quantiles(steps: int) -> np.ndarray:
    return beta_quantile(1 - np.arange(steps) / steps)


@schedule("even in arctan sigma", a1111="KL Optimal")
def kl_optimal(d: Discretization, steps: int) -> np.ndarray:
    """Optimal in the Kullback-Leibler divergence for normal data (Sabour et al. 2024, theorem 3.1).

    https://arxiv.org/abs/2404.14507. The data's standard deviation is 1, as latents are scaled to be.
    """
    low, high = np.arctan(d.sigma(0)), np.arctan(d.sigma(d.num_timesteps - 1))
    return np.append(np.tan(np.linspace(high, low, steps)), 0.0)


LCM_LEVELS = 50  # that latent consistency models are distilled on

# Noise levels for Stable Diffusion 1.5 (Sabour et al. 2024, https://arxiv.org/abs/2404.14507)
AYS_SIGMAS = (
    *(14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092),
    *(0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582),
)


@schedule(
    "Align Your Steps: 11 noise levels optimised for v1 and v2 models",
    "align_your_steps",
    a1111="Align Your Steps",  # its n levels include the lowest one, 0.029, and no noise comes after them
)
def ays(d: Discretization, steps: int) -> np.ndarray:
    """Align Your Steps: the published levels, log-linear in between, and no noise in place of the last."""
    at = np.linspace(0, len(AYS_SIGMAS) - 1, steps + 1)[:-1]
    return np.append(np.exp(np.interp(at, np.arange(len(AYS_SIGMAS)), np.log(AYS_SIGMAS))), 0.0)


def lcm_timesteps(num_timesteps: int, levels: int = LCM_LEVELS) -> np.ndarray:
    """The rising timesteps, int64 [levels], that consistency models are distilled on (Luo et al. 2023)."""
    return np.arange(1, levels + 1) * num_timesteps // levels - 1


@schedule("of the 50 timesteps that latent consistency models are distilled on")
def lcm(d: Discretization, steps: int) -> np.ndarray:
    """Of the 50 timesteps that latent consistency models are distilled on (or as many as there are steps)."""
    taught = lcm_timesteps(d.num_timesteps, max(LCM_LEVELS, steps))[::-1]
    return np.append(d.sigma(taught[np.arange(steps) * len(taught) // steps]), 0.0)


# (discretization, steps) -> descending sigmas [steps + 1]
SCHEDULES: dict[str, Callable[..., np.ndarray]] = {name: globals()[name] for name in facts.SCHEDULES}
