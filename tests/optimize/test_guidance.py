"""The part of the UNet that guidance's two halves share, computed once: against the plain model."""

import copy

import pytest
import torch
from tiny_sampling import Recorder, contexts, guided_latents, normal, relative_difference, tiny_model
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.openaimodel import ResBlock
from ldm.optimize.approximate import merge_similar_tokens
from ldm.optimize.graph import graph_unet
from ldm.optimize.guidance import before_the_prompt, share_prefix
from ldm.sampling import Denoiser
from ldm.sampling.denoiser import timesteps


def batches(model: LatentDiffusion) -> dict[nn.Module, list[int]]:
    """The batch sizes that each layer before the prompt is called with, from now on."""
    found: dict[nn.Module, list[int]] = {}
    for layer in before_the_prompt(model.model.diffusion_model):
        sizes = found[layer] = []
        part = layer.to_q if isinstance(layer, CrossAttention) else layer
        part = part.in_layers if isinstance(layer, ResBlock) else part
        part.register_forward_pre_hook(lambda module, given, sizes=sizes: sizes.append(len(given[0])))
    return found


def inner(found: dict[nn.Module, list[int]]) -> set[int]:
    """The sizes within the layers that have parts; a convolution's hook sees the call before it is halved."""
    return {size for layer, sizes in found.items() if not isinstance(layer, nn.Conv2d) for size in sizes}


def guided(model: LatentDiffusion, images: int) -> Tensor:
    """The UNet's output for a call as `Denoiser` makes it: the latents twice, two prompts each."""
    generator = torch.Generator().manual_seed(images)
    x = torch.randn(images, 4, 8, 8, generator=generator)
    context = torch.randn(2 * images, 5, 32, generator=generator)
    x, context = (t.to(next(model.parameters()).dtype) for t in (x, context))
    with torch.inference_mode():
        t = timesteps(500.0, 2 * images, torch.device("cpu"), equal_halves=True)
        return model.apply_model(torch.cat([x, x]), t, context)


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
    assert inner(found) == {images}


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_the_denoiser_decides_without_reading_the_latents(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    """The halves were compared in every call, for which a GPU has to wait. Two equal images without guidance
    are no halves.
    """
    share_prefix(model)
    found = batches(model)
    cond, uncond = contexts(2, images=2)
    denoiser = Denoiser(model, cond, uncond, scale)
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("tensors are compared"))
    with torch.inference_mode():
        denoiser(normal(1, 4, 8, 8).repeat(2, 1, 1, 1), 3.0)
    assert inner(found) == {2}
    assert model.model.diffusion_model.forward.__self__.active is False


def test_calls_of_which_nothing_is_known_are_computed_as_they_are(model: LatentDiffusion) -> None:
    x, t, context = normal(1, 4, 8, 8).repeat(2, 1, 1, 1), torch.tensor([500.0, 3.0]), normal(2, 5, 32)
    with torch.inference_mode():
        plain = model.apply_model(x, t, context)
        share_prefix(model)
        found = batches(model)
        assert torch.equal(model.apply_model(x, t, context), plain)
    assert inner(found) == {2}


def test_recorded_calls_share_too(model: LatentDiffusion) -> None:
    """And a call of the same shapes that shares nothing has a recording of its own."""
    plain = tiny_model()
    uncond, *conds = contexts(3)
    for each in (plain, model):
        share_prefix(each)
    recorder = Recorder()
    graph_unet(model, recorder)
    found = batches(model)
    results = [guided_latents(each, conds, uncond) for each in (model, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert inner(found) == {1}
    assert recorder.captured == 2
    x, context = normal(2, 4, 8, 8), normal(2, 5, 32)
    with torch.inference_mode():
        for equal_halves in (True, False):
            model.apply_model(x, timesteps(3.0, 2, torch.device("cpu"), equal_halves), context)
    assert recorder.captured == 4


def test_over_merged_tokens(model: LatentDiffusion) -> None:
    merge_similar_tokens(model, 0.5)
    plain = guided(model, 2)
    share_prefix(model)
    assert relative_difference(guided(model, 2), plain) < 2e-6
