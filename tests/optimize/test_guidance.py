"""The part of the UNet that guidance's two halves share, computed once: against the plain model."""

import copy

import pytest
import torch
from tiny_sampling import relative_difference
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.openaimodel import ResBlock
from ldm.optimize.approximate import merge_similar_tokens
from ldm.optimize.guidance import before_the_prompt, share_prefix


def batches(model: LatentDiffusion) -> dict[nn.Module, list[int]]:
    """The batch sizes that each layer before the prompt is called with, from now on."""
    found: dict[nn.Module, list[int]] = {}
    for layer in before_the_prompt(model.model.diffusion_model):
        sizes = found[layer] = []
        part = layer.to_q if isinstance(layer, CrossAttention) else layer
        part = part.in_layers if isinstance(layer, ResBlock) else part
        part.register_forward_pre_hook(lambda module, given, sizes=sizes: sizes.append(len(given[0])))
    return found


def guided(model: LatentDiffusion, images: int) -> Tensor:
    """The UNet's output for a call as `Denoiser` makes it: the latents twice, two prompts each."""
    generator = torch.Generator().manual_seed(images)
    x = torch.randn(images, 4, 8, 8, generator=generator)
    context = torch.randn(2 * images, 5, 32, generator=generator)
    x, context = (t.to(next(model.parameters()).dtype) for t in (x, context))
    with torch.inference_mode():
        return model.apply_model(torch.cat([x, x]), torch.full((2 * images,), 500.0), context)


def test_what_comes_before_the_prompt(model: LatentDiffusion) -> None:
    unet = model.model.diffusion_model
    first = unet.input_blocks[1]
    expected = [unet.input_blocks[0][0], first[0], first[1].transformer_blocks[0].attn1]
    assert list(before_the_prompt(unet)) == expected


@pytest.mark.parametrize("images", [1, 3])
def test_a_guided_call_gives_the_plain_result(model: LatentDiffusion, images: int) -> None:
    plain, exact = guided(model, images), guided(copy.deepcopy(model).double(), images)
    share_prefix(model)
    found = batches(model)
    shared = guided(model, images)
    # float32 itself is about 1e-6 from float64 here, and sums of another batch size have another order
    assert relative_difference(shared, plain) < 2e-6
    assert relative_difference(shared, exact) < 1.5 * relative_difference(plain, exact)
    inner = [sizes for layer, sizes in found.items() if not isinstance(layer, nn.Conv2d)]
    assert inner
    assert all(sizes == [images] for sizes in inner)


def test_halves_that_differ_are_computed_as_they_are(model: LatentDiffusion) -> None:
    """Two images without guidance, two timesteps, an odd batch: nothing is shared."""
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(3, 5, 32, generator=generator)
    cases = [
        (x, torch.tensor([500.0, 500.0]), context[:2]),
        (x[:1].repeat(2, 1, 1, 1), torch.tensor([500.0, 3.0]), context[:2]),
        (x[:1].repeat(3, 1, 1, 1), torch.tensor([500.0] * 3), context),
    ]
    with torch.inference_mode():
        plain = [model.apply_model(*case) for case in cases]
        share_prefix(model)
        assert all(torch.equal(model.apply_model(*case), a) for case, a in zip(cases, plain, strict=True))


def test_over_merged_tokens(model: LatentDiffusion) -> None:
    merge_similar_tokens(model, 0.5)
    plain = guided(model, 2)
    share_prefix(model)
    assert relative_difference(guided(model, 2), plain) < 2e-6
