"""Noise schedules: the original's, those of k-diffusion and diffusers."""

import math

import numpy as np
import pytest
import torch
from closed_form import V1, V1_ALPHAS
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from golden_files import case
from scipy import stats

from ldm.modules.diffusionmodules.util import make_beta_schedule
from ldm.sampling import SCHEDULES, Discretization
from ldm.sampling.catalogue import RHO
from ldm.sampling.schedule import (
    ays,
    beta,
    beta_quantile,
    exponential,
    karras,
    kl_optimal,
    lcm,
    leading,
    leading_timesteps,
    linspace,
    polyexponential,
    sgm_uniform,
    trailing,
    uniform,
    zero_terminal_snr,
)

V1_SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}  # diffusers' name
FIRST, LAST = np.sqrt(1 / V1_ALPHAS[[0, -1]] - 1)  # sigmas of timesteps 0 and 999
TO_FIRST_ALPHA = ("leading", "uniform")  # these end where the model does, the others without noise


def timesteps(sigmas: np.ndarray) -> list[float]:
    """All but the last level's."""
    return [V1.timestep(sigma) for sigma in sigmas[:-1]]


# --- alphas and sigmas


def test_sigmas_of_the_discretization():
    assert V1.sigma(np.array([0, 999])) == pytest.approx([0.029167, 14.614641], rel=1e-5)
    sigmas = V1.sigma(np.arange(1000))
    assert (np.diff(sigmas) > 0).all()
    assert sigmas == pytest.approx(np.sqrt((1 - V1_ALPHAS) / V1_ALPHAS), rel=1e-9)


def test_sigmas_and_timesteps_are_inverse():
    for t in [*range(1000), 0.001, 0.5, 99.9, 499.25, 899.1, 998.999]:
        assert V1.timestep(V1.sigma(t)) == pytest.approx(t, abs=1e-7)


def test_timesteps_are_clamped_to_the_schedule():
    assert V1.timestep(0.0) == 0
    assert V1.timestep(0.02) == 0
    assert V1.timestep(15.0) == 999
    assert V1.timestep(1e6) == 999


def test_zero_terminal_snr_is_the_papers():
    betas = torch.tensor(make_beta_schedule("linear", 1000, 0.00085, 0.012))
    expected = torch.cumprod(1.0 - rescale_zero_terminal_snr(betas), 0).numpy()
    alphas = zero_terminal_snr(V1_ALPHAS)
    assert alphas[:-1] == pytest.approx(expected[:-1], rel=1e-9)
    assert expected[-1] == 0
    assert alphas[-1] == 2.0**-24
    assert alphas[0] == pytest.approx(V1_ALPHAS[0], rel=1e-12)


def test_the_last_sigma_of_zero_terminal_snr_is_a_number():
    d = Discretization(zero_terminal_snr(V1_ALPHAS))
    assert d.sigma(999) == pytest.approx(4096, rel=1e-6)
    assert (np.diff(d.sigma(np.arange(1000))) > 0).all()
    assert d.timestep(d.sigma(999)) == 999
    assert d.timestep(d.sigma(998)) == pytest.approx(998)


# --- the original's grid


