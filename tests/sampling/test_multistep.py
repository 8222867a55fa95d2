"""The multistep samplers of recent years: diffusers', and straightforward forms of their formulas."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from closed_form import V1
from diffusers import DEISMultistepScheduler
from torch import Tensor

from ldm.sampling import SAMPLERS
from ldm.sampling.multistep import deis_weights, integral

DIFFUSERS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
X = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def curved(x: Tensor, sigma: float) -> Tensor:
    """A denoiser whose prediction bends along the way."""
    return x * 0.25 / (0.25 + sigma**2) + 0.1 * torch.sin(3 * x / (1 + sigma)) * sigma / (1 + sigma)


def levels(steps: int, end: float = 0.0) -> list[float]:
    return [*np.geomspace(14.6, 0.1, steps).tolist(), end]


def seeded() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(3)
    return lambda *_: torch.randn(X.shape, generator=generator, dtype=X.dtype)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 25])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_is_diffusers(steps, order):
    scheduler = DEISMultistepScheduler(
        **DIFFUSERS, solver_order=order, lower_order_final=False, timestep_spacing="linspace"
    )
    scheduler.set_timesteps(steps)
    sigmas = [float(sigma) for sigma in scheduler.sigmas]  # the last is the first alpha's
    assert sigmas[-1] > 0
    x = X
    for k, t in enumerate(scheduler.timesteps):
        alpha = 1 / (1 + sigmas[k] ** 2)
        x0 = curved(x / math.sqrt(alpha), sigmas[k])
        eps = (x - math.sqrt(alpha) * x0) / math.sqrt(1 - alpha)
        x = scheduler.step(eps, t, x).prev_sample
    out = SAMPLERS["deis"](curved, X * math.sqrt(1 + sigmas[0] ** 2), sigmas, order=order)
    out = out / math.sqrt(1 + sigmas[-1] ** 2)
    torch.testing.assert_close(out, x, rtol=0, atol=2e-4)  # diffusers computes in float32


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_weights_of_deis_integrate_polynomials_in_log_sigma(count):
    places, end = [2.0, 3.0, 5.0, 7.0][:count], 1.3
    weights = deis_weights(places, end)
    fine = np.geomspace(2.0, end, 200_001)
    for k in range(count):
        values = np.log(fine) ** k
        expected = np.trapezoid(values, fine)
        found = sum(w * math.log(place) ** k for w, place in zip(weights, places, strict=True))
        assert found == pytest.approx(expected, rel=1e-8)


def test_ipndm_is_plms_without_its_second_call():
    """Four steps in, both know the same number of derivatives; only the first step differs."""
    sigmas, calls = levels(8, 0.03), []

    def counted(x: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return curved(x, sigma)

    x, history = X * 14.6, []
    weights = ([1], [3 / 2, -1 / 2], [23 / 12, -4 / 3, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -3 / 8])
    for sigma, sigma_next in itertools.pairwise(sigmas):
        history.insert(0, (x - curved(x, sigma)) / sigma)
        along = sum(w * e for w, e in zip(weights[min(3, len(history) - 1)], history, strict=False))
        x = x + along * (sigma_next - sigma)
    torch.testing.assert_close(SAMPLERS["ipndm"](counted, X * 14.6, sigmas), x, rtol=0, atol=1e-10)
    assert calls == sigmas[:-1]


def test_res_multistep_is_the_papers_with_its_phi_functions():
    sigmas = levels(8)
    x, last = X * 14.6, None
    for k, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x0 = curved(x, sigma)
        if sigma_next == 0:
            x = x0
            continue
        h = math.log(sigma / sigma_next)
        phi_1 = (math.exp(-h) - 1) / -h
        phi_2 = (phi_1 - 1) / -h
        if last is None:
            b_1, b_2 = phi_1, 0.0
        else:
            c_2 = -math.log(sigmas[k - 1] / sigma) / h  # where the last step began, in steps
            b_1, b_2 = phi_1 - phi_2 / c_2, phi_2 / c_2
        x = math.exp(-h) * x + h * (b_1 * x0 + b_2 * (0.0 if last is None else last))
        last = x0
    torch.testing.assert_close(SAMPLERS["res_multistep"](curved, X * 14.6, sigmas), x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gamma", [1.0, 2.0, 2.5])
def test_gradient_estimation_mixes_the_last_two_derivatives(gamma):
    sigmas = levels(8)
    x, last = X * 14.6, None
    for sigma, sigma_next in itertools.pairwise(sigmas):
        eps = (x - curved(x, sigma)) / sigma
        mixed = eps if last is None else gamma * eps + (1 - gamma) * last
        x = curved(x, sigma) if sigma_next == 0 else x + mixed * (sigma_next - sigma)
        last = eps
    out = SAMPLERS["gradient_estimation"](curved, X * 14.6, sigmas, gamma=gamma)
    torch.testing.assert_close(out, x, rtol=0, atol=1e-10)
    if gamma == 1.0:
        torch.testing.assert_close(SAMPLERS["euler"](curved, X * 14.6, sigmas), x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_er_sde_is_the_papers_with_its_integrals_summed(order):
    """The integrals by a sum of many terms, as the authors take them."""

    def phi(level):
        return level * (np.exp(level**0.3) + 10)

    sigmas, noise = levels(8), seeded()
    x, found = X * 14.6, []
    for k, (s, t) in enumerate(itertools.pairwise(sigmas)):
        found.append(curved(x, s))
        if t == 0:
            x = found[-1]
            continue
        r = phi(t) / phi(s)
        x = r * x + (1 - r) * found[-1]
        fine = np.linspace(t, s, 400_001)
        if k >= 1 and order >= 2:
            slope = (found[-1] - found[-2]) / (s - sigmas[k - 1])
            x = x + (t - s + np.trapezoid(1 / phi(fine), fine) * phi(t)) * slope
        if k >= 2 and order >= 3:
            before = (found[-2] - found[-3]) / (sigmas[k - 1] - sigmas[k - 2])
            bend = (slope - before) / ((s - sigmas[k - 2]) / 2)
            x = x + ((t - s) ** 2 / 2 + np.trapezoid((fine - s) / phi(fine), fine) * phi(t)) * bend
        x = x + noise() * math.sqrt(t**2 - s**2 * r**2)
    out = SAMPLERS["er_sde"](curved, X * 14.6, sigmas, noise=seeded(), order=order)
    torch.testing.assert_close(out, x, rtol=0, atol=1e-6)


def test_integrals_over_many_orders_of_magnitude():
    assert integral(lambda level: 1 / level, 0.03, 4096.0) == pytest.approx(math.log(4096 / 0.03), rel=1e-9)
    assert integral(lambda level: level, 0.03, 15.0) == pytest.approx((225 - 0.0009) / 2, rel=1e-9)


@pytest.mark.parametrize("name", ["deis", "ipndm", "res_multistep", "gradient_estimation", "er_sde"])
def test_they_begin_at_zero_terminal_snr(name):
    out = SAMPLERS[name](curved, X * 4096, [4096.0, 14.6, 3.0, 0.5, 0.0], noise=seeded())
    assert out.isfinite().all()
    assert V1.sigma(999) < 4096
