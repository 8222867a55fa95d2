"""From a model to `denoise(x, sigma) -> x0`: guidance, its limits, conditioning, zero terminal SNR."""

from collections.abc import Sequence

import pytest
import tiny
import torch
from closed_form import V1, V1_ALPHAS, NormalData, compvis_noise, image_noise
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from ldm.sampling import (
    Denoiser,
    Discretization,
    Trajectory,
    default_trajectory,
    guidance_interval,
    same_length,
    sample,
)
from ldm.sampling.denoiser import (
    equal_but_for_context,
    has_equal_halves,
    model_input,
    rescale_guidance,
    stack,
    timestep_of,
    timesteps,
    to_x0,
)
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


def test_fully_rescaled_guidance_has_the_standard_deviation_of_each_conditional_output():
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


# --- a scale for each image


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_images_of_a_batch_may_differ_in_their_scale(parameterization, rescale):
    model, x = NormalData(parameterization=parameterization), latents(3, 3, 4, 5) * 3
    cond, uncond = latents(3, 3, 4, 5, seed=1), latents(3, 3, 4, 5, seed=2)
    scales = [7.5, 1.0, 3.0]
    batch = Denoiser(model, cond, uncond, scales, rescale=rescale)(x, 3.0)
    for k, scale in enumerate(scales):
        row = slice(k, k + 1)
        alone = Denoiser(model, cond[row], uncond[row], scale, rescale=rescale if scale != 1.0 else 0.0)
        torch.testing.assert_close(batch[row], alone(x[row], 3.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_equal_scales_are_one_scale(scale):
    """To the bit, and without a second half of the batch where it is 1."""
    model, x = NormalData(), latents(2, 3, 4, 5) * 3
    one = Denoiser(model, COND, UNCOND, scale)(x, 3.0)
    assert torch.equal(Denoiser(model, COND, UNCOND, [scale, scale])(x, 3.0), one)
    assert model.batches == ([2, 2] if scale == 1.0 else [4, 4])


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
    run = Trajectory.of(linspace(V1, 10))
    assert rows(sampler, run, start, end) == [2 if step in guided else 1 for step in range(10)]


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.2, 0.8), (0.0, 0.5)])
@pytest.mark.parametrize(("sampler", "at_the_end"), [("heun", True), ("dpm_2", False), ("dpmpp_sde", False)])
def test_second_calls_go_by_their_own_level(sampler, at_the_end, start, end):
    """Heun's is at the next step's level, a midpoint is within its own step; the last step has none."""
    run = Trajectory.of(linspace(V1, 10))
    calls = [step + second for step in range(10) for second in (0, 1 if at_the_end else 0.5)][:-1]
    guided = [2 if start * 10 <= call < end * 10 else 1 for call in calls]
    assert rows(sampler, run, start, end) == guided


def test_guidance_of_a_whole_run_reaches_beyond_its_ends():
    """A sampler that adds noise first, or aims below the last level, is guided there, too."""
    run = Trajectory.of(linspace(V1, 10))
    low, high = guidance_interval(run, 0.0, 1.0)
    assert low < 0
    assert high > 1e9
    assert guidance_interval(run, 0.2, 0.8) == (run.sigmas[8], run.sigmas[2])


def test_the_parts_of_an_image_to_image_run_are_its_own():
    run = Trajectory.of(linspace(V1, 20), 10)
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


def test_contexts_of_different_lengths_are_repeated_to_their_common_multiple():
    short, middle, long = torch.rand(1, 2, 6), torch.rand(1, 3, 6), torch.rand(2, 6, 6)
    repeated = same_length([short, middle, long])
    assert torch.equal(repeated[0], torch.cat([short] * 3, dim=1))
    assert torch.equal(repeated[1], torch.cat([middle] * 2, dim=1))
    assert repeated[2] is long
    assert [c.shape for c in same_length([short, middle])] == [(1, 6, 6), (1, 6, 6)]


def test_conditions_of_different_lengths_stack():
    """Cross-attention only: what is concatenated to the latents, and class labels, stay as they are."""
    uncond, cond = torch.rand(1, 2, 6), torch.rand(3, 4, 6)
    stacked = stack(uncond, cond)
    assert torch.equal(stacked[:3], uncond.repeat(1, 2, 1).expand(3, 4, 6))
    assert torch.equal(stacked[3:], cond)
    latent, label = torch.rand(3, 1, 4, 5), torch.rand(3, 7)
    both = stack(
        {"c_crossattn": [uncond], "c_concat": [latent], "c_adm": label},
        {"c_crossattn": [cond], "c_concat": [latent], "c_adm": label},
    )
    assert torch.equal(both["c_crossattn"][0], stacked)
    assert torch.equal(both["c_concat"][0], torch.cat([latent, latent]))
    assert torch.equal(both["c_adm"], torch.cat([label, label]))


