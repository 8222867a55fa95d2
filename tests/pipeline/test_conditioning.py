"""What the UNet is given besides the latents."""

import pytest
import tiny
import torch
from tiny_sampling import normal, tiny_model
from torch import Tensor

from ldm.errors import FieldError, InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipeline import ImageRequest
from ldm.pipeline.conditioning import check_task, conditions
from ldm.pipeline.settings.text import Reading
from ldm.sampling import Denoiser
from ldm.util import instantiate_from_config

REQUESTS = [ImageRequest("a", scale=3.0), ImageRequest("long b", scale=5.0, negative_prompt="c")]


def embed(prompt: str, reading: Reading = Reading()) -> Tensor:  # noqa: B008
    """A context of the miniature's width, of its own for each prompt."""
    return normal(1, 154 if prompt.startswith("long") else 77, 32, seed=sum(map(ord, prompt)))


@pytest.fixture(scope="module")
def hybrid() -> LatentDiffusion:
    """A model that takes four more channels and a class label."""
    changes = {
        "conditioning_key": "hybrid-adm",
        "unet_config.params.in_channels": 8,
        "unet_config.params.num_classes": 10,
    }
    torch.manual_seed(0)
    return instantiate_from_config(tiny.model_section(changes)).eval().requires_grad_(False)


def test_prompts_of_different_lengths_stack() -> None:
    cond, uncond = conditions(tiny_model(), REQUESTS, embed)
    assert (cond.shape, uncond.shape) == ((2, 154, 32), (2, 77, 32))
    assert torch.equal(cond[0], embed("a")[0].repeat(2, 1))
    assert torch.equal(cond[1], embed("long b")[0])


def test_one_row_stands_for_equal_negative_prompts() -> None:
    cond, uncond = conditions(tiny_model(), [ImageRequest(p, scale=2.0) for p in "ab"], embed)
    assert (len(cond), len(uncond)) == (2, 1)
    assert conditions(tiny_model(), [ImageRequest("a", scale=1.0)], embed)[1] is None


@pytest.mark.parametrize("negative", ["", "c"])
def test_channels_and_label_reach_the_unet_in_both_halves(hybrid: LatentDiffusion, negative: str) -> None:
    requests = [REQUESTS[0], ImageRequest("long b", scale=5.0, negative_prompt=negative)]
    concat, label = normal(2, 4, 8, 8, seed=1), torch.tensor([3, 7])
    cond, uncond = conditions(hybrid, requests, embed, concat=concat, label=label)
    seen = {}
    hook = hybrid.model.diffusion_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(x=args[0], **kwargs), with_kwargs=True
    )
    x = normal(2, 4, 8, 8, seed=2)
    x0 = Denoiser(hybrid, cond, uncond, [3.0, 5.0])(x, 2.0)
    hook.remove()
    assert x0.shape == x.shape
    assert seen["x"].shape == (4, 8, 8, 8)
    assert torch.equal(seen["x"][:, 4:], torch.cat([concat, concat]))
    assert torch.equal(seen["y"], torch.tensor([3, 7, 3, 7]))
    assert seen["context"].shape == (4, 154, 32)
    assert torch.equal(seen["context"][2:], torch.cat([embed("a").repeat(1, 2, 1), embed("long b")]))
    assert torch.equal(seen["context"][1, :77], embed(negative)[0])
    for k in range(2):  # each image is as it is alone
        cond, uncond = conditions(
            hybrid, [requests[k]], embed, concat=concat[k : k + 1], label=label[k : k + 1]
        )
        alone = Denoiser(hybrid, cond, uncond, requests[k].scale)(x[k : k + 1], 2.0)
        torch.testing.assert_close(x0[k : k + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "lacking"),
    [
        ({}, r"\(adm, concat\)"),
        ({"concat": torch.zeros(2, 4, 8, 8)}, r"\(adm\)"),
        ({"label": torch.zeros(2)}, r"\(concat\)"),
    ],
)
def test_a_model_that_needs_more_is_an_error_in_words(
    hybrid: LatentDiffusion, given: dict, lacking: str
) -> None:
    with pytest.raises(InputError, match=f"conditioned by hybrid-adm.*{lacking}"):
        conditions(hybrid, REQUESTS, embed, **given)
    if given:
        with pytest.raises(InputError, match="conditioned by crossattn"):
            conditions(tiny_model(), REQUESTS, embed, **given)


@pytest.mark.parametrize("tile", [1, 2, 64])
def test_tiles_are_for_models_that_enlarge(tile: int) -> None:
    """Others decoded in them, unchecked: a tile of 1 was a ZeroDivisionError, others had seams."""
    check_task("text", ImageRequest("a", tile=0))
    with pytest.raises(FieldError, match=f"tile {tile}: this model enlarges nothing"):
        check_task("text", ImageRequest("a", tile=tile))
