"""The geometry of painting a part of an image anew: masks, margins, crops, and how a result is pasted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter, ImageOps

LANCZOS, BILINEAR = Image.Resampling.LANCZOS, Image.Resampling.BILINEAR


class Sides(NamedTuple):
    """Pixels that are added to an image on each side."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def added_to(self, height: int, width: int) -> tuple[int, int]:
        return self.top + height + self.bottom, self.left + width + self.right


class Box(NamedTuple):
    """A part of an image; it may reach beyond the image."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.bottom - self.top, self.right - self.left

    def within(self, height: int, width: int) -> Box:
        """The part of it that lies in an image of this size."""
        return Box(max(self.top, 0), max(self.left, 0), min(self.bottom, height), min(self.right, width))

    def grown(self, pixels: int) -> Box:
        return Box(self.top - pixels, self.left - pixels, self.bottom + pixels, self.right + pixels)

    def joined(self, other: Box) -> Box:
        """The smallest box around both."""
        return Box(
            min(self.top, other.top),
            min(self.left, other.left),
            max(self.bottom, other.bottom),
            max(self.right, other.right),
        )


def fit_mask(mask: np.ndarray, height: int, width: int, how: str = "stretch") -> np.ndarray:
    """A mask float32 [h, w] in 0 … 1 in a new size, with `how` of `ldm.images.init_image.fit`.

    What is padded is 0. Bilinear: values between those of the mask come about at edges.
    """
    if mask.shape == (height, width):
        return mask
    image, size = Image.fromarray(mask.astype(np.float32)), (width, height)
    if how == "crop":
        fitted = ImageOps.fit(image, size, BILINEAR)
    elif how == "pad":
        fitted = ImageOps.pad(image, size, BILINEAR, color=0)
    else:
        fitted = image.resize(size, BILINEAR)
    return np.asarray(fitted).clip(0.0, 1.0)


def extended(pixels: np.ndarray, sides: Sides) -> np.ndarray:
    """An image uint8 [h, w, 3] with margins that repeat its edges, more and more blurred outwards.

    Colours and brightness go on so, but no thing is there twice, as it would be in a reflection.
    """
    if not any(sides):
        return pixels
    edges = [(sides.top, sides.bottom), (sides.left, sides.right)]
    whole = np.pad(pixels, [*edges, (0, 0)], mode="edge")
    rows, columns = (
        np.pad(np.zeros(size, int), edge, mode="linear_ramp", end_values=edge)
        for size, edge in zip(pixels.shape, edges, strict=False)
    )
    distance = np.maximum(rows[:, None], columns)  # from the image, in pixels
    image, blur = Image.fromarray(whole), 1.0
    while distance.max() > 2 * blur:
        blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)))
        whole = np.where((distance > 2 * blur)[..., None], blurred, whole)
        blur *= 1.5
    return whole


def surrounded(mask: np.ndarray, sides: Sides, value: float) -> np.ndarray:
    """A mask [h, w] with margins of one value."""
    edges = ((sides.top, sides.bottom), (sides.left, sides.right))
    return np.pad(mask, edges, constant_values=value)


def feather(inside: np.ndarray, standard_deviation: float) -> np.ndarray:
    """A bool mask [h, w] blurred with a Gaussian, float32 in 0 … 1: exactly 0 and 1 away from the edge.

    Pillow's Gaussian is three box blurs, which end about 2.5 standard deviations away; at the border of the
    image the mask goes on as it is.
    """
    image = Image.fromarray(inside.astype(np.uint8) * 255)
    if standard_deviation > 0:
        image = image.filter(ImageFilter.GaussianBlur(standard_deviation))
    return np.asarray(image, dtype=np.float32) / 255


def paste_alpha(inside: np.ndarray, margins: np.ndarray, standard_deviation: float) -> np.ndarray:
    """How much of the result shows in each pixel, float32 [h, w] in 0 … 1, of bool masks [h, w].

    The margins, which are `inside`, show nothing but the result: their feather lies in the image alone, where
    it falls from 1 to 0.
    """
    alpha = feather(inside, standard_deviation)
    if not margins.any():
        return alpha
    beside = (2 * feather(margins, standard_deviation)).clip(max=1.0)  # half of a blurred edge lies inside
    return np.where(margins, np.float32(1.0), np.maximum(alpha, beside))


def bounding_box(inside: np.ndarray) -> Box | None:
    """The smallest box around what is true in [h, w]; None if nothing is."""
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not len(rows):
        return None
    return Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)


def to_aspect(box: Box, shape: tuple[int, int], height: int, width: int) -> Box:
    """A box that is grown to the aspect ratio height : width, to the nearest pixel.

    It stays inside an image of `shape` (height and width) if it is small enough for that, and is centred on
    the image where it is not.
    """
    h, w = box.size
    h, w = max(h, round(w * height / width)), max(w, round(h * width / height))
    top = _placed(box.top, box.bottom, h, shape[0])
    left = _placed(box.left, box.right, w, shape[1])
    return Box(top, left, top + h, left + w)


def _placed(start: int, end: int, length: int, size: int) -> int:
    """Where a stretch of `length` begins that has start … end in its middle, and lies in 0 … size."""
    if length > size:
        return (size - length) // 2
    return min(max((start + end - length) // 2, 0), size - length)


def cut(pixels: np.ndarray, box: Box) -> np.ndarray:
    """The part [h, w, …] of an image or mask in a box; beyond the image its edges are repeated."""
    height, width = pixels.shape[:2]
    inner = box.within(height, width)
    part = pixels[inner.top : inner.bottom, inner.left : inner.right]
    edges = [
        (inner.top - box.top, box.bottom - inner.bottom),
        (inner.left - box.left, box.right - inner.right),
    ]
    if not np.any(edges):
        return part
    return np.pad(part, [*edges, *[(0, 0)] * (pixels.ndim - 2)], mode="edge")


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image uint8 [h, w, 3] in a new size by LANCZOS; in its own size it is the same."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), LANCZOS))


def paste(whole: np.ndarray, pixels: np.ndarray, box: Box, alpha: np.ndarray) -> np.ndarray:
    """An image uint8 [h, w, 3] with `pixels`, uint8 [H, W, 3], in its box, to the share `alpha` [h, w].

    The pixels come back to the size of the box. Where alpha is 0 the image stays as it is, byte for byte.
    """
    inner = box.within(*whole.shape[:2])
    there = np.s_[inner.top : inner.bottom, inner.left : inner.right]
    part = resize(pixels, *box.size)[
        inner.top - box.top : inner.bottom - box.top, inner.left - box.left : inner.right - box.left
    ].astype(np.float32)
    before, share = whole[there].astype(np.float32), alpha[there][..., None]
    result = whole.copy()
    result[there] = (before + share * (part - before)).round().astype(np.uint8)
    return result