@pytest.mark.parametrize("steps", [n for n in range(1, 1000) if 1000 % n == 0])
def test_the_original_grid_where_steps_divide_1000(steps):
    assert leading_timesteps(steps)[::-1].tolist() == [t + 1 for t in range(0, 1000, 1000 // steps)]


def test_the_original_grid_of_50_steps():
    timesteps = leading_timesteps(50).tolist()
    assert timesteps[:3] == [981, 961, 941]
    assert timesteps[-2:] == [21, 1]


def test_the_grid_has_exactly_the_steps_asked_for():
    """The original ran 31 steps for 30, and crashed on 3, 9, 27, 36, 37, 101-111, 251-333 and 501-1000."""
    for steps in range(1, 1001):
        timesteps = leading_timesteps(steps)
        assert len(timesteps) == steps
        assert (np.diff(timesteps) < 0).all()
        assert timesteps[0] <= 999
        assert timesteps[-1] >= 0


# --- all grids


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 30, 50, 999, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_sigmas_of_a_run(name, steps):
    sigmas = SCHEDULES[name](V1, steps)
    assert sigmas.dtype == np.float64
    assert sigmas.shape == (steps + 1,)
    assert np.isfinite(sigmas).all()
    assert (np.diff(sigmas) < 0).all()
    assert sigmas[0] <= LAST * (1 + 1e-6)
    if name not in TO_FIRST_ALPHA:
        assert sigmas[-1] == 0
    elif (name, steps) != ("leading", 1000):  # all timesteps: only then the last step starts at the first
        assert sigmas[-1] == pytest.approx(FIRST, rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@pytest.mark.parametrize("name", sorted({*SCHEDULES} - {"leading"}))
def test_all_but_the_originals_grid_start_at_the_last_timestep(name, steps):
    assert SCHEDULES[name](V1, steps)[0] == pytest.approx(LAST, rel=1e-6)


@pytest.mark.parametrize("name", sorted({*SCHEDULES} - {"ays"}))
def test_grids_go_by_the_models_own_levels(name):
    """A model of 100 timesteps with zero terminal SNR."""
    d = Discretization(zero_terminal_snr(np.linspace(0.98, 0.02, 100)))
    sigmas = SCHEDULES[name](d, 10)
    assert (np.diff(sigmas) < 0).all()
    if name == "leading":
        assert sigmas[0] == d.sigma(91)
    else:
        assert sigmas[0] == pytest.approx(4096)


def test_runs_of_the_original_end_at_the_first_alpha_not_at_no_noise():
    for schedule in (leading, uniform):
        assert schedule(V1, 50)[-1] == pytest.approx(math.sqrt(1 / V1_ALPHAS[0] - 1), rel=1e-9)


def test_the_grid_of_dpm_solver():
    timesteps = [V1.timestep(sigma) for sigma in uniform(V1, 10)]
    assert timesteps == pytest.approx([999, 899.1, 799.2, 699.3, 599.4, 499.5, 399.6, 299.7, 199.8, 99.9, 0])


def test_the_grid_of_generative_models():
    assert timesteps(sgm_uniform(V1, 4)) == pytest.approx([999, 749.25, 499.5, 249.75])


# --- k-diffusion


def k_karras(n: int, low: float, high: float, rho: float) -> list[float]:
    """k_diffusion.sampling.get_sigmas_karras, number by number."""
    ramp = [i / max(n - 1, 1) for i in range(n)]
    least, most = low ** (1 / rho), high ** (1 / rho)
    return [(most + r * (least - most)) ** rho for r in ramp] + [0.0]


def k_polyexponential(n: int, low: float, high: float, rho: float) -> list[float]:
    """k_diffusion.sampling.get_sigmas_polyexponential, number by number."""
    ramp = [(1 - i / max(n - 1, 1)) ** rho for i in range(n)]
    return [math.exp(r * (math.log(high) - math.log(low)) + math.log(low)) for r in ramp] + [0.0]


@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0, 7.0, 10.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 25, 1000])
def test_karras_and_polyexponential_are_k_diffusions(steps, rho):
    assert karras(V1, steps, rho) == pytest.approx(k_karras(steps, FIRST, LAST, rho), rel=1e-9)
    assert polyexponential(V1, steps, rho) == pytest.approx(
        k_polyexponential(steps, FIRST, LAST, rho), rel=1e-9
    )


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_exponential_is_k_diffusions(steps):
    expected = np.append(np.exp(np.linspace(math.log(LAST), math.log(FIRST), steps)), 0)
    assert exponential(V1, steps) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 999, 1000])
def test_linspace_is_k_diffusions(steps):
    """DiscreteSchedule.get_sigmas; its sigma is exp of linearly interpolated log sigmas, not log alphas."""
    log_sigmas = np.log(np.sqrt((1 - V1_ALPHAS) / V1_ALPHAS))
    t = np.linspace(999, 0, steps)
    expected = np.append(np.exp(np.interp(t, np.arange(1000), log_sigmas)), 0)
    assert timesteps(linspace(V1, steps)) == pytest.approx(t, abs=1e-7)
    assert linspace(V1, steps) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("schedule", [karras, exponential])
def test_the_recorded_grids_of_k_diffusion(schedule, steps):
    recorded = case("samplers_k")[0][f"sigmas_{schedule.__name__}_{steps}"].numpy()
    assert schedule(V1, steps) == pytest.approx(recorded, rel=1e-6)


