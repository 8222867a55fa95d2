"""Networks of an upscaler that start as linear maps: training has only to add what these lack.

An autoencoder: the average of each block of pixels in, interpolation out. A UNet: v of the latents that a
linear fit makes of the small image, at the last timestep, where v is -x0.

Normalised layers take thousands of steps to learn the colour of a flat area to a level or two. Here it is
right from the first step. Three channels of the features carry red, green and blue, three their negatives,
because SiLU(x) - SiLU(-x) = x, and two a large constant of either sign, so that the standard deviation by
which a normalisation divides is nearly the same for every image.
"""

import math

import torch
from torch import nn

from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.diffusionmodules.model import AttnBlock, Downsample, ResnetBlock, Upsample
from ldm.modules.diffusionmodules.openaimodel import UNetModel

CARRIED = 6  # channels for the colours and their negatives; two more are constant
STD = 10.0  # what normalisations divide by


@torch.no_grad()
def start_linear(model: AutoencoderKL, logvar: float = -12.0) -> None:
    """Set the weights of an autoencoder with one group in its normalisations and at least 9 channels.

    The latents' first channels are the colours; `logvar` is the log-variance of its posterior. Layers that
    carry nothing keep their weights.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels > CARRIED + 2:
            _blind(layer)
    for layer in model.modules():
        match layer:
            case ResnetBlock():
                nn.init.zeros_(layer.conv2.weight)
                nn.init.zeros_(layer.conv2.bias)
                nn.init.constant_(layer.norm1.weight, STD)
                if isinstance(layer.nin_shortcut, nn.Conv2d):
                    _carry(layer.nin_shortcut, torch.ones(1, 1))
            case AttnBlock():
                nn.init.zeros_(layer.proj_out.weight)
                nn.init.zeros_(layer.proj_out.bias)
            case Downsample():  # the average of 2x2 pixels
                _carry(layer.conv, torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]) / 4)
            case Upsample():  # of repeated pixels: bilinear interpolation
                _carry(layer.conv, torch.outer(*[torch.tensor([0.25, 0.5, 0.25])] * 2))
    for part in (model.encoder, model.decoder):
        nn.init.constant_(part.norm_out.weight, STD)
        _into(part.conv_in)
        _out_of(part.conv_out)
    channels = model.embed_dim
    for conv in (model.quant_conv, model.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.out_channels)[..., None, None])
        nn.init.zeros_(conv.bias)
    model.quant_conv.weight[channels:] = 0
    model.quant_conv.bias[channels:] = logvar


def _blind(conv: nn.Conv2d, start: int = 0) -> None:
    """Keep a layer from reading the constants, also during training: a small step would be a large change."""
    columns = slice(start + CARRIED, start + CARRIED + 2)
    conv.weight[:, columns] = 0

    def without_constants(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[:, columns] = 0
        return gradient

    if conv.weight.requires_grad:
        conv.weight.register_hook(without_constants)


def _carry(conv: nn.Conv2d, kernel: torch.Tensor) -> None:
    """Pass the colours on through `kernel`, and set the constants."""
    conv.weight[: CARRIED + 2] = 0
    for i in range(CARRIED):
        conv.weight[i, i] = kernel
    _constants(conv)


def _into(conv: nn.Conv2d, start: int = 0, groups: int = 1) -> None:
    """Three input channels, from `start` on, become the colours and their negatives."""
    conv.weight[: CARRIED + 2] = 0
    for i in range(3):
        conv.weight[i, start + i, 1, 1] = 1
        conv.weight[3 + i, start + i, 1, 1] = -1
    _constants(conv, groups)


def _out_of(conv: nn.Conv2d) -> None:
    """The colours, less their negatives, are the first three channels that come out."""
    conv.weight[:3] = 0
    nn.init.zeros_(conv.bias)
    for i in range(3):
        conv.weight[i, i, 1, 1] = 1
        conv.weight[i, 3 + i, 1, 1] = -1


def _constants(conv: nn.Conv2d, groups: int = 1) -> None:
    """Set the constant channels, for a normalisation in so many groups.

    Channels that carry nothing begin small, so that the mean over all stays 0.
    """
    conv.weight[CARRIED + 2 :] *= 0.1
    conv.bias[CARRIED + 2 :] *= 0.1
    constant = STD * math.sqrt(conv.out_channels / groups / 2)
    conv.bias[: CARRIED + 2] = 0
    conv.bias[CARRIED] = constant
    conv.bias[CARRIED + 1] = -constant


@torch.no_grad()
def start_from_small_image(unet: UNetModel, small: torch.Tensor, latents: torch.Tensor) -> None:
    """Set the weights of an upscaler's UNet so that its first output is -x0, as far as that is linear.

    `latents` [n, c, h, w] are scaled x0, which the UNet is to predict from `small` [n, 3, h, w], the input
    channels behind the noisy ones. Groups of its normalisations have 8 channels or more, and its first level
    has more channels than its first convolution.
    """
    channels = latents.shape[1]
    columns = small.permute(0, 2, 3, 1).reshape(-1, small.shape[1])
    columns = torch.cat([columns, columns.new_ones(len(columns), 1)], dim=1)
    fit = torch.linalg.lstsq(columns, latents.permute(0, 2, 3, 1).reshape(-1, channels)).solution
    first, last, (norm, _, out) = unet.input_blocks[0][0], unet.output_blocks[-1][0], unet.out
    _into(first, channels, norm.num_groups)
    before = last.skip_connection.in_channels - first.out_channels  # the skip connection is behind these
    last.skip_connection.weight[: CARRIED + 2] = 0
    for i in range(CARRIED):
        last.skip_connection.weight[i, before + i] = 1
    _constants(last.skip_connection, norm.num_groups)
    for block, start in ((unet.input_blocks[1][0], 0), (last, before)):
        block.in_layers[0].weight[start : start + CARRIED + 2] = STD
    keep_blind(unet)
    norm.weight[: CARRIED + 2] = STD
    out.weight[:, :3, 1, 1] = -fit[:-1].T
    out.weight[:, 3:CARRIED, 1, 1] = fit[:-1].T
    out.bias.copy_(-fit[-1])


@torch.no_grad()
def keep_blind(unet: UNetModel) -> None:
    """Keep a UNet that started from the small image from reading the constants, also in training."""
    first, last = unet.input_blocks[0][0], unet.output_blocks[-1][0]
    before = last.skip_connection.in_channels - first.out_channels
    for block, start in ((unet.input_blocks[1][0], 0), (last, before)):
        _blind(block.in_layers[2], start)
        _blind(block.skip_connection, start)
    _blind(unet.out[2])
