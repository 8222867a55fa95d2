"""Masks of regions to repaint."""

import numpy as np
import pytest

from ldm.scenes.masks import box, grown, random_mask, rectangle, strokes

COVERAGE = np.zeros((2, 32, 32), np.float32)
COVERAGE[0, 4:8, 6:12] = 1
COVERAGE[1, 20:30, 16:20] = 0.5


def test_a_grown_mask_reaches_so_many_pixels_further() -> None:
    mask = np.zeros((9, 9), bool)
    mask[4, 4] = True
    assert np.array_equal(np.argwhere(grown(mask, 2)).min(0), [2, 2])
    assert grown(mask, 2).sum() == 25
    assert not grown(np.zeros((9, 9), bool), 2).any()


def test_a_box_holds_the_mask_and_stays_in_the_image() -> None:
    expected = np.zeros((32, 32), bool)
    expected[0:13, 1:17] = True
    assert np.array_equal(box(COVERAGE[0] > 0, 5), expected)
    assert not box(np.zeros((8, 8), bool), 3).any()


def test_a_rectangle_has_sides_of_a_fifth_to_four_fifths() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rectangle(rng, 40)
        sides = [mask.any(axis).sum() for axis in (0, 1)]
        assert mask.sum() == sides[0] * sides[1]
        assert 8 <= min(sides) <= max(sides) <= 32


def test_strokes_paint_a_part_of_the_image() -> None:
    shares = [strokes(np.random.default_rng(seed), 64).mean() for seed in range(30)]
    assert min(shares) > 0
    assert max(shares) < 1
    assert np.std(shares) > 0.05


def test_every_kind_of_random_mask_comes_up() -> None:
    """A mask that is made for a solid holds all of it and leaves something of the image."""
    rng = np.random.default_rng(1)
    made_for = set()
    whole = 0
    for _ in range(200):
        mask, solid = random_mask(COVERAGE, rng)
        assert mask.any()
        made_for.add(solid)
        whole += mask.all()
        if solid is not None:
            assert mask[COVERAGE[solid] > 0].all()
            assert mask.mean() < 0.5
    assert made_for == {0, 1, None}
    assert whole / 200 == pytest.approx(0.15, abs=0.08)


def test_masks_depend_on_the_generator_alone() -> None:
    first, again = (random_mask(COVERAGE, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first[0], again[0])
    assert first[1] == again[1]
