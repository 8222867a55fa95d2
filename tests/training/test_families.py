"""What each family's UNet is given in training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_training import DEPTH, INPAINTING, SECOND_STAGE, UPSCALER

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.scenes.source import Scenes
from ldm.training.data.images import tensors
from ldm.training.families import concat_channels, conditions, has_channels
from ldm.util import instantiate_from_config

FAMILIES = {"inpainting": (INPAINTING, "masked"), "depth": (DEPTH, "deep"), "upscaler": (UPSCALER, "plain")}


def built(config: dict[str, Any]) -> LatentDiffusion:
    torch.manual_seed(0)
    return instantiate_from_config(config)


def drawing(count: int, seed: int = 0) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(count, *shape, generator=generator)


def examples(family: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Images [3, 3, 32, 32] of scenes and their maps."""
    scenes = Scenes(seed=0, images=3, image_size=32, family=family)
    rows = [tensors(scenes[k]) for k in range(3)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return batch.pop("image"), batch


@torch.no_grad()
def given(model: LatentDiffusion, family: str, seed: int = 0, **more: torch.Tensor) -> torch.Tensor | None:
    x, maps = examples(family)
    side = 32 // model.first_stage_model.factor
    return concat_channels(model, x, maps | more, (side, side), drawing(3, seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_channels_are_those_that_the_unet_takes(name: str) -> None:
    config, family = FAMILIES[name]
    model = built(config)
    concat = given(model, family)
    assert has_channels(model)
    assert concat.shape[1] == model.model.diffusion_model.in_channels - model.channels
    uniform = torch.Generator().manual_seed(0)
    cond = conditions(
        model, torch.zeros(3, 77, 8), concat, lambda: torch.rand(3, generator=uniform), drawing(3)
    )
    x = torch.zeros(3, model.channels, *concat.shape[2:])
    assert model.apply_model(x, torch.zeros(3), cond).shape == x.shape


@torch.no_grad()
def test_a_mask_is_followed_by_the_latents_of_what_it_leaves() -> None:
    model = built(INPAINTING)
    x, maps = examples("masked")
    concat = given(model, "masked")
    assert torch.equal(concat[:, :1], maps["mask"][:, :, ::8, ::8])
    posterior = model.encode_first_stage(x * (maps["mask"] < 0.5))
    noise = drawing(3)(4, 4, 4)
    expected = model.scale_factor * (posterior.mean + posterior.std * noise)
    assert torch.allclose(concat[:, 1:], expected, atol=1e-6)
    assert not torch.equal(concat, given(model, "masked", seed=1))


def test_an_inpainting_model_needs_masks() -> None:
    with pytest.raises(InputError, match="an inpainting model is trained with masks: set `masks: true`"):
        given(built(INPAINTING), "plain")


def test_a_depth_map_fills_its_range() -> None:
    concat = given(built(DEPTH), "deep")
    assert concat.amin((1, 2, 3)) == pytest.approx(-1, abs=1e-3)
    assert concat.amax((1, 2, 3)) == pytest.approx(1, abs=0.04)


@torch.no_grad()
def test_a_depth_that_is_not_there_is_estimated() -> None:
    model = built(DEPTH)
    x, _ = examples("plain")
    expected = model.depth_channel(model.estimate_depth(x), (4, 4))
    assert torch.equal(given(model, "plain"), expected)
    assert not torch.allclose(given(model, "deep"), expected)


def test_an_upscaler_is_given_the_small_image_with_noise_of_its_level() -> None:
    model = built(UPSCALER)
    x, _ = examples("plain")
    assert torch.allclose(given(model, "plain"), F.avg_pool2d(x, 4), atol=1e-6)
    own = torch.rand(3, 3, 8, 8)
    assert torch.equal(given(model, "plain", small=own), own)
    generator = torch.Generator().manual_seed(0)
    many = torch.zeros(4000, 3, 4, 4)
    cond = conditions(
        model,
        torch.zeros(4000, 1, 8),
        many,
        lambda: torch.rand(4000, generator=generator),
        drawing(4000, 1),
    )
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
    assert not has_channels(model)
    assert given(model, "plain") is None
    context = torch.zeros(3, 77, 8)
    assert conditions(model, context, None, drawing(3), drawing(3)) is context
