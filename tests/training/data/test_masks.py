"""Random masks for inpainting."""

import numpy as np
import pytest

from ldm.training.data.masks import RandomMasks, random_masks


def masks(count: int = 200, size: tuple[int, int] = (64, 48), **params: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([RandomMasks(**params).draw(*size, rng) for _ in range(count)])


def test_masks_are_of_0_and_1_at_the_size_of_the_image() -> None:
    drawn = masks()
    assert drawn.dtype == np.float32
    assert drawn.shape == (200, 48, 64)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    assert drawn.any(axis=(1, 2)).all(), "no mask is empty"


def test_a_quarter_covers_everything() -> None:
    whole = masks(1000).all(axis=(1, 2)).mean()
    assert whole == pytest.approx(0.25, abs=0.06)
    assert masks(everything=1.0).all()
    assert masks(1000, everything=0.0, widest=20).all(axis=(1, 2)).mean() < 0.01


def test_boxes_are_rectangles_within_the_margin() -> None:
    drawn = masks(strokes=0, everything=0, most_boxes=1, size=(256, 256))
    for mask in drawn:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height, width = len(rows), len(columns)
        assert mask.sum() == height * width, "one box is a whole rectangle"
        assert 30 <= min(height, width) <= max(height, width) <= 150
        assert rows[0] >= 10
        assert rows[-1] < 246
        assert columns[0] >= 10
        assert columns[-1] < 246


def test_strokes_are_no_rectangles_and_grow_with_the_image() -> None:
    small, large = (masks(boxes=0, everything=0, size=(side, side)) for side in (64, 256))
    assert small.mean() == pytest.approx(large.mean(), rel=0.15)
    spans = [(len(np.flatnonzero(m.any(1))), len(np.flatnonzero(m.any(0))), m.sum()) for m in large]
    assert np.mean([area < 0.95 * height * width for height, width, area in spans]) > 0.9


def test_masks_depend_on_the_generator_alone() -> None:
    assert np.array_equal(masks(20), masks(20))


def test_the_setting() -> None:
    assert random_masks(False) is None
    assert random_masks(True) == RandomMasks()
    assert random_masks({"everything": 0.5}) == RandomMasks(everything=0.5)


def test_tiny_images_have_masks() -> None:
    assert masks(size=(8, 8)).shape == (200, 8, 8)
