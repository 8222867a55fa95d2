"""Encoder and decoder of the first stage (Esser et al. 2021, https://arxiv.org/abs/2012.09841)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


@dataclass(frozen=True)
class AutoencoderShape:
    """The `ddconfig` section of a first-stage YAML; names are the original's, `num_groups` is ours."""

    ch: int  # channels at full resolution
    ch_mult: tuple[int, ...]  # channel factor of each level; each level but the last halves the resolution
    num_res_blocks: int
    z_channels: int
    resolution: int = 256  # only decides, through attn_resolutions, which levels have attention
    attn_resolutions: tuple[int, ...] = ()
    in_channels: int = 3
    out_ch: int = 3
    double_z: bool = True  # the encoder predicts mean and log-variance
    dropout: float = 0.0
    attn_type: str = "vanilla"  # or "none": no attention in the middle either
    num_groups: int = 32  # 32 groups on few channels is instance normalisation, which forgets flat colours

    def channels(self, level: int) -> int:
        return self.ch * self.ch_mult[level]

    def attention(self, level: int) -> bool:
        return self.resolution >> level in self.attn_resolutions


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions around a skip connection: [b, c_in, h, w] -> [b, c_out, h, w]."""

    def __init__(self, in_channels: int, out_channels: int, shape: AutoencoderShape):
        super().__init__()
        self.norm1 = nn.GroupNorm(shape.num_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(shape.num_groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(shape.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = (
            nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(self.dropout(F.silu(self.norm2(h), inplace=True)))
        h += self.nin_shortcut(x)  # of the largest features each copy is 134 MB at 512x512 pixels
        return h


class AttnBlock(nn.Module):
    """Self-attention of one head over all pixels, [b, c, h, w] -> [b, c, h, w]."""

    attend = staticmethod(F.scaled_dot_product_attention)  # (q, k, v); an instance may have its own

    def __init__(self, channels: int, shape: AutoencoderShape):
        super().__init__()
        self.norm = nn.GroupNorm(shape.num_groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        # of transposed views torch would hold the whole attention matrix: 2 GiB more at 1024x1024 pixels
        h = self.attend(q.contiguous(), k.contiguous(), v.contiguous())
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Half the resolution; the original pads on the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the config asks for it."""

    def __init__(self, in_channels: int, level: int, num_blocks: int, shape: AutoencoderShape):
        super().__init__()
        channels = shape.channels(level)
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else channels, channels, shape) for i in range(num_blocks)
        )
        self.attn = nn.ModuleList(
            AttnBlock(channels, shape) for _ in range(num_blocks if shape.attention(level) else 0)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    """The blocks at the lowest resolution."""

    def __init__(self, channels: int, shape: AutoencoderShape):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, shape)
        self.attn_1 = nn.Identity() if shape.attn_type == "none" else AttnBlock(channels, shape)
        self.block_2 = ResnetBlock(channels, channels, shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images [b, 3, h, w] in [-1, 1] -> moments [b, 2 z, h / f, w / f] with f = 2^(levels - 1)."""

    def __init__(self, shape: AutoencoderShape):
        super().__init__()
        last = len(shape.ch_mult) - 1
        self.conv_in = nn.Conv2d(shape.in_channels, shape.ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = shape.ch
        for level in range(last + 1):
            stage = Level(channels, level, shape.num_res_blocks, shape)
            channels = shape.channels(level)
            if level != last:
                stage.downsample = Downsample(channels)
            self.down.append(stage)
        self.mid = Middle(channels, shape)
        self.norm_out = nn.GroupNorm(shape.num_groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, shape.z_channels * (2 if shape.double_z else 1), 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        for stage in self.down[:-1]:
            h = stage.downsample(stage(h))
        h = self.mid(self.down[-1](h))
        return self.conv_out(F.silu(self.norm_out(h), inplace=True))


class Decoder(nn.Module):
    """Latents [b, z, h / f, w / f] -> images [b, 3, h, w], about [-1, 1]."""

    def __init__(self, shape: AutoencoderShape):
        super().__init__()
        last = len(shape.ch_mult) - 1
        channels = shape.channels(last)
        self.conv_in = nn.Conv2d(shape.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, shape)
        stages = []
        for level in range(last, -1, -1):
            stage = Level(channels, level, shape.num_res_blocks + 1, shape)
            channels = shape.channels(level)
            if level != 0:
                stage.upsample = Upsample(channels)
            stages.append(stage)
        self.up = nn.ModuleList(reversed(stages))  # up.0 is the full resolution in checkpoints
        self.norm_out = nn.GroupNorm(shape.num_groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, shape.out_ch, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.mid(self.conv_in(z))
        for level in range(len(self.up) - 1, 0, -1):
            h = self.up[level].upsample(self.up[level](h))
        return self.conv_out(F.silu(self.norm_out(self.up[0](h)), inplace=True))
