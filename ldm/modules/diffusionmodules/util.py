"""The schedule that a diffusion model was trained on: betas, and what checkpoints carry of them."""

import numpy as np
import torch

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


def schedule_buffers(betas: np.ndarray) -> dict[str, torch.Tensor]:
    """The twelve float32 tensors [timesteps] that checkpoints carry, by name (Ho et al. 2020, eq. 4-7)."""
    alphas = 1.0 - betas
    ac = np.cumprod(alphas)
    ac_prev = np.append(1.0, ac[:-1])
    variance = betas * (1.0 - ac_prev) / (1.0 - ac)
    values = {
        "betas": betas,
        "alphas_cumprod": ac,
        "alphas_cumprod_prev": ac_prev,
        "sqrt_alphas_cumprod": np.sqrt(ac),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - ac),
        "log_one_minus_alphas_cumprod": np.log(1.0 - ac),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / ac),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / ac - 1.0),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(ac_prev) / (1.0 - ac),
        "posterior_mean_coef2": (1.0 - ac_prev) * np.sqrt(alphas) / (1.0 - ac),
    }
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
