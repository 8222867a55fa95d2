"""From a model to `denoise(x, sigma) -> x0`: guidance, its limits, conditioning, zero terminal SNR."""

from collections.abc import Sequence

import pytest
import tiny
import torch
from closed_form import V1, V1_ALPHAS, NormalData, compvis_noise
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from ldm.errors import InputError
from ldm.pipeline.generate import Settings, generate, guidance_interval
from ldm.sampling import Denoiser, Trajectory, default_trajectory, sample, trajectory
from ldm.sampling.batches import Batch
from ldm.sampling.denoiser import rescale_guidance, stack
from ldm.sampling.schedule import linspace, trailing, zero_terminal_snr
from ldm.util import instantiate_from_config

COND, UNCOND = torch.full((2, 3, 1, 1), 0.3), torch.full((2, 3, 1, 1), -0.1)


def latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- guidance


@pytest.mark.parametrize(
    ("scale", "negative", "rows"),
    [(1.0, True, 2), (7.5, False, 2), (7.5, True, 4), (0.0, True, 4), (0.999, True, 4)],
)
def test_guidance_doubles_the_batch_unless_the_scale_is_1(scale, negative, rows):
    model = NormalData()
    denoise = Denoiser(model, COND, UNCOND if negative else None, scale)
    x = latents(2, 3, 4, 5) * 3
    x0 = denoise(x, 3.0)
    assert model.batches == [rows]
    guided = -0.1 + scale * 0.4 if rows == 4 else 0.3
    torch.testing.assert_close(x0, model.x0(x, V1.sigma(V1.timestep(3.0)), guided), rtol=0, atol=1e-5)


@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescaled_guidance_is_diffusers(phi):
    guided, cond = latents(2, 4, 8, 8) * 5, latents(2, 4, 8, 8, seed=1)
    expected = rescale_noise_cfg(guided, cond, guidance_rescale=phi)
    torch.testing.assert_close(rescale_guidance(guided, cond, phi), expected, rtol=1e-5, atol=1e-6)


def test_fully_rescaled_guidance_has_the_deviation_of_each_conditional_output():
    guided, cond = latents(2, 4, 8, 8) * 5, latents(2, 4, 8, 8, seed=1)
    cond[1] *= 2
    rescaled = rescale_guidance(guided, cond, 1.0)
    torch.testing.assert_close(rescaled.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_the_denoiser_rescales_what_the_model_put_out(parameterization):
    model = NormalData(parameterization=parameterization)
    x, sigma = latents(2, 3, 4, 5) * 3, V1.sigma(500)
    c_in = (1 + sigma**2) ** -0.5
    means = latents(2, 3, 4, 5, seed=1), latents(2, 3, 4, 5, seed=2)
    cond, uncond = (model.apply_model(x * c_in, torch.full((2,), 500.0), mean).float() for mean in means)
    output = rescale_noise_cfg(uncond + 7.5 * (cond - uncond), cond, guidance_rescale=0.7)
    expected = x - sigma * output if parameterization == "eps" else (x * c_in - sigma * output) * c_in
    x0 = Denoiser(model, *means, 7.5, rescale=0.7)(x, sigma)
    torch.testing.assert_close(x0, expected, rtol=0, atol=1e-5)
    assert (Denoiser(model, *means, 7.5)(x, sigma) - x0).abs().max() > 0.1


def test_without_guidance_nothing_is_rescaled():
    x = latents(2, 3, 4, 5) * 3
    plain, rescaled = (Denoiser(NormalData(), COND, UNCOND, 1.0, rescale=phi)(x, 3.0) for phi in (0.0, 0.7))
    assert torch.equal(plain, rescaled)


# --- guidance in a part of the run


def rows(sampler: str, run: Trajectory, start: float, end: float) -> list[int]:
    """Rows of each model call for a batch of 1: 2 where it is guided."""
    model = NormalData()
    denoiser = Denoiser(model, COND[:1], UNCOND[:1], 5.0, interval=guidance_interval(run, start, end))
    sample(denoiser, sampler, run, compvis_noise(0, (1, 3, 4, 5)))
    return model.batches


@pytest.mark.parametrize(
    ("start", "end", "guided"),
    [
        (0.0, 1.0, range(10)),
        (0.2, 0.8, range(2, 8)),
        (0.0, 0.5, range(5)),
        (0.3, 1.0, range(3, 10)),
        (0.25, 0.75, range(3, 8)),  # step i of 10 is at i / 10
        (0.29, 0.31, range(3, 4)),
        (0.7, 0.8, range(7, 8)),  # 0.7 x 10 is a little above 7 in binary
    ],
)
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_guidance_is_limited_to_a_part_of_the_steps(sampler, start, end, guided):
    run = trajectory(linspace(V1, 10))
    assert rows(sampler, run, start, end) == [2 if step in guided else 1 for step in range(10)]


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.2, 0.8), (0.0, 0.5)])
@pytest.mark.parametrize(("sampler", "at_the_end"), [("heun", True), ("dpm_2", False), ("dpmpp_sde", False)])
def test_second_calls_go_by_their_own_level(sampler, at_the_end, start, end):
    """Heun's is at the next step's level, a midpoint is within its own step; the last step has none."""
    run = trajectory(linspace(V1, 10))
    calls = [step + second for step in range(10) for second in (0, 1 if at_the_end else 0.5)][:-1]
    guided = [2 if start * 10 <= call < end * 10 else 1 for call in calls]
    assert rows(sampler, run, start, end) == guided


