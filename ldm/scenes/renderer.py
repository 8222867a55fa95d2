"""Scenes in pixels.

Each solid is ray-marched once into a colourless sprite; an image scales, tints and stacks sprites. Below, x
and y are shares of the image's side, y pointing down; a solid stands on the ground at (x, y).
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from ldm.scenes.scene import BACKGROUNDS, COLOURS, Scene, Solid, pick

# Width of a unit solid as a share of the image, (low, high); None is a size left open, in between.
_SINGLE_SCALE = {"small": (0.30, 0.36), None: (0.44, 0.54), "large": (0.62, 0.70)}
_PAIR_SCALE = {"small": (0.22, 0.25), None: (0.29, 0.33), "large": (0.37, 0.40)}

_ELEVATION = math.radians(28)  # of the orthographic camera above the ground
_UP, _DEPTH = math.cos(_ELEVATION), math.sin(_ELEVATION)
_VIEW = np.float32([0, _DEPTH, _UP])  # towards the camera; x right, y up, z near
_HEIGHT = {"cube": 0.84, "sphere": 1.0, "cone": 1.1, "cylinder": 0.95, "pyramid": 1.05, "torus": 1.08}
# Angles in degrees at which these solids are shown; the others look the same from every side.
_TURNS = {"cube": range(26, 66, 4), "pyramid": range(24, 56, 4), "torus": range(-32, 40, 8)}
_LEFT, _TOP, _EXTENT = -0.85, 1.25, 1.7  # the window that a sprite shows, in units of the solid
_PIXELS = 256  # side of a sprite
_LIGHT = np.float32([-0.47, 0.80, 0.38])
_DISTANCE = 3.0  # from the camera to the ground in the middle of the image, for inverse depths


@dataclass(frozen=True)
class Layers:
    """What each pixel of a render shows.

    coverage: float32 [solids, size, size], the share 0 … 1 of each pixel in which a solid is seen, in the
        order of the canonical scene
    disparity: float32 [size, size], the inverse of the depth, whose unit is the image's side; large is near
    """

    coverage: np.ndarray
    disparity: np.ndarray


def render(scene: Scene, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """The scene as uint8 [size, size, 3]; `rng` jitters place and tint. Its mirrored form looks the same."""
    return _draw(scene.canonical(), rng, size)


def render_layers(scene: Scene, rng: np.random.Generator, size: int = 64) -> tuple[np.ndarray, Layers]:
    """The image that `render` returns for the same state of `rng`, and its true masks and depths."""
    scene = scene.canonical()
    coverage = np.zeros((1 if scene.second is None else 2, size, size), np.float32)
    layers = Layers(coverage, np.empty((size, size), np.float32))
    return _draw(scene, rng, size, layers), layers


def _draw(scene: Scene, rng: np.random.Generator, size: int, layers: Layers | None = None) -> np.ndarray:
    """A canonical scene as uint8 [size, size, 3]; its layers are written into `layers`."""
    background = scene.background or pick(rng, tuple(BACKGROUNDS))
    horizon = rng.uniform(0.38, 0.5)
    canvas = _backdrop(BACKGROUNDS[background], horizon, rng, size)
    nearness = _backdrop_nearness(horizon, size)
    for solid, x, y, scale in _layout(scene, rng):
        if scene.relation != "on top of" or solid is scene.second:
            _cast_shadow(canvas, x, y, scale)
            ground = y
        turned = solid.shape, int(pick(rng, _TURNS.get(solid.shape, (0,))))
        brightness = np.float32(rng.uniform(0.96, 1.06))
        tint = np.float32(COLOURS[solid.colour]) * brightness
        _paint(canvas, _sprite(*turned), tint, x, y, scale)
        if solid.stripes is not None:
            change = np.float32(COLOURS[solid.stripes.colour]) * brightness - tint
            _tint(canvas, _sprite_stripes(*turned, solid.stripes.count), change, x, y, scale)
        if layers is not None:
            # What is lifted off the ground moves up in the image and, as the camera looks down, nearer.
            foot = _ground_nearness(ground) + (ground - y) * _DEPTH / _UP
            hidden_by = _cover(nearness, turned, x, y, scale, foot)
            layers.coverage[:] *= 1 - hidden_by
            layers.coverage[0 if solid is scene.first else 1] = hidden_by
    if layers is not None:
        layers.disparity[:] = 1 / (_DISTANCE - nearness)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def _layout(scene: Scene, rng: np.random.Generator) -> list[tuple[Solid, float, float, float]]:
    """The solids of a canonical scene with their x, y and scale, in the order in which they are painted."""
    a, b = scene.first, scene.second
    jitter_x, jitter_y = rng.uniform(-1, 1, 2)
    if b is None:
        scale = rng.uniform(*_SINGLE_SCALE[a.size])
        room = 0.5 - 0.62 * scale  # left on each side of the solid
        return [(a, 0.5 + room * jitter_x, 0.5 + 0.33 * scale + room * (0.3 + 0.45 * jitter_y), scale)]
    scale_a, scale_b = (rng.uniform(*_PAIR_SCALE[solid.size]) for solid in (a, b))
    if scene.relation == "on top of":
        rise = _HEIGHT[b.shape] * _UP * scale_b
        if b.shape not in ("cube", "cylinder") and a.shape not in ("sphere", "torus"):
            rise += 0.2 * scale_a  # a flat foot would hide the point that it stands on
        x, y = 0.5 + 0.1 * jitter_x, 0.47 + 0.5 * (rise + _UP * scale_a) + 0.03 * jitter_y
        return [(b, x, y, scale_b), (a, x, y - rise, scale_a)]
    if scene.relation == "left of":
        gap = 0.6 * (scale_a + scale_b) + rng.uniform(0, 0.05)
        middle = 0.5 + 0.3 * (scale_a - scale_b) + (0.98 - gap - 0.6 * (scale_a + scale_b)) * 0.4 * jitter_x
        y = 0.64 + 0.06 * jitter_y
        step = rng.uniform(-0.03, 0.03)
        return [(a, middle - gap / 2, y, scale_a), (b, middle + gap / 2, y + step, scale_b)]
    aside = pick(rng, (-1, 1)) * rng.uniform(0.5, 0.62) * (0.7 * scale_a + 0.3 * scale_b)
    x, y = 0.5 + 0.08 * jitter_x, 0.74 + 0.04 * jitter_y
    return [(b, x + aside / 2, y - 0.5 * scale_a, scale_b), (a, x - aside / 2, y, scale_a)]


def _backdrop(
    colour: tuple[int, int, int], horizon: float, rng: np.random.Generator, size: int
) -> np.ndarray:
    """A wall that meets a lighter ground in a soft horizon, float32 [size, size, 3]."""
    y = (np.arange(size, dtype=np.float32) + 0.5) / size
    ground = 1 / (1 + np.exp((horizon - y) * 30))
    light = rng.uniform(0.95, 1.05) * (0.84 + 0.12 * y + 0.14 * ground)
    rows = light[:, None] * np.float32(colour) + 10 * ground[:, None]
    return np.repeat(rows[:, None].astype(np.float32), size, axis=1)


def _ground_nearness(y: float | np.ndarray) -> float | np.ndarray:
    """How much nearer to the camera than in the middle of the image the ground is at y."""
    return (y - 0.5) * _UP / _DEPTH


def _backdrop_nearness(horizon: float, size: int) -> np.ndarray:
    """The nearness of the ground and of the upright wall behind it, float32 [size, size]."""
    y = (np.arange(size, dtype=np.float32) + 0.5) / size
    wall = _ground_nearness(horizon) + (horizon - y) * _DEPTH / _UP
    rows = np.where(y < horizon, wall, _ground_nearness(y))
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
    place, window = _scaled(sprite, len(canvas), x, y, scale)
    shade, gloss, cover = np.moveaxis(window[..., None] / 255, 2, 0)
    target = canvas[place]
    target *= 1 - cover
    target += shade * tint + 255 * gloss


def _tint(
    canvas: np.ndarray, sprite: Image.Image, change: np.ndarray, x: float, y: float, scale: float
) -> None:
    """Add `change` to the colour of a painted solid in its stripes; the sprite is `_sprite_stripes`'."""
    place, window = _scaled(sprite, len(canvas), x, y, scale)
    canvas[place] += window[..., None] / 255 * change


