"""What images are going to look like: a linear map from latents to colours, and the file that shows it."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ldm.images.metadata import encode_image
from ldm.images.pixels import make_grid
from ldm.log import notice

if TYPE_CHECKING:
    from torch import Tensor

PREVIEW = "preview.png"
SHORTER = 256  # pixels, at least, of each image's shorter side: latents are small

# Red, green and blue of each channel, and of the bias: [c + 1, 3]; or [2 c + 1, 3], where those of averages
# over 3 x 3 latents stand in between: the autoencoders of the small models spread a colour over them.
Factors = Sequence[Sequence[float]]

# By the factor that brings a first stage's latents to unit variance, which distinguishes the first stages.
# The first two are published (ComfyUI, comfy/latent_formats.py: SD15, SD_X4); those of the bundled models
# are made by scripts/fit_preview.py. Colours are -1 … 1.
FACTORS: dict[float, Factors] = {
    0.18215: (  # Stable Diffusion 1 and 2, LAION-400M
        (0.3512, 0.2297, 0.3227),
        (0.3250, 0.4974, 0.2350),
        (-0.2829, 0.1762, 0.2721),
        (-0.2120, -0.2616, -0.7177),
        (0.0, 0.0, 0.0),
    ),
    0.08333: (  # the x4 upscaler of Stable Diffusion 2
        (-0.2340, -0.3863, -0.3257),
        (0.0994, 0.0885, -0.0908),
        (-0.2833, -0.2349, -0.3741),
        (0.2523, -0.0055, -0.1651),
        (0.0, 0.0, 0.0),
    ),
    0.29291: (  # models/scenes-64 and all that have its autoencoder
        (-0.0938, 0.1519, 0.1858),
        (0.2092, 0.1031, 0.0645),
        (0.0038, -0.0893, -0.1118),
        (0.0554, -0.0021, -0.0521),
        (0.5664, 0.5526, 0.9081),
        (0.1864, -0.0704, -0.2482),
        (-0.1590, -0.0228, -0.2418),
        (0.2349, 0.0145, -0.0077),
        (-0.0408, -0.1861, -0.2267),
    ),
    0.26192: (  # models/scenes-128
        (-0.1298, 0.1492, 0.1327),
        (0.1918, 0.0774, 0.0607),
        (0.0077, -0.0913, -0.0652),
        (0.0544, -0.0087, -0.0524),
        (0.7941, 0.4643, 0.9944),
        (0.1376, -0.0336, -0.2408),
        (-0.2405, 0.0244, -0.4102),
        (0.2728, 0.0108, -0.0711),
        (-0.0601, -0.1586, -0.2113),
    ),
    0.86706: (  # models/scenes-x4, fitted with --count 256
        (0.4244, 0.0042, 0.0083),
        (0.0065, 0.3973, 0.0100),
        (0.0078, 0.0039, 0.3957),
        (-0.0194, 0.0100, 0.0095),
        (0.0517, 0.0210, 0.0076),
        (0.0232, 0.0342, 0.0152),
        (0.0127, 0.0222, 0.0370),
        (0.0546, 0.0110, 0.0191),
        (-0.0194, -0.0826, -0.0941),
    ),
}


def factors_of(scale_factor: float) -> Factors | None:
    """The map from latents of this scale factor to colours; None where none is known."""
    known = (factors for key, factors in FACTORS.items() if math.isclose(key, scale_factor, rel_tol=1e-3))
    return next(known, None)


def to_colours(latents: Tensor, factors: Factors) -> np.ndarray:
    """Latents [b, c, h, w] as colours, uint8 [b, h, w, 3]. They are computed where the latents are."""
    colours = _mapped(latents, latents.new_tensor(factors))
    return (127.5 * (colours.nan_to_num() + 1)).clamp(0, 255).round().byte().cpu().numpy()


def fit_factors(latents: Tensor, pixels: Tensor) -> Tensor:
    """The factors, [2 c + 1, 3], of latents [b, c, h, w] and the images that they decode to, [b, 3, H, W].

    Least squares, on the images' averages over the pixels of each latent.
    """
    import torch

    x = _features(latents.double(), 2 * latents.shape[1]).flatten(0, 2)  # [n, 2 c]
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    return torch.linalg.lstsq(x, _averages(latents, pixels).flatten(0, 2)).solution


def correlation(latents: Tensor, pixels: Tensor, factors: Factors) -> float:
    """Pearson's correlation of a preview with the decoded images' averages over the pixels of each latent."""
    import torch

    x = latents.double()
    seen = _mapped(x, x.new_tensor(factors)).clamp(-1, 1)
    return torch.corrcoef(torch.stack([seen.flatten(), _averages(latents, pixels).flatten()]))[0, 1].item()


def _mapped(latents: Tensor, table: Tensor) -> Tensor:
    """Colours [b, h, w, 3], about -1 … 1, of latents [b, c, h, w]."""
    return _features(latents, len(table) - 1) @ table[:-1] + table[-1]


def _features(latents: Tensor, count: int) -> Tensor:
    """What colours are made of, [b, h, w, count]: latents, and where there are 2 c their averages, too."""
    import torch
    from torch.nn.functional import avg_pool2d, pad

    if count > latents.shape[1]:
        around = avg_pool2d(pad(latents, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        latents = torch.cat([latents, around], dim=1)
    return latents.movedim(1, -1)


def _averages(latents: Tensor, pixels: Tensor) -> Tensor:
    """The average colours of images [b, 3, H, W] at each latent, float64 [b, h, w, 3]."""
    from torch.nn.functional import adaptive_avg_pool2d

    return adaptive_avg_pool2d(pixels.double().clamp(-1, 1), latents.shape[-2:]).movedim(1, -1)


class Preview:
    """Writes the batch in hand into a folder's preview.png, every so many steps; a callback of samplers.

    Between those steps the latents are not touched: to read them means to wait for a GPU.
    """

    def __init__(self, folder: Path, every: int, factors: Factors):
        self.path, self.every, self.factors = folder / PREVIEW, every, factors
        self.failed = False

    def __call__(self, step: int, x0: Tensor) -> None:
        """After each step, from 1, with clean latents x0 [b, c, h, w]."""
        if step % self.every or self.failed:
            return
        try:
            self._replace(encode_image(drawn(to_colours(x0, self.factors)), None))
        except OSError as error:
            self.failed = True  # images are worth more than their previews
            notice(f"--preview: cannot write {self.path}: {error.strerror}; the run goes on without it")

    def _replace(self, data: bytes) -> None:
        """A viewer finds the old file or the new one."""
        temporary = self.path.with_name(f".{PREVIEW}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)


def drawn(colours: np.ndarray) -> np.ndarray:
    """Colours uint8 [b, h, w, 3], enlarged, as a grid uint8 [H, W, 3] about as wide as high."""
    height, width = colours.shape[1:3]
    zoom = math.ceil(SHORTER / min(height, width, SHORTER))
    size = width * zoom, height * zoom
    images = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in colours]
    return make_grid(images, math.ceil(math.sqrt(len(images))))
