"""Captioned pictures of solids without end: the training data of the miniature model.

A `Scene` is one solid, or two in a relation. `caption` and `paraphrase` put it into words and `render` into
pixels. Each solid is ray-marched once into a colourless sprite; a picture scales, tints and stacks sprites.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from PIL import Image

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

_CANONICAL, _MIRRORED = RELATIONS[::2], RELATIONS[1::2]
_MIRROR = dict(zip(_CANONICAL + _MIRRORED, _MIRRORED + _CANONICAL, strict=True))
_SYNONYMS = {
    "on top of": ("on top of", "above", "on"),
    "below": ("below", "beneath", "under"),
    "left of": ("left of", "to the left of", "next to"),
    "right of": ("right of", "to the right of", "next to"),
    "in front of": ("in front of",),
    "behind": ("behind",),
    "torus": ("torus", "ring"),
    "sphere": ("sphere", "ball"),
}
# Width of a unit solid as a share of the picture, (low, high); None is a size left unsaid, in between.
_SINGLE_SCALE = {"small": (0.30, 0.36), None: (0.44, 0.54), "large": (0.62, 0.70)}
_PAIR_SCALE = {"small": (0.22, 0.25), None: (0.29, 0.33), "large": (0.37, 0.40)}


@dataclass(frozen=True)
class Solid:
    """A coloured solid; `size` is "small", "large" or None, which leaves it unsaid."""

    shape: str
    colour: str
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """One solid, or `first` in `relation` to `second`; a `background` of None leaves it to chance."""

    first: Solid
    relation: str | None = None
    second: Solid | None = None
    background: str | None = None

    def mirrored(self) -> "Scene":
        """The same picture told from the other solid; a scene of one solid is its own mirror image."""
        if self.relation is None or self.second is None:
            return self
        return replace(self, first=self.second, relation=_MIRROR[self.relation], second=self.first)

    def canonical(self) -> "Scene":
        """The wording with "on top of", "left of" or "in front of"; equal for two wordings of a picture."""
        return self.mirrored() if self.relation in _MIRRORED else self


def random_scene(rng: np.random.Generator, pair_share: float = 0.65) -> Scene:
    """A scene with its background named; the two solids of a pair differ in shape, in colour or in both."""

    def solid() -> Solid:
        return Solid(_pick(rng, SHAPES), _pick(rng, tuple(COLOURS)), _pick(rng, (None, *SIZES)))

    first, background = solid(), _pick(rng, tuple(BACKGROUNDS))
    if rng.random() >= pair_share:
        return Scene(first, background=background)
    second = solid()
    while (second.shape, second.colour) == (first.shape, first.colour):
        second = solid()
    return Scene(first, _pick(rng, RELATIONS), second, background)


def caption(scene: Scene) -> str:
    """The canonical wording, such as "a small red cube left of an orange cone on a grey background"."""
    words = _with_article(_describe(scene.first))
    if scene.second is not None:
        words += f" {scene.relation} {_with_article(_describe(scene.second))}"
    return words + (f" on a {scene.background} background" if scene.background else "")


def paraphrase(scene: Scene, rng: np.random.Generator) -> str:
    """A true wording, half the time `caption`'s own, that may leave the sizes or the background unsaid."""
    if rng.random() < 0.35:
        scene = replace(scene, background=None)
    if rng.random() < 0.25:
        second = scene.second and replace(scene.second, size=None)
        scene = replace(scene, first=replace(scene.first, size=None), second=second)
    if rng.random() < 0.5:
        return caption(scene)
    if rng.random() < 0.5:
        scene = scene.mirrored()

    def renamed(solid: Solid) -> Solid:
        return replace(solid, shape=_pick(rng, _SYNONYMS.get(solid.shape, (solid.shape,))))

    first = renamed(scene.first)
    words = _describe(first)
    if rng.random() < 0.2:
        words = f"{_describe(replace(first, colour=''))} that is {first.colour}"
    if rng.random() < 0.8:
        words = _pick(rng, ("", "", "a picture of ", "there is ")) + _with_article(words)
    if scene.second is not None:
        words += f" {_pick(rng, _SYNONYMS[scene.relation])} {_with_article(_describe(renamed(scene.second)))}"
    link = _pick(rng, (" on a ", " against a ", ", "))
    return words + (f"{link}{scene.background} background" if scene.background else "")


