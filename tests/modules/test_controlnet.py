"""The ControlNet against diffusers' on the same weights."""

import pytest
import torch
from diffusers_pipelines import WIDTH, tiny_config, tiny_pipeline
from tiny_control import original_state, tiny_controlnet

from ldm.models.diffusion.ddpm import DiffusionWrapper
from ldm.modules.controlnet import ControlNet
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.pipeline.control import added_features
from ldm.weights import diffusers_names


def ours(kind: str) -> ControlNet:
    net = ControlNet(4, **tiny_config(kind)["params"]["unet_config"]["params"])
    net.load_state_dict({name.removeprefix("control_model."): t for name, t in original_state(kind).items()})
    return net.eval()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("kind", ["v1", "v2"])
@torch.inference_mode()
def test_it_adds_what_diffusers_adds(kind: str) -> None:
    x, t, context = randn(2, 4, 8, 8), torch.tensor([3, 700]), randn(2, 77, WIDTH)
    image = randn(2, 3, 64, 64).sigmoid()
    skips, middle = tiny_controlnet(kind)(x, t, context, image, return_dict=False)
    net = ours(kind)
    added = net(x, t, context, net.embed(image))
    assert len(added) == len(skips) + 1
    for mine, theirs in zip(added, [*skips, middle], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)

    params = tiny_config(kind)["params"]["unet_config"]["params"]
    unet = UNetModel(**params).eval()
    unet.load_state_dict(diffusers_names.unet_to_ours(tiny_pipeline(kind).unet.state_dict()))
    plain = unet(x, t, context)
    with added_features(unet, added):
        found = DiffusionWrapper(unet)(x, t, c_crossattn=[context])
    expected = tiny_pipeline(kind).unet(
        x, t, context, down_block_additional_residuals=skips, mid_block_additional_residual=middle
    )
    torch.testing.assert_close(found, expected.sample, atol=1e-4, rtol=1e-4)
    assert (found - plain).abs().max() > 1e-2
    assert torch.equal(unet(x, t, context), plain)  # outside nothing is added
    assert "run" not in vars(unet)


def test_at_first_it_adds_nothing() -> None:
    net = ControlNet(4, **tiny_config("v1")["params"]["unet_config"]["params"])
    x, context = randn(1, 4, 8, 8), randn(1, 77, WIDTH)
    features = net.embed(randn(1, 3, 64, 64))
    assert not features.any()
    assert not any(each.any() for each in net(x, torch.tensor([5]), context, features))
