"""Schedules, samplers, guidance and noise: the original's trajectories, and closed-form models."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import case, manifest, pseudo_state_dict
from omegaconf import OmegaConf
from torch import Tensor

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.prompts import Batch
from ldm.sampling import SAMPLERS, Denoiser, Discretization, sample
from ldm.sampling.denoiser import stack
from ldm.sampling.noise import MAX_SEED, CompvisNoise, ImageNoise, noise_source
from ldm.sampling.schedule import leading_sigmas, leading_timesteps, make_beta_schedule, uniform_sigmas
from ldm.util import instantiate_from_config

MINI_YAML = Path(__file__).parent / "golden/configs/mini-v1.yaml"
CPU = torch.device("cpu")
V1_ALPHAS = np.cumprod(1.0 - make_beta_schedule("linear", 1000, 0.00085, 0.012))
V1 = Discretization(V1_ALPHAS)

# name in the records, extra model calls
RECORDED = {"ddim": ("ddim", 0), "plms": ("plms", 1), "dpmpp_2m": ("dpm", 0)}


class NormalData:
    """The exact model of data that are normal around `cond` [b, c, 1, 1] with deviation `std`.

    Stands in for LatentDiffusion; `batches` lists the sizes of the calls.
    """

    def __init__(self, std: float = 0.5, parameterization: str = "eps"):
        self.std = std
        self.parameterization = parameterization
        self.alphas_cumprod = torch.tensor(V1_ALPHAS, dtype=torch.float32)
        self.batches: list[int] = []

    def apply_model(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        self.batches.append(len(x))
        sigma = torch.tensor(V1.sigma(t.double().numpy()))[:, None, None, None]
        alpha = 1.0 / (1.0 + sigma**2)
        x = x.double()
        x0 = self.x0(x / alpha.sqrt(), sigma, cond)
        eps = (x - alpha.sqrt() * x0) / (1.0 - alpha).sqrt()
        if self.parameterization == "v":
            return alpha.sqrt() * eps - (1.0 - alpha).sqrt() * x0
        return eps

    def x0(self, x: Tensor, sigma: Tensor | float, mean: Tensor | float) -> Tensor:
        """What is best predicted for x0 + sigma eps."""
        return (self.std**2 * x + sigma**2 * mean) / (self.std**2 + sigma**2)

    def solution(self, x: Tensor, sigma: float, sigma_end: float, mean: Tensor | float) -> Tensor:
        """Where the probability-flow ODE takes x from sigma to sigma_end."""
        return mean + (x - mean) * math.sqrt((self.std**2 + sigma_end**2) / (self.std**2 + sigma**2))


def compvis_noise(seed: int, shape: tuple[int, ...], start: Tensor | None = None) -> CompvisNoise:
    return CompvisNoise(torch.Generator().manual_seed(seed), shape, start)


def run(sampler: str, steps: int, model: NormalData | None = None, **options) -> Tensor:
    model = model or NormalData()
    denoiser = Denoiser(model, torch.full((2, 3, 1, 1), 0.3), None, 1.0)
    return sample(denoiser, sampler, steps, compvis_noise(0, (2, 3, 4, 5)), **options)


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
    name, extra_calls = RECORDED[sampler]
    start = tensors[f"{name}_{steps}_xT"]
    denoiser = Denoiser(mini_v1, tensors["cond"], tensors["uncond"], 7.5)
    out = sample(denoiser, sampler, steps, compvis_noise(0, start.shape, start))
    assert_close_to_record(out, tensors[f"{name}_{steps}_out"])
    assert count_calls() == steps + extra_calls


def test_img2img_of_the_original(mini_v1, count_calls):
    """The tail of the grid: noised one level above the first step, as the original does."""
    tensors = case("samplers_mini-v1")[0]
    t = leading_timesteps(20)[::-1]
    a = mini_v1.alphas_cumprod[t[12].item()]
    z = a.sqrt() * tensors["img2img_x0"] + (1 - a).sqrt() * tensors["img2img_noise"]
    torch.testing.assert_close(z, tensors["img2img_z12"])

    sigmas = leading_sigmas(V1, 20)[-13:].tolist()
    denoiser = Denoiser(mini_v1, tensors["cond"], tensors["uncond"], 5.0)
    x = SAMPLERS["ddim"](denoiser, z * math.sqrt(1 + sigmas[0] ** 2), sigmas)
    assert_close_to_record(x / math.sqrt(1 + sigmas[-1] ** 2), tensors["img2img_out"])
    assert count_calls() == 12


# --- schedules


@pytest.mark.parametrize(
    ("start", "end", "first", "last"),
    [
        (0.00085, 0.012, 0.99915, 0.0046600985),
        (0.0001, 0.02, 0.9999, 0.00073341246),
        (0.0015, 0.015, 0.9985, 0.00081251847),
        (0.0015, 0.0195, 0.9985, 0.00014230398),
        (0.0015, 0.0205, 0.9985, 9.6910867e-05),
    ],
)
def test_alphas_of_the_families(start, end, first, last):
    alphas = np.cumprod(1.0 - make_beta_schedule("linear", 1000, start, end))
    assert alphas[[0, -1]] == pytest.approx([first, last], rel=1e-6)


def test_other_beta_schedules():
    assert make_beta_schedule("sqrt_linear", 3, 0.1, 0.3) == pytest.approx([0.1, 0.2, 0.3])
    assert make_beta_schedule("sqrt", 3, 0.01, 0.09) == pytest.approx(np.sqrt([0.01, 0.05, 0.09]))
    cosine = make_beta_schedule("cosine", 1000, 0.1, 0.3)
    alphas = np.cumprod(1.0 - cosine)
    t = np.array([0, 100, 500, 900])
    angle = ((np.append(t, 0) + np.array([1, 1, 1, 1, 0])) / 1000 + 0.008) / 1.008 * np.pi / 2
    assert alphas[t] == pytest.approx(np.cos(angle[:-1]) ** 2 / np.cos(angle[-1]) ** 2)
    assert cosine.max() == 0.999
    with pytest.raises(InputError, match="'karras' is not one of linear"):
        make_beta_schedule("karras", 10, 0.1, 0.3)


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


@pytest.mark.parametrize("steps", [1, 2, 30, 50, 999, 1000])
@pytest.mark.parametrize("schedule", [leading_sigmas, uniform_sigmas])
def test_sigmas_of_a_run(schedule, steps):
    sigmas = schedule(V1, steps)
    assert sigmas.dtype == np.float64
    assert sigmas.shape == (steps + 1,)
    assert (np.diff(sigmas) < 0).all()


def test_runs_end_at_the_first_alpha_not_at_no_noise():
    for schedule in (leading_sigmas, uniform_sigmas):
        assert schedule(V1, 50)[-1] == pytest.approx(math.sqrt(1 / V1_ALPHAS[0] - 1), rel=1e-9)


def test_the_grid_of_dpm_solver():
    timesteps = [V1.timestep(sigma) for sigma in uniform_sigmas(V1, 10)]
    assert timesteps == pytest.approx([999, 899.1, 799.2, 699.3, 599.4, 499.5, 399.6, 299.7, 199.8, 99.9, 0])


# --- samplers


@pytest.mark.parametrize("steps", [1, 3, 7, 9, 27, 30, 36, 101, 251, 333, 501, 999, 1000])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_count_runs_exactly_that_many_steps(sampler, steps):
    """The original ran one more for 7 and 30, and crashed on the others."""
    model, seen = NormalData(), []
    out = run(sampler, steps, model, callback=lambda step, x0: seen.append((step, tuple(x0.shape))))
    assert out.isfinite().all()
    assert out.shape == (2, 3, 4, 5)
    assert len(model.batches) == steps + RECORDED[sampler][1]
    assert seen == [(step, (2, 3, 4, 5)) for step in range(1, steps + 1)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_many_steps_arrive_at_the_exact_solution(sampler):
    sigmas = (leading_sigmas if sampler != "dpmpp_2m" else uniform_sigmas)(V1, 500)
    start = compvis_noise(0, (2, 3, 4, 5)).draw()
    x = start * math.sqrt(1 + sigmas[0] ** 2)
    expected = NormalData().solution(x, sigmas[0], sigmas[-1], 0.3) / math.sqrt(1 + sigmas[-1] ** 2)
    torch.testing.assert_close(run(sampler, 500), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("plms", 3)])
def test_order_of_convergence(sampler, order):
    """Twice as many, evenly spaced steps divide the error by 2^order; PLMS has at least its Heun start's."""
    data = NormalData(std=1.0)
    x = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(1, 2, 2, 2) * 5

    def error(steps: int) -> float:
        sigmas = np.linspace(5.0, 0.1, steps + 1).tolist()
        out = SAMPLERS[sampler](lambda x, sigma: data.x0(x, sigma, 0.3), x, sigmas)
        return (out - data.solution(x, sigmas[0], sigmas[-1], 0.3)).abs().max().item()

    assert math.log2(error(200) / error(400)) > order - 0.1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_perfect_denoiser_is_followed_to_the_end(sampler):
    """With x0 known, every sampler lands on x0 and the last sigma's share of the noise; at sigma 0 on x0."""
    x0, x = torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.full((1, 1, 2, 2), 5.0, dtype=torch.float64)
    for end in (0.5, 0.0):
        out = SAMPLERS[sampler](lambda x, sigma: x0, x, [5.0, 3.0, 1.0, end])
        torch.testing.assert_close(out, torch.full_like(x, end))


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
    noise = compvis_noise(0, (2, 3, 4, 5))
    expected = ddim_in_the_originals_form(NormalData(), cond, steps, eta, noise.draw)
    torch.testing.assert_close(run("ddim", steps, eta=eta), expected.float(), rtol=0, atol=2e-5)


