"""Masks, margins, crops and pasting."""

import numpy as np
import pytest
from image_files import noise

from ldm.images.masks import (
    Box,
    Sides,
    bounding_box,
    cut,
    extended,
    feather,
    fit_mask,
    paste,
    paste_alpha,
    resize,
    surrounded,
    to_aspect,
)

MIDDLE = Box(20, 30, 40, 60)


def square(height: int = 60, width: int = 80, box: Box = MIDDLE) -> np.ndarray:
    """A bool mask that is true in a box."""
    mask = np.zeros((height, width), bool)
    mask[box.top : box.bottom, box.left : box.right] = True
    return mask


# --- blur


@pytest.mark.parametrize("standard_deviation", [0.7, 2, 6])
def test_a_feather_ends(standard_deviation: float) -> None:
    """It is a Gaussian's integral near a straight edge, and exactly 0 and 1 three standard deviations off."""
    reach = int(np.ceil(3 * standard_deviation))
    mask = np.arange(200) >= 100
    alpha = feather(np.tile(mask, (9, 1)), standard_deviation)
    assert (alpha[:, : 100 - reach] == 0).all()
    assert (alpha[:, 100 + reach :] == 1).all()
    assert (np.diff(alpha[4]) >= 0).all()
    slope = np.diff(alpha[4])
    mean = (slope * np.arange(199)).sum()
    spread = np.sqrt((slope * (np.arange(199) - mean) ** 2).sum())
    assert spread == pytest.approx(standard_deviation, rel=0.1)
    assert mean == pytest.approx(99, abs=0.1)


def test_no_blur_is_the_mask() -> None:
    assert np.array_equal(feather(square(), 0), square().astype(np.float32))


def test_a_mask_at_the_border_goes_on_beyond_it() -> None:
    alpha = feather(np.ones((20, 20), bool), 5)
    assert (alpha == 1).all()


def test_margins_show_the_result_alone() -> None:
    """Half of their blurred edge lay in them: there the repeated edges showed through."""
    sides = Sides(left=30, bottom=8)
    margins = surrounded(np.zeros((40, 50), bool), sides, True)
    alpha = paste_alpha(margins, margins, 4)
    assert alpha.shape == (48, 80)
    assert (alpha[margins] == 1).all()
    row = alpha[5, 30:]
    assert 0.8 < row[0] < 1
    assert (np.diff(row) <= 0).all()
    assert (row[12:] == 0).all()


def test_a_mask_beside_margins_keeps_its_feather() -> None:
    mask = square()
    margins = surrounded(np.zeros((60, 80), bool), Sides(right=10), True)
    whole = surrounded(mask, Sides(right=10), True)
    alpha = paste_alpha(whole, margins, 2)
    assert np.array_equal(alpha[:, :70], feather(mask, 2)[:, :70])
    assert np.array_equal(paste_alpha(mask, np.zeros_like(mask), 2), feather(mask, 2))


# --- sizes


def test_a_mask_is_fitted_as_its_image() -> None:
    mask = np.zeros((10, 20), np.float32)
    mask[:, 10:] = 1
    assert fit_mask(mask, 10, 20) is mask
    stretched = fit_mask(mask, 20, 20)
    assert stretched.shape == (20, 20)
    assert (stretched[:, :9] == 0).all()
    assert (stretched[:, 11:] == 1).all()
    cropped = fit_mask(mask, 10, 10, "crop")  # columns 5 … 15
    assert (cropped[:, :5] == 0).all()
    assert (cropped[:, 5:] == 1).all()
    padded = fit_mask(mask, 20, 20, "pad")
    assert (padded[:5] == 0).all()
    assert (padded[15:] == 0).all()
    assert (padded[6:14, 11:] == 1).all()


