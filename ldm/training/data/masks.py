"""Random masks for inpainting: strokes of a brush and boxes.

After Suvorov et al. 2021, "Resolution-robust Large Mask Inpainting with Fourier Convolutions" (LaMa,
https://arxiv.org/abs/2109.07161), with its settings for large masks. Stable Diffusion's inpainting models
were trained with such masks and, for a quarter of the images, with everything masked.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ldm.errors import InputError
from ldm.util import check_params


@dataclass(frozen=True)
class RandomMasks:
    """How masks are drawn. Lengths are pixels of an image whose shorter side is 256, and grow with it."""

    strokes: float = 1.0  # how often strokes are drawn, compared with boxes
    boxes: float = 1.0
    everything: float = 0.25  # share of masks that cover the whole image
    most_strokes: int = 5
    most_bends: int = 5  # of a stroke: its straight parts
    longest: float = 200.0  # of a stroke's parts
    widest: float = 100.0  # of the brush
    most_boxes: int = 3
    smallest_box: float = 30.0  # side
    largest_box: float = 150.0
    margin: float = 10.0  # between a box and the edge of the image

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            most = 1 if option.name == "everything" else math.inf
            least = 1 if option.name.startswith("most_") else 0
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                bounds = f"from {least} to {most}" if most == 1 else f"of at least {least}"
                raise InputError(f"data: masks: {option.name} must be a number {bounds}, not {value!r}")
        if self.strokes + self.boxes == 0:
            raise InputError("data: masks: strokes and boxes cannot both be 0")
        if self.smallest_box > self.largest_box:
            raise InputError("data: masks: smallest_box is larger than largest_box")

    def draw(self, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
        """A mask float32 [height, width], 1 where the image is to be repainted."""
        if rng.random() < self.everything:
            return np.ones((height, width), np.float32)
        image = Image.new("L", (width, height))
        if rng.random() * (self.strokes + self.boxes) < self.strokes:
            self._strokes(ImageDraw.Draw(image), width, height, rng)
        else:
            self._boxes(ImageDraw.Draw(image), width, height, rng)
        return np.asarray(image, np.float32)

    def _strokes(self, draw: ImageDraw.ImageDraw, width: int, height: int, rng: np.random.Generator) -> None:
        scale = min(width, height) / 256
        for _ in range(rng.integers(1, self.most_strokes + 1)):
            x, y = rng.uniform(0, width), rng.uniform(0, height)
            for _ in range(rng.integers(1, self.most_bends + 1)):
                angle = rng.uniform(0, 2 * math.pi)
                length = scale * rng.uniform(10, 10 + self.longest)
                brush = scale * rng.uniform(5, 5 + self.widest)
                end = np.clip(
                    [x + length * math.cos(angle), y + length * math.sin(angle)], 0, [width, height]
                )
                draw.line([x, y, *end], fill=1, width=max(1, round(brush)))
                for a, b in ((x, y), end):
                    draw.ellipse([a - brush / 2, b - brush / 2, a + brush / 2, b + brush / 2], fill=1)
                x, y = end

    def _boxes(self, draw: ImageDraw.ImageDraw, width: int, height: int, rng: np.random.Generator) -> None:
        scale = min(width, height) / 256
        for _ in range(rng.integers(1, self.most_boxes + 1)):
            spans = []
            for side in (width, height):
                room = max(1, side - 2 * round(scale * self.margin))
                length = round(scale * rng.uniform(self.smallest_box, self.largest_box))
                length = min(max(1, length), room)
                start = (side - room) // 2 + int(rng.integers(room - length + 1))
                spans.append((start, start + length - 1))
            draw.rectangle([spans[0][0], spans[1][0], spans[0][1], spans[1][1]], fill=1)


def random_masks(setting: bool | Mapping[str, Any]) -> RandomMasks | None:
    """What `masks:` of a `data:` section asks for; InputError for an unknown parameter or a wrong value."""
    if setting is False:
        return None
    params = {} if setting is True else setting
    check_params(RandomMasks, params)
    return RandomMasks(**params)
