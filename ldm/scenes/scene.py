"""Scenes of coloured solids, as plain data: one solid, or two in a relation, before a background.

The bundled model is trained on random scenes. A tenth of all combinations is held out, to measure what the
model makes of scenes that it has never seen.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

VERSION = 1  # raised whenever the same seed gives other scenes, captions or renders: caches depend on it

SHAPES = ("cube", "sphere", "cone", "cylinder", "pyramid", "torus")
COLOURS = {
    "red": (222, 32, 38),
    "green": (30, 165, 60),
    "blue": (40, 80, 235),
    "yellow": (252, 222, 30),
    "orange": (250, 128, 16),
    "purple": (150, 50, 190),
    "cyan": (40, 215, 230),
    "white": (250, 250, 250),
}
BACKGROUNDS = {
    "grey": (136, 138, 142),
    "black": (26, 26, 29),
    "beige": (212, 190, 150),
    "pink": (236, 172, 184),
    "navy": (24, 34, 82),
}
SIZES = ("small", "large")
RELATIONS = ("on top of", "below", "left of", "right of", "in front of", "behind")
CANONICAL_RELATIONS = RELATIONS[::2]  # each of the others is the opposite of one of these

_MIRRORED = RELATIONS[1::2]
_MIRROR = dict(zip(CANONICAL_RELATIONS + _MIRRORED, _MIRRORED + CANONICAL_RELATIONS, strict=True))


@dataclass(frozen=True)
class Stripes:
    """So many bands of equal height around a solid: from below its own colour, `colour`, its own, …"""

    colour: str
    count: int = 2


@dataclass(frozen=True)
class Solid:
    """A coloured solid; `size` is "small", "large" or None, which leaves it open.

    The scenes that the bundled models learn have no `stripes`: these are for subjects of fine-tuning.
    """

    shape: str
    colour: str
    size: str | None = None
    stripes: Stripes | None = None


@dataclass(frozen=True)
class Scene:
    """One solid, or `first` in `relation` to `second`; a `background` of None leaves it to chance."""

    first: Solid
    relation: str | None = None
    second: Solid | None = None
    background: str | None = None

    def mirrored(self) -> "Scene":
        """The same scene described from the other solid; a scene of one solid is its own mirror image."""
        if self.relation is None or self.second is None:
            return self
        return replace(self, first=self.second, relation=_MIRROR[self.relation], second=self.first)

    def canonical(self) -> "Scene":
        """The description by "on top of", "left of" or "in front of".

        Two descriptions of the same scene have the same canonical one.
        """
        return self.mirrored() if self.relation in _MIRRORED else self


def random_scene(rng: np.random.Generator, pair_share: float = 0.65) -> Scene:
    """A scene with its background named; the two solids of a pair differ in shape, in colour or in both."""

    def solid() -> Solid:
        return Solid(pick(rng, SHAPES), pick(rng, tuple(COLOURS)), pick(rng, (None, *SIZES)))

    first, background = solid(), pick(rng, tuple(BACKGROUNDS))
    if rng.random() >= pair_share:
        return Scene(first, background=background)
    second = solid()
    while (second.shape, second.colour) == (first.shape, first.colour):
        second = solid()
    return Scene(first, pick(rng, RELATIONS), second, background)


def held_out(scene: Scene) -> bool:
    """Whether the scene's combination, one in ten by a stable hash, is kept out of training.

    The combination of a pair is its shapes, colours and canonical relation; that of a single solid is shape,
    colour, size and background, and a single that leaves one of these open is never held out.
    """
    scene = scene.canonical()
    first, second = scene.first, scene.second
    if second is not None:
        key = (first.shape, first.colour, scene.relation, second.shape, second.colour)
    else:
        key = (first.shape, first.colour, first.size, scene.background)
    return None not in key and zlib.crc32(" ".join(key).encode()) % 10 == 0


def held_out_scenes(rng: np.random.Generator, count: int, pairs: bool) -> list[Scene]:
    """`count` held-out scenes, each of another combination; ValueError if there are fewer of these."""
    if pairs:
        solids = [Solid(*names) for names in product(SHAPES, COLOURS)]
        every = (
            Scene(a, relation, b) for a, relation, b in product(solids, CANONICAL_RELATIONS, solids) if a != b
        )
    else:
        every = (Scene(Solid(*n), background=b) for *n, b in product(SHAPES, COLOURS, SIZES, BACKGROUNDS))
    kept = [scene for scene in every if held_out(scene)]
    if count > len(kept):
        raise ValueError(f"count is {count}, but only {len(kept)} combinations are held out")
    chosen = [kept[i] for i in rng.choice(len(kept), count, replace=False)]
    return [scene.mirrored() if rng.random() < 0.5 else scene for scene in chosen]


def pick(rng: np.random.Generator, choices: Sequence) -> Any:
    """One of the choices, at the cost of one random integer."""
    return choices[rng.integers(len(choices))]
