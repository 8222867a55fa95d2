"""Renders show what the scene describes."""

from itertools import product

import numpy as np
import pytest

from ldm.scenes.captions import caption
from ldm.scenes.renderer import render
from ldm.scenes.scene import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, Scene, Solid


def centroid(image: np.ndarray, colour: str) -> np.ndarray:
    """Mean (x, y) of the pixels whose direction in RGB is nearest to the colour's."""
    pixels = image.astype(float)
    directions = pixels / np.linalg.norm(pixels, axis=-1, keepdims=True)
    nominal = np.array(COLOURS[colour]) / np.linalg.norm(COLOURS[colour])
    y, x = np.nonzero((directions @ nominal > 0.97) & (pixels.max(-1) > 60))
    return np.array([x.mean(), y.mean()])


@pytest.mark.parametrize("size", [64, 128])
def test_render_shape_and_determinism(size):
    scene = Scene(Solid("torus", "cyan", "large"), "behind", Solid("cone", "yellow"))
    image = render(scene, np.random.default_rng(5), size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert np.array_equal(image, render(scene, np.random.default_rng(5), size))
    assert np.array_equal(image, render(scene.mirrored(), np.random.default_rng(5), size))
    assert not np.array_equal(image, render(scene, np.random.default_rng(6), size))


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_solid_has_its_colour(background):
    for seed, (shape, colour) in enumerate(product(SHAPES, COLOURS)):
        scene = Scene(Solid(shape, colour, "large"), background=background)
        image = render(scene, np.random.default_rng(seed)).astype(float)
        distance = np.linalg.norm(image - COLOURS[colour], axis=-1)
        assert (distance < 60).sum() > 60, (shape, colour)


@pytest.mark.parametrize("relation", RELATIONS)
def test_relation_is_seen(relation):
    rng = np.random.default_rng(2)
    axis, sign = {
        "on top of": (1, -1),
        "below": (1, 1),
        "left of": (0, -1),
        "right of": (0, 1),
        "in front of": (1, 1),
        "behind": (1, -1),
    }[relation]
    for shape, other in product(SHAPES, SHAPES):
        scene = Scene(Solid(shape, "red"), relation, Solid(other, "green"), "black")
        image = render(scene, rng)
        apart = centroid(image, "red") - centroid(image, "green")
        assert sign * apart[axis] > 2, (caption(scene), apart)


def test_the_solid_in_front_covers_part_of_the_one_behind():
    front, behind = Solid("sphere", "red"), Solid("sphere", "green")
    shares = []
    for seed in range(20):
        scene = Scene(front, "in front of", behind, "grey")
        image = render(scene, np.random.default_rng(seed)).astype(int)
        red, green = ((image[..., i] > image[..., 1 - i] + 40).sum() for i in (0, 1))
        shares.append(green / red)
    assert min(shares) > 0.4  # still recognisable
    assert np.mean(shares) < 0.95
