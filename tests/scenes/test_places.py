"""Where solids are seen, against the true masks of renders."""

import numpy as np

from ldm.scenes.places import farthest, places
from ldm.scenes.renderer import render, render_layers
from ldm.scenes.scene import Scene, Solid
from ldm.scenes.scores import evaluation_scenes


def truth(scene: Scene, coverage: np.ndarray) -> dict[str, np.ndarray]:
    """The centres of the true masks, by colour."""
    scene = scene.canonical()
    y, x = np.mgrid[: coverage.shape[1], : coverage.shape[2]]
    masks: dict[str, np.ndarray] = {}
    for solid, mask in zip(filter(None, (scene.first, scene.second)), coverage, strict=True):
        masks[solid.colour] = masks.get(solid.colour, 0) + mask
    return {name: np.array([(m * x).sum(), (m * y).sum()]) / m.sum() for name, m in masks.items()}


def test_places_are_those_of_the_true_masks() -> None:
    """All but a few white solids, whose shaded sides look like a grey background, are within three pixels."""
    rng = np.random.default_rng(1)
    distances = []
    for scene in [scene for pairs in (False, True) for scene in evaluation_scenes(1, 40, pairs=pairs)]:
        image, layers = render_layers(scene, rng, 64)
        distances.append(farthest(places(image, scene), truth(scene, layers.coverage)))
    assert np.mean(np.array(distances) < 3) > 0.9
    assert np.median(distances) < 0.5


def test_a_colour_that_is_not_there_has_no_place() -> None:
    red, green = (Scene(Solid("cube", colour, "large"), background="black") for colour in ("red", "green"))
    image = render(red, np.random.default_rng(0))
    assert places(image, green) == {"green": None}
    assert farthest(places(image, green), places(image, green)) == np.inf


def test_a_solid_that_is_moved_has_moved_so_far() -> None:
    scene = Scene(Solid("sphere", "yellow", "small"), background="navy")
    image = render(scene, np.random.default_rng(4))
    moved = np.roll(image, -5, axis=1)  # away from the edge
    assert abs(farthest(places(image, scene), places(moved, scene)) - 5) < 0.2
