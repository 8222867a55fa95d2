"""What a family's UNet is given besides noisy latents and caption: a mask, a depth map, a small image."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.diffusion.ddpm import (
    LatentDepth2ImageDiffusion,
    LatentDiffusion,
    LatentInpaintDiffusion,
    LatentUpscaleDiffusion,
)
from ldm.sampling.denoiser import Conditioning
from ldm.scenes.captions import paraphrase
from ldm.scenes.masks import random_mask
from ldm.scenes.renderer import render, render_layers
from ldm.scenes.scene import Scene

# image uint8 [size, size, 3], caption, and float32 [size, size] of what the family is given besides
Example = tuple[np.ndarray, str, np.ndarray | None]
ALONE = 0.4  # share of the masks around one solid whose caption is about this solid only


def plain(scene: Scene, rng: np.random.Generator, size: int) -> Example:
    return render(scene, rng, size), paraphrase(scene, rng), None


def masked(scene: Scene, rng: np.random.Generator, size: int) -> Example:
    """With a mask, 1 where the image is to be repainted."""
    scene = scene.canonical()
    image, layers = render_layers(scene, rng, size)
    mask, solid = random_mask(layers.coverage, rng)
    if solid is not None and rng.random() < ALONE:
        scene = Scene(scene.second if solid else scene.first)
    return image, paraphrase(scene, rng), mask.astype(np.float32)


def deep(scene: Scene, rng: np.random.Generator, size: int) -> Example:
    """With its map of inverse depth."""
    image, layers = render_layers(scene, rng, size)
    return image, paraphrase(scene, rng), layers.disparity


def example_of(model: LatentDiffusion) -> Callable[[Scene, np.random.Generator, int], Example]:
    """What makes examples for a model: (scene, rng, size) -> `Example`."""
    match model:
        case LatentInpaintDiffusion():
            return masked
        case LatentDepth2ImageDiffusion():
            return deep
    return plain


def concat_channels(
    model: LatentDiffusion,
    x: Tensor,
    maps: Tensor | None,
    size: tuple[int, int],
    generator: torch.Generator,
) -> Tensor | None:
    """The UNet's further input channels [b, c, h, w], (h, w) = `size` being that of the latents.

    They are made of images x [b, 3, H, W] in [-1, 1] and the maps [b, 1, H, W] of their examples. An upscaler
    is given the images themselves, at the size of the latents and without noise. None for a model that has no
    such channels.
    """
    match model:
        case LatentInpaintDiffusion():
            noise = torch.randn(len(x), model.channels, *size, generator=generator).to(x.device)
            return model.concat_channels(maps, x, noise)
        case LatentDepth2ImageDiffusion():
            return model.depth_channel(maps, size)
        case LatentUpscaleDiffusion():
            return F.interpolate(x, size, mode="area")
    return None


def conditions(
    model: LatentDiffusion, context: Tensor, concat: Tensor | None, generator: torch.Generator
) -> Conditioning:
    """What `apply_model` takes, from text embeddings [b, n, d] and `concat_channels`.

    The small images of an upscaler are noised here, low levels more often than high ones.
    """
    if concat is None:
        return context
    if not isinstance(model, LatentUpscaleDiffusion):
        return {"c_crossattn": [context], "c_concat": [concat]}
    rank = torch.rand(len(concat), generator=generator)
    levels = (rank**4 * (model.low_scale_model.max_noise_level + 1)).long().to(concat.device)
    noise = torch.randn(concat.shape, generator=generator).to(concat.device)
    concat, levels = model.low_scale_model(concat, levels, noise)
    return {"c_crossattn": [context], "c_concat": [concat], "c_adm": levels}