def test_guidance_of_a_whole_run_reaches_beyond_its_ends():
    """A sampler that adds noise first, or aims below the last level, is guided there, too."""
    run = trajectory(linspace(V1, 10))
    low, high = guidance_interval(run, 0.0, 1.0)
    assert low < 0
    assert high > 1e9
    assert guidance_interval(run, 0.2, 0.8) == (run.sigmas[8], run.sigmas[2])


def test_the_parts_of_an_image_to_image_run_are_its_own():
    run = trajectory(linspace(V1, 20), 10)
    assert rows("euler", run, 0.2, 0.8) == [1, 1, 2, 2, 2, 2, 2, 2, 1, 1]


# --- conditioning


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


def tiny_model(changes: dict | None = None):
    model = instantiate_from_config(tiny.model_section(changes or {}))
    model.load_state_dict(tiny.state_dict())
    return model.eval().requires_grad_(False)


def test_a_dict_and_a_tensor_give_the_same_image():
    model = tiny_model()
    cond, uncond = latents(2, 77, 32).split(1)
    plain, nested = (
        sample(denoiser, "ddim", default_trajectory(denoiser, "ddim", 2), compvis_noise(0, (1, 4, 8, 8)))
        for denoiser in (
            Denoiser(model, cond, uncond, 5.0),
            Denoiser(model, {"c_crossattn": [cond]}, {"c_crossattn": [uncond]}, 5.0),
        )
    )
    assert torch.equal(plain, nested)


# --- zero terminal SNR


def mean_and_std(model: NormalData, mean: float) -> Sequence[float]:
    denoiser = Denoiser(model, torch.full((1, 1, 1, 1), mean), None, 1.0)
    run = trajectory(trailing(denoiser.discretization, 100))
    out = sample(denoiser, "ddim", run, compvis_noise(0, (1, 1, 100, 100)))
    return out.mean().item(), out.std().item()


def test_only_from_true_noise_the_brightness_is_right():
    """At v1's last timestep 7 % of the picture shows, but a run starts without it: it comes out too grey."""
    for parameterization in ("eps", "v"):
        mean, _ = mean_and_std(NormalData(std=0.5, parameterization=parameterization), 4.0)
        assert mean == pytest.approx(4.0 * (1 - 0.5 / V1.sigma(999)), abs=0.02)
    rescaled = NormalData(std=0.5, parameterization="v", alphas=zero_terminal_snr(V1_ALPHAS))
    mean, std = mean_and_std(rescaled, 4.0)
    assert mean == pytest.approx(4.0, abs=0.01)
    assert std == pytest.approx(0.5, abs=0.02)


def run_tiny(changes: dict, **settings) -> list:
    batches = [Batch(("a cat",), (0,))]
    return list(generate(tiny_model(changes), batches, Settings(height=16, width=16, steps=4, **settings)))


def test_zero_snr_is_refused_to_an_eps_model():
    with pytest.raises(InputError, match="v-prediction"):
        run_tiny({}, zero_snr=True, schedule="trailing")


def test_zero_snr_samples_with_a_v_model():
    changes = {"parameterization": "v"}
    ((_, (plain,)),), ((_, (rescaled,)),) = (
        run_tiny(changes, zero_snr=zero_snr, schedule="trailing") for zero_snr in (False, True)
    )
    assert plain.shape == rescaled.shape == (16, 16, 3)
    assert (plain != rescaled).any()