def _cover(
    nearness: np.ndarray, turned: tuple[str, int], x: float, y: float, scale: float, foot: float
) -> np.ndarray:
    """Put a solid, whose foot has the nearness `foot`, into the map of nearness.

    Returns the share of each pixel that it covers, float32 [size, size].
    """
    place, window = _scaled(_sprite(*turned), len(nearness), x, y, scale)
    _, near = _scaled(_sprite_nearness(*turned), len(nearness), x, y, scale)
    coverage = np.zeros_like(nearness)
    coverage[place] = cover = window[..., 2] / 255
    surface = foot + scale * near / np.maximum(cover, 1 / 255)
    nearness[place] = np.where(cover > 0.5, surface, nearness[place])
    return coverage


def _scaled(
    sprite: Image.Image, size: int, x: float, y: float, scale: float
) -> tuple[tuple[slice, slice], np.ndarray]:
    """A sprite with its foot at (x, y): the rows and columns of the image that it fills, and its pixels."""
    width = _EXTENT * scale * size
    corner = (x + _LEFT * scale) * size, (y - _TOP * scale) * size
    start = [max(0, math.ceil(edge)) for edge in corner]
    stop = [min(size, math.floor(edge + width)) for edge in corner]
    zoom = _PIXELS / width
    box = [(at - edge) * zoom for at, edge in zip(start + stop, corner * 2, strict=True)]
    window = sprite.resize((stop[0] - start[0], stop[1] - start[1]), Image.Resampling.HAMMING, tuple(box))
    place = slice(start[1], stop[1]), slice(start[0], stop[0])
    return place, np.asarray(window, dtype=np.float32)