def test_eta_1_samples_the_distribution():
    """On exact models an ancestral sampler draws from the data: the noise it adds has the right variance."""
    model = NormalData(std=0.5)
    denoiser = Denoiser(model, torch.full((1, 1, 1, 1), 0.3), None, 1.0)
    out = sample(denoiser, "ddim", 250, compvis_noise(0, (1, 1, 100, 200)), eta=1.0)
    assert out.mean().item() == pytest.approx(0.3, abs=0.02)
    assert out.std().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_v_and_eps_models_of_the_same_data_agree(sampler, scale):
    """Stability's PLMS had no branch for v-models: it took v for eps and drew noise without a word."""
    cond, uncond = torch.full((2, 3, 1, 1), 0.3), torch.full((2, 3, 1, 1), -0.1)
    eps, v = (
        sample(
            Denoiser(NormalData(parameterization=parameterization), cond, uncond, scale),
            sampler,
            20,
            compvis_noise(0, (2, 3, 4, 5)),
        )
        for parameterization in ("eps", "v")
    )
    torch.testing.assert_close(v, eps, rtol=0, atol=2e-5)
    mean = 0.3 if scale == 1.0 else -0.1 + 3.0 * 0.4
    assert v.mean().item() == pytest.approx(mean, abs=0.1)


