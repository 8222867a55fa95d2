"""Whole runs of every sampler: the original's trajectories, and closed-form models."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from closed_form import V1, V1_ALPHAS, NormalData, compvis_noise, image_noise
from golden_files import case, manifest, pseudo_state_dict
from omegaconf import OmegaConf
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.sampling import SAMPLERS, Denoiser, Trajectory, catalogue, default_trajectory, sample
from ldm.sampling.schedule import karras, leading, leading_timesteps
from ldm.util import instantiate_from_config

MINI_YAML = Path(__file__).parents[1] / "golden/configs/mini-v1.yaml"
SHAPE = (2, 3, 4, 5)

RECORDED = {"ddim": "ddim", "plms": "plms", "dpmpp_2m": "dpm"}  # names in the records
ALWAYS_STOCHASTIC = {name for name, facts in catalogue.SAMPLERS.items() if facts.noise and not facts.options}
DETERMINISTIC = [name for name in SAMPLERS if name not in ALWAYS_STOCHASTIC]
PLANNED = [name for name in SAMPLERS if not catalogue.SAMPLERS[name].adaptive]  # as many steps as asked for


def without_noise(sampler: str) -> dict[str, float]:
    """The options that make a sampler deterministic."""
    return {"eta": 0.0} if "eta" in catalogue.SAMPLERS[sampler].options else {}


def calls(sampler: str, run: Trajectory) -> int:
    """Model calls of a run; a step of two calls that ends without noise takes one."""
    return {
        "1": run.steps,
        "1 (first: 2)": run.steps + 1,
        "2": 2 * run.steps - (run.sigmas[-1] == 0),
        "N in all": run.steps,
    }[catalogue.SAMPLERS[sampler].calls]


def run(sampler: str, steps: int, model: NormalData | None = None, callback=None, **options) -> Tensor:
    """Two images of data around 0.3, on the sampler's own grid."""
    denoiser = Denoiser(model or NormalData(), torch.full((2, 3, 1, 1), 0.3), None, 1.0)
    plan = default_trajectory(denoiser, sampler, steps)
    return sample(denoiser, sampler, plan, compvis_noise(0, SHAPE), options=options, callback=callback)


@pytest.fixture(scope="module")
def mini_v1() -> LatentDiffusion:
    """mini-v1 with its stand-in weights, but for the text encoder and the first stage."""
    config = OmegaConf.load(MINI_YAML).model
    for part in ("cond_stage_config", "first_stage_config"):
        config.params[part] = {"target": "torch.nn.Identity"}
    model = instantiate_from_config(config)
    parts = ("cond_stage_model.", "first_stage_model.")
    listed = {name: entry for name, entry in manifest("mini-v1").items() if not name.startswith(parts)}
    model.load_state_dict(pseudo_state_dict(listed))
    return model.eval().requires_grad_(False)


@pytest.fixture
def count_calls(mini_v1, monkeypatch) -> Callable[[], int]:
    """How often mini_v1's UNet was called so far."""
    calls = []
    apply_model = mini_v1.apply_model
    monkeypatch.setattr(mini_v1, "apply_model", lambda *args: (calls.append(1), apply_model(*args))[1])
    return lambda: len(calls)


def assert_close_to_record(actual: Tensor, expected: Tensor) -> None:
    """The records' tolerance: relative to the standard deviation."""
    assert ((actual - expected).abs().max() / expected.std()).item() < 1e-3


# --- the recorded trajectories


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("sampler", RECORDED)
def test_trajectories_of_the_original(mini_v1, count_calls, sampler, steps):
    tensors = case("samplers_mini-v1")[0]
    name = RECORDED[sampler]
    start = tensors[f"{name}_{steps}_xT"]
    denoiser = Denoiser(mini_v1, tensors["cond"], tensors["uncond"], 7.5)
    plan = default_trajectory(denoiser, sampler, steps)
    out = sample(denoiser, sampler, plan, compvis_noise(0, start.shape, start))
    assert_close_to_record(out, tensors[f"{name}_{steps}_out"])
    assert count_calls() == calls(sampler, plan)


