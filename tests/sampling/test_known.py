"""Keeping a known part of the latents: the original's loop, every sampler, strengths of single pixels."""

import math

import pytest
import torch
from closed_form import NormalData, image_noise
from tiny_sampling import contexts, normal, tiny_model
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.sampling import SAMPLERS, Denoiser, catalogue, default_trajectory, sample
from ldm.sampling.known import KnownRegion, joining_levels

LEFT = torch.zeros(1, 1, 8, 8)
LEFT[..., :4] = 1


def region(mask: Tensor, latents: Tensor, noise: Tensor, sigmas=(14.6, 3.0, 0.0)) -> KnownRegion:
    return KnownRegion(latents, noise, joining_levels(mask, sigmas))


def test_the_step_at_which_a_strength_joins() -> None:
    """At step k of n everything from 1 - k / n on is free, 1 always and 0 never."""
    sigmas = (10.0, 5.0, 2.0, 1.0, 0.0)
    strengths = {1.0: math.inf, 0.99: 5, 0.75: 5, 0.74: 2, 0.5: 2, 0.25: 1, 0.24: -1, 0.0: -1}
    levels = joining_levels(torch.tensor(list(strengths)), sigmas)
    assert levels.tolist() == list(strengths.values())
    thirds = joining_levels(torch.tensor([1 / 3, 2 / 3]), sigmas[1:])
    assert thirds.tolist() == [1, 2]
    assert joining_levels(torch.tensor([1.0, 0.5, 0.0]), (10.0, 0.0)).tolist() == [math.inf, -1, -1]


def test_every_model_call_sees_the_known_part_at_its_level() -> None:
    latents, noise, x = normal(1, 4, 8, 8), normal(1, 4, 8, 8, seed=1), normal(1, 4, 8, 8, seed=2)
    seen = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        seen.append(x)
        return x * 0.5

    known = region(LEFT, latents, noise)
    x0 = known.denoiser(denoise)(x, 2.0)
    assert torch.equal(seen[0][..., :4], x[..., :4])
    assert torch.equal(seen[0][..., 4:], (latents + 2.0 * noise)[..., 4:])
    assert torch.equal(x0[..., :4], x[..., :4] * 0.5)
    assert torch.equal(x0[..., 4:], latents[..., 4:])


def test_ddim_is_the_originals_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `mask` and `x0`: img = q_sample(x0, t) * mask + (1 - mask) * img before each step, on noise that is
    equal in all steps; the free part sees the known one through the UNet.
    """
    model, (cond, uncond) = tiny_model(), contexts(2)
    latents, noise = normal(1, 4, 8, 8), image_noise(7)
    plain = model.q_sample
    monkeypatch.setattr(model, "q_sample", lambda x0, t, _=None: plain(x0, t, noise.start()))
    guidance = {"unconditional_guidance_scale": 5.0, "unconditional_conditioning": uncond}
    expected, _ = DDIMSampler(model).sample(
        10, 1, (4, 8, 8), cond, mask=1 - LEFT, x0=latents, x_T=noise.start(), **guidance
    )
    denoiser = Denoiser(model, cond, uncond, 5.0)
    run = default_trajectory(denoiser, "ddim", 10)
    with torch.inference_mode():
        known = region(LEFT, latents, noise.start(), run.sigmas)
        found = sample(denoiser, "ddim", run, noise, known=known)
        unmasked = sample(denoiser, "ddim", run, image_noise(7))
    torch.testing.assert_close(found[..., :4], expected[..., :4], rtol=0, atol=1e-4)
    assert torch.equal(found[..., 4:], latents[..., 4:])
    assert (found - unmasked)[..., :4].abs().max() > 1e-2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_keeps_what_is_known(sampler: str) -> None:
    """Finite everywhere, the known part as it was, and the rest as without a mask where a model's answers for
    a latent do not depend on others.
    """
    brownian = catalogue.SAMPLERS[sampler].noise == "brownian"

    def latents(mask: Tensor | None) -> Tensor:
        model = NormalData()
        denoiser = Denoiser(model, torch.full((2, 4, 1, 1), 0.3), None, 1.0)
        run = default_trajectory(denoiser, sampler, 6)
        noise = image_noise(1, 2, brownian=brownian)
        known = None if mask is None else region(mask, image, noise.start(), run.sigmas)
        return sample(denoiser, sampler, run, noise, known=known).float()

    image, mask = normal(2, 4, 8, 8), LEFT.expand(2, -1, -1, -1)
    found, plain = latents(mask), latents(None)
    assert found.isfinite().all()
    assert torch.equal(found[..., 4:], image[..., 4:])
    # an adaptive sampler's steps follow the error of all latents
    tolerance = 0.1 if catalogue.SAMPLERS[sampler].adaptive else 1e-5
    torch.testing.assert_close(found[..., :4], plain[..., :4], rtol=0, atol=tolerance)
    assert torch.equal(latents(torch.ones(2, 1, 8, 8)), plain)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun", "euler_ancestral"])
def test_the_larger_a_strength_the_larger_the_change(sampler: str) -> None:
    """Of data around 0.3 an image of 2 that joins at a later step comes less far."""
    strengths = torch.linspace(0, 0.5, 6)
    mask = strengths.repeat(64, 1)[None, None]
    denoiser = Denoiser(NormalData(), torch.full((1, 4, 1, 1), 0.3), None, 1.0)
    run, noise = default_trajectory(denoiser, sampler, 20), image_noise(3, shape=(4, 64, 6))
    image = torch.full((1, 4, 64, 6), 2.0)
    known = KnownRegion(image, noise.start(), joining_levels(mask, run.sigmas))
    found = sample(denoiser, sampler, run, noise, known=known)
    change = (image - found).mean(dim=(0, 1, 2))
    assert change[0] == 0
    assert (change.diff() > 0).all(), change


def test_a_latent_joins_at_the_level_of_its_step() -> None:
    """An image that was noised one level too far, as the original does, was left with that noise where it
    joined at the end.
    """
    denoiser = Denoiser(NormalData(std=1e6), torch.zeros(1, 4, 1, 1), None, 1.0)  # it returns x
    run, noise = default_trajectory(denoiser, "ddim", 10), image_noise(3)
    image = normal(1, 4, 8, 8)
    known = KnownRegion(image, noise.start(), joining_levels(torch.full((1, 1, 8, 8), 0.1), run.sigmas))
    found = sample(denoiser, "ddim", run, noise, init=image, known=known)
    last = run.sigmas[-2]
    expected = (image + last * noise.start()) * (1 + run.sigmas[-1] ** 2) ** -0.5
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-3)
