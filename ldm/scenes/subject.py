"""A subject to fine-tune on: a solid in two colours, as no bundled model has ever seen one.

`scripts/subject.py` renders a few images of it, and measures how often a fine-tuned model paints it in new
scenes: `stripes_seen` says whether an image shows it, `rest_seen` whether all else is as the prompt says. It
measures, too, how often pyramids of other colours are still painted as their prompts say.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import ImageRequest
from ldm.scenes.captions import caption
from ldm.scenes.detector import DETECTOR_WEIGHTS, Detector, load_detector, outline
from ldm.scenes.places import background_of, colour_masks
from ldm.scenes.renderer import render
from ldm.scenes.scene import BACKGROUNDS, COLOURS, SHAPES, Scene, Solid, Stripes, pick
from ldm.weights.loading import find

SUBJECT = Solid("pyramid", "green", stripes=Stripes("yellow"))
# An embedding cannot change the UNet, which must be able to paint the subject by some words or other.
ALONE = Solid("cylinder", "green", "large", Stripes("yellow"))
LEARNED, UNSEEN = ("grey", "black", "beige"), ("pink", "navy")  # the backgrounds of its images, and others
COUNT = 10  # images of a subject
WORD = "zqx"  # stands for its looks in captions; no caption of the bundled models has it
_RELATIONS = ("on top of", "left of", "right of", "in front of")  # that hide little of the first solid
_COLOURS = tuple(name for name in COLOURS if name not in (SUBJECT.colour, SUBJECT.stripes.colour))
_OTHER_SHAPES = tuple(name for name in SHAPES if name != SUBJECT.shape)
SHARE = 0.12  # of the solid's pixels that each of its colours has at least


def subject_scenes(count: int = COUNT) -> list[Scene]:
    """The subject once alone, then beside other solids, before one background after the other."""
    others = [
        ("right of", Solid("cube", "white")),
        ("on top of", Solid("cylinder", "blue")),
        ("left of", Solid("torus", "red")),
        ("on top of", Solid("sphere", "white")),
        ("in front of", Solid("cone", "orange")),
        ("on top of", Solid("cube", "purple")),
        ("in front of", Solid("torus", "cyan")),
        ("left of", Solid("sphere", "cyan")),
        ("in front of", Solid("cylinder", "purple")),
    ]
    scenes = [Scene(SUBJECT), *(Scene(SUBJECT, relation, second) for relation, second in others)]
    backgrounds = tuple(BACKGROUNDS)
    return [
        replace(scenes[k % len(scenes)], background=backgrounds[k % len(backgrounds)]) for k in range(count)
    ]


def alone_scenes(count: int = COUNT, backgrounds: Sequence[str] = LEARNED) -> list[Scene]:
    """The subject of textual inversion, before one of the backgrounds after the other."""
    return [Scene(ALONE, background=backgrounds[k % len(backgrounds)]) for k in range(count)]


def new_scenes(count: int, seed: int) -> list[Scene]:
    """The subject with one other solid, in pairs that `subject_scenes` has none of."""
    rng = np.random.default_rng(seed)
    taken = {(scene.relation, scene.second) for scene in subject_scenes()}
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = Scene(SUBJECT, pick(rng, _RELATIONS), _other_solid(rng), pick(rng, tuple(BACKGROUNDS)))
        if (scene.relation, scene.second) not in taken:
            scenes.append(scene)
    return scenes


def other_scenes(count: int, seed: int) -> list[Scene]:
    """Pyramids of other colours, which should stay as they are: in turn alone and with another solid."""
    rng = np.random.default_rng(seed)
    scenes = []
    for k in range(count):
        first, background = Solid(SUBJECT.shape, pick(rng, _COLOURS)), pick(rng, tuple(BACKGROUNDS))
        pair = {"relation": pick(rng, _RELATIONS), "second": _other_solid(rng)} if k % 2 else {}
        scenes.append(Scene(first, background=background, **pair))
    return scenes


def _other_solid(rng: np.random.Generator) -> Solid:
    return Solid(pick(rng, _OTHER_SHAPES), pick(rng, _COLOURS))


def subject_caption(scene: Scene, word: str = WORD) -> str:
    """The scene in words: "a zqx pyramid on top of a red cube on a beige background"."""
    return caption(replace(scene, first=replace(scene.first, colour=word, size=None)))


def stripes_seen(image: np.ndarray, scene: Scene) -> bool:
    """Whether an image, uint8 [64, 64, 3], shows the first solid's two colours, the stripes' above its own.

    Each has to have `SHARE` of the pixels of both, and the one has to lie above the other.
    """
    solid = scene.first
    names = [solid.colour, solid.stripes.colour, *([scene.second.colour] if scene.second else [])]
    masks = colour_masks(image, names)
    own, striped = (masks[name] for name in names[:2])
    both = own.sum() + striped.sum()
    if min(own.sum(), striped.sum()) < max(SHARE * both, 6):
        return False
    (low, x), (high, x_striped) = (np.argwhere(mask).mean(0) for mask in (own, striped))
    return high + 2 < low and abs(x - x_striped) < low - high


def cylinder_seen(image: np.ndarray, scene: Scene) -> bool:
    """Whether an image shows the subject of textual inversion: `stripes_seen`, in one cylinder.

    The colours have the same place and width from left to right, to 30 %, and are 1.1 to 1.9 times as high
    together as wide. Renders of it are 1.4 to 1.5 times as high, two cylinders that stand on each other 2.3.
    """
    if not stripes_seen(image, scene):
        return False
    masks = colour_masks(image, [scene.first.colour, scene.first.stripes.colour])
    (left, right), (left_striped, right_striped) = (_extent(mask.sum(0)) for mask in masks.values())
    shared = min(right, right_striped) - max(left, left_striped)
    if shared <= 0.7 * (max(right, right_striped) - min(left, left_striped)):
        return False
    (x, x_end), (y, y_end) = (_extent(np.any(list(masks.values()), axis=0).sum(axis)) for axis in (0, 1))
    return 1.1 <= (y_end - y) / max(x_end - x, 1) <= 1.9


def _extent(counts: np.ndarray) -> tuple[int, int]:
    """Where rows or columns with two or more pixels begin and end; (0, 0) if there are none."""
    (found,) = np.nonzero(counts >= 2)
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)


def rest_seen(detector: Detector, images: Sequence[np.ndarray], scenes: Sequence[Scene]) -> list[bool]:
    """Whether each image shows everything but the subject's colours as its scene has them.

    That is the relation, the subject's shape, and the other solid's shape and colour.
    """
    right = []
    for seen, asked in zip(detector.read(images), map(outline, scenes), strict=True):
        solids = [(asked.first, seen.first), (asked.second, seen.second)]
        same = seen.relation == asked.relation and all(
            mine is theirs is None
            or (
                (mine and theirs and mine.shape == theirs.shape)
                and (mine.shape == SUBJECT.shape or mine.colour == theirs.colour)
            )
            for mine, theirs in solids
        )
        right.append(same)
    return right


@dataclass(frozen=True)
class Measured:
    """Images, uint8 [h, w, 3], and whether each of them shows what the names say, bool [n].

    An image that came out as NaN is black and shows nothing; `lost` has the prompts of these.
    """

    images: list[np.ndarray]
    shows: dict[str, np.ndarray]
    lost: list[str]


def paint(
    pipeline: Pipeline, prompts: Sequence[str], seed: int, **fields: Any
) -> tuple[list[np.ndarray], np.ndarray, list[str]]:
    """The image of each prompt, uint8 [h, w, 3], whether it is there, bool [n], and the others' prompts.

    An image that came out as NaN is not there, and black. `fields` are further ones of the requests.
    """
    requests = [
        ImageRequest(prompt, seed=seed + k, steps=20, sampler="dpmpp_2m", **fields)
        for k, prompt in enumerate(prompts)
    ]
    made = [image.pixels for image in tqdm(pipeline.generate(requests), "images", len(requests))]
    size = pipeline.described.native_size
    black = np.zeros((size, size, 3), np.uint8)
    there = np.array([pixels is not None for pixels in made])
    lost = [prompt for prompt, pixels in zip(prompts, made, strict=True) if pixels is None]
    return [black if pixels is None else pixels for pixels in made], there, lost


def measure(pipeline: Pipeline, word: str, count: int, seed: int, **fields: Any) -> Measured:
    """Whether images of `count` `new_scenes` show the subject's colours, the rest, and both.

    `word` stands for the subject's looks in prompts; `seed` decides scenes and images.
    """
    scenes = new_scenes(count, seed)
    prompts = [subject_caption(scene, word) for scene in scenes]
    images, there, lost = paint(pipeline, prompts, 1000 * seed, **fields)
    striped = np.array([stripes_seen(*pair) for pair in zip(images, scenes, strict=True)]) & there
    rest = np.array(rest_seen(load_detector(find(DETECTOR_WEIGHTS)), images, scenes)) & there
    return Measured(images, {"two colours": striped, "the rest": rest, "both": striped & rest}, lost)


def measure_class(pipeline: Pipeline, count: int, seed: int, **fields: Any) -> Measured:
    """Whether images of `count` `other_scenes` show what their prompts say, by the detector."""
    scenes = other_scenes(count, seed)
    prompts = [caption(scene) for scene in scenes]
    images, there, lost = paint(pipeline, prompts, 1000 * seed + 500, **fields)
    seen = load_detector(find(DETECTOR_WEIGHTS)).read(images)
    right = [outline(asked) == found for asked, found in zip(scenes, seen, strict=True)]
    return Measured(images, {"others of the class": np.array(right) & there}, lost)


def measure_alone(pipeline: Pipeline, word: str, count: int, seed: int, **fields: Any) -> Measured:
    """Whether images of the subject of textual inversion show it: half of them before unseen backgrounds.

    So `count` is two at least.
    """
    scenes = alone_scenes(count // 2, UNSEEN) + alone_scenes(count - count // 2, LEARNED)
    prompts = [subject_caption(scene, word) for scene in scenes]
    images, there, lost = paint(pipeline, prompts, 1000 * seed, **fields)
    pairs = list(zip(images, scenes, strict=True))
    right = np.array(
        [cylinder_seen(*pair) and background_of(pair[0]) == pair[1].background for pair in pairs]
    )
    right &= there
    shows = {"unseen backgrounds": right[: count // 2], "learned ones": right[count // 2 :]}
    return Measured(images, shows, lost)


def write_images(folder: Path, count: int, seed: int, captions: bool = False, alone: bool = False) -> None:
    """Write renders of the subject, and their captions if asked for; `alone`: that of textual inversion."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    scenes = alone_scenes(count) if alone else subject_scenes(count)
    for k, scene in enumerate(scenes):
        path = folder / f"{k:02}.png"
        Image.fromarray(render(scene, rng)).save(path)
        if captions:
            path.with_suffix(".txt").write_text(subject_caption(scene) + "\n")
    print(f"{count} images of a {WORD} {scenes[0].first.shape} in {folder}")
