"""ControlNet: a copy of the UNet's encoder that follows an image (Zhang et al. 2023, https://arxiv.org/abs/2302.05543)."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.modules.diffusionmodules.openaimodel import (
    Block,
    Downsample,
    ResBlock,
    UNetModel,
    timestep_embedding,
)

HINT_WIDTHS = (16, 32, 96, 256)  # channels at 1, 1/2, 1/4 and 1/8 of the control image's size
HINT_FACTOR = 8  # pixels of a control image to a latent


class ControlNet(nn.Module):
    """What an image adds to the skip connections and the middle block of a UNet.

    `unet` are the parameters of the UNet that it was made for, but for its `in_channels`, which are the
    latents' own here. Parameter names are the original's, after `control_model.`.
    """

    def __init__(self, latent_channels: int = 4, hint_channels: int = 3, **unet: Any):
        super().__init__()
        known = UNetModel.training_params | {"in_channels", "num_classes", "adm_in_channels"}
        copied = UNetModel(
            latent_channels, **{name: each for name, each in unet.items() if name not in known}
        )
        self.model_channels = copied.model_channels
        self.use_checkpoint = False
        self.time_embed = copied.time_embed
        self.input_blocks, self.middle_block = copied.input_blocks, copied.middle_block
        self.input_hint_block = hint_block(hint_channels, self.model_channels)
        self.zero_convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1)) for width in map(width_of, self.input_blocks)
        )
        width = width_of(self.middle_block)
        self.middle_block_out = nn.Sequential(nn.Conv2d(width, width, 1))
        zeros = [self.input_hint_block[-1], self.middle_block_out[0], *(conv[0] for conv in self.zero_convs)]
        for conv in zeros:  # at first it adds nothing
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        """The features [b, model_channels, h, w] of control images [b, 3, 8 h, 8 w] in 0 … 1."""
        return self.input_hint_block(image)

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, features: torch.Tensor
    ) -> list[torch.Tensor]:
        """What is added to each skip connection of the UNet, in their order, and to its middle block.

        `x` [b, c, h, w] are the latents that the UNet is given at timesteps [b], `context` is what its
        cross-attention reads, and `features` are the control image's, of `embed`.
        """
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        h, added = x, []
        for i, (block, conv) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            h = self.run(block, h, emb, context)
            if i == 0:
                h = h + features
            added.append(conv(h))
        added.append(self.middle_block_out(self.run(self.middle_block, h, emb, context)))
        return added

    def run(self, block: Block, *inputs: torch.Tensor) -> torch.Tensor:
        """The block's output; with use_checkpoint its activations are computed again for the gradients."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def width_of(block: Block) -> int:
    """The channels of a block's output, by its first layer: attention keeps their number."""
    match block[0]:
        case ResBlock() as layer:
            return layer.out_layers[-1].out_channels
        case Downsample() as layer:
            return layer.op.out_channels
    return block[0].out_channels


def hint_block(channels: int, width: int) -> nn.Sequential:
    """Convolutions that bring a control image to the size of the latents."""
    layers: list[nn.Module] = [nn.Conv2d(channels, HINT_WIDTHS[0], 3, padding=1), nn.SiLU()]
    for i, here in enumerate(HINT_WIDTHS[:-1]):
        layers += [nn.Conv2d(here, here, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(here, HINT_WIDTHS[i + 1], 3, padding=1, stride=2), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(HINT_WIDTHS[-1], width, 3, padding=1))