def test_img2img_of_the_original(mini_v1, count_calls):
    """The tail of the grid: noised one level above the first step, as the original does."""
    tensors = case("samplers_mini-v1")[0]
    start = tensors["img2img_noise"]
    denoiser = Denoiser(mini_v1, tensors["cond"], tensors["uncond"], 5.0)
    plan = Trajectory.of(leading(V1, 20), 12, original=True)
    a = 1 / (1 + plan.start**2)
    z = math.sqrt(a) * tensors["img2img_x0"] + math.sqrt(1 - a) * start
    torch.testing.assert_close(z, tensors["img2img_z12"])
    assert a == pytest.approx(V1_ALPHAS[leading_timesteps(20)[::-1][12]])

    noise = compvis_noise(0, start.shape, start)
    out = sample(denoiser, "ddim", plan, noise, init=tensors["img2img_x0"])
    assert_close_to_record(out, tensors["img2img_out"])
    assert count_calls() == 12


# --- every sampler


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 27, 50, 251])
@pytest.mark.parametrize("sampler", PLANNED)
def test_every_step_count_runs_exactly_that_many_steps(sampler, steps):
    model, seen = NormalData(), []
    out = run(sampler, steps, model, callback=lambda step, x0: seen.append((step, tuple(x0.shape))))
    assert out.isfinite().all()
    assert out.shape == SHAPE
    plan = default_trajectory(Denoiser(model, torch.zeros(1), None, 1.0), sampler, steps)
    assert len(model.batches) == calls(sampler, plan)
    assert seen == [(step, SHAPE) for step in range(1, steps + 1)]


@pytest.mark.parametrize("steps", [9, 30, 36, 101, 333, 501, 999, 1000])
@pytest.mark.parametrize("sampler", RECORDED)
def test_the_originals_samplers_run_any_number_of_steps(sampler, steps):
    """The original ran one more for 7 and 30, and crashed on the others."""
    seen = []
    assert run(sampler, steps, callback=lambda step, x0: seen.append(step)).isfinite().all()
    assert seen == list(range(1, steps + 1))


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_many_steps_arrive_at_the_exact_solution(sampler):
    plan = default_trajectory(Denoiser(NormalData(), torch.zeros(1), None, 1.0), sampler, 500)
    first, last = plan.sigmas[0], plan.sigmas[-1]
    x = compvis_noise(0, SHAPE).draw() * math.sqrt(1 + first**2)
    expected = NormalData().solution(x, first, last, 0.3) / math.sqrt(1 + last**2)
    out = run(sampler, 500, **without_noise(sampler))
    tolerance = 6e-2 if sampler == "dpm_adaptive" else 2e-2  # it takes few steps, as its rtol allows
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("end", [0.03, 0.0])
@pytest.mark.parametrize("options", ["default", "noisy"])
@pytest.mark.parametrize("sampler", PLANNED)
def test_no_sampler_waits_for_the_device(sampler, options, end):
    """On `meta` there are no numbers to read: .item(), .cpu() and a condition on a tensor are errors."""
    x = torch.empty(SHAPE, device="meta")
    has = catalogue.SAMPLERS[sampler].options
    chosen = {"eta": 0.5, "s_churn": 10.0, "s_noise": 1.1} if options == "noisy" else {}
    out = SAMPLERS[sampler](
        lambda x, sigma: x * 0.5,
        x,
        [14.6, 7.0, 3.0, 1.0, 0.5, end],
        noise=lambda sigma, sigma_next: torch.empty(SHAPE, device="meta"),
        callback=lambda step, x0: None,
        **{name: value for name, value in chosen.items() if name in has},
    )
    assert out.device.type == "meta"
    assert out.shape == SHAPE
    assert out.dtype == x.dtype


def test_the_adaptive_sampler_reads_one_number_a_step(monkeypatch):
    read, steps = [], []
    item = Tensor.item
    monkeypatch.setattr(Tensor, "item", lambda self: (read.append(1), item(self))[1])
    data, x = NormalData(), compvis_noise(0, SHAPE).draw() * 14.6
    denoise = lambda x, sigma: data.x0(x, sigma, 0.3)  # noqa: E731
    SAMPLERS["dpm_adaptive"](denoise, x, [14.6, 0.03], callback=lambda step, x0: steps.append(step))
    assert steps == list(range(1, len(steps) + 1))
    assert 5 < len(steps) <= len(read) < 2 * len(steps)


