"""Every sampler: k-diffusion's records, diffusers' schedulers, orders of convergence, exact models."""

import json
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from closed_form import V1
from diffusers import DDPMScheduler, LCMScheduler, UniPCMultistepScheduler
from golden_files import case
from torch import Tensor

from ldm.sampling import SAMPLERS, catalogue
from ldm.sampling.euler import ADAMS_BASHFORTH, adams_weights
from ldm.sampling.steps import ancestral_step

DIFFUSERS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
K = json.loads(case("samplers_k")[1]["model_calls"])
DPM = json.loads(case("samplers_dpm")[1]["model_calls"])
ETA = [name for name, facts in catalogue.SAMPLERS.items() if "eta" in facts.options]
CHURN = [name for name, facts in catalogue.SAMPLERS.items() if "s_churn" in facts.options]


class Curved:
    """The recorded cases' denoiser; counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        self.calls += 1
        return x * 0.25 / (0.25 + sigma**2) + 0.1 * torch.sin(3 * x / (1 + sigma)) * sigma / (1 + sigma)


class Normal:
    """The exact denoiser of data that are normal with this mean and standard deviation."""

    def __init__(self, mean: float = 0.3, std: float = 1.0):
        self.mean, self.std = mean, std

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return (self.std**2 * x + sigma**2 * self.mean) / (self.std**2 + sigma**2)

    def solution(self, x: Tensor, sigma: float, end: float) -> Tensor:
        """Where the probability-flow ODE takes x."""
        return self.mean + (x - self.mean) * math.sqrt((self.std**2 + end**2) / (self.std**2 + sigma**2))


def seeded(seed: int = 0) -> Callable[..., Tensor]:
    """A noise stream for x of [1, 2, 3, 4]."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(1, 2, 3, 4, generator=generator, dtype=torch.float64)


def forbidden(*_: float) -> Tensor:
    raise AssertionError("a run without noise drew some")


# --- the records


@pytest.mark.parametrize("key", K)
def test_k_diffusion(key: str) -> None:
    tensors, (name, grid, steps) = case("samplers_k")[0], key.rsplit("_", 2)
    denoise, draws = Curved(), iter(tensors.get(f"{key}_noise", ()))
    sigmas = tensors[f"sigmas_{grid}_{steps}"].tolist()
    out = SAMPLERS[name](denoise, tensors[f"{key}_x"], sigmas, noise=lambda *_: next(draws))
    assert (out - tensors[f"{key}_out"]).abs().max() <= 1e-9
    assert denoise.calls == int(K[key])
    assert not list(draws)


@pytest.mark.parametrize("key", DPM)
def test_k_diffusions_dpm_solver(key: str) -> None:
    tensors, (name, steps, eta) = (
        case("samplers_dpm")[0],
        re.fullmatch(r"(\D+?)(?:_(\d+))?_eta(\d)", key).groups(),
    )
    denoise, draws = Curved(), iter(tensors.get(f"{key}_noise", ()))
    sigmas = np.linspace(14.6, 0.03, int(steps or 1) + 1).tolist()
    out = SAMPLERS[name](denoise, tensors[f"{key}_x"], sigmas, noise=lambda *_: next(draws), eta=float(eta))
    assert (out - tensors[f"{key}_out"]).abs().max() <= 1e-9
    assert denoise.calls == DPM[key]
    assert len(list(draws)) == int(eta)  # k-diffusion's last draw, which it multiplies by zero


# --- diffusers


def diffusers_run(scheduler: object, x: Tensor, noise: Callable | None = None) -> Tensor:
    """The scheduler's way from x, at its first timestep in the model's scale, with the curved denoiser."""
    denoise = Curved()
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator} if noise else {}
    for t in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[t].item()
        sigma = math.sqrt((1 - alpha) / alpha)
        x0 = denoise(x / math.sqrt(alpha), sigma)
        eps = (x - math.sqrt(alpha) * x0) / math.sqrt(1 - alpha)
        x = scheduler.step(eps, t, x, **options).prev_sample
    return x


