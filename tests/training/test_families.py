"""What each family's UNet is given in training."""

import numpy as np
import pytest
import torch
from tiny_training import DEPTH, INPAINTING, SECOND_STAGE, TRAINING, UPSCALER

from ldm.images.pixels import to_float
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.scenes.scene import Scene, Solid
from ldm.training.config import training_config
from ldm.training.dataset import random_crops, render_scenes
from ldm.training.families import concat_channels, conditions, example_of, masked, plain
from ldm.util import instantiate_from_config

SCENE = Scene(Solid("cube", "red"), "right of", Solid("sphere", "blue"), "grey")


def built(config: dict) -> LatentDiffusion:
    torch.manual_seed(0)
    return instantiate_from_config(config)


@pytest.fixture(params=[INPAINTING, DEPTH, UPSCALER], ids=["inpainting", "depth", "upscaler"])
def model(request: pytest.FixtureRequest) -> LatentDiffusion:
    return built(request.param)


@torch.no_grad()
def given(model: LatentDiffusion, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Images, maps and further channels of three examples."""
    config = training_config(TRAINING | {"images": 3})
    images, _, maps = render_scenes(config, example_of(model))
    x = to_float(images)
    side = 32 // model.first_stage_model.factor
    generator = torch.Generator().manual_seed(seed)
    return x, maps, concat_channels(model, x, maps, (side, side), generator)


def test_the_channels_are_those_that_the_unet_takes(model: LatentDiffusion) -> None:
    _, _, concat = given(model)
    unet = model.model.diffusion_model
    assert concat.shape[1] == unet.in_channels - model.channels
    cond = conditions(model, torch.zeros(3, 77, 8), concat, torch.Generator().manual_seed(0))
    x = torch.zeros(3, model.channels, *concat.shape[2:])
    assert model.apply_model(x, torch.zeros(3), cond).shape == x.shape


def test_a_mask_is_followed_by_the_latents_of_what_it_leaves() -> None:
    model = built(INPAINTING)
    x, maps, concat = given(model)
    assert set(maps.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(concat[:, :1], maps[:, :, ::8, ::8])
    with torch.no_grad():
        mean = model.scale_factor * model.encode_first_stage(x * (maps < 0.5)).mean
        std = model.scale_factor * model.encode_first_stage(x * (maps < 0.5)).std
    draws = (concat[:, 1:] - mean) / std
    assert 0.7 < draws.std() < 1.3
    assert torch.equal(concat, given(model)[2])
    assert not torch.equal(concat, given(model, seed=1)[2])


def test_some_captions_are_about_the_masked_solid_alone() -> None:
    rng = np.random.default_rng(0)
    captions = [masked(SCENE, rng, 32)[1] for _ in range(60)]
    alone = [words for words in captions if ("cube" in words) != ("sphere" in words or "ball" in words)]
    assert 5 < len(alone) < 30
    assert not any("background" in words for words in alone)


def test_a_depth_map_fills_its_range() -> None:
    _, maps, concat = given(built(DEPTH))
    assert maps.min() > 0
    assert concat.amin((1, 2, 3)) == pytest.approx(-1, abs=1e-3)
    assert concat.amax((1, 2, 3)) == pytest.approx(1, abs=0.04)


def test_an_upscaler_is_given_the_small_image_with_noise_of_its_level() -> None:
    model = built(UPSCALER)
    x, maps, concat = given(model)
    assert maps is None
    assert torch.allclose(concat, torch.nn.functional.avg_pool2d(x, 4), atol=1e-6)
    many = torch.zeros(4000, 3, 4, 4)
    cond = conditions(model, torch.zeros(4000, 1, 8), many, torch.Generator().manual_seed(0))
    levels, (noise,) = cond["c_adm"], cond["c_concat"]
    assert 0 <= levels.min() < 5
    assert 340 < levels.max() <= 350
    assert (levels < 22).float().mean() == pytest.approx(0.5, abs=0.03), "low levels are seen more often"
    for low, high in ((0, 20), (300, 350)):
        chosen = (levels >= low) & (levels <= high)
        expected = model.low_scale_model.sqrt_one_minus_alphas_cumprod[levels[chosen]].square().mean().sqrt()
        assert noise[chosen].std() == pytest.approx(expected.item(), rel=0.05)


def test_a_model_of_text_alone_is_given_nothing_else() -> None:
    model = built(SECOND_STAGE)
    assert example_of(model) is plain
    _, maps, concat = given(model)
    assert maps is None
    assert concat is None
    context = torch.zeros(3, 77, 8)
    assert conditions(model, context, None, torch.Generator()) is context


def test_crops_are_parts_of_their_images() -> None:
    images = torch.arange(2 * 12 * 12 * 1).reshape(2, 12, 12, 1)
    crops = random_crops(images, 4, torch.Generator().manual_seed(0))
    assert crops.shape == (2, 4, 4, 1)
    for image, crop in zip(images, crops, strict=True):
        top, left = divmod(int(crop[0, 0, 0] - image[0, 0, 0]), 12)
        assert torch.equal(crop, image[top : top + 4, left : left + 4])
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert random_crops(images, 0, generator) is images
    assert torch.equal(generator.get_state(), state), "whole images cost no random number"