def test_rho_bends_the_grid():
    assert set(RHO) == {"karras", "polyexponential"}
    for name, default in RHO.items():
        assert np.array_equal(SCHEDULES[name](V1, 10), SCHEDULES[name](V1, 10, rho=default))
        low, high = (SCHEDULES[name](V1, 10, rho=rho) for rho in (2.0, 9.0))
        assert low[[0, -2, -1]] == pytest.approx(high[[0, -2, -1]])
        assert (high[1:-2] < low[1:-2]).all()  # more steps at low noise


# --- diffusers


DIVISORS = (1, 2, 4, 10, 25, 50, 100, 500)  # for others diffusers' "leading" leaves out the highest timesteps
SPACINGS = [
    *((linspace, n) for n in (2, 3, 4, 7, 10, 30, 50, 999, 1000)),
    *((trailing, n) for n in (1, 2, 3, 4, 7, 10, 30, 50, 999, 1000)),
    *((leading, n) for n in DIVISORS),
]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DDIMScheduler])
@pytest.mark.parametrize(("schedule", "steps"), SPACINGS)
def test_timesteps_are_diffusers(schedule, steps, scheduler):
    theirs = scheduler(**V1_SCHEDULE, timestep_spacing=schedule.__name__, steps_offset=1)
    theirs.set_timesteps(steps)
    rounding = 0.5 if (scheduler, schedule) == (DDIMScheduler, linspace) else 1e-4  # to whole timesteps
    assert timesteps(schedule(V1, steps)) == pytest.approx(theirs.timesteps.numpy(), abs=rounding)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [2, 10, 50])
@pytest.mark.parametrize("schedule", [karras, exponential])
def test_sigmas_are_diffusers(schedule, steps):
    scheduler = EulerDiscreteScheduler(**V1_SCHEDULE, **{f"use_{schedule.__name__}_sigmas": True})
    scheduler.set_timesteps(steps)
    assert schedule(V1, steps) == pytest.approx(scheduler.sigmas.numpy(), rel=1e-4)


# --- Align Your Steps


def test_align_your_steps_are_the_published_ones():
    published = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]  # of 10 steps for Stable Diffusion 1.5
    sigmas = ays(V1, 10)
    assert timesteps(sigmas) == pytest.approx(published, abs=1e-6)
    assert sigmas[-1] == 0


def test_align_your_steps_are_log_linear_in_between():
    ten, twenty = ays(V1, 10), ays(V1, 20)
    assert twenty[::2] == pytest.approx(ten)
    assert twenty[1:-2:2] == pytest.approx(np.sqrt(twenty[0:-3:2] * twenty[2:-1:2]))


# --- the beta distribution, the arctangent


@pytest.mark.parametrize("a", [0.5, 0.6, 1.0, 2.0])
def test_quantiles_of_the_beta_distribution_are_scipys(a):
    q = np.concatenate([[1e-9, 1e-4], np.arange(1, 1000) / 1000, [0.9999, 1.0]])
    assert beta_quantile(q, a) == pytest.approx(stats.beta.ppf(q, a, a), rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 50])
def test_beta_is_comfyuis_but_for_its_rounding(steps):
    """Whole timesteps of the quantiles, those that coincide once; from the last one down."""
    theirs = [round(q * 999) for q in stats.beta.ppf(1 - np.arange(steps) / steps, 0.6, 0.6)]
    assert timesteps(beta(V1, steps)) == pytest.approx(theirs, abs=0.5 + 1e-6)
    assert beta(V1, steps)[-1] == 0


@pytest.mark.parametrize("steps", [2, 5, 10, 50])
def test_kl_optimal_is_even_in_the_arctangent(steps):
    """ComfyUI's and A1111's, number by number."""
    part = [k / (steps - 1) for k in range(steps)]
    expected = [math.tan(p * math.atan(FIRST) + (1 - p) * math.atan(LAST)) for p in part] + [0.0]
    assert kl_optimal(V1, steps) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
def test_the_grid_of_lcm_is_diffusers(steps):
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(steps)
    assert lcm(V1, steps)[:-1] == pytest.approx(V1.sigma(scheduler.timesteps.numpy()))