# --- guidance and conditioning


@pytest.mark.parametrize(
    ("scale", "negative", "rows"),
    [(1.0, True, 2), (7.5, False, 2), (7.5, True, 4), (0.0, True, 4), (0.999, True, 4)],
)
def test_guidance_doubles_the_batch_unless_the_scale_is_1(scale, negative, rows):
    model = NormalData()
    cond, uncond = torch.full((2, 3, 1, 1), 0.3), torch.full((2, 3, 1, 1), -0.1)
    denoise = Denoiser(model, cond, uncond if negative else None, scale)
    x = compvis_noise(0, (2, 3, 4, 5)).draw() * 3
    x0 = denoise(x, 3.0)
    assert model.batches == [rows]
    guided = -0.1 + scale * 0.4 if rows == 4 else 0.3
    torch.testing.assert_close(x0, model.x0(x, V1.sigma(V1.timestep(3.0)), guided), rtol=0, atol=1e-5)


def test_one_unconditional_row_serves_the_batch():
    cond, uncond = torch.rand(3, 5, 6), torch.rand(1, 5, 6)
    assert torch.equal(stack(uncond, cond), torch.cat([uncond, uncond, uncond, cond]))


def test_conditioning_is_stacked_unconditional_first():
    a, b, c, d = torch.rand(4, 2, 5, 6)
    assert torch.equal(stack(a, b), torch.cat([a, b]))
    first, second = stack([a, b], [c, d])
    assert torch.equal(first, torch.cat([a, c]))
    assert torch.equal(second, torch.cat([b, d]))
    uncond = {"c_crossattn": [a], "c_concat": [b], "c_adm": c[:, 0], "more": [d]}
    stacked = stack(uncond, {"c_concat": [d], "c_crossattn": [c], "c_adm": a[:, 0]})
    assert list(stacked) == ["c_concat", "c_crossattn", "c_adm"]
    assert torch.equal(stacked["c_crossattn"][0], torch.cat([a, c]))
    assert torch.equal(stacked["c_concat"][0], torch.cat([b, d]))
    assert torch.equal(stacked["c_adm"], torch.cat([c[:, 0], a[:, 0]]))