def test_several_contexts_of_different_lengths_are_joined_first():
    """Repeating one of them alone would give its tokens more weight."""
    uncond, cond = [torch.rand(1, 2, 6), torch.rand(1, 2, 6)], [torch.rand(1, 2, 6), torch.rand(1, 6, 6)]
    (stacked,) = stack(uncond, cond)
    assert torch.equal(stacked[0], torch.cat([*uncond, *uncond], dim=1)[0])
    assert torch.equal(stacked[1], torch.cat(cond, dim=1)[0])


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


def test_a_repeated_context_is_the_same_condition():
    """Softmax shares a key's weight among its copies."""
    model, x = tiny_model(), latents(1, 4, 8, 8)
    context = latents(1, 77, 32)
    once, thrice = (Denoiser(model, c, None, 1.0)(x * 3, 3.0) for c in (context, context.repeat(1, 3, 1)))
    torch.testing.assert_close(thrice, once, rtol=0, atol=1e-5 * once.std().item())


def test_the_condition_stays_the_same_object_from_step_to_step():
    """Its keys and values are kept by identity."""
    given = []

    class Recording(NormalData):
        def apply_model(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            given.append(cond)
            return super().apply_model(x, t, cond)

    for uncond in (UNCOND, None):
        denoiser = Denoiser(Recording(), COND, uncond, [7.5, 3.0])
        for sigma in (10.0, 5.0, 1.0):
            denoiser(latents(2, 3, 4, 5), sigma)
    assert len({id(cond) for cond in given[:3]}) == 1
    assert all(cond is COND for cond in given[3:])


def test_the_host_knows_what_a_call_is_for():
    """Reading the timestep from a GPU, or comparing halves there, waits for it."""
    cpu = torch.device("cpu")
    times = timesteps(500.1, 4, cpu, equal_halves=True)
    assert times is timesteps(500.1, 4, cpu, equal_halves=True)
    assert times is not timesteps(500.1, 4, cpu)
    assert timestep_of(times) == times.max().item()
    assert timestep_of(torch.tensor([3.0, 7.0])) == 7.0
    assert has_equal_halves(times)
    assert not has_equal_halves(timesteps(500.1, 4, cpu))
    assert not has_equal_halves(torch.full((4,), 500.1))


def test_conditions_that_differ_beyond_the_context():
    a, b = torch.rand(2, 1, 5, 6)
    latent, label = torch.rand(1, 1, 4, 5), torch.tensor([7])
    cond = {"c_crossattn": [a], "c_concat": [latent], "c_adm": label}
    assert equal_but_for_context({**cond, "c_crossattn": [b]}, cond, "hybrid-adm")
    assert equal_but_for_context({**cond, "c_concat": [latent.clone()]}, cond, "hybrid-adm")
    assert not equal_but_for_context({**cond, "c_concat": [latent + 1]}, cond, "hybrid-adm")
    assert not equal_but_for_context({**cond, "c_adm": label + 1}, cond, "hybrid-adm")
    assert equal_but_for_context(a, b, "crossattn")
    assert not equal_but_for_context(a, b, "concat")


@pytest.mark.parametrize("scale", [None, 7.5])
@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_numbers_and_tensors_give_the_same_bits(parameterization, scale):
    """A recorded step reads them from tensors."""
    x, sigma, rows = latents(2, 4, 8, 8) * 3, 2.7, 2 if scale is None else 4
    c_in, output = (1 + sigma**2) ** -0.5, latents(rows, 4, 8, 8, seed=1)

    def step(*numbers):
        c_in, sigma, scale = numbers
        x_model = model_input(x, c_in, scale is not None)
        return x_model, to_x0(parameterization, x, x_model, output, c_in, sigma, scale, 0.7)

    found = step(*(None if number is None else torch.tensor(number) for number in (c_in, sigma, scale)))
    assert all(map(torch.equal, found, step(c_in, sigma, scale)))


def test_a_model_may_take_a_whole_step_its_own_way():
    model, taken = NormalData(), []
    x = latents(2, 3, 4, 5) * 3
    plain = Denoiser(model, COND, UNCOND, 7.5)(x, 3.0)

    def step(x, t, cond, c_in, sigma, scale, rescale):
        taken.append((len(t), scale))
        x_model = model_input(x, c_in, scale is not None)
        output = model.apply_model(x_model, t, cond)
        return to_x0(model.parameterization, x, x_model, output, c_in, sigma, scale, rescale)

    model.denoise_step = step
    assert torch.equal(Denoiser(model, COND, UNCOND, 7.5)(x, 3.0), plain)
    Denoiser(model, COND, UNCOND, 1.0)(x, 3.0)
    assert taken == [(4, 7.5), (2, None)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_an_image_alone_is_denoised_as_in_a_batch(dtype, tolerance):
    """One call, with scales and lengths of context that differ: rounding apart, no row reads another."""
    model, x = tiny_model().to(dtype), latents(3, 4, 8, 8) * 3
    conds = [latents(1, 77 * n, 32, seed=n) for n in (1, 2, 3)]
    unconds = [latents(1, 77, 32, seed=9), latents(1, 154, 32, seed=8), latents(1, 77, 32, seed=7)]
    scales = [3.0, 1.0, 2.0]
    batch = Denoiser(model, torch.cat(same_length(conds)), torch.cat(same_length(unconds)), scales)(x, 1.0)
    for k, (cond, uncond, scale) in enumerate(zip(conds, unconds, scales, strict=True)):
        alone = Denoiser(model, cond, uncond, scale)(x[k : k + 1], 1.0)
        torch.testing.assert_close(batch[k : k + 1], alone, rtol=0, atol=tolerance * alone.std().item())
    assert (batch[0] - batch[1]).abs().max() > batch.std()


# --- zero terminal SNR


def mean_and_std(model: NormalData, mean: float) -> Sequence[float]:
    denoiser = Denoiser(model, torch.full((1, 1, 1, 1), mean), None, 1.0)
    run = Trajectory.of(trailing(denoiser.discretization, 100))
    out = sample(denoiser, "ddim", run, compvis_noise(0, (1, 1, 100, 100)))
    return out.mean().item(), out.std().item()


def test_only_from_true_noise_the_brightness_is_right():
    """At v1's last timestep 7 % of the image shows, but a run starts without it: it comes out too grey."""
    for parameterization in ("eps", "v"):
        mean, _ = mean_and_std(NormalData(std=0.5, parameterization=parameterization), 4.0)
        assert mean == pytest.approx(4.0 * (1 - 0.5 / V1.sigma(999)), abs=0.02)
    rescaled = NormalData(std=0.5, parameterization="v", alphas=zero_terminal_snr(V1_ALPHAS))
    mean, std = mean_and_std(rescaled, 4.0)
    assert mean == pytest.approx(4.0, abs=0.01)
    assert std == pytest.approx(0.5, abs=0.02)


def test_zero_snr_samples_with_a_v_model():
    """The schedule is the denoiser's own: the model's alphas stay as they are."""
    model = tiny_model({"parameterization": "v"})
    rescaled = Discretization(zero_terminal_snr(model.alphas_cumprod.numpy()))
    cond = latents(1, 77, 32)

    def run(discretization: Discretization | None) -> Tensor:
        denoiser = Denoiser(model, cond, None, 1.0, discretization=discretization)
        run = Trajectory.of(trailing(denoiser.discretization, 4))
        return sample(denoiser, "ddim", run, compvis_noise(0, (1, 4, 8, 8)))

    plain, shifted = run(None), run(rescaled)
    assert plain.isfinite().all()
    assert shifted.isfinite().all()
    assert (plain != shifted).any()


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("mean", [0.3, 4.0])
def test_adaptive_steps_sample_the_distribution_of_a_zero_snr_model(mean, eta):
    """From sigma 4096 the steps grew until one leapt from 122 to 0.5: the standard deviation was 0.69."""
    model = NormalData(std=0.5, parameterization="v", alphas=zero_terminal_snr(V1_ALPHAS))
    denoiser = Denoiser(model, torch.full((1, 1, 1, 1), mean), None, 1.0)
    run = Trajectory.of(linspace(denoiser.discretization, 50))
    noise = image_noise(0, shape=(1, 80, 80))
    out = sample(denoiser, "dpm_adaptive", run, noise, options={"eta": eta})
    assert out.mean().item() == pytest.approx(mean, abs=0.035)
    assert out.std().item() == pytest.approx(0.5, abs=0.06)
