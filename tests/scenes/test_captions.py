"""Captions agree with their scenes."""

import numpy as np
from scene_words import parse

from ldm.scenes.captions import caption, paraphrase
from ldm.scenes.scene import Scene, Solid, random_scene


def agrees(said: Solid, shown: Solid) -> bool:
    return (said.shape, said.colour) == (shown.shape, shown.colour) and said.size in (None, shown.size)


def test_caption_is_canonical():
    cone, cylinder = Solid("cone", "green", "small"), Solid("cylinder", "orange")
    assert caption(Scene(Solid("cube", "red"))) == "a red cube"
    assert caption(Scene(cone, background="grey")) == "a small green cone on a grey background"
    expected = "a small green cone left of an orange cylinder on a grey background"
    assert caption(Scene(cone, "left of", cylinder, "grey")) == expected


def test_words_never_contradict_the_scene():
    rng = np.random.default_rng(0)
    canonical = 0
    for _ in range(2000):
        scene = random_scene(rng)
        assert parse(caption(scene)) == scene
        text = paraphrase(scene, rng)
        said, ways = parse(text), [scene, scene.mirrored()]
        if said.relation == "next to":
            assert scene.relation in ("left of", "right of")
        else:
            ways = [way for way in ways if way.relation == said.relation]
        assert said.background in (None, scene.background)
        assert any(
            agrees(said.first, way.first)
            and (said.second is None) == (way.second is None)
            and (said.second is None or agrees(said.second, way.second))
            for way in ways
        ), (text, scene)
        canonical += text == caption(said) if said.relation != "next to" else 0
    assert 0.45 < canonical / 2000 < 0.75
