"""Random scenes, their two descriptions, and the split that holds a tenth of them out of training."""

from itertools import product

import numpy as np
import pytest
from scene_words import parse

from ldm.scenes.captions import caption
from ldm.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Solid,
    held_out,
    held_out_scenes,
    random_scene,
)

MIRROR = {"below": "on top of", "right of": "left of", "behind": "in front of"}


@pytest.mark.parametrize(("said", "canonical"), MIRROR.items())
def test_canonical_mirrors(said, canonical):
    a, b = Solid("cube", "red"), Solid("sphere", "blue")
    assert Scene(a, said, b).canonical() == Scene(b, canonical, a)
    assert Scene(b, canonical, a).canonical() == Scene(b, canonical, a)
    assert Scene(a, said, b).mirrored().mirrored() == Scene(a, said, b)


def test_pairs_differ():
    rng = np.random.default_rng(1)
    for scene in (random_scene(rng, pair_share=1.0) for _ in range(1000)):
        assert (scene.first.shape, scene.first.colour) != (scene.second.shape, scene.second.colour)
    assert random_scene(rng, pair_share=0.0).second is None


def test_held_out_ignores_the_wording():
    rng = np.random.default_rng(3)
    for scene in (random_scene(rng, pair_share=1.0) for _ in range(500)):
        a, b = scene.first, scene.second
        bare = Scene(Solid(a.shape, a.colour), scene.relation, Solid(b.shape, b.colour))
        assert held_out(scene) == held_out(scene.mirrored()) == held_out(bare)


def test_held_out_is_stable_and_a_tenth():
    assert held_out(Scene(Solid("cube", "red"))) is False
    solids = [Solid(*names) for names in product(SHAPES, COLOURS)]
    pairs = [Scene(a, r, b) for a, r, b in product(solids, RELATIONS[::2], solids) if a != b]
    singles = [Scene(Solid(*n), background=b) for *n, b in product(SHAPES, COLOURS, SIZES, BACKGROUNDS)]
    counts = [sum(map(held_out, scenes)) for scenes in (pairs, singles)]
    assert counts == [659, 50]  # a change here would let held-out scenes into training


@pytest.mark.parametrize("pairs", [True, False])
def test_held_out_scenes_are_distinct_and_fully_named(pairs):
    scenes = held_out_scenes(np.random.default_rng(0), 30, pairs)
    assert len({scene.canonical() for scene in scenes}) == 30
    assert all(held_out(parse(caption(scene))) for scene in scenes)
    assert all((scene.second is not None) == pairs for scene in scenes)
    with pytest.raises(ValueError, match="100000"):
        held_out_scenes(np.random.default_rng(0), 100_000, pairs)
