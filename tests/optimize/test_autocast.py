"""Weights that are cast once under autocast: against autocast's own casts, bit for bit."""

import pytest
import torch
from tiny_sampling import Recorder, contexts, guided_latents, normal, tiny_model
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize.autocast import keep_casts
from ldm.optimize.context import keep_context
from ldm.optimize.graph import graph_unet
from ldm.optimize.timesteps import keep_timesteps

DTYPES = [torch.bfloat16, torch.float16]


def latents(model: LatentDiffusion, dtype: torch.dtype) -> list[Tensor]:
    uncond, *conds = contexts(3)
    with torch.autocast("cpu", dtype=dtype):
        return guided_latents(model, conds, uncond)


def own_weights(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each convolution and linear layer from now on, whether it reads the UNet's own, uncast weights."""
    found = []
    ours = {p.data_ptr() for p in model.model.parameters()}
    for name in ("linear", "conv2d"):
        plain = getattr(torch.nn.functional, name)

        def call(x: Tensor, weight: Tensor, *args: object, plain=plain) -> Tensor:
            found.append(weight.data_ptr() in ours)
            return plain(x, weight, *args)

        monkeypatch.setattr(torch.nn.functional, name, call)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_casts_have_the_bits_of_autocasts_own(dtype: torch.dtype) -> None:
    model, plain = tiny_model(), tiny_model()
    keep_casts(model)
    assert all(torch.equal(a, b) for a, b in zip(latents(model, dtype), latents(plain, dtype), strict=True))
    uncond, *conds = contexts(2)
    results = [guided_latents(each, conds, uncond) for each in (model, plain)]  # in float32 as before
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_recorded_steps_cast_no_weights(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replay cast all of them again."""
    model, plain = tiny_model(), tiny_model()
    keep_casts(model)
    graph_unet(model, Recorder())
    keep_context(model)
    keep_timesteps(model)
    expected = latents(plain, dtype)
    assert all(torch.equal(a, b) for a, b in zip(latents(model, dtype), expected, strict=True))
    uncast = own_weights(model, monkeypatch)
    uncond, cond = contexts(2)
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype):
        context = torch.cat([uncond, cond])
        for t in (500.0, 3.0):
            model.apply_model(normal(2, 4, 8, 8), torch.tensor([t, t]), context)
            if t == 500.0:
                uncast.clear()  # a new prompt is projected once, by the plain weights
    assert uncast
    assert not any(uncast)


def test_layers_that_have_another_forward_or_16_bits_are_left_alone() -> None:
    model = tiny_model()
    unet = model.model.diffusion_model
    special = unet.time_embed[0]
    special.forward = lambda x: x
    keep_casts(model)
    assert special.forward(3) == 3
    half = tiny_model()
    with torch.inference_mode(False):
        half.half()
    keep_casts(half)
    assert not any("forward" in vars(layer) for layer in half.modules() if isinstance(layer, nn.Linear))


def test_gradients_reach_the_weights_themselves() -> None:
    model = tiny_model()
    keep_casts(model)
    weight = model.model.diffusion_model.time_embed[0].weight.requires_grad_()
    with torch.autocast("cpu"):
        model.apply_model(normal(1, 4, 8, 8), torch.tensor([3.0]), contexts(1)[0]).sum().backward()
    assert weight.grad.abs().sum() > 0
