"""What a family's UNet is given besides noisy latents and caption: a mask, a depth map, a small image."""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import (
    LatentDepth2ImageDiffusion,
    LatentDiffusion,
    LatentInpaintDiffusion,
    LatentUpscaleDiffusion,
)
from ldm.sampling.denoiser import Conditioning

NEEDS_MASKS = (
    "an inpainting model is trained with masks: set `masks: true` in data, which draws them, or use a source "
    "that has some"
)


def has_channels(model: LatentDiffusion) -> bool:
    """Whether the model's UNet has further input channels, which `concat_channels` makes."""
    return isinstance(model, LatentInpaintDiffusion | LatentDepth2ImageDiffusion | LatentUpscaleDiffusion)


def concat_channels(
    model: LatentDiffusion,
    x: Tensor,
    maps: Mapping[str, Tensor],
    size: tuple[int, int],
    normal: Callable[..., Tensor],
) -> Tensor | None:
    """The UNet's further input channels [b, c, h, w], (h, w) = `size` being that of the latents.

    They are made of images x [b, 3, H, W] in [-1, 1] and of the maps of their examples: "mask" or "depth"
    [b, 1, H, W], or "small" [b, 3, h, w] in [-1, 1]. Depths that are not there are estimated by the model,
    and small images are the large ones made smaller, without noise. `normal(c, h, w)` draws standard normal
    numbers [b, c, h, w] on the CPU. None for a model that has no such channels; InputError without the masks
    that an inpainting model needs.
    """
    match model:
        case LatentInpaintDiffusion():
            if "mask" not in maps:
                raise InputError(NEEDS_MASKS)
            noise = normal(model.channels, *size).to(x.device)
            return model.concat_channels(maps["mask"].to(x), x, noise)
        case LatentDepth2ImageDiffusion():
            depth = maps["depth"].to(x) if "depth" in maps else model.estimate_depth(x)
            return model.depth_channel(depth.float(), size)
        case LatentUpscaleDiffusion():
            return F.interpolate(maps["small"].to(x) if "small" in maps else x, size, mode="area")
    return None


def conditions(
    model: LatentDiffusion,
    context: Tensor,
    concat: Tensor | None,
    uniform: Callable[[], Tensor],
    normal: Callable[..., Tensor],
) -> Conditioning:
    """What `apply_model` takes, from text embeddings [b, n, d] and `concat_channels`.

    The small images of an upscaler are noised here, low levels more often than high ones. `uniform()` draws
    numbers 0 <= u < 1 [b], and `normal(c, h, w)` standard normal ones [b, c, h, w], both on the CPU.
    """
    if concat is None:
        return context
    if not isinstance(model, LatentUpscaleDiffusion):
        return {"c_crossattn": [context], "c_concat": [concat]}
    levels = (uniform() ** 4 * (model.low_scale_model.max_noise_level + 1)).long().to(concat.device)
    concat, levels = model.low_scale_model(concat, levels, normal(*concat.shape[1:]).to(concat.device))
    return {"c_crossattn": [context], "c_concat": [concat], "c_adm": levels}
