"""The UNet, and the layers it shares with the first stage."""

import pytest
import torch
from golden_files import manifest
from networks import FAMILIES, RECORDED, X4_UNET, build, golden, load, random_tensors, shapes, tiny_unet
from torch import nn

from ldm.errors import InputError
from ldm.modules.diffusionmodules import model as first_stage
from ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel


@pytest.mark.parametrize("part", ["model.diffusion_model", "first_stage_model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_shapes_of_every_family(family, part):
    listed = manifest(family).items()
    expected = {k.removeprefix(f"{part}."): shape for k, (_, shape) in listed if k.startswith(f"{part}.")}
    assert shapes(build(family, part)) == expected


def test_keys_of_the_published_x4_upscaler():
    """x4-upscaling.yaml says so explicitly."""
    with torch.device("meta"):
        unet = UNetModel(**X4_UNET, disable_middle_self_attn=False)
    assert shapes(unet) == shapes(build("x4-upscaler", "model.diffusion_model"))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"num_classes": "many"}, "'many'"),
        ({"num_heads": -1}, "num_heads or num_head_channels"),
        ({"context_dim": None}, "context_dim"),
    ],
)
def test_unets_that_cannot_be_built(params, message):
    with pytest.raises(InputError, match=message):
        tiny_unet(**params)


@pytest.mark.parametrize("family", RECORDED)
def test_unet(family):
    tensors = golden(family)
    unet = load(family, "model.diffusion_model")
    x, context = tensors["unet_x"], tensors["text_embeddings"][:2]
    if "c_concat" in tensors:
        x = torch.cat([x, tensors["c_concat"]], dim=1)
    with torch.no_grad():
        out = unet(x, tensors["unet_t"], context, tensors.get("noise_level"))
    torch.testing.assert_close(out, tensors["unet_out"], rtol=0, atol=1e-4)


def test_fractional_timesteps_lie_between_their_neighbours():
    unet = tiny_unet()
    x, context = random_tensors((1, 4, 6, 6), (1, 5, 6))
    with torch.no_grad():
        low, middle, high = (unet(x, torch.tensor([t]), context) for t in (40.0, 40.5, 41.0))
        assert torch.equal(low, unet(x, torch.tensor([40]), context))
    assert not torch.equal(low, middle)
    torch.testing.assert_close(middle, (low + high) / 2, rtol=0, atol=0.3 * (high - low).abs().max().item())


@pytest.mark.parametrize(
    ("params", "label"),
    [
        ({"num_classes": 10}, torch.tensor([1, 9])),
        ({"num_classes": "continuous"}, torch.tensor([[0.5], [2.0]])),
        ({"num_classes": "sequential", "adm_in_channels": 3}, torch.arange(6.0).reshape(2, 3)),
    ],
)
def test_class_labels(params, label):
    unet = tiny_unet(**params)
    x, context = random_tensors((1, 4, 6, 6), (1, 5, 6))
    x, context, t = x.expand(2, -1, -1, -1), context.expand(2, -1, -1), torch.tensor([7, 7])
    with torch.no_grad():
        first, second = unet(x, t, context, label)
        assert not torch.equal(first, second)
        with pytest.raises(ValueError, match="class labels"):
            unet(x, t, context)
        with pytest.raises(ValueError, match="class labels"):
            tiny_unet()(x, t, context, label)


def test_gradient_checkpointing_changes_no_gradient():
    x, context = random_tensors((2, 4, 5, 6), (2, 5, 6))
    gradients = []
    for use_checkpoint in (False, True):
        unet = tiny_unet(use_checkpoint=use_checkpoint)
        inputs = x.clone().requires_grad_(), context.clone().requires_grad_()
        unet(inputs[0], torch.tensor([3, 500]), inputs[1]).square().sum().backward()
        gradients.append([weight.grad for weight in (*inputs, *unet.parameters())])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_the_unet_pads_on_both_sides_and_the_first_stage_below_and_right():
    """A kernel that copies its first value shows where the padding is."""
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    copies = {}
    for module, conv in ((Downsample(1), "op"), (first_stage.Downsample(1), "conv")):
        layer = getattr(module, conv)
        layer.weight.data = torch.zeros(1, 1, 3, 3)
        layer.weight.data[..., 0, 0] = 1.0
        layer.bias.data.zero_()
        copies[conv] = module(x).squeeze().tolist()
    assert copies == {"op": [[0, 0], [0, 5]], "conv": [[0, 2], [8, 10]]}


def test_epsilons_of_the_normalisations():
    """Too small to show on stand-in weights: 1e-6 in the first stage and before attention, 1e-5 elsewhere."""
    for family in FAMILIES:
        for name, module in build(family, "model.diffusion_model").named_modules():
            if isinstance(module, nn.GroupNorm):
                assert module.eps == (1e-6 if name.endswith(".norm") else 1e-5), name
        norms = [m for m in build(family, "first_stage_model").modules() if isinstance(m, nn.GroupNorm)]
        assert {norm.eps for norm in norms} == {1e-6}
