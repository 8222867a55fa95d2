"""Reads a scene back from its picture, to measure how often a text-to-image model paints what it is told.

The detector sees pixels only, never the prompt. The bundled weights were trained on renders alone, by
`scripts/evaluate_scenes.py --train_detector`: 2,000 steps of 128 renders, 11 minutes on one shared CPU core.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.images.pixels import to_float
from ldm.scenes.scenes import COLOURS, RELATIONS, SHAPES, Scene, Solid, random_scene, render

DETECTOR_WEIGHTS = "models/scenes-64/detector.safetensors"
SIZE = 64  # pixels; pictures of other sizes are scaled to it
# What there is to tell about a picture, in canonical order; a layout of None is a single solid.
_LAYOUTS, _SHAPES, _COLOURS = (None, *RELATIONS[::2]), SHAPES, tuple(COLOURS)
_HEADS = (_LAYOUTS, _SHAPES, _COLOURS, _SHAPES, _COLOURS)
_IGNORED = -100  # cross_entropy's default: the second solid of a single has no shape and no colour


def outline(scene: Scene) -> Scene:
    """What the detector tells of a scene: its canonical wording without sizes and background."""
    scene = scene.canonical()
    first, second = (solid and Solid(solid.shape, solid.colour) for solid in (scene.first, scene.second))
    return Scene(first, scene.relation, second)


class Detector(nn.Module):
    """A small convolutional network with five answers: layout, then shape and colour of each solid."""

    def __init__(self) -> None:
        super().__init__()

        def halve(before: int, after: int, kernel: int = 3) -> tuple[nn.Module, ...]:
            conv = nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2, bias=False)
            return conv, nn.BatchNorm2d(after), nn.ReLU()

        self.layers = nn.Sequential(
            *halve(3, 32, kernel=5),
            *halve(32, 64),
            *halve(64, 96),
            *halve(96, 128),
            nn.Conv2d(128, 64, 1),
            nn.Flatten(),  # no pooling: the order of the solids is in their places
            nn.Linear(64 * (SIZE // 16) ** 2, 128),
            nn.ReLU(),
            nn.Linear(128, sum(map(len, _HEADS))),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Pictures [b, 3, 64, 64] in [-1, 1] -> the logits [b, answers] of each of `_HEADS`."""
        return self.layers(x).split([len(answers) for answers in _HEADS], dim=1)

    @torch.no_grad()
    def read(self, pictures: Sequence[np.ndarray], batch_size: int = 128) -> list[Scene]:
        """The `outline` of the scene that each picture, uint8 [h, w, 3], shows."""
        scenes = []
        for start in range(0, len(pictures), batch_size):
            x = F.interpolate(to_float(pictures[start : start + batch_size]), (SIZE, SIZE), mode="area")
            for best in torch.stack([logits.argmax(1) for logits in self(x)], dim=1).tolist():
                layout, *names = (answers[i] for answers, i in zip(_HEADS, best, strict=True))
                first, second = Solid(*names[:2]), Solid(*names[2:])
                scenes.append(Scene(first, layout, second) if layout else Scene(first))
        return scenes


def load_detector(path: str | Path) -> Detector:
    """The trained detector, in eval mode; InputError if the file is not there."""
    if not Path(path).exists():
        raise InputError(f"no detector at {path}; --train_detector makes one")
    detector = Detector()
    detector.load_state_dict(load_file(path))
    return detector.eval().requires_grad_(False)


def save_detector(detector: Detector, path: str | Path) -> None:
    """Its weights in half precision."""
    state = {name: t.half() if t.is_floating_point() else t for name, t in detector.state_dict().items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


def train_detector(steps: int, batch_size: int = 128, seed: int = 0) -> Iterator[tuple[float, Detector]]:
    """The loss and the detector after every step of AdamW, on ever new renders, held-out scenes among them.

    Decoded pictures are softer than renders: `_roughen` prepares the detector for that.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    detector = Detector()
    optimizer = torch.optim.AdamW(detector.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        scenes = [random_scene(rng, pair_share=0.8) for _ in range(batch_size)]
        x = _roughen(to_float([render(scene, rng, SIZE) for scene in scenes]))
        targets = torch.tensor([_targets(scene) for scene in scenes]).T
        loss = sum(
            F.cross_entropy(logits, target) for logits, target in zip(detector(x), targets, strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item(), detector


def _targets(scene: Scene) -> tuple[int, ...]:
    """The number of the right answer of each head."""
    scene = outline(scene)
    second = scene.second
    return (
        _LAYOUTS.index(scene.relation),
        _SHAPES.index(scene.first.shape),
        _COLOURS.index(scene.first.colour),
        _SHAPES.index(second.shape) if second else _IGNORED,
        _COLOURS.index(second.colour) if second else _IGNORED,
    )


def _roughen(x: Tensor) -> Tensor:
    """Pictures [b, 3, h, w] with blur, contrast, brightness and noise, each to a degree of its own."""

    def degree(low: float, high: float) -> Tensor:
        return torch.empty(len(x), 1, 1, 1).uniform_(low, high)

    small = F.interpolate(
        x, scale_factor=float(torch.empty(()).uniform_(0.35, 1)), mode="bilinear", antialias=True
    )
    x = x.lerp(F.interpolate(small, x.shape[-2:], mode="bilinear"), degree(0, 1))
    x = x * degree(0.85, 1.15) + degree(-0.1, 0.1)
    return x + degree(0, 0.15) * torch.randn_like(x)