def ddim_in_the_originals_form(model: NormalData, cond: Tensor, steps: int, eta: float, draw) -> Tensor:
    """reference.md 2.2, variance-preserving: alphas of the grid, the last one `alphas_cumprod[0]`."""
    timesteps = np.arange(0, 1000, 1000 // steps) + 1
    alphas = V1_ALPHAS[timesteps]
    alphas_prev = np.append(V1_ALPHAS[0], alphas[:-1])
    x = draw().double()
    for t, a, ap in zip(timesteps[::-1], alphas[::-1], alphas_prev[::-1], strict=True):
        sigma = eta * math.sqrt((1 - ap) / (1 - a) * (1 - a / ap))
        eps = model.apply_model(x, torch.full((len(x),), float(t)), cond)
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        x = math.sqrt(ap) * x0 + math.sqrt(1 - ap - sigma**2) * eps + sigma * draw()
    return x


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_ddim_with_eta_is_the_originals_formula(steps, eta):
    cond = torch.full((2, 3, 1, 1), 0.3)
    noise = compvis_noise(0, SHAPE)
    expected = ddim_in_the_originals_form(NormalData(), cond, steps, eta, noise.draw).float()
    torch.testing.assert_close(run("ddim", steps, eta=eta), expected, rtol=0, atol=2e-5)
    if eta == 1.0:
        torch.testing.assert_close(run("ddpm", steps), expected, rtol=0, atol=2e-5)


# draw from a distilled model's data, not from an exact one's: that is blurred
DISTILLED = ("lcm", "tcd")
WITH_ETA = [name for name in SAMPLERS if "eta" in catalogue.SAMPLERS[name].options]
DISTRIBUTIONS = [
    *((name, {}) for name in SAMPLERS if name not in DISTILLED),
    ("ddim", {"eta": 1.0}),
    *((name, {"s_churn": 10.0}) for name in ("euler", "heun", "dpm_2")),
    *((name, {"eta": 0.5}) for name in WITH_ETA if name != "tcd"),
]


@pytest.mark.parametrize(("sampler", "options"), DISTRIBUTIONS)
def test_samples_have_the_datas_distribution(sampler, options):
    """On exact models any sampler draws from the data: the noise it adds has the right variance."""
    denoiser = Denoiser(NormalData(std=0.5), torch.full((1, 1, 1, 1), 0.3), None, 1.0)
    plan = Trajectory.of(karras(V1, 150))
    noise = image_noise(0, shape=(1, 80, 80), brownian=catalogue.SAMPLERS[sampler].noise == "brownian")
    out = sample(denoiser, sampler, plan, noise, options=options)
    assert out.mean().item() == pytest.approx(0.3, abs=0.035)
    assert out.std().item() == pytest.approx(0.5, abs=0.025)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in DISTILLED])
def test_the_default_schedule_suits_the_sampler(sampler):
    """50 steps on a grid even in time end so steeply that multistep SDE samplers overshot: 0.6 and 1.0."""
    denoiser = Denoiser(NormalData(std=0.5), torch.full((1, 1, 1, 1), 0.3), None, 1.0)
    noise = image_noise(0, shape=(1, 80, 80), brownian=catalogue.SAMPLERS[sampler].noise == "brownian")
    out = sample(denoiser, sampler, default_trajectory(denoiser, sampler, 50), noise)
    assert out.mean().item() == pytest.approx(0.3, abs=0.035)
    assert out.std().item() == pytest.approx(0.5, abs=0.06)


