"""How often a text-to-image model paints the held-out scenes of its prompts, as a `Detector` sees it."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ldm.images.pixels import make_grid, to_uint8
from ldm.pipeline.device import arithmetic
from ldm.pipeline.pipeline import Pipeline
from ldm.scenes.detector import outline
from ldm.scenes.scene import Scene, held_out_scenes

HELD_OUT = {False: 50, True: 659}  # how many combinations there are of singles and of pairs
RIGHT, WRONG = (20, 200, 60), (230, 30, 30)  # RGB of the frames in a grid
NOT_FINITE = "not finite"  # in a table, of a figure that is infinite or NaN

Scores = Mapping[str, float]  # for each name of `check`, the share of images that pass


def evaluation_scenes(seed: int, count: int, pairs: bool) -> list[Scene]:
    """`count` held-out scenes. No scene is repeated before every one has appeared."""
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scenes += held_out_scenes(rng, min(count - len(scenes), HELD_OUT[pairs]), pairs)
    return scenes


def check(asked: Scene, seen: Scene | None) -> dict[str, bool]:
    """Which parts of the asked scene the image shows; none of them if there is no image (`seen` is None).

    `all`: the scenes agree in everything but sizes and background. `relation`: the pair's relation is right,
    or there is just one solid as asked. `solids`: the right shapes in the right colours, wherever they are.
    `shapes` and `colours`: each of these alone.
    """
    if seen is None:
        return dict.fromkeys(("all", "relation", "solids", "shapes", "colours"), False)
    asked, seen = outline(asked), outline(seen)

    def of(scene: Scene, *fields: str) -> list[list[str]]:
        return sorted([getattr(solid, f) for f in fields] for solid in (scene.first, scene.second) if solid)

    return {
        "all": asked == seen,
        "relation": asked.relation == seen.relation,
        "solids": of(asked, "shape", "colour") == of(seen, "shape", "colour"),
        "shapes": of(asked, "shape") == of(seen, "shape"),
        "colours": of(asked, "colour") == of(seen, "colour"),
    }


def score(asked: Sequence[Scene], seen: Sequence[Scene | None]) -> Scores:
    """The share of images that pass each part of `check`, 0 … 1."""
    checks = [check(*pair) for pair in zip(asked, seen, strict=True)]
    return {name: float(np.mean([each[name] for each in checks])) for name in checks[0]}


@torch.inference_mode()
def round_trip(pipeline: Pipeline, images: Sequence[np.ndarray], batch_size: int = 64) -> list[np.ndarray]:
    """Images, uint8 [h, w, 3], encoded to the means of their latents and decoded.

    The first stage works as it does for the pipeline's own images, in their precision.
    """
    decoded: list[np.ndarray] = []
    autocast = torch.autocast(pipeline.device.type, enabled=pipeline.precision == "autocast")
    with arithmetic(pipeline.device), autocast:
        for start in range(0, len(images), batch_size):
            means = pipeline.first_stage.encode(images[start : start + batch_size]).mode().float()
            latents = pipeline.model.get_first_stage_encoding(means)
            decoded += list(to_uint8(pipeline.first_stage.decode(latents)))
    return decoded


def marked_grid(images: Sequence[np.ndarray], right: Sequence[bool], columns: int) -> np.ndarray:
    """A grid of images, uint8 [h, w, 3]: those that are right have a green frame, the others a red one."""
    framed = []
    for image, passed in zip(images, right, strict=True):
        frame = np.full((image.shape[0] + 4, image.shape[1] + 4, 3), RIGHT if passed else WRONG, np.uint8)
        frame[2:-2, 2:-2] = image
        framed.append(frame)
    return make_grid(framed, columns)


def markdown_table(title: str, rows: Mapping[str, Scores]) -> str:
    """Scores in percent, one row for each named set of images."""
    names = list(next(iter(rows.values())))
    lines = [f"| {title} | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for row, scores in rows.items():
        lines.append(f"| {row} | {' | '.join(f'{100 * scores[name]:.1f}' for name in names)} |")
    return "\n".join(lines) + "\n"
