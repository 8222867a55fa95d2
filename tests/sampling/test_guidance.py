"""Guidance beyond the classifier-free one: the papers' formulas, image by image."""

import math

import pytest
import torch
from closed_form import V1, NormalData, image_noise
from torch import Tensor

from ldm.sampling import SAMPLERS, Denoiser, Trajectory, sample
from ldm.sampling.guidance import AdaptiveProjection, FurtherGuidance, plus_plus, threshold
from ldm.sampling.schedule import karras

COND, UNCOND = torch.full((2, 3, 1, 1), 0.3), torch.full((2, 3, 1, 1), -0.1)
RUN = Trajectory.of(karras(V1, 6))


def latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


UNCOND_X0, COND_X0 = (latents(2, 4, 8, 8, seed=seed) for seed in range(2))


def test_without_anything_further_it_is_classifier_free_guidance():
    expected = UNCOND_X0 + 7.5 * (COND_X0 - UNCOND_X0)
    torch.testing.assert_close(FurtherGuidance().combine(UNCOND_X0, COND_X0, 7.5), expected)
    whole = FurtherGuidance(projection=AdaptiveProjection())
    torch.testing.assert_close(whole.combine(UNCOND_X0, COND_X0, 7.5), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("eta", "norm", "momentum"), [(0.0, 0.0, 0.0), (0.3, 5.0, 0.0), (0.0, 5.0, -0.5)])
def test_adaptive_projection_is_the_papers(eta, norm, momentum):
    """Over three calls, of vectors, an image at a time."""
    project, running = AdaptiveProjection(eta, norm, momentum), [0.0, 0.0]
    for call in range(3):
        uncond, cond = latents(2, 4, 8, 8, seed=10 + call), latents(2, 4, 8, 8, seed=20 + call)
        found = project(uncond, cond)
        for k in range(2):
            d, c = (cond[k] - uncond[k]).flatten().double(), cond[k].flatten().double()
            running[k] = d + momentum * running[k]
            d = running[k]
            if norm:
                d = d * min(1.0, norm / d.norm().item())
            unit = c / c.norm()
            parallel = (d @ unit) * unit
            expected = (d - parallel) + eta * parallel
            torch.testing.assert_close(found[k].flatten().double(), expected, rtol=0, atol=1e-5)


def test_projected_guidance_is_perpendicular_to_the_conditional_prediction():
    found = AdaptiveProjection(eta=0.0)(UNCOND_X0, COND_X0)
    assert (found * COND_X0).sum((1, 2, 3)).abs().max() < 1e-3
    assert (found - (COND_X0 - UNCOND_X0)).abs().max() > 0.01


def test_the_threshold_gives_each_channel_the_range_of_less_guidance():
    guided, like = 5 * latents(2, 4, 8, 8) + 1, latents(2, 4, 8, 8, seed=1)
    found = threshold(guided, like, 1.0)
    for k in range(2):
        for c in range(4):
            there = (like[k, c] - like[k, c].mean()).abs().max()
            here = (found[k, c] - guided[k, c].mean()).abs().max()
            assert here == pytest.approx(there.item(), rel=1e-4)
    assert torch.allclose(threshold(like, like, 1.0), like, atol=1e-6)


def test_the_threshold_cuts_off_beyond_its_percentile():
    guided, like = 5 * latents(1, 1, 10, 10), latents(1, 1, 10, 10, seed=1)
    found = threshold(guided, like, 0.9)
    distance = (found - guided.mean()).abs().flatten()
    assert (distance > distance.max() * (1 - 1e-5)).sum() == 10  # a tenth of the values lie at the limit


def test_a_mimicked_scale_equal_to_the_scale_changes_nothing():
    plain = FurtherGuidance().combine(UNCOND_X0, COND_X0, 4.0)
    found = FurtherGuidance(mimic_scale=4.0).combine(UNCOND_X0, COND_X0, 4.0)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)


