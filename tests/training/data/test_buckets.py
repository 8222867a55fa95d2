"""The sizes of aspect buckets, and which images go where."""

import numpy as np
import pytest

from ldm.training.data.buckets import bucket_sizes, nearest_bucket


@pytest.mark.parametrize(("size", "step"), [(512, 64), (768, 64), (64, 8), (320, 64), (256, 32)])
def test_sizes_are_multiples_within_the_area(size: int, step: int) -> None:
    sizes = bucket_sizes(size, step)
    assert (size, size) in sizes
    assert len(set(sizes)) == len(sizes) > 4
    for width, height in sizes:
        assert width % step == height % step == 0
        assert width * height <= size * size
        assert size / 2 <= min(width, height)
        assert max(width, height) <= 2 * size
        assert (height, width) in sizes
        assert width * height > 0.7 * size * size, "no bucket is much smaller than the square"


def test_the_known_sizes_of_512() -> None:
    assert set(bucket_sizes(512)) >= {
        (512, 512),
        (256, 1024),
        (384, 640),
        (640, 384),
        (1024, 256),
        (448, 576),
    }


def test_an_image_goes_to_the_nearest_aspect_ratio() -> None:
    buckets = bucket_sizes(512)
    sizes = np.array([(1000, 1000), (3000, 2000), (200, 300), (100, 4000), (640, 384), (1, 1)])
    chosen = [buckets[k] for k in nearest_bucket(sizes, buckets)]
    assert chosen[0] == (512, 512)
    assert chosen[3] == (256, 1024)
    assert chosen[4] == (640, 384)
    assert chosen[5] == (512, 512)
    for (width, height), (w, h) in zip(sizes, chosen, strict=True):
        distances = [abs(np.log(width / height) - np.log(a / b)) for a, b in buckets]
        assert abs(np.log(width / height) - np.log(w / h)) == pytest.approx(min(distances))
