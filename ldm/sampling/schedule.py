"""Noise schedules: betas, alphas, sigmas, and which of them a run visits. All of it float64 on the host.

A latent at timestep t is `sqrt(a_t) x0 + sqrt(1 - a_t) eps` in the variance-preserving form of the model.
Samplers work on the same latent divided by `sqrt(a_t)`, that is `x0 + sigma eps` with
`sigma = sqrt((1 - a) / a)` (Karras et al. 2022, https://arxiv.org/abs/2206.00364, C.3.3).
"""

import numpy as np

from ldm.errors import InputError


def make_beta_schedule(
    schedule: str, timesteps: int, linear_start: float, linear_end: float, cosine_s: float = 8e-3
) -> np.ndarray:
    """Betas, float64 [timesteps], of the original's named schedules; "linear" is so in the square root."""
    match schedule:
        case "linear":
            return np.linspace(linear_start**0.5, linear_end**0.5, timesteps) ** 2
        case "sqrt_linear":
            return np.linspace(linear_start, linear_end, timesteps)
        case "sqrt":
            return np.linspace(linear_start, linear_end, timesteps) ** 0.5
        case "cosine":
            steps = (np.arange(timesteps + 1) / timesteps + cosine_s) / (1 + cosine_s)
            alphas = np.cos(steps * np.pi / 2) ** 2
            return np.clip(1 - alphas[1:] / alphas[:-1], 0, 0.999)
    raise InputError(f"beta_schedule {schedule!r} is not one of linear, cosine, sqrt_linear, sqrt")


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


def leading_timesteps(steps: int, num_timesteps: int = 1000) -> np.ndarray:
    """The original's DDIM and PLMS grid, descending: floor(i * 1000 / steps) + 1.

    Exactly `steps` timesteps for every count; the original's own numbers wherever `steps` divides 1000.
    """
    timesteps = np.arange(steps) * num_timesteps // steps + 1
    return np.minimum(timesteps, timesteps - 1 + (timesteps[-1] < num_timesteps))[::-1]


def leading_sigmas(discretization: Discretization, steps: int) -> np.ndarray:
    """The leading grid's sigmas, [steps + 1]; the last is timestep 0's, as in the original, not 0."""
    timesteps = leading_timesteps(steps, discretization.num_timesteps)
    end = discretization.sigma(0.0) if timesteps[-1] > 0 else 0.0
    return np.append(discretization.sigma(timesteps), end)


def uniform_sigmas(discretization: Discretization, steps: int) -> np.ndarray:
    """DPM-Solver's grid, [steps + 1]: even, fractional timesteps from the last one to timestep 0."""
    return discretization.sigma(np.linspace(discretization.num_timesteps - 1, 0, steps + 1))


SCHEDULES = {"leading": leading_sigmas, "uniform": uniform_sigmas}
