"""The networks of an upscaler are linear maps at first, and stay trainable."""

import pytest
import torch
import torch.nn.functional as F
from tiny_training import FIRST_STAGE_X4, UPSCALER

from ldm.models.autoencoder import AutoencoderKL
from ldm.training.linear import CARRIED, start_from_small_image, start_linear
from ldm.util import instantiate_from_config


@pytest.fixture
def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    model = instantiate_from_config(FIRST_STAGE_X4)
    start_linear(model)
    return model


@torch.no_grad()
def test_latents_are_averages_of_pixels(autoencoder: AutoencoderKL) -> None:
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    posterior = autoencoder.encode(x)
    assert (posterior.mean[:, :3] - F.avg_pool2d(x, 4)).abs().max() < 0.03
    assert posterior.std.max() < 0.003


@torch.no_grad()
def test_a_smooth_image_comes_back(autoencoder: AutoencoderKL) -> None:
    """Colours are right to a level or two, also of a flat image, which normalisations usually forget."""
    smooth = F.interpolate(torch.rand(3, 3, 2, 2) * 2 - 1, (64, 64), mode="bilinear", align_corners=True)
    for x in (smooth, torch.full((1, 3, 64, 64), 0.4)):
        y, _ = autoencoder(x, sample_posterior=False)
        assert (y - x)[:, :, 8:-8, 8:-8].abs().max() < 0.05


def test_constants_are_neither_read_nor_learned(autoencoder: AutoencoderKL) -> None:
    x = torch.rand(1, 3, 16, 16)
    autoencoder(x, torch.randn(1, 4, 4, 4))[0].square().mean().backward()
    conv = autoencoder.decoder.up[1].block[0].conv1
    assert conv.weight[:, CARRIED : CARRIED + 2].abs().max() == 0
    gradient = autoencoder.decoder.up[1].block[0].conv2.weight.grad
    assert gradient.abs().max() > 0
    up = autoencoder.decoder.up[1].upsample.conv.weight.grad
    assert up[:, CARRIED : CARRIED + 2].abs().max() == 0
    assert up[:, :CARRIED].abs().max() > 0


def test_the_unet_first_predicts_the_latents_of_the_small_image() -> None:
    """v is -x0 at the last timestep. The noisy latents, the timestep and the prompt change nothing yet."""
    torch.manual_seed(0)
    unet = instantiate_from_config(UPSCALER).model.diffusion_model
    small = torch.rand(4, 3, 8, 8) * 2 - 1
    latents = torch.einsum("oc,nchw->nohw", torch.randn(4, 3), small) + torch.randn(4, 1, 1)
    start_from_small_image(unet, small, latents)
    for t in (10.0, 990.0):
        x = torch.cat([torch.randn(4, 4, 8, 8), small], dim=1)
        v = unet(x, torch.full((4,), t), torch.randn(4, 77, 8), torch.full((4,), 20))
        assert (v + latents).abs().max() < 0.02
    v.square().mean().backward()
    assert unet.out[2].weight.grad[:, :CARRIED].abs().max() > 0
    assert unet.out[2].weight.grad[:, CARRIED : CARRIED + 2].abs().max() == 0
