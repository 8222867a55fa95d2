"""A point of an evaluation: images sampled by a resumable run, and the figures that are measured on them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from ldm.errors import FieldError, InputError
from ldm.evaluation.clip_score import ClipScore
from ldm.evaluation.fid import Features, FrechetDistance, Statistics
from ldm.evaluation.intervals import Figure, bootstrap, share
from ldm.images.init_image import fit, open_init_image
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import ImageRequest
from ldm.runs.manifest import read_manifest
from ldm.runs.options import RunOptions
from ldm.runs.run import run
from ldm.scenes.captions import caption
from ldm.scenes.detector import Detector
from ldm.scenes.renderer import render
from ldm.scenes.scene import Scene
from ldm.scenes.scores import check, evaluation_scenes
from ldm.weights.files import exists, user_file

BATCH = 32  # images that a network for features sees together
READERS = 8  # threads that decode images
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
RENDERS = 5000  # of the reference for scenes
Progress = Callable[[int], object]  # called with the number of images that were read


def sample(
    pipeline: Pipeline,
    prompts: Sequence[str],
    like: ImageRequest,
    folder: Path,
    seed: int,
    devices: int | None = None,
) -> int:
    """Make those images of the prompts that a folder lacks, sampled as `like` is; image k has seed + k.

    Returns the run's exit code: 130 if the user ended it, 1 if an image could not be made.
    """
    options = RunOptions(
        outdir=str(folder), seed=seed, resume=folder.is_dir(), skip_grid=True, safety="off", devices=devices
    )
    requests = (replace(like, prompt=prompt) for prompt in prompts)
    with contextlib.redirect_stdout(io.StringIO()):  # the folder's name, which is no result here
        return run(pipeline, requests, options, again="the same command")


def sampled_files(folder: Path, count: int) -> list[Path | None]:
    """The files of the images 0 … count - 1 of a run; None where an image came to nothing.

    InputError if there are images that the run has not come to, or fewer than two.
    """
    files: dict[int, Path | None] = {}
    for line in read_manifest(folder):
        if line["file"] or not files.get(line["image"]):
            files[line["image"]] = folder / line["file"] if line["file"] else None
    there = sum(file is not None for file in files.values())
    if len(files) < count or there < 2:
        raise InputError(f"{folder} has {there} of {count} images; the same command makes the others")
    return [files[k] for k in range(count)]


@dataclass(frozen=True)
class Measures:
    """What is measured on the images of a list of prompts.

    `agree` gives a number for each of some images, by their places in the list: a similarity, or whether an
    image shows what it should.
    """

    features: Features
    distance: FrechetDistance
    agree: Callable[[Sequence[np.ndarray], Sequence[int]], np.ndarray]
    seed: int  # of the bootstrap

    def __call__(
        self, images: Iterable[tuple[int, np.ndarray]], count: int, progress: Progress = lambda n: None
    ) -> tuple[Figure, Figure]:
        """Distance and agreement of images, uint8 [h, w, 3], by their places among `count` prompts.

        Images that are not there are left out; where agreement is yes or no, they count as no.
        """
        features, agreed = [], []
        for batch in _batches(images):
            numbers, pixels = zip(*batch, strict=True)
            features.append(self.features(pixels))
            agreed.append(self.agree(pixels, numbers))
            progress(len(batch))
        distance, influences = self.distance(np.concatenate(features))
        return bootstrap(distance, influences, self.seed), self._agreement(np.concatenate(agreed), count)

    def _agreement(self, values: np.ndarray, count: int) -> Figure:
        if values.dtype == bool:
            return share(np.concatenate([values, np.zeros(count - len(values), bool)]))
        return bootstrap(values.mean(), values, self.seed)


def clip_agreement(score: ClipScore, prompts: Sequence[str]) -> Callable:
    """`agree` of Measures: the CLIP score of each image with its prompt."""
    return lambda images, numbers: score(images, [prompts[k] for k in numbers])


def scene_agreement(detector: Detector, scenes: Sequence[Scene]) -> Callable:
    """`agree` of Measures: whether the detector reads from each image the scene that was asked for."""

    def agree(images: Sequence[np.ndarray], numbers: Sequence[int]) -> np.ndarray:
        seen = detector.read(images)
        return np.array([check(scenes[k], each)["all"] for k, each in zip(numbers, seen, strict=True)])

    return agree


def asked_scenes(seed: int, count: int) -> list[Scene]:
    """`count` held-out scenes, half of them of one solid, the larger half of two."""
    singles = evaluation_scenes(seed, count // 2, pairs=False)
    return singles + evaluation_scenes(seed, count - count // 2, pairs=True)


def scene_prompts(scenes: Sequence[Scene]) -> list[str]:
    return [caption(scene) for scene in scenes]


def renders(scenes: Sequence[Scene], seed: int, size: int) -> Iterator[np.ndarray]:
    """The renderer's own images of scenes, uint8 [size, size, 3]."""
    rng = np.random.default_rng([seed, 6])  # another stream than those of other evaluations
    return (render(scene, rng, size) for scene in scenes)


def reference_files(folder: str | Path) -> list[Path]:
    """The images of a folder, sorted by name. FieldError, naming `reference`, if there are none."""
    folder = Path(folder)
    if not exists(folder):
        raise FieldError("{reference} {folder} is not there", folder=folder)
    with user_file(folder):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise FieldError(
            "{reference} {folder} has {count} images ({suffixes}): give a folder of real ones, such as "
            "val2017 of COCO (cocodataset.org/#download)",
            folder=folder,
            count=len(files) or "no",
            suffixes=", ".join(SUFFIXES),
        )
    return files


def cropped(files: Iterable[Path], height: int, width: int) -> Iterator[np.ndarray]:
    """Image files as uint8 [height, width, 3]: the middle of each, scaled by LANCZOS. InputError."""

    def read(path: Path) -> np.ndarray:
        return np.asarray(fit(open_init_image(path), height, width, "crop"))

    return _in_threads(read, files)


def read_images(files: Sequence[Path | None]) -> Iterator[tuple[int, np.ndarray]]:
    """The places and pixels, uint8 [h, w, 3], of those files that are there."""

    def read(item: tuple[int, Path]) -> tuple[int, np.ndarray]:
        return item[0], np.asarray(open_init_image(item[1]))

    return _in_threads(read, ((k, path) for k, path in enumerate(files) if path is not None))


def _batches(items: Iterable) -> Iterator[tuple]:
    """The items, BATCH at a time."""
    iterator = iter(items)
    while batch := tuple(islice(iterator, BATCH)):
        yield batch


def _in_threads(read: Callable, items: Iterable) -> Iterator:
    """What `read` makes of the items, in order, a batch ahead of its use at most."""
    with ThreadPoolExecutor(READERS) as pool:
        for batch in _batches(items):
            yield from pool.map(read, batch)


def reference_statistics(
    images: Iterable[np.ndarray], features: Features, progress: Progress = lambda n: None
) -> Statistics:
    """Of the features of images, uint8 [h, w, 3] of one size."""
    found = []
    for batch in _batches(images):
        found.append(features(batch))
        progress(len(batch))
    return Statistics.of(np.concatenate(found))
