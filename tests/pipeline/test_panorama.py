"""Panoramas: which windows there are, their average, what they are given, and that no seam shows."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny_sampling import normal, relative_difference, tiny_model

from ldm.pipeline import ImageRequest, Pipeline
from ldm.pipeline.panorama import WindowedModel, cut, windowed, windows, within_windows

Load = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def bundled() -> Pipeline:
    return Pipeline.load(safety="off")


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("side", [1, 2, 3, 8, 64])
def test_windows_cover_every_place_and_share_half(side: int, around: bool) -> None:
    for length in (*range(1, 3 * side + 2), 5 * side):
        found = windows(length, side, around)
        total = torch.zeros(length)
        for one in found:
            assert len(set(one.places.tolist())) == len(one.places) == min(side, length)
            assert (one.weights > 0).all()
            total[one.places] += one.weights
        torch.testing.assert_close(total, torch.ones(length))
        if length <= side:
            assert len(found) == 1
            continue
        steps = np.diff([one.places[0].item() for one in found])
        assert steps.max() <= max(1, side // 2)
        assert found[-1].places[-1] == length - 1 or around
    assert len(windows(4 * side, side, around=True)) == 4 * side // max(1, side // 2)


def test_weights_fall_towards_the_ends_of_a_window() -> None:
    first, second, third = windows(16, 8)
    assert first.places.tolist() == [*range(8)]
    assert second.places.tolist() == [*range(4, 12)]
    # 0.5 … 3.5 latents from the end of one, 3.5 … 0.5 from that of the other
    falling = torch.tensor([3.5, 2.5, 1.5, 0.5]) / 4
    torch.testing.assert_close(first.weights, torch.cat([torch.ones(4), falling]))
    torch.testing.assert_close(second.weights, torch.cat([falling.flip(0), falling]))
    torch.testing.assert_close(third.weights, first.weights.flip(0))


@torch.inference_mode()
@pytest.mark.parametrize("around", [(), (3,), (2, 3)])
def test_the_average_is_a_plain_loops(around: tuple[int, ...]) -> None:
    model, x, t, context = tiny_model(), normal(2, 4, 9, 13), torch.tensor([300.0] * 2), normal(2, 5, 32)
    side, (height, width) = 6, x.shape[2:]
    total, weight = torch.zeros_like(x), torch.zeros(height, width)
    for row in windows(height, side, 2 in around):
        for column in windows(width, side, 3 in around):
            part = torch.empty(2, 4, side, side)
            for i, y in enumerate(row.places):
                for j, z in enumerate(column.places):
                    part[:, :, i, j] = x[:, :, y, z]
            out = model.apply_model(part, t, context)
            for i, y in enumerate(row.places):
                for j, z in enumerate(column.places):
                    # how far the pixel is from the window's nearest edges
                    near = (min(i, side - 1 - i) + 0.5) * (min(j, side - 1 - j) + 0.5)
                    total[:, :, y, z] += near * out[:, :, i, j]
                    weight[y, z] += near
    found = WindowedModel(model, side, around).apply_model(x, t, context)
    assert relative_difference(found, total / weight) < 1e-6


def test_one_window_is_the_model_itself() -> None:
    model = tiny_model()
    assert windowed(model, 8, (8, 8), (3,)) is model
    assert windowed(model, 8, (8, 9), (3,)) is not model
    assert within_windows(8, (8, 9), (2, 3)) == (2,)


def test_what_lies_beside_the_latents_is_cut_with_them() -> None:
    at = torch.tensor([1, 2])[:, None], torch.tensor([3, 0])
    big, text = normal(1, 2, 4, 4), normal(1, 5, 32)
    found = cut({"c_concat": [big], "c_control": [big, 2 * big], "c_crossattn": [text]}, at)
    expected = torch.stack([big[:, :, 1, [3, 0]], big[:, :, 2, [3, 0]]], dim=2)
    assert torch.equal(found["c_concat"][0], expected)
    assert torch.equal(found["c_control"][1], 2 * expected)
    assert found["c_crossattn"][0] is text  # keys and values that are kept know it as an object
    assert cut(text, at) is text


def pixels(pipeline: Pipeline, *requests: ImageRequest) -> list[np.ndarray]:
    return [image.pixels for image in pipeline.generate(requests)]


def one(**values: object) -> ImageRequest:
    return ImageRequest(**{"prompt": "a cat", "steps": 2, "seed": 1, "scale": 3.0} | values)


def test_an_image_of_the_models_size_is_the_same_bit_for_bit(load: Load) -> None:
    pipeline = load()
    assert all(map(np.array_equal, pixels(pipeline, one(panorama=True)), pixels(pipeline, one())))
    wide = [pixels(pipeline, one(panorama=panorama, width=64))[0] for panorama in (True, False)]
    assert wide[0].shape == (16, 64, 3)
    assert not np.array_equal(*wide)


def test_an_image_alone_is_the_image_of_a_batch(load: Load) -> None:
    requests = [
        one(seed=k, panorama=True, width=48, height=32, tiling="x", sampler="ddim", eta=0.7) for k in range(3)
    ]
    pipeline = load(batch_size=3)
    for request, together in zip(requests, pixels(pipeline, *requests), strict=True):
        assert np.abs(pixels(pipeline, request)[0].astype(int) - together).max() <= 1


def jumps(image: np.ndarray) -> np.ndarray:
    """Mean differences between neighbouring columns; the last is between the first and the last one."""
    values = image.astype(float)
    return np.abs(np.roll(values, -1, 1) - values).mean(axis=(0, 2))


def test_no_seam_shows_in_a_wide_image(bundled: Pipeline) -> None:
    request = ImageRequest("a red cube left of a blue sphere", seed=5, steps=10, width=192, panorama=True)
    plain, around = pixels(bundled, request, request.twin(tiling="x"))
    ends = {8 * place for window in windows(24, 8) for place in (window.places[0], window.places[-1] + 1)}
    columns = sorted(int(end) - 1 for end in ends if 0 < end < 24 * 8)
    inside = np.delete(jumps(plain)[:-1], columns)
    assert jumps(plain)[columns].max() <= inside.max()
    assert jumps(around)[-1] <= jumps(around)[:-1].max()
    # without windows the model draws one image at a size that it does not know
    assert not np.array_equal(plain, pixels(bundled, request.twin(panorama=False))[0])