def render(scene: Scene, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """The scene as uint8 [size, size, 3], alike for either wording; `rng` jitters place and tint."""
    scene = scene.canonical()
    background = scene.background or _pick(rng, tuple(BACKGROUNDS))
    canvas = _backdrop(BACKGROUNDS[background], rng, size)
    for solid, x, y, scale in _layout(scene, rng):
        if scene.relation != "on top of" or solid is scene.second:
            _cast_shadow(canvas, x, y, scale)
        turned = _sprite(solid.shape, int(_pick(rng, _TURNS.get(solid.shape, (0,)))))
        tint = np.float32(COLOURS[solid.colour]) * np.float32(rng.uniform(0.96, 1.06))
        _paint(canvas, turned, tint, x, y, scale)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


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


def training_scenes(seed: int, size: int = 64, pair_share: float = 0.65) -> Iterator[tuple[np.ndarray, str]]:
    """Pictures, uint8 [size, size, 3], with captions, without end and without held-out scenes."""
    rng = np.random.default_rng(seed)
    while True:
        scene = random_scene(rng, pair_share)
        if not held_out(scene):
            yield render(scene, rng, size), paraphrase(scene, rng)


def held_out_scenes(rng: np.random.Generator, count: int, pairs: bool) -> list[Scene]:
    """`count` held-out scenes, each of another combination; ValueError if there are fewer of these."""
    if pairs:
        solids = [Solid(*names) for names in product(SHAPES, COLOURS)]
        every = (Scene(a, relation, b) for a, relation, b in product(solids, _CANONICAL, solids) if a != b)
    else:
        every = (Scene(Solid(*n), background=b) for *n, b in product(SHAPES, COLOURS, SIZES, BACKGROUNDS))
    kept = [scene for scene in every if held_out(scene)]
    if count > len(kept):
        raise ValueError(f"count is {count}, but only {len(kept)} combinations are held out")
    chosen = [kept[i] for i in rng.choice(len(kept), count, replace=False)]
    return [scene.mirrored() if rng.random() < 0.5 else scene for scene in chosen]


def _pick(rng: np.random.Generator, choices: Sequence) -> Any:
    return choices[rng.integers(len(choices))]


def _describe(solid: Solid) -> str:
    return " ".join(word for word in (solid.size, solid.colour, solid.shape) if word)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# Pictures: x and y are shares of the picture, y down; a solid stands on the ground at (x, y).

_ELEVATION = math.radians(28)  # of the camera, which is orthographic
_UP, _DEPTH = math.cos(_ELEVATION), math.sin(_ELEVATION)
_HEIGHT = {"cube": 0.84, "sphere": 1.0, "cone": 1.1, "cylinder": 0.95, "pyramid": 1.05, "torus": 1.08}
_TURNS = {"cube": range(26, 66, 4), "pyramid": range(24, 56, 4), "torus": range(-32, 40, 8)}  # degrees
_LEFT, _TOP, _EXTENT, _PIXELS = -0.85, 1.25, 1.7, 256  # the window of a sprite in units of the solid


def _layout(scene: Scene, rng: np.random.Generator) -> list[tuple[Solid, float, float, float]]:
    """The solids of a canonical scene with their x, y and scale, in the order of painting."""
    a, b = scene.first, scene.second
    jitter_x, jitter_y = rng.uniform(-1, 1, 2)
    if b is None:
        scale = rng.uniform(*_SINGLE_SCALE[a.size])
        room = 0.5 - 0.62 * scale  # that the frame leaves on each side
        return [(a, 0.5 + room * jitter_x, 0.5 + 0.33 * scale + room * (0.3 + 0.45 * jitter_y), scale)]
    scale_a, scale_b = (rng.uniform(*_PAIR_SCALE[solid.size]) for solid in (a, b))
    if scene.relation == "on top of":
        rise = _HEIGHT[b.shape] * _UP * scale_b
        if b.shape not in ("cube", "cylinder") and a.shape not in ("sphere", "torus"):
            rise += 0.2 * scale_a  # a flat foot on a point would hide it
        x, y = 0.5 + 0.1 * jitter_x, 0.47 + 0.5 * (rise + _UP * scale_a) + 0.03 * jitter_y
        return [(b, x, y, scale_b), (a, x, y - rise, scale_a)]
    if scene.relation == "left of":
        gap = 0.6 * (scale_a + scale_b) + rng.uniform(0, 0.05)
        middle = 0.5 + 0.3 * (scale_a - scale_b) + (0.98 - gap - 0.6 * (scale_a + scale_b)) * 0.4 * jitter_x
        y = 0.64 + 0.06 * jitter_y
        step = rng.uniform(-0.03, 0.03)
        return [(a, middle - gap / 2, y, scale_a), (b, middle + gap / 2, y + step, scale_b)]
    aside = _pick(rng, (-1, 1)) * rng.uniform(0.5, 0.62) * (0.7 * scale_a + 0.3 * scale_b)
    x, y = 0.5 + 0.08 * jitter_x, 0.74 + 0.04 * jitter_y
    return [(b, x + aside / 2, y - 0.5 * scale_a, scale_b), (a, x - aside / 2, y, scale_a)]


def _backdrop(colour: tuple[int, int, int], rng: np.random.Generator, size: int) -> np.ndarray:
    """A wall that meets a lighter ground in a soft horizon, float32 [size, size, 3]."""
    y = (np.arange(size, dtype=np.float32) + 0.5) / size
    ground = 1 / (1 + np.exp((rng.uniform(0.38, 0.5) - y) * 30))
    light = rng.uniform(0.95, 1.05) * (0.84 + 0.12 * y + 0.14 * ground)
    rows = light[:, None] * np.float32(colour) + 10 * ground[:, None]
    return np.repeat(rows[:, None].astype(np.float32), size, axis=1)


def _cast_shadow(canvas: np.ndarray, x: float, y: float, scale: float) -> None:
    """Darken the ground softly around a foot, away from the light."""
    centres = (np.arange(len(canvas), dtype=np.float32) + 0.5) / len(canvas)
    across = (centres - x - 0.14 * scale) / (0.62 * scale)
    along = (centres - y) / (0.62 * _DEPTH * scale)
    canvas *= 1 - 0.6 * (np.exp(-(along**4))[:, None] * np.exp(-(across**4)))[..., None]


def _paint(
    canvas: np.ndarray, sprite: Image.Image, tint: np.ndarray, x: float, y: float, scale: float
) -> None:
    """Lay a sprite over the canvas with its foot at (x, y), exact to a fraction of a pixel."""
    size, width = len(canvas), _EXTENT * scale * len(canvas)
    corner = (x + _LEFT * scale) * size, (y - _TOP * scale) * size
    start = [max(0, math.ceil(edge)) for edge in corner]
    stop = [min(size, math.floor(edge + width)) for edge in corner]
    zoom = _PIXELS / width
    box = [(at - edge) * zoom for at, edge in zip(start + stop, corner * 2, strict=True)]
    window = sprite.resize((stop[0] - start[0], stop[1] - start[1]), Image.Resampling.HAMMING, tuple(box))
    shade, gloss, cover = np.moveaxis(np.asarray(window, dtype=np.float32)[..., None] / 255, 2, 0)
    target = canvas[start[1] : stop[1], start[0] : stop[0]]
    target *= 1 - cover
    target += shade * tint + 255 * gloss


@cache
def _sprite(shape: str, degrees: int) -> Image.Image:
    """A solid turned about its axis: diffuse light, gloss and coverage as the channels of one picture."""
    yaw = math.radians(degrees)
    steps = (np.arange(_PIXELS, dtype=np.float32) + 0.5) / _PIXELS * _EXTENT
    u, v = np.meshgrid(_LEFT + steps, _TOP - steps)
    view = np.float32([0, _DEPTH, _UP])  # towards the camera; x right, y up, z near

    def distance(point: np.ndarray) -> np.ndarray:
        x, y, z = point
        x, z = x * math.cos(yaw) - z * math.sin(yaw), x * math.sin(yaw) + z * math.cos(yaw)
        return _distance(shape, x, y, z)

    point = np.stack([u, v * _UP, -v * _DEPTH]) + 3 * view[:, None, None]
    for _ in range(64):  # sphere tracing: every step is as long as nothing can be in its way
        point -= distance(point) * view[:, None, None]
    cover = distance(point) < 5e-3
    steps = 2e-3 * np.eye(3, dtype=np.float32)[..., None, None]
    normal = np.stack([distance(point + step) - distance(point - step) for step in steps])
    normal /= np.linalg.norm(normal, axis=0) + 1e-9
    light = np.float32([-0.47, 0.80, 0.38])
    half = (light + view) / np.linalg.norm(light + view)
    diffuse = 0.46 + 0.58 * np.clip(np.tensordot(light, normal, 1), 0, 1)
    diffuse *= 0.88 + 0.12 * np.clip(point[1] / 0.4, 0, 1)  # darker near the ground
    gloss = 0.6 * np.clip(np.tensordot(half, normal, 1), 0, 1) ** 40 * (shape in ("sphere", "torus"))
    channels = np.stack([diffuse, gloss, np.ones_like(gloss)], -1) * cover[..., None]
    return Image.fromarray((255 * np.clip(channels, 0, 1)).astype(np.uint8))


def _distance(shape: str, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """A lower bound of the distance to a solid that stands on y = 0 about the y axis."""
    height = _HEIGHT[shape]
    middle = y - height / 2
    match shape:
        case "cube":
            return np.maximum(np.maximum(abs(x), abs(z)), abs(middle)) - height / 2
        case "sphere":
            return np.sqrt(x * x + middle * middle + z * z) - height / 2
        case "cylinder":
            return np.maximum(np.hypot(x, z) - 0.42, abs(middle) - height / 2)
        case "torus":
            return np.hypot(np.hypot(x, middle) - 0.38, z) - 0.16
    # A cone or a pyramid, whose foot is its radius or half its side.
    foot, out = (0.5, np.hypot(x, z)) if shape == "cone" else (0.45, np.maximum(abs(x), abs(z)))
    return np.maximum((height * out + foot * y - foot * height) / math.hypot(height, foot), -y)
