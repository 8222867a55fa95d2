"""Enlarging an image four times: the low-resolution image that the x4 model is given, and tiles.

An image that is too large to be enlarged at once goes through the UNet in overlapping tiles at every step,
and their outputs are blended (MultiDiffusion, Bar-Tal et al. 2023, https://arxiv.org/abs/2302.08113): tiles
agree on what they share before the next step, so that no seam can grow. The autoencoder decodes in the same
tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import FieldError, InputError
from ldm.fields import settings_of
from ldm.images.init_image import allowed_size
from ldm.images.pixels import to_float
from ldm.models.diffusion.ddpm import LatentDiffusion, LatentUpscaleDiffusion
from ldm.optimize.tiling import in_tiles, overlap_of
from ldm.pipeline.init_images import InitImages
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.request import ImageRequest, image_name
from ldm.sampling.denoiser import DiffusionModel
from ldm.sampling.noise import ImageNoise
from ldm.weights.description import Description

LEAST_TILE = 16  # latents; smaller ones see too little of the image
# Values at the peak of memory in the networks of the x4 upscaler: of a latent, for each channel of the UNet's
# first level and each row of the batch; of a pixel, for each channel of the decoder's last level.
UNET_VALUES, DECODER_VALUES = 20, 8
SHARE = 0.6  # of all memory; the rest is for the weights and for others


def enlarged_size(request: ImageRequest, images: InitImages, factor: int) -> tuple[int, int]:
    """Height and width of the result: `factor` times the init image's own, or those of the request.

    InputError if it would have more pixels than allowed, or sides that no request can have.
    """
    height, width = (factor * side for side in images.whole(request).shape[:2])
    asked = request.height, request.width
    size = (height, width) if asked == (None, None) else asked
    name, each = image_name(request.init_img), settings_of(ImageRequest)["height"]
    height, width = allowed_size(name, (width, height), *size, images.max_pixels)
    if not each.low <= min(height, width) <= max(height, width) <= each.high:
        raise InputError(f"{name} would become {width}x{height}: sides of {each.bounds} pixels can be made")
    return height, width


def small_image(request: ImageRequest, images: InitImages, factor: int) -> np.ndarray:
    """The image that is enlarged to a resolved request's size, uint8 [H / factor, W / factor, 3]."""
    return images.fitted(request, request.height // factor, request.width // factor)


def check_level(request: ImageRequest, config: Mapping[str, Any]) -> None:
    """FieldError for a noise level beyond those that the model was trained on."""
    stage = (config.get("params") or {}).get("low_scale_config") or {}
    noised = not str(stage.get("target")).endswith("SimpleImageConcat")
    most = (stage.get("params") or {}).get("max_noise_level", 999) if noised else 0
    if request.noise_level > most:
        raise FieldError(
            "{noise_level} {level} is not in range: this model was trained on 0 … {most}",
            level=request.noise_level,
            most=most,
        )


def tile_size(
    request: ImageRequest,
    config: Mapping[str, Any],
    described: Description,
    options: RuntimeOptions,
    memory: float,
    width: int,
) -> int:
    """The side of a sized request's tiles in pixels of the low-resolution image; 0 if it needs none.

    Where the user leaves it to us, `memory` decides (bytes, of the machine or the GPU as a whole, so that a
    run that is taken up again finds the same), with values of `width` bytes: the image as a whole, or else
    tiles of the model's native size or of a power of two times that. FieldError for a size that cannot be.
    """
    factor = described.factor or 4
    height_, width_ = request.height // factor, request.width // factor
    longest, area = max(height_, width_), height_ * width_
    tile = request.tile
    if tile is None:
        bytes_each = width * _values(config, factor, request.rows)
        fitting = SHARE * memory / bytes_each
        native = max(LEAST_TILE, described.native_size // factor)
        tile = native
        while area > fitting and (2 * tile) ** 2 <= fitting:
            tile *= 2
        tile = 0 if area <= fitting else tile
    check_tile(tile)
    tile = tile if tile < longest else 0
    if tile and options.deepcache > 1:
        raise FieldError(
            "{deepcache} {calls} with tiles of {side} pixels: kept features belong to one part of the image; "
            "leave it out, or take {tile} 0",
            calls=options.deepcache,
            side=tile,
        )
    return tile


def check_tile(tile: int) -> None:
    """FieldError for tiles that are too small to be blended well."""
    if 0 < tile < LEAST_TILE:
        raise FieldError("{tile} {side}: take at least {least}, or 0 for none", side=tile, least=LEAST_TILE)


def _values(config: Mapping[str, Any], factor: int, rows: int) -> float:
    """How many values a latent takes at the peak of memory, in the UNet or in the decoder."""
    params = config.get("params") or {}
    unet = (params.get("unet_config") or {}).get("params") or {}
    stage = (params.get("first_stage_config") or {}).get("params") or {}
    decoder = (stage.get("ddconfig") or {}).get("ch", 128)
    levels = unet.get("channel_mult") or [1]
    return max(
        rows * UNET_VALUES * unet.get("model_channels", 256) * levels[0], DECODER_VALUES * decoder * factor**2
    )


def inputs(
    model: LatentUpscaleDiffusion, batch: Sequence[ImageRequest], images: InitImages, noise: ImageNoise
) -> dict[str, Tensor]:
    """What the UNet is given besides the prompts: concat [b, 3, h, w], the small images with noise on them,
    and label int64 [b], the levels of that noise.
    """
    factor = model.first_stage_model.factor
    small = to_float([small_image(request, images, factor) for request in batch]).to(model.device)
    levels = torch.tensor([request.noise_level for request in batch], device=model.device)
    drawn = noise.at(b"small image", tuple(small.shape[1:]))
    noised, levels = model.low_scale_model(small, levels, drawn)
    return {"concat": noised, "label": levels}


class TiledModel:
    """A model whose UNet works on overlapping square tiles of `tile` latents, its outputs blended."""

    def __init__(self, model: LatentDiffusion, tile: int):
        self.model, self.tile = model, tile
        self.parameterization, self.alphas_cumprod = model.parameterization, model.alphas_cumprod

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """As `LatentDiffusion.apply_model`; what is concatenated is cut as the latents are."""
        channels = x_noisy.shape[1]

        def part(both: Tensor) -> Tensor:
            own = {**cond, "c_concat": [both[:, channels:]]}
            return self.model.apply_model(both[:, :channels], t, own).float()

        both = torch.cat([x_noisy, *cond["c_concat"]], dim=1)
        return in_tiles(part, both, self.tile, overlap_of(self.tile), 1, 1)


def tiled(model: LatentDiffusion, batch: Sequence[ImageRequest]) -> DiffusionModel:
    """The model as a denoiser calls it for requests that have one `batch_key`: in tiles, if they say so."""
    return TiledModel(model, batch[0].tile) if batch[0].tile else model
