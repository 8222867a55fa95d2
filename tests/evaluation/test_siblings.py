"""What is measured of the inpainting, depth and upscaling models, with pipelines that know the answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.evaluation import siblings
from ldm.images.edges import canny
from ldm.pipeline.request import ImageRequest
from ldm.scenes.captions import caption
from ldm.scenes.detector import DETECTOR_WEIGHTS, Detector, load_detector
from ldm.scenes.renderer import render, render_layers
from ldm.weights.loading import find

LIKE = ImageRequest(sampler="dpmpp_2m", steps=2)
SIZE = 64


@dataclass
class Answers:
    """A pipeline whose image of a request is what `answer` makes of it; None for NaN."""

    answer: Callable[[ImageRequest], np.ndarray | None]
    native_size: int = SIZE

    @property
    def described(self) -> SimpleNamespace:
        return SimpleNamespace(native_size=self.native_size)

    def generate(self, requests: Sequence[ImageRequest]) -> Iterator[SimpleNamespace]:
        yield from (SimpleNamespace(pixels=self.answer(request)) for request in requests)


@pytest.fixture(scope="module")
def detector() -> Detector:
    return load_detector(find(DETECTOR_WEIGHTS))


def test_repaintings_differ_in_the_masked_region_alone() -> None:
    """But for the shadow of the solid, which may lie beyond the mask."""
    cases = list(siblings.repaintings(5, 6, SIZE))
    assert len(cases) == 12
    assert [case.asked.second is None for case in cases] == [True] * 6 + [False] * 6
    for case in cases:
        assert 0.02 < case.mask.mean() < 1
        rows, columns = (np.flatnonzero(case.mask.any(axis)) for axis in (1, 0))
        assert case.mask.sum() == len(rows) * len(columns), "it is a rectangle"


def test_asked_solids_are_counted_and_kept_pixels_measured(detector: Detector) -> None:
    """The true image has what was asked for; the init image does not, and keeps every pixel."""
    seen: list[ImageRequest] = []

    def unchanged(request: ImageRequest) -> np.ndarray:
        seen.append(request)
        return np.asarray(request.init_img)

    rows, scores = siblings.inpainting(Answers(unchanged), detector, LIKE, 5, 8)
    assert scores["asked solid"] < 0.1
    assert scores["pixels kept"] == 1
    assert len(rows) == 16
    assert [row[2].shape for row in rows] == [(SIZE, SIZE, 3)] * 16
    cases = list(siblings.repaintings(5, 8, SIZE))
    assert [request.prompt for request in seen] == [caption(case.asked) for case in cases]
    assert all(request.mask.size == (SIZE, SIZE) for request in seen)

    truth = {
        caption(case.asked): render_layers(case.asked, np.random.default_rng(1), SIZE)[0] for case in cases
    }
    _, scores = siblings.inpainting(Answers(lambda request: truth[request.prompt]), detector, LIKE, 5, 8)
    assert scores["asked solid"] > 0.9
    assert scores["pixels kept"] < 0.9

    _, scores = siblings.inpainting(Answers(lambda _: None), detector, LIKE, 5, 8)
    assert scores["asked solid"] == 0, "an image that is NaN is wrong"


def test_places_and_colours_of_a_depth_map_are_read(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """True renders are right; renders of the same prompts in other places have their colours only."""
    monkeypatch.setattr(siblings, "estimates", lambda *_: 1.0)
    rng = np.random.default_rng([5, 3])
    scenes = siblings.with_background(siblings.both(5, 8))
    renders = {caption(scene): render_layers(scene, rng, SIZE)[0] for scene in scenes}
    rows, scores = siblings.depth(Answers(lambda request: renders[request.prompt]), detector, LIKE, 5, 8)
    assert scores["places within 4 pixels"] == 1
    assert scores["median distance in pixels"] == 0
    assert scores["colours of the prompt"] > 0.9
    assert all(np.ptp(row[0]) == 255 for row in rows), "a map takes up all greys"

    other = np.random.default_rng(77)
    renders = {caption(scene): render_layers(scene, other, SIZE)[0] for scene in scenes}
    _, scores = siblings.depth(Answers(lambda request: renders[request.prompt]), detector, LIKE, 5, 8)
    assert scores["places within 4 pixels"] < 0.6
    assert scores["colours of the prompt"] > 0.9


def test_places_are_read_with_and_without_edges(detector: Detector) -> None:
    """True renders where a request has their edges; renders of the same prompts in other places elsewhere."""
    rng, other = np.random.default_rng([5, 6]), np.random.default_rng(77)
    scenes = siblings.with_background(siblings.both(5, 8))
    true = {caption(scene): render(scene, rng, SIZE) for scene in scenes}
    elsewhere = {caption(scene): render(scene, other, SIZE) for scene in scenes}

    def answer(request: ImageRequest) -> np.ndarray:
        if not request.control:
            return elsewhere[request.prompt]
        (control,) = request.control
        assert control.file == "net.safetensors"
        assert np.array_equal(np.asarray(control.image), canny(true[request.prompt]))
        return true[request.prompt]

    rows, scores = siblings.edges(Answers(answer), detector, LIKE, 5, 8, "net.safetensors")
    assert scores["places within 4 pixels"] == 1
    assert scores["places within 4 pixels without the edges"] < 0.6
    assert scores["median distance in pixels"] == 0
    assert scores["median distance in pixels without the edges"] > 1
    assert scores["colours of the prompt"] > 0.9
    assert [len(row) for row in rows] == [4] * 16


def test_estimates_are_compared_with_true_maps() -> None:
    rng = np.random.default_rng([5, 4])
    maps = iter([render_layers(scene, rng, SIZE)[1].disparity for scene in siblings.both(5, 2)])

    def estimate(x: torch.Tensor) -> torch.Tensor:
        assert x.shape == (4, 3, SIZE, SIZE)
        return 3 + 2 * torch.stack([torch.from_numpy(next(maps))[None] for _ in x])

    pipeline = Answers(lambda _: None)
    pipeline.model = SimpleNamespace(estimate_depth=estimate)
    assert siblings.estimates(pipeline, 5, 2) == pytest.approx(1)


def test_an_enlarged_image_is_compared_with_a_bicubic_one(detector: Detector) -> None:
    size = 128

    def bicubic(request: ImageRequest) -> np.ndarray:
        assert request.noise_level == 20
        return np.asarray(request.init_img.resize((size, size), Image.Resampling.BICUBIC))

    rows, scores = siblings.upscaling(Answers(bicubic, native_size=size), detector, LIKE, 5, 3)
    assert scores["better by"] == 0
    assert scores["PSNR"] == scores["PSNR of bicubic"] > 28
    assert [len(row) for row in rows] == [3] * 6
    report = siblings.report("upscaling", scores)
    assert "| better by | 0.00 |" in report
    assert "| better than bicubic | 0.0 % |" in report


def test_psnr() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert siblings.psnr(black, black) == np.inf
    assert siblings.psnr(black + 255, black) == pytest.approx(0)
    assert siblings.psnr(black + 1, black) == pytest.approx(48.13, abs=0.01)