def test_margins_go_on_from_the_edges_and_blur() -> None:
    image = noise(40, 30)
    whole = extended(image, Sides(left=60, top=1, right=2, bottom=13))
    assert whole.shape == (54, 92, 3)
    assert np.array_equal(whole[1:41, 60:90], image)
    assert np.array_equal(whole[1:41, 58:60], image[:, [0, 0]])
    assert np.array_equal(whole[0, 60:90], image[0])
    assert np.array_equal(whole[41, 60:90], image[-1])
    spread = whole[1:41].astype(float).std(axis=0).mean(axis=-1)  # of each column
    assert spread[59] > 50
    assert spread[0] < spread[30] < spread[50] < spread[59] / 2
    assert extended(image, Sides()) is image
    assert extended(noise(1, 1), Sides(right=300)).shape == (1, 301, 3)


def test_the_box_around_a_mask() -> None:
    assert bounding_box(square()) == Box(20, 30, 40, 60)
    assert bounding_box(np.zeros((3, 4), bool)) is None
    assert Box(2, 3, 4, 5).grown(3).within(6, 7) == Box(0, 0, 6, 7)
    assert Box(2, 3, 4, 5).joined(Box(0, 4, 3, 9)) == Box(0, 3, 4, 9)


@pytest.mark.parametrize(
    ("box", "aspect", "expected"),
    [
        (Box(20, 30, 40, 60), (1, 1), Box(15, 30, 45, 60)),
        (Box(20, 30, 40, 60), (1, 2), Box(20, 25, 40, 65)),
        (Box(0, 0, 10, 30), (1, 1), Box(0, 0, 30, 30)),  # moved into the image
        (Box(50, 60, 60, 80), (1, 1), Box(40, 60, 60, 80)),
        (Box(0, 10, 60, 20), (1, 2), Box(0, -20, 60, 100)),  # too wide for the image
    ],
)
def test_a_box_grows_to_an_aspect_ratio(box: Box, aspect: tuple[int, int], expected: Box) -> None:
    assert to_aspect(box, (60, 80), *aspect) == expected


# --- cutting and pasting


@pytest.mark.parametrize(
    "box", [Box(2, 3, 10, 20), Box(0, 0, 16, 24), Box(-3, 4, 12, 30), Box(-2, -2, 20, 26)]
)
def test_what_was_cut_is_pasted_where_it_was(box: Box) -> None:
    image, other = noise(16, 24), noise(16, 24, seed=1)
    part = cut(other, box)
    assert part.shape == (*box.size, 3)
    result = paste(image, part, box, np.ones((16, 24), np.float32))
    inner = box.within(16, 24)
    inside = square(16, 24, inner)
    assert np.array_equal(result[inside], other[inside])
    assert np.array_equal(result[~inside], image[~inside])


def test_beyond_the_image_its_edges_are_repeated() -> None:
    image = noise(4, 6)
    part = cut(image, Box(-2, 1, 3, 9))
    assert np.array_equal(part[0], part[2])
    assert np.array_equal(part[2:, :5], image[:3, 1:])
    assert np.array_equal(part[2:, 7], image[:3, 5])
    assert cut(np.arange(6.0).reshape(2, 3), Box(0, 0, 3, 4)).tolist()[2] == [3, 4, 5, 5]


@pytest.mark.parametrize("size", [(8, 17), (64, 64)])
def test_known_pixels_stay_byte_for_byte(size: tuple[int, int]) -> None:
    image, box = noise(60, 80), Box(10, 20, 50, 70)
    alpha = feather(square(), 3)
    result = paste(image, noise(*size, seed=2), box, alpha)
    assert np.array_equal(result[alpha == 0], image[alpha == 0])
    assert (result[alpha == 1] != image[alpha == 1]).any(axis=-1).mean() > 0.9
    expected = resize(noise(*size, seed=2), *box.size)
    assert np.array_equal(result[30, 45], expected[20, 25])
    assert np.array_equal(image, noise(60, 80))  # the user's own


def test_alpha_is_the_share_of_the_result() -> None:
    image, result = np.full((2, 2, 3), 100, np.uint8), np.full((2, 2, 3), 200, np.uint8)
    alpha = np.array([[0, 0.25], [0.5, 1]], np.float32)
    assert paste(image, result, Box(0, 0, 2, 2), alpha)[..., 0].tolist() == [[100, 125], [150, 200]]
