"""Masks of regions to repaint: around solids, rectangles, brush strokes, the whole image."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ldm.scenes.scene import pick

SEEN = 0.02  # the share of a pixel from which on it counts as the solid's


def random_mask(coverage: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int | None]:
    """A mask bool [size, size], True where the image is to be repainted, and the one solid it is made for.

    `coverage` [solids, size, size] are a render's; the second result counts along its first axis, and is None
    for a mask that has nothing to do with a single solid.
    """
    size = coverage.shape[-1]
    kind = rng.random()
    if kind < 0.55:
        solid = int(rng.integers(len(coverage)))
        around = grown if rng.random() < 0.5 else box
        return around(coverage[solid] > SEEN, int(rng.integers(1, size // 8 + 1))), solid
    if kind < 0.65:
        return grown(coverage.max(0) > SEEN, int(rng.integers(1, size // 8 + 1))), None
    if kind < 0.75:
        return rectangle(rng, size), None
    if kind < 0.85:
        return strokes(rng, size), None
    return np.ones((size, size), bool), None


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask and everything that is at most so many pixels away from it, along each axis."""
    filtered = Image.fromarray(255 * mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * pixels + 1))
    return np.asarray(filtered) > 0


def box(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The smallest rectangle that holds the mask and so many pixels on each side; empty like the mask."""
    result = np.zeros_like(mask)
    if mask.any():
        spans = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        result[tuple(slice(max(0, span[0] - pixels), span[-1] + pixels + 1) for span in spans)] = True
    return result


def rectangle(rng: np.random.Generator, size: int) -> np.ndarray:
    """A rectangle at random, whose sides are 0.2 to 0.8 of the image's."""
    mask = np.zeros((size, size), bool)
    sides = [int(side * size) for side in rng.uniform(0.2, 0.8, 2)]
    starts = [int(rng.integers(size - side + 1)) for side in sides]
    mask[tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))] = True
    return mask


def strokes(rng: np.random.Generator, size: int) -> np.ndarray:
    """One to three strokes of a round brush with a few bends each."""
    image = Image.new("L", (size, size))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 4))):
        points = [tuple(point) for point in rng.uniform(0, size, (int(rng.integers(2, 5)), 2)).tolist()]
        width = int(pick(rng, range(size // 12, size // 4)))
        draw.line(points, fill=255, width=width, joint="curve")
        for x, y in points:
            draw.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=255)
    return np.asarray(image) > 0
