"""The depth estimator: the checkpoint's names, its function against timm's layers and transformers' model."""

import math
from functools import partial

import pytest
import timm.models.resnetv2
import timm.models.vision_transformer
import timm.models.vision_transformer_hybrid
import torch
import torch.nn.functional as F
from golden_files import manifest
from networks import shapes
from timm.layers import StdConv2dSame
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.modules.midas.api import MiDaSInference

MINIATURE = {
    "image_size": 64,
    "width": 32,
    "layers": 4,
    "heads": 4,
    "backbone_width": 8,
    "backbone_depths": (1, 2, 2),
    "groups": 8,
    "features": 16,
    "classes": 10,
}


@pytest.fixture(scope="module")
def model() -> MiDaSInference:
    made = MiDaSInference(**MINIATURE).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in made.named_parameters():
        spread = 1.2 / weight[0].numel() ** 0.5 if weight.ndim > 3 else 0.2
        weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
        if "norm" in name and name.endswith("weight"):
            weight += 1.0
    made.model.scratch.output_conv.get_parameter("4.bias").fill_(2.0)  # no value is cut off at 0
    return made


def images(height: int, width: int) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_names_and_shapes_are_the_checkpoints():
    with torch.device("meta"):
        model = MiDaSInference("dpt_hybrid")
    listed = {
        name.removeprefix("depth_model."): shape
        for name, (_, shape) in manifest("sd-v2-depth").items()
        if name.startswith("depth_model.")
    }
    assert len(listed) == 368
    assert shapes(model) == listed
    assert list(model.unused_weights) == [
        f"model.pretrained.model.head.{name}" for name in ("weight", "bias")
    ]
    assert all(weight.is_meta for weight in model.parameters())


def vision_transformer() -> nn.Module:
    """timm's, as MiDaS builds it (vit_base_resnet50_384), in the miniature's size."""
    backbone = timm.models.resnetv2.ResNetV2(
        layers=MINIATURE["backbone_depths"],
        channels=[MINIATURE["backbone_width"] * factor for factor in (4, 8, 16)],
        stem_chs=MINIATURE["backbone_width"],
        num_classes=0,
        global_pool="",
        preact=False,
        stem_type="same",
        conv_layer=partial(StdConv2dSame, eps=1e-8),
        norm_layer=partial(timm.layers.GroupNormAct, num_groups=MINIATURE["groups"]),
    )
    return timm.models.vision_transformer.VisionTransformer(
        img_size=MINIATURE["image_size"],
        patch_size=1,
        embed_dim=MINIATURE["width"],
        depth=MINIATURE["layers"],
        num_heads=MINIATURE["heads"],
        num_classes=MINIATURE["classes"],
        embed_layer=partial(timm.models.vision_transformer_hybrid.HybridEmbed, backbone=backbone),
    ).eval()


def midas(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """MiDaS's DPT-hybrid from its description: Ranftl et al. 2021, section 3, on timm's layers."""
    vit, kept = vision_transformer(), {}
    prefix = "pretrained.model."
    vit.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    stages, blocks = vit.patch_embed.backbone.stages, vit.blocks
    for number, layer in enumerate([stages[0], stages[1], blocks[2], blocks[3]], start=1):
        layer.register_forward_hook(lambda _, __, output, number=number: kept.update({number: output}))
    with torch.no_grad():
        vit.forward_features(x)

    def weights(name: str) -> dict[str, Tensor]:
        return {key: state[f"{name}.{key}"] for key in ("weight", "bias") if f"{name}.{key}" in state}

    def conv(name: str, x: Tensor, **how: int) -> Tensor:
        return F.conv2d(x, **weights(name), **how)

    for stage in (3, 4):  # the class token joins every other one
        tokens, name = kept[stage][:, 1:], f"pretrained.act_postprocess{stage}"
        joined = torch.cat([tokens, kept[stage][:, :1].expand_as(tokens)], dim=-1)
        joined = F.gelu(F.linear(joined, **weights(f"{name}.0.project.0")))
        kept[stage] = conv(
            f"{name}.3", joined.transpose(1, 2).unflatten(2, [math.isqrt(tokens.shape[1])] * 2)
        )
    kept[4] = conv("pretrained.act_postprocess4.4", kept[4], stride=2, padding=1)

    def unit(name: str, x: Tensor) -> Tensor:
        h = conv(f"{name}.conv1", x.relu(), padding=1)
        return x + conv(f"{name}.conv2", h.relu(), padding=1)

    path = None
    for stage in (4, 3, 2, 1):
        h, name = conv(f"scratch.layer{stage}_rn", kept[stage], padding=1), f"scratch.refinenet{stage}"
        path = h if path is None else path + unit(f"{name}.resConfUnit1", h)
        path = unit(f"{name}.resConfUnit2", path)
        path = F.interpolate(path, scale_factor=2, mode="bilinear", align_corners=True)
        path = conv(f"{name}.out_conv", path)
    h = conv("scratch.output_conv.0", path, padding=1)
    h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=True)
    h = conv("scratch.output_conv.2", h, padding=1).relu()
    return conv("scratch.output_conv.4", h).relu()


def test_same_function_as_midas_on_timm(model):
    """Under the checkpoint's names, so each name means what it means there."""
    x = images(64, 64)
    state = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    expected = midas(state, x)
    assert expected.std() > 0.01
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-4 * expected.std().item())


def test_same_function_as_transformers(model):
    from transformers import DPTForDepthEstimation

    x = images(64, 64)
    theirs = DPTForDepthEstimation(model.network[0].dpt.config).eval()
    weights = {}
    for name, twins in model.twins.items():
        parts = model.model.get_parameter(name).chunk(len(twins))
        weights |= {twin.removeprefix("dpt."): part for twin, part in zip(twins, parts, strict=True)}
    theirs.load_state_dict(weights)
    with torch.no_grad():
        expected = theirs(x).predicted_depth
    torch.testing.assert_close(model(x)[:, 0], expected, rtol=0, atol=1e-4 * expected.std().item())


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (128, 128), (32, 160)])
def test_images_of_other_sizes(model, size):
    """transformers' own network takes square images of one size only."""
    x = images(*size)
    depth = model(x)
    assert depth.shape == (2, 1, *size)
    assert depth.isfinite().all()
    torch.testing.assert_close(model(x[1:]), depth[1:], rtol=0, atol=0.01 * depth.std().item())


def test_weights_are_assigned_and_trained_under_the_checkpoints_names(model):
    with torch.device("meta"):
        empty = MiDaSInference(**MINIATURE)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    empty.load_state_dict(state, assign=True)
    assert not any(weight.is_meta for weight in empty.parameters())
    x = images(64, 64)
    assert torch.equal(empty(x), model(x))

    empty.requires_grad_(True)
    empty(x).square().mean().backward()
    without = {name for name, weight in empty.named_parameters() if weight.grad is None}
    unread = ("pretrained.model.head", "pretrained.model.norm", "scratch.refinenet4.resConfUnit1")
    assert {name for name in state if name.removeprefix("model.").startswith(unread)} == without


def test_the_weights_type_is_followed(model):
    half = MiDaSInference(**MINIATURE)
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    x = images(64, 64)
    depth = half(x.bfloat16())
    assert depth.dtype == torch.bfloat16
    exact = model(x)
    assert (depth - exact).std() < 0.1 * exact.std()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"model_type": "dpt_large"}, r"'dpt_large' .* dpt_hybrid"),
        ({"image_size": 100}, r"100 is not a multiple of 32"),
    ],
)
def test_params_that_cannot_be(params, message):
    with pytest.raises(InputError, match=message):
        MiDaSInference(**params)
