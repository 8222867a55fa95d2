"""The first stage, images to latents (Rombach et al. 2022, https://arxiv.org/abs/2112.10752, 3.1)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ldm.modules.diffusionmodules.model import AutoencoderShape, Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import check_params


class AutoencoderKL(nn.Module):
    """A variational autoencoder with a downsampling factor of 2^(levels - 1); 8 for Stable Diffusion.

    Images are [b, 3, h, w] in [-1, 1], h and w multiples of the factor; latents [b, embed_dim, h/8, w/8].
    """

    training_params = frozenset(
        {
            "ckpt_path",
            "colorize_nlabels",
            "ema_decay",
            "ignore_keys",
            "image_key",
            "learn_logvar",
            "lossconfig",
            "monitor",
        }
    )

    def __init__(self, embed_dim: int, ddconfig: Mapping[str, Any]):
        super().__init__()
        check_params(AutoencoderShape, ddconfig)
        lists = {name: tuple(ddconfig.get(name, ())) for name in ("ch_mult", "attn_resolutions")}
        self.shape = AutoencoderShape(**{**ddconfig, **lists})
        self.factor = 2 ** (len(self.shape.ch_mult) - 1)
        self.embed_dim = embed_dim
        self.encoder = Encoder(self.shape)
        self.decoder = Decoder(self.shape)
        self.quant_conv = nn.Conv2d(2 * self.shape.z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, self.shape.z_channels, 1)

    def encode(self, x: torch.Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(z))

    def forward(
        self, x: torch.Tensor, noise: torch.Tensor | None = None, sample_posterior: bool = True
    ) -> tuple[torch.Tensor, DiagonalGaussianDistribution]:
        """The reconstruction of x, from a sample of the posterior or from its mode, and the posterior.

        The sample is drawn with `noise`, or else from torch's global CPU generator.
        """
        posterior = self.encode(x)
        return self.decode(posterior.sample(noise) if sample_posterior else posterior.mode()), posterior