def test_lists_of_different_lengths_do_not_stack():
    a, b = torch.rand(2, 2, 5, 6)
    with pytest.raises(ValueError, match="zip"):
        stack([a], [a, b])


def test_a_dict_and_a_tensor_give_the_same_image(mini_v1):
    cond, uncond = torch.randn(2, 1, 77, 768, generator=torch.Generator().manual_seed(0))
    plain, nested = (
        sample(Denoiser(mini_v1, c, u, 5.0), "ddim", 2, compvis_noise(0, (1, 4, 8, 8)))
        for c, u in ((cond, uncond), ({"c_crossattn": [cond]}, {"c_crossattn": [uncond]}))
    )
    assert torch.equal(plain, nested)


# --- noise


def image_noise(*seeds: int, **options) -> ImageNoise:
    return ImageNoise(seeds, (4, 8, 8), CPU, **options)


def test_an_image_alone_has_the_noise_it_has_in_a_batch():
    batch, alone = image_noise(5, 6, 7), image_noise(6)
    for _ in range(4):
        assert torch.equal(batch.start()[1:2], alone.start())
        assert torch.equal(batch(2.0, 1.0)[1:2], alone(2.0, 1.0))


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 0.7), ("plms", 0.0), ("dpmpp_2m", 0.0)])
def test_an_image_alone_is_the_image_of_a_batch(mini_v1, sampler, eta):
    """The original's image k depended on the batch size, the sampler and all images before it."""
    conds = torch.randn(3, 77, 768, generator=torch.Generator().manual_seed(0))
    uncond = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(1))
    batch = sample(Denoiser(mini_v1, conds, uncond, 2.0), sampler, 6, image_noise(42, 43, 44), eta)
    for k in range(3):
        denoiser = Denoiser(mini_v1, conds[k : k + 1], uncond, 2.0)
        alone = sample(denoiser, sampler, 6, image_noise(42 + k), eta)
        torch.testing.assert_close(alone[0], batch[k], rtol=0, atol=1e-4 * batch[k].std().item())
    assert (batch[0] - batch[1]).abs().max() > batch.std()


def test_seeds_differ_in_their_start_and_in_their_steps():
    first, second = image_noise(1), image_noise(2)
    draws = [
        first.start(),
        first(2.0, 1.0),
        first(1.0, 0.5),
        second.start(),
        second(2.0, 1.0),
        second(1.0, 0.5),
    ]
    for i, draw in enumerate(draws):
        assert draw.mean().abs() < 0.3
        assert draw.std().item() == pytest.approx(1, abs=0.2)
        assert not any(torch.equal(draw, other) for other in draws[:i])


