"""How often a text-to-image model paints the held-out scenes that it is told to, as a `Detector` sees it."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ldm.images.pixels import make_grid, to_float, to_uint8
from ldm.models.autoencoder import AutoencoderKL
from ldm.scenes.detector import outline
from ldm.scenes.scenes import Scene, held_out_scenes

HELD_OUT = {False: 50, True: 659}  # how many combinations there are of singles and of pairs
RIGHT, WRONG = (20, 200, 60), (230, 30, 30)  # frames

Scores = Mapping[str, float]  # of each `check`, a share of the pictures


def evaluation_scenes(seed: int, count: int, pairs: bool) -> list[Scene]:
    """`count` held-out scenes; where there are fewer of them, every one returns before any does so again."""
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scenes += held_out_scenes(rng, min(count - len(scenes), HELD_OUT[pairs]), pairs)
    return scenes


def check(asked: Scene, seen: Scene | None) -> dict[str, bool]:
    """What of a scene is right in its picture; nothing is if there is no picture (None).

    `all` is the canonical wording but for sizes and background. `relation` is that of the pair, or that there
    is just one solid; `solids` are the right shapes in the right colours, in whichever place; `shapes` and
    `colours` are each of these alone.
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
    """The share of pictures that pass each `check`, 0 … 1."""
    checks = [check(*pair) for pair in zip(asked, seen, strict=True)]
    return {name: float(np.mean([each[name] for each in checks])) for name in checks[0]}


@torch.inference_mode()
def round_trip(
    first_stage: AutoencoderKL, pictures: list[np.ndarray], batch_size: int = 64
) -> list[np.ndarray]:
    """Pictures, uint8 [h, w, 3], encoded to the means of their latents and decoded."""
    device = next(first_stage.parameters()).device
    decoded: list[np.ndarray] = []
    for start in range(0, len(pictures), batch_size):
        x = to_float(pictures[start : start + batch_size]).to(device)
        decoded += list(to_uint8(first_stage.decode(first_stage.encode(x).mode())))
    return decoded


def marked_grid(pictures: Sequence[np.ndarray], right: Sequence[bool], columns: int) -> np.ndarray:
    """A grid of pictures, uint8 [h, w, 3], in a green frame where right and in a red one where not."""
    framed = []
    for picture, passed in zip(pictures, right, strict=True):
        frame = np.full((picture.shape[0] + 4, picture.shape[1] + 4, 3), RIGHT if passed else WRONG, np.uint8)
        frame[2:-2, 2:-2] = picture
        framed.append(frame)
    return make_grid(framed, columns)


def markdown_table(title: str, rows: Mapping[str, Scores]) -> str:
    """Scores in percent, a row for each kind of pictures."""
    names = list(next(iter(rows.values())))
    lines = [f"| {title} | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for row, scores in rows.items():
        lines.append(f"| {row} | {' | '.join(f'{100 * scores[name]:.1f}' for name in names)} |")
    return "\n".join(lines) + "\n"
