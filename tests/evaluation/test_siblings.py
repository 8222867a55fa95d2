"""What is measured of the inpainting, depth and upscaling models, with pipelines that know the answers."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_siblings import depth_section, write_model

from ldm.evaluation import siblings
from ldm.images.edges import canny
from ldm.pipeline import Pipeline, RuntimeOptions
from ldm.pipeline.depth import DepthMaps
from ldm.pipeline.init_images import InitImages
from ldm.pipeline.request import ImageRequest
from ldm.scenes.captions import caption
from ldm.scenes.detector import DETECTOR_WEIGHTS, Detector, load_detector, outline
from ldm.scenes.renderer import render, render_layers
from ldm.scenes.scene import Scene
from ldm.weights.loading import find

LIKE = ImageRequest(sampler="dpmpp_2m", steps=2)
SIZE = 64


@dataclass
class Answers:
    """A pipeline whose image of a request is what `answer` makes of it; None for NaN."""

    answer: Callable[[ImageRequest], np.ndarray | None]
    native_size: int = SIZE

    device = torch.device("cpu")

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

    rows, scores, lost = siblings.inpainting(Answers(unchanged), detector, LIKE, 5, 8)
    assert scores["asked solid"] < 0.1
    assert scores["pixels kept"] == 1
    assert lost == []
    assert len(rows) == 16
    assert [row[2].shape for row in rows] == [(SIZE, SIZE, 3)] * 16
    cases = list(siblings.repaintings(5, 8, SIZE))
    assert [request.prompt for request in seen] == [caption(case.asked) for case in cases]
    assert all(request.mask.size == (SIZE, SIZE) for request in seen)

    truth = {
        caption(case.asked): render_layers(case.asked, np.random.default_rng(1), SIZE)[0] for case in cases
    }
    _, scores, _ = siblings.inpainting(Answers(lambda request: truth[request.prompt]), detector, LIKE, 5, 8)
    assert scores["asked solid"] > 0.9
    assert scores["pixels kept"] < 0.9

    _, scores, lost = siblings.inpainting(Answers(lambda _: None), detector, LIKE, 5, 8)
    assert scores["asked solid"] == 0, "an image that is NaN is wrong"
    assert lost == [caption(case.asked) for case in cases]


def test_places_and_colours_of_a_depth_map_are_read(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """True renders are right; renders of the same prompts in other places have their colours only."""
    monkeypatch.setattr(siblings, "estimates", lambda *_: 1.0)
    rng = np.random.default_rng([5, 3])
    scenes = siblings.with_background(siblings.both(5, 8))
    renders = {caption(scene): render_layers(scene, rng, SIZE)[0] for scene in scenes}
    rows, scores, _ = siblings.depth(Answers(lambda request: renders[request.prompt]), detector, LIKE, 5, 8)
    assert scores["places within 4 pixels"] == 1
    assert scores["median distance in pixels"] == 0
    assert scores["colours of the prompt"] > 0.9
    assert all(np.ptp(row[0]) == 255 for row in rows), "a map takes up all greys"

    other = np.random.default_rng(77)
    renders = {caption(scene): render_layers(scene, other, SIZE)[0] for scene in scenes}
    _, scores, _ = siblings.depth(Answers(lambda request: renders[request.prompt]), detector, LIKE, 5, 8)
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

    rows, scores, _ = siblings.edges(Answers(answer), detector, LIKE, 5, 8, "net.safetensors")
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
        assert x.shape == (1, 3, SIZE, SIZE)
        return 3 + 2 * torch.from_numpy(next(maps))[None, None]

    assert siblings.estimates(with_estimates(estimate), 5, 2) == pytest.approx(1)


def with_estimates(estimate: Callable[[torch.Tensor], torch.Tensor]) -> Answers:
    """A pipeline whose model estimates depth in this way."""
    pipeline = Answers(lambda _: None)
    pipeline.depth_maps = DepthMaps(InitImages(10_000))
    pipeline.model = SimpleNamespace(estimate_depth=estimate, device=torch.device("cpu"))
    return pipeline


def test_a_flat_estimate_has_no_correlation() -> None:
    """It was NaN in scores.json, which is no JSON."""
    assert siblings.estimates(with_estimates(lambda x: torch.ones_like(x[:, :1])), 5, 1) is None


def test_depth_is_estimated_by_the_pipelines_own_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All images went to it at once and from the host's memory, which a network on CUDA does not take; nor
    was there the way out where 16 bits overflow."""
    config, weights = write_model(tmp_path, "depth", depth_section())
    options = RuntimeOptions(device="cpu", eager=True, precision="bf16")
    pipeline = Pipeline.load(str(weights), str(config), options, safety="off")
    plain, seen = pipeline.model.depth_model.forward, []

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append((len(x), x.dtype))
        return plain(x) if x.dtype == torch.float32 else plain(x) * torch.nan

    monkeypatch.setattr(pipeline.model.depth_model, "forward", forward)
    assert -1 <= siblings.estimates(pipeline, 5, 1) <= 1
    assert seen == [(1, torch.bfloat16), (1, torch.float32), (1, torch.float32)]


