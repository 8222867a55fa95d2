"""Strategic stochastic sampling: diffusers' scheduler."""

import math

import pytest
import torch
from closed_form import V1, NormalData, image_noise
from diffusers import TCDScheduler
from torch import Tensor

from ldm.sampling import SAMPLERS, Denoiser, Discretization, Trajectory, sample
from ldm.sampling.schedule import published

X = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def curved(x: Tensor, sigma: float) -> Tensor:
    return x * 0.25 / (0.25 + sigma**2) + 0.1 * torch.sin(3 * x / (1 + sigma)) * sigma / (1 + sigma)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_tcd_is_diffusers(steps, eta):
    scheduler = TCDScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(steps)
    generator, x = torch.Generator().manual_seed(0), X
    for t in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[t].item()
        x0 = curved(x / math.sqrt(alpha), math.sqrt((1 - alpha) / alpha))
        eps = (x - math.sqrt(alpha) * x0) / math.sqrt(1 - alpha)
        x = scheduler.step(eps, t, x, eta=eta, generator=generator).prev_sample

    generator = torch.Generator().manual_seed(0)
    sigmas = [*V1.sigma(scheduler.timesteps.numpy()).tolist(), V1.sigma(0)]  # theirs ends at timestep 0
    out = SAMPLERS["tcd"](
        curved,
        X * math.sqrt(1 + sigmas[0] ** 2),
        sigmas,
        noise=lambda *_: torch.randn(X.shape, generator=generator, dtype=X.dtype),
        eta=eta,
    )
    torch.testing.assert_close(out / math.sqrt(1 + sigmas[-1] ** 2), x, rtol=0, atol=2e-5)


def test_the_published_timesteps_are_v1s():
    assert published().log_alphas == pytest.approx(V1.log_alphas)


def test_tcd_goes_by_the_models_own_timesteps():
    """A run gives it the denoiser's, which need not be v1's."""
    alphas = torch.linspace(0.98, 0.02, 100, dtype=torch.float64).numpy()
    denoiser = Denoiser(NormalData(alphas=alphas), torch.zeros(1, 1, 1, 1), None, 1.0)
    own = Discretization(alphas)
    run = Trajectory((own.sigma(99.0), own.sigma(50.0), 0.0), own.sigma(99.0))
    noise = image_noise(0, shape=(1, 2, 2))
    found = sample(denoiser, "tcd", run, noise, options={"eta": 0.5})

    noise = image_noise(0, shape=(1, 2, 2))
    x = noise.start() * math.sqrt(1 + run.sigmas[0] ** 2)
    down, up = own.sigma(25), own.sigma(50.0)
    x0 = denoiser(x, run.sigmas[0])
    x = x0 + (x - x0) * (down / run.sigmas[0]) + noise(*run.sigmas[:2]) * math.sqrt(up**2 - down**2)
    torch.testing.assert_close(found, denoiser(x, run.sigmas[1]), rtol=0, atol=1e-6)
