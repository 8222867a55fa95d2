"""Scenes in words: one canonical caption, and the many other wordings that a model learns from."""

from dataclasses import replace

import numpy as np

from ldm.scenes.scene import Scene, Solid, pick

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


def caption(scene: Scene) -> str:
    """The scene in canonical words: "a small red cube left of an orange cone on a grey background"."""
    words = _with_article(_describe(scene.first))
    if scene.second is not None:
        words += f" {scene.relation} {_with_article(_describe(scene.second))}"
    return words + (f" on a {scene.background} background" if scene.background else "")


def paraphrase(scene: Scene, rng: np.random.Generator) -> str:
    """A true wording, half the time `caption`'s own, that may leave out the sizes or the background."""
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
        return replace(solid, shape=pick(rng, _SYNONYMS.get(solid.shape, (solid.shape,))))

    first = renamed(scene.first)
    words = _describe(first)
    if rng.random() < 0.2:
        words = f"{_describe(replace(first, colour=''))} that is {first.colour}"
    if rng.random() < 0.8:
        words = pick(rng, ("", "", "a picture of ", "there is ")) + _with_article(words)
    if scene.second is not None:
        words += f" {pick(rng, _SYNONYMS[scene.relation])} {_with_article(_describe(renamed(scene.second)))}"
    link = pick(rng, (" on a ", " against a ", ", "))
    return words + (f"{link}{scene.background} background" if scene.background else "")


def _describe(solid: Solid) -> str:
    return " ".join(word for word in (solid.size, solid.colour, solid.shape) if word)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
