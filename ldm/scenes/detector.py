"""Reads a scene back from an image, to measure how often a text-to-image model paints what its prompt says.

The detector sees pixels only, never the prompt. The bundled weights were trained on renders alone, by
`scripts/evaluate_scenes.py --train_detector`: 2,000 steps of 128 renders, 11 minutes on one shared CPU core.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.images.pixels import to_float
from ldm.scenes.renderer import render
from ldm.scenes.scene import CANONICAL_RELATIONS, COLOURS, SHAPES, Scene, Solid, random_scene
from ldm.weights.files import exists

DETECTOR_WEIGHTS = "models/scenes-64/detector.safetensors"
SIZE = 64  # pixels; images of other sizes are scaled to it
# The answers to choose from, for each question in canonical order; a layout of None is a single solid.
_LAYOUTS, _SHAPES, _COLOURS = (None, *CANONICAL_RELATIONS), SHAPES, tuple(COLOURS)
_HEADS = (_LAYOUTS, _SHAPES, _COLOURS, _SHAPES, _COLOURS)
_IGNORED = -100  # cross_entropy skips this target: the second solid of a single has no shape or colour


def outline(scene: Scene) -> Scene:
    """What the detector can see of a scene: its canonical description without sizes and background."""
    scene = scene.canonical()
    first, second = (solid and Solid(solid.shape, solid.colour) for solid in (scene.first, scene.second))
    return Scene(first, scene.relation, second)


class Detector(nn.Module):
    """A small convolutional network that answers five questions: layout, shape and colour of each solid."""

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
            nn.Flatten(),  # not pooled: which solid comes first depends on where they are
            nn.Linear(64 * (SIZE // 16) ** 2, 128),
            nn.ReLU(),
            nn.Linear(128, sum(map(len, _HEADS))),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images [b, 3, 64, 64] in [-1, 1] -> the logits [b, answers] of each of `_HEADS`."""
        return self.layers(x).split([len(answers) for answers in _HEADS], dim=1)

    @torch.no_grad()
    def read(self, images: Sequence[np.ndarray], batch_size: int = 128) -> list[Scene]:
        """The `outline` of the scene that each image, uint8 [h, w, 3], shows."""
        scenes = []
        for start in range(0, len(images), batch_size):
            x = F.interpolate(to_float(images[start : start + batch_size]), (SIZE, SIZE), mode="area")
            for best in torch.stack([logits.argmax(1) for logits in self(x)], dim=1).tolist():
                layout, *names = (answers[i] for answers, i in zip(_HEADS, best, strict=True))
                first, second = Solid(*names[:2]), Solid(*names[2:])
                scenes.append(Scene(first, layout, second) if layout else Scene(first))
        return scenes


def load_detector(path: str | Path) -> Detector:
    """The trained detector, in eval mode; InputError if the file is missing or does not hold one."""
    if not exists(Path(path)):
        raise InputError(f"no detector at {path}; --train_detector makes one")
    detector = Detector()
    try:
        detector.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:  # unreadable, damaged, or of another network
        raise InputError(f"{path} is not a detector's weights: {str(error).splitlines()[0]}") from error
    return detector.eval().requires_grad_(False)


def save_detector(detector: Detector, path: str | Path) -> None:
    """Write the detector's weights in half precision; InputError if the file cannot be written."""
    state = {name: t.half() if t.is_floating_point() else t for name, t in detector.state_dict().items()}
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(save(state))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def train_detector(steps: int, batch_size: int = 128, seed: int = 0) -> Iterator[tuple[float, Detector]]:
    """The loss and the detector after every step of AdamW; every step has new renders, held out or not.

    Decoded images are softer than renders: `_roughen` prepares the detector for that.
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
    """The index of the right answer to each question of `_HEADS`."""
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
    """Images [b, 3, h, w] with blur, contrast, brightness and noise, of a random strength for each image."""

    def strength(low: float, high: float) -> Tensor:
        return torch.empty(len(x), 1, 1, 1).uniform_(low, high)

    small = F.interpolate(
        x, scale_factor=float(torch.empty(()).uniform_(0.35, 1)), mode="bilinear", antialias=True
    )
    x = x.lerp(F.interpolate(small, x.shape[-2:], mode="bilinear"), strength(0, 1))
    x = x * strength(0.85, 1.15) + strength(-0.1, 0.1)
    return x + strength(0, 0.15) * torch.randn_like(x)