# --- CFG++


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("scale", [0.6, 1.0])
def test_a_falling_scale_makes_cfg_plus_plus(scale, eta):
    """The paper's step: to the guided x0, with noise by the unconditional prediction."""
    denoiser = Denoiser(NormalData(), COND, UNCOND, scale, factor=plus_plus(RUN.sigmas, eta))
    assert denoiser.guided
    found = sample(denoiser, "ddim", RUN, image_noise(0, 1, shape=(3, 4, 5)), options={"eta": eta})

    noise, data = image_noise(0, 1, shape=(3, 4, 5)), NormalData()
    x = noise.start() * math.sqrt(1 + RUN.sigmas[0] ** 2)
    for sigma, sigma_next in zip(RUN.sigmas, RUN.sigmas[1:], strict=False):
        uncond, cond = (data.x0(x, sigma, mean) for mean in (UNCOND, COND))
        up = eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        down = math.sqrt(sigma_next**2 - up**2)
        x = uncond + scale * (cond - uncond) + (x - uncond) / sigma * down
        if up:
            x = x + up * noise(sigma, sigma_next)
    torch.testing.assert_close(found, x, rtol=0, atol=2e-4)


def test_the_factor_is_that_of_the_step_a_level_belongs_to():
    factor = plus_plus([8.0, 4.0, 1.0, 0.0])
    assert [factor(sigma) for sigma in (9.0, 8.0, 5.0, 4.0, 1.0, 0.5)] == pytest.approx(
        [2.0, 2.0, 2.0, 4 / 3, 1.0, 1.0]
    )


# --- in a denoiser


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize("scale", [5.0, [5.0, 3.0]])
def test_the_denoiser_combines_its_models_predictions(parameterization, scale):
    """Projected guidance of each image's exact predictions."""
    model = NormalData(parameterization=parameterization)
    x, sigma = latents(2, 3, 4, 5) * 3, V1.sigma(500)
    further = FurtherGuidance(AdaptiveProjection(0.2, 1.0))
    found = Denoiser(model, COND, UNCOND, scale, further=further)(x, sigma)
    uncond, cond = (model.x0(x, sigma, mean) for mean in (UNCOND, COND))
    scales = torch.tensor(scale).reshape(-1, 1, 1, 1)
    expected = cond + (scales - 1) * AdaptiveProjection(0.2, 1.0)(uncond, cond)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_rescaled_further_guidance_without_more_is_the_plain_one():
    x, sigma = latents(2, 3, 4, 5) * 3, V1.sigma(500)
    for parameterization in ("eps", "v"):
        model = NormalData(parameterization=parameterization)
        plain, further = (
            Denoiser(model, COND, UNCOND, 5.0, rescale=0.7, further=more)(x, sigma)
            for more in (None, FurtherGuidance())
        )
        torch.testing.assert_close(further, plain, rtol=0, atol=1e-4)


def test_nothing_further_happens_where_nothing_guides():
    further, model = FurtherGuidance(AdaptiveProjection(norm=0.1)), NormalData()
    guided = Denoiser(model, COND, UNCOND, 5.0, further=further, interval=(1.0, 4.0))
    plain = Denoiser(model, COND, UNCOND, 5.0, interval=(1.0, 4.0))
    x = latents(2, 3, 4, 5)
    assert torch.equal(guided(x * 8, 8.0), plain(x * 8, 8.0))
    assert (guided(x * 3, 3.0) - plain(x * 3, 3.0)).abs().max() > 0.1


def test_an_image_alone_is_that_of_a_batch():
    def run(rows: slice) -> Tensor:
        further = FurtherGuidance(AdaptiveProjection(0.2, 3.0, -0.5), 3.0, 0.95)
        denoiser = Denoiser(NormalData(), COND[rows], UNCOND[rows], 7.5, further=further)
        x = latents(2, 3, 4, 5)[rows] * RUN.sigmas[0]
        return SAMPLERS["euler"](denoiser, x, RUN.sigmas)

    both = run(slice(0, 2))
    for k in range(2):
        torch.testing.assert_close(run(slice(k, k + 1))[0], both[k], rtol=0, atol=1e-5)
