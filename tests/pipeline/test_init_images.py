"""Init images as the model takes them; the ones used last are kept."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import Result
from PIL import Image

from ldm.errors import InputError
from ldm.pipeline import ImageRequest, Pipeline, init_images
from ldm.pipeline.init_images import MOST, InitImages

Command = Callable[..., Result]
Load = Callable[..., Pipeline]


def colour(red: int, side: int = 64) -> Image.Image:
    return Image.fromarray(np.full((side, side, 3), (red, 90, 255 - red), np.uint8))


def test_an_init_image_is_the_one_that_is_given(load: Load, tmp_path: Path) -> None:
    """An image object that had gone left its pixels to the next one with its id; a file that had changed was
    not read again."""
    pipeline = load()

    def round_trip(source: object) -> np.ndarray:
        return next(pipeline.generate([ImageRequest(init_img=source, strength=0, seed=0)])).pixels

    seen = [round_trip(colour(red)) for red in (0, 120, 240)]
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[1], seen[2])
    path = tmp_path / "init.png"
    colour(0).save(path)
    assert np.array_equal(round_trip(str(path)), seen[0])
    colour(240).save(path)
    assert np.array_equal(round_trip(str(path)), seen[2])


def test_a_grey_background_is_no_map(tmp_path: Path) -> None:
    """With --background grey one file as init image and mask ended in a TypeError."""
    path = tmp_path / "both.png"
    colour(9).save(path)
    images = InitImages(10**6)
    request = ImageRequest(init_img=str(path), background="grey", mask=str(path), strength=0.5)
    assert images.whole(request).shape == (64, 64, 3)
    assert images.grey(str(path)).shape == (64, 64)
    digests = images.digests(request)
    assert digests["init image"] != digests["mask image"]


def test_an_image_that_is_kept_is_one_object(tmp_path: Path) -> None:
    """Under the size that a resolved request has, too; a batch of it is encoded once."""
    images, request = InitImages(10**6), ImageRequest(init_img=colour(9, 70), strength=0.5)
    found = images(request)
    assert found.shape == (64, 64, 3)
    assert images(ImageRequest(init_img=request.init_img, strength=0.9, height=64, width=64)) is found
    assert images(ImageRequest(init_img=request.init_img, strength=0.9, height=32, width=64)).shape == (
        32,
        64,
        3,
    )
    for red in range(MOST):
        images(ImageRequest(init_img=colour(red), strength=0.5))
    assert images(request) is not found
    assert np.array_equal(images(request), found)


def test_what_is_kept_has_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty-two photographs of 24 megapixels and their masks took 5 GB. The last one is always kept."""
    monkeypatch.setattr(init_images, "KEPT_BYTES", 3 * 16 * 16 * 2)
    images = InitImages(max_pixels=1000)
    requests = [ImageRequest(init_img=Image.new("RGB", (16, 16)), strength=1.0) for _ in range(3)]
    first, second, third = (images.whole(request) for request in requests)
    assert images.whole(requests[2]) is third
    assert images.whole(requests[1]) is second
    assert images.whole(requests[0]) is not first
    monkeypatch.setattr(init_images, "KEPT_BYTES", 1)
    assert images.whole(requests[2]) is images.whole(requests[2])


def test_digests_tell_contents_apart(tmp_path: Path) -> None:
    images, path = InitImages(10**6), tmp_path / "a.png"

    def digest(source: object, **own: object) -> str:
        return images.digests(ImageRequest(init_img=source, strength=0.5, **own))["init image"]

    colour(9).save(path)
    assert digest(str(path)) == digest(colour(9)) != digest(colour(8))
    assert digest(str(path), height=32, width=32) != digest(str(path))
    before = digest(str(path))
    colour(200).save(path)
    images.forget()
    assert digest(str(path)) != before


def test_large_images_are_refused() -> None:
    with pytest.raises(InputError, match="pixels"):
        InitImages(100)(ImageRequest(init_img=colour(9), strength=0.5))
