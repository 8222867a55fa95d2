"""The first stage in tiles, against the whole image at once."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_sampling import normal, tiny_model
from torch import Tensor

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize.tiling import spans, tile_first_stage
from ldm.scenes.renderer import render
from ldm.scenes.scene import random_scene


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def psnr(a: Tensor, b: Tensor) -> float:
    """Of images in [-1, 1], in dB."""
    return 10 * torch.log10(4 / (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean()).item()


@pytest.mark.parametrize(("tile", "overlap"), [(64, 16), (8, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("scale", [1, 8])
def test_the_weights_of_tiles_add_up_to_one(tile: int, overlap: int, scale: int) -> None:
    for length in range(1, 4 * tile):
        total, previous = torch.zeros(length * scale), None
        for span in spans(length, tile, overlap, scale):
            assert span.stop - span.start == min(tile, length)
            assert previous is None or previous.stop - span.start >= overlap
            assert span.weight.min() >= 0
            total[span.of(scale)] += span.weight
            previous = span
        assert previous.stop == length
        torch.testing.assert_close(total, torch.ones_like(total))


def test_tiles_are_as_few_as_the_overlap_allows() -> None:
    assert [len(spans(length, 64, 16, 1)) for length in (1, 64, 65, 112, 113, 160)] == [1, 1, 2, 2, 3, 3]


def test_an_image_within_one_tile_is_decoded_and_encoded_as_without_tiles() -> None:
    model, z, x = tiny_model(), normal(2, 4, 8, 5), normal(2, 3, 64, 40)
    decoded, posterior = model.decode_first_stage(z), model.encode_first_stage(x)
    tile_first_stage(model, tile=8, overlap=2)
    assert torch.equal(model.decode_first_stage(z), decoded)
    assert torch.equal(model.encode_first_stage(x).mean, posterior.mean)
    assert torch.equal(model.encode_first_stage(x).logvar, posterior.logvar)


@pytest.mark.parametrize("size", [(9, 8), (17, 23), (3, 40), (1, 9)])
def test_tiles_of_any_image_in_a_batch(size: tuple[int, int]) -> None:
    model = tiny_model()
    h, w = size
    tile_first_stage(model, tile=8, overlap=2)
    z, x = normal(3, 4, h, w), normal(3, 3, 8 * h, 8 * w)
    decoded, posterior = model.decode_first_stage(z), model.encode_first_stage(x)
    assert decoded.shape == (3, 3, 8 * h, 8 * w)
    assert posterior.mean.shape == posterior.logvar.shape == z.shape
    assert decoded.isfinite().all()
    # an image does not depend on its company
    assert torch.equal(decoded[1:2], model.decode_first_stage(z[1:2]))
    assert torch.equal(posterior.mean[1:2], model.encode_first_stage(x[1:2]).mean)


def scene_image(side: int) -> Tensor:
    rng = np.random.default_rng(3)
    pixels = render(random_scene(rng), rng, side)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_tiles_against_the_whole_image(bundled: LatentDiffusion) -> None:
    model, x = bundled, scene_image(512)
    posterior = model.encode_first_stage(x)
    z = model.get_first_stage_encoding(posterior.mode())
    whole = model.decode_first_stage(z)
    tile_first_stage(model, tile=32, overlap=8)
    tiled, tiled_posterior = model.decode_first_stage(z), model.encode_first_stage(x)
    assert psnr(tiled, whole) > 40  # measured 43.6
    error = (tiled_posterior.mean - posterior.mean).square().mean() / posterior.mean.var()
    assert -10 * torch.log10(error) > 30

    # no seams: where tiles meet, steps from pixel to pixel are the whole image's to a grey level, and no
    # larger than anywhere else
    steps = (tiled.diff(dim=3) - whole.diff(dim=3)).square().mean(dim=(0, 1, 2)).sqrt() * 127.5
    seam = torch.zeros(len(steps), dtype=torch.bool)
    for left, right in pairwise(spans(64, 32, 8, 8)):
        middle = (left.stop + right.start) * 4
        seam[middle - 33 : middle + 33] = True
    assert steps[seam].max() < 1  # measured 0.74; tiles on their own, put side by side, are 35 apart
    assert steps[seam].max() <= steps[~seam].max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiles_in_half_precision(dtype: torch.dtype) -> None:
    model, z = tiny_model(), normal(1, 4, 12, 12)
    tile_first_stage(model, tile=8, overlap=2)
    expected = model.decode_first_stage(z)
    with torch.inference_mode(False):
        model.to(dtype)
    decoded = model.decode_first_stage(z.to(dtype))
    assert decoded.dtype == dtype
    assert (decoded.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_the_statistics_are_forgotten_when_a_tile_fails() -> None:
    model, z = tiny_model(), normal(1, 4, 12, 12)
    plain = model.decode_first_stage
    calls = []

    def failing(z: Tensor) -> Tensor:
        calls.append(z.shape)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return plain(z)

    whole = model.decode_first_stage(z)
    model.decode_first_stage = failing
    tile_first_stage(model, tile=8, overlap=2)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.decode_first_stage(z)
    assert calls == [(1, 4, 8, 8)] * 3
    assert torch.equal(plain(z), whole)


@pytest.mark.parametrize(("tile", "overlap"), [(64, 0), (64, 22), (2, 1), (0, 0)])
def test_an_overlap_that_cannot_be_blended_is_an_error(tile: int, overlap: int) -> None:
    with pytest.raises(InputError, match="overlap"):
        tile_first_stage(tiny_model(), tile, overlap)
