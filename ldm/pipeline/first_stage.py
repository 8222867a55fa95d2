"""The autoencoder as a pipeline uses it, also where low precision is not enough for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.images.pixels import to_float
from ldm.log import notice
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.optimize.tiling import overlap_of, with_common_statistics


class FirstStage:
    """Encodes and decodes. Once a result is NaN in low precision, the first stage works in float32.

    Those of SD 1 and 2 hold values beyond what float16 can express on some images.
    """

    def __init__(self, model: LatentDiffusion):
        self.model = model
        self.in_float32 = False

    def encode(self, images: Sequence[np.ndarray | Tensor]) -> DiagonalGaussianDistribution:
        """The posterior over latents of images, uint8 [H, W, 3] or tensors [3, H, W] in [-1, 1].

        An object that comes again is encoded once.
        """
        moments: dict[int, Tensor] = {}
        for pixels in images:
            if id(pixels) not in moments:
                x = pixels[None] if isinstance(pixels, Tensor) else to_float([pixels])
                moments[id(pixels)] = self._safely(self._moments, x.to(self.model.device))
        return DiagonalGaussianDistribution(torch.cat([moments[id(pixels)] for pixels in images]))

    def decode(self, latents: Tensor, tile: int = 0) -> Tensor:
        """Images [b, 3, h, w], about [-1, 1], of latents [b, c, h, w]; in blended tiles of `tile` latents."""
        if not tile:
            return self._safely(self.model.decode_first_stage, latents)
        stage, overlap = self.model.first_stage_model, overlap_of(tile)
        return self._safely(
            lambda z: with_common_statistics(
                stage, self.model.decode_first_stage, z, tile, overlap, 1, stage.factor
            ),
            latents,
        )

    def _moments(self, x: Tensor) -> Tensor:
        posterior = self.model.encode_first_stage(x)
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def _safely(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not self.in_float32:
            result = function(x)
            low = torch.promote_types(result.dtype, torch.float32) != result.dtype
            lost = x.isfinite().flatten(1).all(1) & ~result.isfinite().flatten(1).all(1)  # [b]
            if not (low and lost.any()):
                return result
            notice("the autoencoder yields NaN in low precision: it works in float32 from here on")
            self.model.first_stage_to(torch.float32)
            self.in_float32 = True
        with torch.autocast(self.model.device.type, enabled=False):
            return function(x.float())
