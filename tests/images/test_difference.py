"""Differences of two images: rounding, moved watermarks, alterations."""

import io

import numpy as np
import pytest
from image_files import noise
from PIL import Image

from ldm.images.difference import difference, difference_image
from ldm.images.watermark import Watermarker


@pytest.fixture
def image() -> np.ndarray:
    return np.clip(noise(256, 256), 40, 200)


def test_identical(image: np.ndarray) -> None:
    gaps = difference(image, image.copy(), 2)
    assert (gaps.identical, gaps.altered, gaps.largest, gaps.share) == (True, False, 0, 0.0)


def test_rounding(image: np.ndarray) -> None:
    other = image.copy()
    other[10, 20, 1] += 2
    gaps = difference(other, image, 2)
    assert (gaps.identical, gaps.altered, gaps.largest, gaps.at) == (False, False, 2, (20, 10))
    assert gaps.share == 1 / 256**2
    assert difference(other, image, 1).altered


def test_where_it_is_altered(image: np.ndarray) -> None:
    other = image.copy()
    other[30:42, 50:55] = 255
    gaps = difference(other, image, 2, marked=True)
    assert gaps.altered
    assert gaps.box == (50, 30, 5, 12)
    shown = difference_image(other, gaps)
    assert (shown == (255, 40, 40)).all(-1).sum() == gaps.beyond.sum() >= 55


def test_a_moved_watermark_is_rounding() -> None:
    """One level moved the mark of some blocks by more than thirty."""
    y, x = np.mgrid[:256, :256]
    image = np.stack([x // 2 + 60, y // 2 + 40, 250 - x // 2], axis=-1).astype(np.uint8)
    marked = Watermarker()(image)
    some = np.random.default_rng(1).random(image.shape) < 0.01
    gaps = difference(Watermarker()(image + some.astype(np.uint8)), marked, 3, marked=True)
    assert gaps.largest > 10
    assert 0 < gaps.marks < 64
    assert not gaps.altered


def test_another_watermark_is_none(image: np.ndarray) -> None:
    marked = Watermarker()(image)
    assert difference(Watermarker("another message")(image), marked, 3, marked=True).altered
    assert difference(image, marked, 3, marked=True).altered


@pytest.mark.parametrize(("format", "quality"), [("JPEG", 95), ("JPEG", 60), ("WEBP", 90), ("WEBP", 60)])
def test_lossy_files(format: str, quality: int) -> None:
    """Loss is rounding, and a painted spot is not."""
    y, x = np.mgrid[:128, :128]
    smooth = np.stack([x + 60, y + 40, 250 - x], axis=-1).clip(0, 255).astype(np.uint8)

    def through(pixels: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format, quality=quality)
        return np.asarray(Image.open(file).convert("RGB"))

    gaps = difference(through(smooth), smooth, 2, lossy=True)
    assert gaps.largest > 2
    assert not gaps.altered
    spot = smooth.copy()
    spot[40:50, 40:50] = 0
    gaps = difference(through(spot), smooth, 2, lossy=True)
    left, top, width, height = gaps.box
    assert left <= 40
    assert top <= 40
    assert left + width >= 50
    assert top + height >= 50


def test_any_size() -> None:
    """Sides that are no multiples of a block."""
    image = noise(37, 21)
    other = image.copy()
    other[36, 20] ^= 128
    for options in ({"marked": True}, {"lossy": True}):
        gaps = difference(other, image, 2, **options)
        assert gaps.beyond.shape == (37, 21)
    assert difference(other, image, 2).altered