@cache
def _sprite(shape: str, degrees: int) -> Image.Image:
    """A solid turned about its vertical axis; the channels are diffuse light, gloss and coverage."""
    point, normal, cover = _surface(shape, degrees)
    half = (_LIGHT + _VIEW) / np.linalg.norm(_LIGHT + _VIEW)
    diffuse = _diffuse(point, normal)
    gloss = 0.6 * np.clip(np.tensordot(half, normal, 1), 0, 1) ** 40 * (shape in ("sphere", "torus"))
    channels = np.stack([diffuse, gloss, np.ones_like(gloss)], -1) * cover[..., None]
    return Image.fromarray((255 * np.clip(channels, 0, 1)).astype(np.uint8))


def _diffuse(point: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """The light that a surface scatters, [n, n]: 0 is none, and 1 shows the colour as it is."""
    diffuse = 0.46 + 0.58 * np.clip(np.tensordot(_LIGHT, normal, 1), 0, 1)
    return diffuse * (0.88 + 0.12 * np.clip(point[1] / 0.4, 0, 1))  # darker near the ground


@cache
def _sprite_stripes(shape: str, degrees: int, count: int) -> Image.Image:
    """The light that a turned solid scatters, as in `_sprite`, from every other of `count` bands."""
    point, normal, cover = _surface(shape, degrees)
    band = np.clip(np.floor(point[1] / _HEIGHT[shape] * count), 0, count - 1)
    striped = band % 2 == 1
    return Image.fromarray(
        (255 * np.clip(_diffuse(point, normal), 0, 1) * (cover & striped)).astype(np.uint8)
    )


@cache
def _sprite_nearness(shape: str, degrees: int) -> Image.Image:
    """How much nearer than its foot the solid's surface is, in units of the solid; 0 where it is not seen."""
    point, _, cover = _surface(shape, degrees)
    return Image.fromarray((np.tensordot(_VIEW, point, 1) * cover).astype(np.float32))


@cache
def _surface(shape: str, degrees: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each pixel of a sprite shows: points and unit normals [3, n, n], and where there is a solid."""
    yaw = math.radians(degrees)
    steps = (np.arange(_PIXELS, dtype=np.float32) + 0.5) / _PIXELS * _EXTENT
    u, v = np.meshgrid(_LEFT + steps, _TOP - steps)

    def distance(point: np.ndarray) -> np.ndarray:
        x, y, z = point
        x, z = x * math.cos(yaw) - z * math.sin(yaw), x * math.sin(yaw) + z * math.cos(yaw)
        return _distance(shape, x, y, z)

    point = np.stack([u, v * _UP, -v * _DEPTH]) + 3 * _VIEW[:, None, None]
    for _ in range(64):  # sphere tracing: a step is never longer than the distance to the solid
        point -= distance(point) * _VIEW[:, None, None]
    cover = distance(point) < 5e-3
    steps = 2e-3 * np.eye(3, dtype=np.float32)[..., None, None]
    normal = np.stack([distance(point + step) - distance(point - step) for step in steps])
    normal /= np.linalg.norm(normal, axis=0) + 1e-9
    return point, normal, cover


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
    # A cone or a pyramid; `foot` is the radius of its base or half its side.
    foot, out = (0.5, np.hypot(x, z)) if shape == "cone" else (0.45, np.maximum(abs(x), abs(z)))
    return np.maximum((height * out + foot * y - foot * height) / math.hypot(height, foot), -y)