def test_consistency_sampling_ends_at_the_prediction():
    predictions = []
    out = run("lcm", 4, callback=lambda step, x0: predictions.append(x0))
    assert torch.equal(out, predictions[-1])
    assert out.mean().item() == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_v_and_eps_models_of_the_same_data_agree(sampler, scale):
    """Stability's PLMS had no branch for v-models: it took v for eps and drew noise without a word."""
    cond, uncond = torch.full((2, 3, 1, 1), 0.3), torch.full((2, 3, 1, 1), -0.1)

    def images(parameterization: str) -> Tensor:
        denoiser = Denoiser(NormalData(parameterization=parameterization), cond, uncond, scale)
        return sample(denoiser, sampler, Trajectory.of(karras(V1, 20)), compvis_noise(0, SHAPE))

    eps, v = images("eps"), images("v")
    tolerance = 1e-3 if sampler == "dpm_adaptive" else 5e-5  # whose steps go by the tiny differences
    torch.testing.assert_close(v, eps, rtol=0, atol=tolerance)
    mean = 0.3 if scale == 1.0 else -0.1 + 3.0 * 0.4
    assert v.mean().item() == pytest.approx(mean, abs=0.15)


# --- from an init image


class Recorder(Denoiser):
    """Keeps the first call's x and sigma."""

    first: tuple[Tensor, float] | None = None

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        self.first = self.first or (x, sigma)
        return super().__call__(x, sigma)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_init_image_is_noised_to_the_start_of_the_run(sampler):
    """And no further: a short run on a faithful model stays by the image."""
    init = torch.linspace(-1, 1, math.prod(SHAPE)).reshape(SHAPE)
    denoiser = Recorder(NormalData(std=1.0), torch.zeros(2, 3, 1, 1), None, 1.0)
    plan = Trajectory.of(karras(V1, 40), 10)
    out = sample(denoiser, sampler, plan, compvis_noise(0, SHAPE), init=init)
    x, sigma = denoiser.first
    assert sigma == plan.sigmas[0]
    torch.testing.assert_close(x, init + compvis_noise(0, SHAPE).start() * plan.start, rtol=0, atol=1e-5)
    assert (out - init).abs().max() < 5 * plan.start


def test_without_steps_the_init_image_comes_back():
    init, denoiser = torch.randn(SHAPE), Denoiser(NormalData(), torch.zeros(2, 3, 1, 1), None, 1.0)
    noise = compvis_noise(0, SHAPE)
    state = noise.generator.get_state()
    assert sample(denoiser, "ddim", Trajectory.of(leading(V1, 20), 0), noise, init=init) is init
    assert torch.equal(noise.generator.get_state(), state)
    assert denoiser.model.batches == []


# --- batches


def row_by_row(denoise: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, float], Tensor]:
    """A denoiser that calls the model once for each image: a row's bits are those of the row alone."""
    return lambda x, sigma: torch.cat([denoise(row, sigma) for row in x.split(1)])


NOISY = [(name, {"eta": 0.7}) for name, facts in catalogue.SAMPLERS.items() if "eta" in facts.options]
CHURNED = [
    (name, {"s_churn": 20.0}) for name, facts in catalogue.SAMPLERS.items() if "s_churn" in facts.options
]
ALONE = [case for case in [*((name, {}) for name in SAMPLERS), *NOISY, *CHURNED] if case[0] in PLANNED]


@pytest.mark.parametrize(("sampler", "options"), ALONE)
def test_an_image_alone_is_the_image_of_a_batch(sampler, options):
    """The original's image k depended on the batch size, the sampler and all images before it.

    To the bit, with a model that is called row by row: what is left to differ, the rounding of a batched
    call, is bounded in test_denoiser.py. Over a run some samplers amplify it a hundredfold.
    """
    model = instantiate_from_config(tiny.model_section({}))
    model.load_state_dict(tiny.state_dict())
    model.eval().requires_grad_(False)
    cond = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser(model, cond, torch.zeros_like(cond), 3.0)
    denoise = row_by_row(denoiser)
    denoise.discretization = denoiser.discretization
    plan = default_trajectory(denoiser, sampler, 6)
    brownian = catalogue.SAMPLERS[sampler].noise == "brownian"

    def images(*seeds: int) -> Tensor:
        return sample(denoise, sampler, plan, image_noise(*seeds, brownian=brownian), options=options)

    batch = images(42, 43, 44)
    for k in range(3):
        assert torch.equal(images(42 + k)[0], batch[k])
    assert (batch[0] - batch[1]).abs().max() > 0.1 * batch.std()