def test_an_enlarged_image_is_compared_with_a_bicubic_one(detector: Detector) -> None:
    size = 128

    def bicubic(request: ImageRequest) -> np.ndarray:
        assert request.noise_level == 20
        return np.asarray(request.init_img.resize((size, size), Image.Resampling.BICUBIC))

    rows, scores, _ = siblings.upscaling(Answers(bicubic, native_size=size), detector, LIKE, 5, 3)
    assert scores["better by"] == 0
    assert scores["PSNR"] == scores["PSNR of bicubic"] > 28
    assert [len(row) for row in rows] == [3] * 6
    report = siblings.report("upscaling", scores)
    assert "| better by | 0.00 |" in report
    assert "| better than bicubic | 0.0 % |" in report


def test_images_that_are_nan_are_wrong_whatever_a_black_one_shows() -> None:
    """They were black images to be read, and nobody was told of them."""

    class Agreeing:
        """A detector that sees in any image what was asked for."""

        def read(self, images: Sequence[np.ndarray]) -> list[Scene]:
            return list(map(outline, siblings.with_background(siblings.both(5, 1))))

    _, scores, lost = siblings.edges(Answers(lambda _: None), Agreeing(), LIKE, 5, 1, "net.safetensors")
    prompts = [caption(scene) for scene in siblings.with_background(siblings.both(5, 1))]
    assert lost == [*prompts, *(f"{prompt}, without the edges" for prompt in prompts)]
    assert scores["places within 4 pixels"] == scores["colours of the prompt"] == 0


def test_figures_that_are_not_finite_are_none(detector: Detector) -> None:
    """They were Infinity and NaN in scores.json, which other programs refuse to read."""
    rng = np.random.default_rng([5, 5])
    renders = {caption(scene): render(scene, rng, SIZE) for scene in siblings.both(5, 1)}
    _, scores, _ = siblings.upscaling(Answers(lambda request: renders[request.prompt]), detector, LIKE, 5, 1)
    assert scores["PSNR"] is scores["better by"] is None
    assert scores["better than bicubic"] == 1
    json.dumps(scores, allow_nan=False)
    assert "| PSNR | not finite |" in siblings.report("upscaling", scores)
    black = np.zeros((SIZE, SIZE, 3), np.uint8)
    _, scores, _ = siblings.edges(Answers(lambda _: black), detector, LIKE, 5, 1, "net.safetensors")
    assert scores["median distance in pixels"] is None


def test_psnr() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert siblings.psnr(black, black) == np.inf
    assert siblings.psnr(black + 255, black) == pytest.approx(0)
    assert siblings.psnr(black + 1, black) == pytest.approx(48.13, abs=0.01)
