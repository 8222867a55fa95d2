"""Where solids are seen in an image, by their colours."""

from collections.abc import Sequence

import numpy as np

from ldm.scenes.scene import BACKGROUNDS, COLOURS, Scene

FEWEST = 8  # pixels of a solid, below which it counts as not seen
_SHADES = np.linspace(0.4, 1.1, 15)  # of a solid's colour, in its shadow and in full light
_SHADOWS = np.linspace(0.35, 1.05, 15)  # of the background
_MARGIN = 14  # levels by which a pixel has to be nearer to the solid's colour than to the background's


def places(image: np.ndarray, scene: Scene) -> dict[str, np.ndarray | None]:
    """The centre (x, y) in pixels of what has each colour of the scene; None for a colour that is not seen.

    Two solids of one colour have one centre.
    """
    names = dict.fromkeys(solid.colour for solid in (scene.first, scene.second) if solid)
    found: dict[str, np.ndarray | None] = {}
    for name, mask in colour_masks(image, list(names)).items():
        y, x = np.nonzero(mask)
        found[name] = np.array([x.mean(), y.mean()]) if len(x) >= FEWEST else None
    return found


def colour_masks(image: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Where an image has each of these colours in some shade, bool [h, w]: nearer than any other of them.

    The background is read from the image's left and right edges.
    """
    pixels = image.astype(np.float32)
    edges = np.concatenate([pixels[:, :2], pixels[:, -2:]], axis=1)
    behind = _distance(pixels, np.median(edges, axis=1)[:, None], _SHADOWS)
    distances = {name: _distance(pixels, np.float32(COLOURS[name]), _SHADES) for name in names}
    masks = {}
    for name, distance in distances.items():
        others = [behind - _MARGIN, *(other for key, other in distances.items() if key != name)]
        masks[name] = distance < np.min(others, axis=0)
    return masks


def background_of(image: np.ndarray) -> str:
    """The background whose colour in some light is nearest to an image's left and right edges."""
    edges = np.concatenate([image[:, :2], image[:, -2:]], axis=1).reshape(-1, 3)
    colour = np.median(edges.astype(np.float32), axis=0)[None, None]
    return min(BACKGROUNDS, key=lambda name: _distance(colour, np.float32(BACKGROUNDS[name]), _SHADOWS).min())


def farthest(a: dict[str, np.ndarray | None], b: dict[str, np.ndarray | None]) -> float:
    """The largest distance in pixels between centres of the same colour; infinity if one is not seen."""
    return max(
        float(np.linalg.norm(a[name] - b[name])) if a[name] is not None and b[name] is not None else np.inf
        for name in a
    )


def _distance(pixels: np.ndarray, colour: np.ndarray, shades: np.ndarray) -> np.ndarray:
    """How far each pixel [h, w, 3] is from the nearest shade of a colour, [h, w]."""
    return np.min([np.linalg.norm(pixels - shade * colour, axis=-1) for shade in shades], axis=0)