def test_seeds_beyond_32_bits_differ():
    """torch's CPU generator reads 32 bits of a seed: seeds that share them made the same image."""
    seeds = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**33 + 1, 2**40 + 1, MAX_SEED - 1, MAX_SEED]
    starts = image_noise(*seeds).start()
    for i in range(len(seeds)):
        assert not any(torch.equal(starts[i], starts[j]) for j in range(i))
    assert torch.equal(starts[3:4], image_noise(2**32).start())


def test_small_seeds_are_torchs():
    expected = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(42))
    assert torch.equal(image_noise(42).start(), expected)


@pytest.mark.parametrize("fixed_code", [False, True])
@pytest.mark.parametrize(
    ("sampler", "eta", "steps", "draws"),
    [
        ("ddim", 0.0, 7, 8),
        ("ddim", 0.5, 7, 8),
        ("plms", 0.0, 7, 9),
        ("dpmpp_2m", 0.0, 7, 1),
        ("plms", 0.0, 1, 3),
    ],
)
def test_one_stream_with_the_originals_unused_draws(sampler, eta, steps, draws, fixed_code):
    """The original drew in every DDIM and PLMS step and multiplied by zero; the next batch comes after."""
    shape = (2, 3, 4, 5)
    code = torch.randn(shape, generator=torch.Generator().manual_seed(9)) if fixed_code else None
    noise, denoiser = (
        compvis_noise(3, shape, code),
        Denoiser(NormalData(), torch.zeros(2, 3, 1, 1), None, 1.0),
    )
    reference = torch.Generator().manual_seed(3)
    for _ in range(2):
        sample(denoiser, sampler, steps, noise, eta)
        for _ in range(draws - fixed_code):
            torch.randn(shape, generator=reference)
        assert torch.equal(noise.generator.get_state(), reference.get_state())


def test_one_stream_starts_with_its_first_draw():
    expected = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(compvis_noise(3, (2, 3, 4, 5)).start(), expected)


def test_a_fixed_code_is_cut_to_a_smaller_batch():
    code = torch.randn(3, 4, 8, 8)
    assert torch.equal(compvis_noise(0, (2, 4, 8, 8), code).start(), code[:2])


# --- the noise of a run's batches

BATCHES = [Batch(("a", "b"), first=0), Batch(("c",), first=2)]


def test_image_k_of_a_run_has_seed_plus_k():
    noise_of = noise_source("image", MAX_SEED, (4, 8, 8), False, CPU, 2)
    assert torch.equal(noise_of(BATCHES[0]).start(), image_noise(MAX_SEED, 0).start())
    assert torch.equal(noise_of(BATCHES[1]).start(), image_noise(1).start())


def test_compvis_batches_share_a_stream():
    noise_of = noise_source("compvis", 3, (4, 8, 8), False, CPU, 2)
    reference = torch.Generator().manual_seed(3)
    for batch in BATCHES:
        expected = torch.randn(len(batch), 4, 8, 8, generator=reference)
        assert torch.equal(noise_of(batch).start(), expected)


@pytest.mark.parametrize("rng", ["image", "compvis"])
def test_a_fixed_code_starts_every_batch(rng):
    noise_of = noise_source(rng, 3, (4, 8, 8), True, CPU, 2)
    first, second = (noise_of(batch) for batch in BATCHES)
    start = first.start()
    assert torch.equal(second.start(), start[:1])
    assert not torch.equal(first(2.0, 1.0)[:1], second(2.0, 1.0))


def test_with_a_fixed_code_the_first_step_does_not_draw_the_start_again():
    """Then eta > 0 only scales the start instead of adding noise to it."""
    noise = noise_source("image", 3, (4, 8, 8), True, CPU, 2)(BATCHES[0])
    start = noise.start()
    assert not torch.equal(noise(2.0, 1.0), start)