def own_run(name: str, timesteps: list[int], x: Tensor, **options) -> Tensor:
    """Ours over the same timesteps, then to no noise, from the same x."""
    sigmas = [*V1.sigma(np.array(timesteps)).tolist(), 0.0]
    generator = torch.Generator().manual_seed(0)

    def noise(*_: float) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    return SAMPLERS[name](Curved(), x * math.sqrt(1 + sigmas[0] ** 2), sigmas, noise=noise, **options)


START = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 25])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_diffusers(steps: int, order: int) -> None:
    scheduler = UniPCMultistepScheduler(
        **DIFFUSERS, solver_order=order, lower_order_final=True, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    ours = own_run("unipc", scheduler.timesteps.tolist(), START, order=order)
    # diffusers keeps its schedule in float32
    torch.testing.assert_close(ours, diffusers_run(scheduler, START), rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 10])
def test_ddpm_is_diffusers(steps: int) -> None:
    scheduler = DDPMScheduler(**DIFFUSERS, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    ours = own_run("ddpm", scheduler.timesteps.tolist(), START)
    torch.testing.assert_close(ours, diffusers_run(scheduler, START, noise=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_is_diffusers(steps: int) -> None:
    """But for diffusers' boundary condition, which keeps a hundred-thousandth of x."""
    scheduler = LCMScheduler(**DIFFUSERS)
    scheduler.set_timesteps(steps)
    ours = own_run("lcm", scheduler.timesteps.tolist(), START)
    torch.testing.assert_close(ours, diffusers_run(scheduler, START, noise=True), rtol=0, atol=1e-4)


# --- convergence

ORDERS = {
    "ddim": 1,
    "euler": 1,
    "euler_ancestral": 1,
    "heun": 2,
    "dpm_2": 2,
    "dpm_2_ancestral": 2,
    "dpmpp_2s_ancestral": 2,
    "dpmpp_sde": 2,
    "dpmpp_2m": 2,
    "dpmpp_2m_sde": 2,
    "dpmpp_3m_sde": 2,  # its first step is of order 1
    "unipc": 2,  # of order 3 within, but its last step is DDIM's
    "lms": 2,  # its first step is Euler's
    "plms": 3,  # its first step is Heun's
    "deis": 2,  # its first step is Euler's
    "ipndm": 2,  # likewise
    "res_multistep": 2,
    "gradient_estimation": 1,
    "er_sde": 2,  # its first step is of order 1
    "tcd": 1,
    "dpm_fast": 3,  # where it does not end in a step of order 1
}


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name: str) -> None:
    """Twice as many steps divide the error by 2^order."""
    data = Normal()
    x = torch.linspace(-10, 10, 8, dtype=torch.float64).reshape(1, 2, 2, 2)
    options = {"eta": 0.0} if name in ETA else {}

    def error(steps: int) -> float:
        # even in sigma for Adams-Bashforth, which takes it so; even in lambda for the others
        grid = np.linspace(5.0, 0.1, steps + 1) if name == "plms" else np.geomspace(5.0, 0.1, steps + 1)
        out = SAMPLERS[name](data, x, grid.tolist(), noise=forbidden, **options)
        return (out - data.solution(x, 5.0, 0.1)).abs().max().item()

    order = math.log2(error(485) / error(971))  # two more than a multiple of 3
    assert ORDERS[name] - 0.1 < order < ORDERS[name] + (1.1 if name == "plms" else 0.2)


def test_the_weights_of_even_steps_are_adams_bashforths() -> None:
    """Also of a thousand steps, where sums of fourth powers of sigma would leave four digits."""
    h = 14.6 / 1000
    for expected in ADAMS_BASHFORTH:
        weights = adams_weights([14.0 + k * h for k in range(len(expected))], 14.0 - h)
        assert weights == pytest.approx([-h * weight for weight in expected], rel=1e-9)


def test_adaptive_steps_end_on_numbers_that_are_none() -> None:
    """No step is short enough where the model overflows: the run would never end."""
    for value in (math.nan, math.inf, 1e300):
        out = SAMPLERS["dpm_adaptive"](lambda x, sigma, v=value: x * v, START, [5.0, 1.0, 0.1])
        assert not out.isfinite().all()


@pytest.mark.parametrize(("order", "share"), [(2, 2.0), (3, 1.0)])
def test_adaptive_steps_keep_to_their_tolerance(order: int, share: float) -> None:
    data = Normal()
    x = torch.linspace(-10, 10, 8, dtype=torch.float64).reshape(1, 2, 2, 2)

    def error(rtol: float, atol: float) -> float:
        out = SAMPLERS["dpm_adaptive"](data, x, [5.0, 0.1], order=order, rtol=rtol, atol=atol)
        return (out - data.solution(x, 5.0, 0.1)).abs().max().item()

    assert error(0.05, 0.0078) < share * 0.05
    assert error(5e-5, 7.8e-6) < share * 5e-5


# --- calls, callbacks, ends

CALLS = {  # of n steps that end at 0, at more than 0
    "plms": (lambda n: n + (n > 1), lambda n: n + 1),
    **dict.fromkeys(
        ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"),
        (lambda n: 2 * n - 1, lambda n: 2 * n),
    ),
}


@pytest.mark.parametrize("end", [0.0, 0.03])
@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_may_be_a_tensor(name: str, end: float) -> None:
    """lms failed on one: it read its levels backwards, which tensors do not allow."""
    levels = torch.tensor([14.6, 7.0, 3.0, 1.0, 0.5, end], dtype=torch.float64)

    def out(sigmas: Tensor | list[float]) -> Tensor:
        stream = seeded(2)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            assert type(sigma) is float
            return Curved()(x, sigma)

        def noise(sigma: float, sigma_next: float) -> Tensor:
            assert type(sigma) is type(sigma_next) is float
            return stream()

        return SAMPLERS[name](denoise, seeded(1)() * 14.6, sigmas, noise=noise)

    assert torch.equal(out(levels), out(levels.tolist()))


@pytest.mark.parametrize("steps", [2, 14, 15, 16])
def test_the_last_step_of_dpmpp_2m_is_first_order_below_15_steps(steps: int) -> None:
    """As in the original, where it is not asked for otherwise."""
    sigmas = np.geomspace(14.6, 0.03, steps + 1).tolist()
    rule, lower, higher = (
        SAMPLERS["dpmpp_2m"](Curved(), START * 14.6, sigmas, **options)
        for options in ({}, {"lower_order_final": True}, {"lower_order_final": False})
    )
    assert not torch.equal(lower, higher)
    assert torch.equal(rule, lower if steps < 15 else higher)


@pytest.mark.parametrize("end", [0.0, 0.03])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_and_callbacks(name: str, steps: int, end: float) -> None:
    sigmas = [*np.geomspace(14.6, 0.1, steps).tolist(), end]
    denoise, seen = Curved(), []
    x = seeded(1)() * 14.6
    out = SAMPLERS[name](
        denoise, x, sigmas, noise=seeded(2), callback=lambda step, x0: seen.append((step, x0.shape))
    )
    assert out.isfinite().all()
    assert seen == [(k + 1, x.shape) for k in range(len(seen))]
    if not catalogue.SAMPLERS[name].adaptive:
        assert len(seen) == steps
        assert denoise.calls == CALLS.get(name, (lambda n: n,) * 2)[end > 0](steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_known_image_is_reached(name: str) -> None:
    """At sigma 0 every sampler lands on x0; above it one without noise keeps that sigma's share of it."""
    x0, x = torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.full((1, 1, 2, 2), 5.0, dtype=torch.float64)
    options = {"eta": 0.0} if name in ETA else {}
    out = SAMPLERS[name](lambda x, sigma: x0, x, [5.0, 3.0, 1.0, 0.0], noise=lambda *_: torch.ones_like(x))
    torch.testing.assert_close(out, x0)
    if name not in ("ddpm", "lcm"):
        out = SAMPLERS[name](lambda x, sigma: x0, x, [5.0, 3.0, 1.0, 0.5], noise=forbidden, **options)
        torch.testing.assert_close(out, torch.full_like(x, 0.5))


# --- noise


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_is_drawn_only_where_it_counts(name: str) -> None:
    if name in ("ddpm", "lcm"):
        with pytest.raises(AssertionError, match="drew some"):
            SAMPLERS[name](Normal(), START, [5.0, 3.0, 0.0], noise=forbidden)
        return
    options = {"eta": 0.0} if name in ETA else {}
    SAMPLERS[name](Normal(), START, [5.0, 3.0, 1.0, 0.0], noise=forbidden, **options)


@pytest.mark.parametrize("end", [0.5, 0.1, 0.03, 0.0291675])
@pytest.mark.parametrize("calls", range(1, 13))
def test_dpm_fast_draws_between_its_steps_only(calls: int, end: float) -> None:
    """A rounded last level, a hair above the end, would draw once more: the images after it would change."""
    drawn: list[float] = []
    stream = seeded()

    def noise(sigma: float, sigma_next: float) -> Tensor:
        drawn.append(sigma_next)
        return stream()

    SAMPLERS["dpm_fast"](Curved(), stream() * 10, [*np.geomspace(10.0, end, calls + 1)], noise=noise, eta=1.0)
    assert len(drawn) == calls // 3
    assert all(sigma > end * 1.01 for sigma in drawn)


def test_more_noise_than_the_level_holds_is_not_added() -> None:
    assert ancestral_step(2.0, 1.0, eta=1.0) == pytest.approx((0.5, math.sqrt(0.75)))
    assert ancestral_step(2.0, 1.0, eta=1.5) == (0.0, 1.0)


NOISY = {name: {"eta": 1.0} for name in ETA if name != "tcd"} | {"ddpm": {}}  # tcd: of distilled models
NOISY |= {name: {"s_churn": 40.0} for name in CHURN}


@pytest.mark.parametrize("name", NOISY)
def test_noisy_runs_sample_the_distribution(name: str) -> None:
    """On exact models: what a sampler adds has the variance of what it takes away."""
    generator = torch.Generator().manual_seed(3)

    def noise(*_: float) -> Tensor:
        return torch.randn(1, 1, 100, 200, generator=generator)

    sigmas = [*np.geomspace(14.6, 0.03, 300).tolist(), 0.0]
    if name == "dpmpp_sde":  # its two draws of a step are of one path
        noise = two_increments(noise)
    start = noise(1.0, 0.5) * math.sqrt(0.5**2 + 14.6**2) + 0.3
    out = SAMPLERS[name](Normal(std=0.5), start, sigmas, noise=noise, **NOISY[name])
    assert out.mean().item() == pytest.approx(0.3, abs=0.02)
    assert out.std().item() == pytest.approx(0.5, abs=0.03)


def two_increments(draw: Callable[..., Tensor]) -> Callable[[float, float], Tensor]:
    """A Brownian path over sigma for calls in dpmpp_sde's order: half of an interval, then all of it."""
    half: list[tuple[float, float, Tensor]] = []

    def noise(sigma: float, sigma_next: float) -> Tensor:
        if half and half[0][0] == sigma and half[0][1] > sigma_next:
            _, middle, first = half.pop()
            rest = draw() * math.sqrt(middle - sigma_next)
            return (first * math.sqrt(sigma - middle) + rest) / math.sqrt(sigma - sigma_next)
        half[:] = [(sigma, sigma_next, draw())]
        return half[0][2]

    return noise


@pytest.mark.parametrize("name", CHURN)
def test_churn_only_between_its_sigmas(name: str) -> None:
    """One step of it is the step from the raised level; gamma is at most sqrt(2) - 1."""
    drawn: list[tuple[float, float]] = []
    stream = seeded(4)

    def noise(sigma: float, sigma_next: float) -> Tensor:
        drawn.append((sigma, sigma_next))
        return stream()

    x, sigmas = seeded(5)() * 8, [8.0, 4.0, 2.0, 1.0, 0.5]
    churn = {"s_churn": 1.2, "s_tmin": 1.5, "s_tmax": 5.0}
    SAMPLERS[name](Normal(), x, sigmas, noise=noise, **churn)
    assert drawn == [(pytest.approx(4.0 * 1.3), 4.0), (pytest.approx(2.0 * 1.3), 2.0)]

    drawn.clear()
    out = SAMPLERS[name](Normal(), x, [8.0, 4.0], noise=noise, s_churn=9.0, s_noise=1.1)
    level = 8.0 * math.sqrt(2)
    assert drawn == [(pytest.approx(level), 8.0)]
    stream = seeded(4)
    stream(), stream()
    raised = x + stream() * 1.1 * math.sqrt(level**2 - 64)
    torch.testing.assert_close(out, SAMPLERS[name](Normal(), raised, [level, 4.0]))
