import numpy as np
import pytest
import torch
from golden_files import case

from ldm.images.pixels import finite_images, make_grid, of_one_size, to_uint8


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_every_level_comes_back(dtype):
    """The original truncated, in half precision: most levels came out one too low."""
    levels = torch.arange(256).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    pixels = to_uint8((levels.double() / 255 * 2 - 1).to(dtype))
    assert np.array_equal(pixels, levels.permute(0, 2, 3, 1).numpy())


def test_pixels_are_rounded_and_clamped():
    x = torch.tensor([-1e9, -1.01, -1, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 0.998, 1, 1.01, 1e9])
    pixels = to_uint8(x.expand(1, 3, 1, 9))
    assert pixels.shape == (1, 1, 9, 3)
    assert pixels.dtype == np.uint8
    assert pixels[0, 0, :, 1].tolist() == [0, 0, 0, 1, 0, 255, 255, 255, 255]


def test_half_precision_is_computed_in_single():
    x = torch.linspace(-1, 1, 3000).half().expand(1, 3, 1, 3000)
    assert np.array_equal(to_uint8(x), to_uint8(x.float()))


def test_channels_come_last():
    x = torch.tensor([1.0, -1.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 5)
    assert np.array_equal(to_uint8(x), np.full((1, 2, 5, 3), [255, 0, 128]))


def test_within_one_level_of_the_original():
    decoded = case("components_mini-v1")[0]["decoded"]
    original = (255 * ((decoded + 1) / 2).clamp(0, 1)).permute(0, 2, 3, 1).numpy().astype(np.uint8)
    assert np.abs(to_uint8(decoded).astype(int) - original).max() <= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_images_that_are_not_finite_are_found(value):
    """The original saved NaN as black pixels without a word."""
    x = torch.zeros(3, 3, 8, 8)
    x[1, 2, 7, 0] = value
    assert finite_images(x) == [True, False, True]
    assert finite_images(x.half()) == [True, False, True]


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 3), (2, 3), (3, 3), (4, 3), (6, 3), (7, 3), (3, 1), (5, 8)]
)
def test_grid_is_torchvisions(count, columns):
    utils = pytest.importorskip("torchvision.utils")
    images = [image(6, 10, seed) for seed in range(count)]
    expected = utils.make_grid(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), nrow=columns)
    grid = make_grid(images, columns)
    assert grid.dtype == np.uint8
    assert np.array_equal(grid, expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("images", [[], [image(6, 10), image(10, 6)], [image(6, 10), image(6, 1)]])
def test_grid_takes_images_of_one_size(images):
    with pytest.raises(ValueError, match="one size"):
        make_grid(images, 2)


def test_only_images_of_other_sizes_are_copied():
    """All were, a page of large ones into hundreds of megabytes."""
    images = [image(6, 10), image(6, 10, 1)]
    assert all(one is other for one, other in zip(of_one_size(images), images, strict=True))
    tall, wide = of_one_size([image(6, 4), image(2, 10)])
    assert tall.shape == wide.shape == (6, 10, 3)
    assert np.array_equal(tall[:, :4], image(6, 4))
    assert not tall[:, 4:].any()
    assert not wide[2:].any()
