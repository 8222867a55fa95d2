"""The denoising UNet (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233; Rombach et al. 2022)."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import InputError
from ldm.modules.attention import SpatialTransformer


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: float = 10000.0) -> torch.Tensor:
    """Cosines, then sines, of timesteps [b] (fractions too) at geometric frequencies -> float32 [b, dim]."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions; the time embedding [b, e] is added between them."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int, dropout: float, num_groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(num_groups, channels),
            nn.SiLU(inplace=True),  # a normalised copy needs no second one
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(num_groups, out_channels),
            nn.SiLU(inplace=True),
            nn.Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        nn.init.zeros_(self.out_layers[3].weight)  # the block starts as its skip connection
        nn.init.zeros_(self.out_layers[3].bias)
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.in_layers(x)
        h += self.emb_layers(emb)[:, :, None, None]
        h = self.out_layers(h)
        h += self.skip_connection(x)
        return h


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Grow to the skip connection's size: twice the resolution, less one where an odd size was halved."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, size: torch.Size) -> torch.Tensor:
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # faster than F.interpolate, and equal
        return self.conv(x[:, :, : size[0], : size[1]])


class Block(nn.Sequential):
    """Layers of one skip connection; each is given what its class takes besides the features."""

    def forward(
        self,
        x: torch.Tensor,
        emb: torch.Tensor,
        context: torch.Tensor | None,
        upsample_to: torch.Size | None = None,
    ) -> torch.Tensor:
        for layer in self:  # not by `match`: torch's compiler breaks the graph there (pytorch issue 171274)
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, upsample_to)
            else:
                x = layer(x)
        return x


class UNetModel(nn.Module):
    """Predicts the noise (or v) in latents x [b, in_channels, h, w] of any h, w at timesteps [b].

    `context` [b, n, context_dim] is read by cross-attention; `y` is a class label: int64 [b] for an integer
    `num_classes`, [b, adm_in_channels] for "sequential", [b, 1] for "continuous". Parameter names are the
    original's, but for `num_groups` of every normalisation, which lets a narrow model keep several channels
    to a group.
    """

    training_params = frozenset({"image_size", "legacy", "num_heads_upsample", "use_bf16", "use_fp16"})

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        dropout: float = 0.0,
        num_classes: int | str | None = None,
        use_checkpoint: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        use_spatial_transformer: bool = True,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        disable_self_attentions: Sequence[bool] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
        adm_in_channels: int | None = None,
        num_groups: int = 32,
    ):
        super().__init__()
        if not use_spatial_transformer or context_dim is None:
            raise InputError("UNetModel needs use_spatial_transformer: true and a context_dim")
        if num_heads == -1 and num_head_channels == -1:
            raise InputError("UNetModel needs num_heads or num_head_channels")
        levels = range(len(channel_mult))
        blocks_of = (
            [num_res_blocks] * len(levels) if isinstance(num_res_blocks, int) else list(num_res_blocks)
        )
        no_self_attn = disable_self_attentions or [False] * len(levels)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.num_classes = num_classes
        self.model_channels = model_channels
        self.use_checkpoint = use_checkpoint
        emb_channels = model_channels * 4

        def res(channels: int, out: int) -> ResBlock:
            return ResBlock(channels, emb_channels, out, dropout, num_groups)

        def attention(channels: int, disable_self_attn: bool) -> SpatialTransformer:
            heads = num_heads if num_head_channels == -1 else channels // num_head_channels
            return SpatialTransformer(
                channels,
                heads,
                channels // heads,
                transformer_depth,
                context_dim,
                num_groups,
                dropout,
                use_linear_in_transformer,
                disable_self_attn,
            )

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        self.label_emb = label_embedding(num_classes, adm_in_channels, emb_channels)

        channels = model_channels
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(in_channels, channels, 3, padding=1))])
        skips = [channels]
        for level in levels:
            for _ in range(blocks_of[level]):
                layers = [res(channels, channel_mult[level] * model_channels)]
                channels = channel_mult[level] * model_channels
                if 2**level in attention_resolutions:
                    layers.append(attention(channels, no_self_attn[level]))
                self.input_blocks.append(Block(*layers))
                skips.append(channels)
            if level != levels[-1]:
                self.input_blocks.append(Block(Downsample(channels)))
                skips.append(channels)

        self.middle_block = Block(
            res(channels, channels), attention(channels, disable_middle_self_attn), res(channels, channels)
        )

        self.output_blocks = nn.ModuleList()
        for level in reversed(levels):
            for i in range(blocks_of[level] + 1):
                layers = [res(channels + skips.pop(), channel_mult[level] * model_channels)]
                channels = channel_mult[level] * model_channels
                if 2**level in attention_resolutions:
                    layers.append(attention(channels, no_self_attn[level]))
                if level != 0 and i == blocks_of[level]:
                    layers.append(Upsample(channels))
                self.output_blocks.append(Block(*layers))

        self.out = nn.Sequential(
            nn.GroupNorm(num_groups, channels),
            nn.SiLU(inplace=True),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        nn.init.zeros_(self.out[2].weight)
        nn.init.zeros_(self.out[2].bias)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, which the inputs must have, too."""
        return self.out[0].weight.dtype

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if (y is None) != (self.label_emb is None):
            raise ValueError("class labels must be given if, and only if, the model has them")
        emb = self.embed(timesteps, y, x.dtype)
        h, skips = x, []
        for block in self.input_blocks:
            h = self.run(block, h, emb, context)
            skips.append(h)
        h = self.run(self.middle_block, h, emb, context)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            h = self.run(block, h, emb, context, skips[-1].shape[2:] if skips else None)
        return self.out(h)

    def embed(self, timesteps: torch.Tensor, y: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The embedding [b, 4 model_channels] of timesteps [b] and class labels."""
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))
        return emb if y is None else emb + self.label_emb(y)

    def run(self, block: Block, *inputs) -> torch.Tensor:
        """The block's output; with use_checkpoint its activations are computed again for the gradients."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def label_embedding(
    num_classes: int | str | None, adm_in_channels: int | None, emb_channels: int
) -> nn.Module | None:
    """What turns a class label (x4: noise level; unCLIP: image embedding) into a time-embedding offset."""
    match num_classes:
        case None:
            return None
        case int():
            return nn.Embedding(num_classes, emb_channels)
        case "continuous":
            return nn.Linear(1, emb_channels)
        case "sequential":
            return nn.Sequential(
                nn.Sequential(
                    nn.Linear(adm_in_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
                )
            )
    raise InputError(f"num_classes {num_classes!r} is not a number, 'continuous' or 'sequential'")
