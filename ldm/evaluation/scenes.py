"""How often a model draws what it is asked for: held-out scenes, read back from its images by a detector."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import FieldError
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import ImageRequest, image_seed
from ldm.scenes.captions import caption
from ldm.scenes.detector import Detector
from ldm.scenes.renderer import render
from ldm.scenes.scene import Scene
from ldm.scenes.scores import Scores, check, evaluation_scenes, markdown_table, marked_grid, round_trip, score

COLUMNS = 20  # images in a row of a grid


class SceneEvaluation:
    """What a detector sees in images of held-out scenes: `count` of one solid, then as many of two.

    `seen` holds the scenes read back from each set of images, by its name; None for an image that is NaN. The
    scenes are chosen by `seed`, and image k of a set has seed + k.
    """

    def __init__(self, detector: Detector, seed: int, count: int, size: int):
        self.detector, self.seed, self.count, self.size = detector, seed, count, size
        self.scenes = [
            scene for pairs in (False, True) for scene in evaluation_scenes(seed, count, pairs=pairs)
        ]
        self.prompts = [caption(scene) for scene in self.scenes]
        self.seen: dict[str, list[Scene | None]] = {}

    def read_renders(self, pipeline: Pipeline) -> None:
        """Read renders, and renders after encoding and decoding: no model can reach more than these."""
        rng = np.random.default_rng(self.seed)
        renders = [render(scene, rng, self.size) for scene in self.scenes]
        self.seen["renders"] = self.detector.read(renders)
        self.seen["renders, encoded and decoded"] = self.detector.read(round_trip(pipeline, renders))

    def requests(self, like: ImageRequest, scale: float) -> list[ImageRequest]:
        """One image of each prompt, sampled as `like` is, at a guidance scale."""
        like = replace(like, height=self.size, width=self.size, scale=scale)
        return [
            replace(like, prompt=prompt, seed=image_seed(self.seed, k))
            for k, prompt in enumerate(self.prompts)
        ]

    def read(self, name: str, images: Sequence[np.ndarray | None]) -> np.ndarray:
        """Read a set of images, uint8 [size, size, 3] or None for NaN.

        Returns their grid, in which a green frame is around what is right, and a red one around the rest.
        """
        shown = [
            np.zeros((self.size, self.size, 3), np.uint8) if image is None else image for image in images
        ]
        read = self.detector.read(shown)
        seen = [image if image is None else scene for image, scene in zip(images, read, strict=True)]
        self.seen[name] = seen
        right = [check(*pair)["all"] for pair in zip(self.scenes, seen, strict=True)]
        return marked_grid(shown, right, COLUMNS)

    def scores(self) -> dict[str, dict[str, Scores]]:
        """The scores of every set of images, on its scenes of one solid and on those of two."""
        halves = {"one solid": slice(self.count), "two solids": slice(self.count, None)}
        return {
            title: {name: score(self.scenes[half], seen[half]) for name, seen in self.seen.items()}
            for title, half in halves.items()
        }

    def report(self, heading: str) -> str:
        """The scores as Markdown tables under a heading."""
        return "\n".join([heading, *(markdown_table(title, rows) for title, rows in self.scores().items())])

    def record(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that was found, for a JSON file."""
        seen = {name: [scene and caption(scene) for scene in scenes] for name, scenes in self.seen.items()}
        return {"settings": settings, "scores": self.scores(), "prompts": self.prompts, "seen": seen}


@contextmanager
def writing(outdir: Path) -> Iterator[None]:
    """Turns an OSError of the block, which writes into `outdir`, into an InputError."""
    try:
        yield
    except OSError as error:
        raise FieldError("{outdir} {path}: {why}", path=outdir, why=error.strerror or str(error)) from error
