"""Rendered scenes with captions, as a source of training data."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.errors import InputError
from ldm.scenes import scene as scenes
from ldm.scenes.captions import paraphrase
from ldm.scenes.masks import random_mask
from ldm.scenes.renderer import render, render_layers
from ldm.scenes.scene import Scene, random_scene
from ldm.training.data.example import Example
from ldm.training.data.sources import digest

ALONE = 0.4  # share of the masks around one solid whose caption is about this solid only
FACTOR = 4  # of an upscaler: its small images have a quarter of the side
Rendered = tuple[np.ndarray, str, dict[str, np.ndarray]]  # image uint8 [size, size, 3], caption, maps


def plain(scene: Scene, rng: np.random.Generator, size: int) -> Rendered:
    return render(scene, rng, size), paraphrase(scene, rng), {}


def masked(scene: Scene, rng: np.random.Generator, size: int) -> Rendered:
    """With a mask, 1 where the image is to be repainted."""
    scene = scene.canonical()
    image, layers = render_layers(scene, rng, size)
    mask, solid = random_mask(layers.coverage, rng)
    if solid is not None and rng.random() < ALONE:
        scene = Scene(scene.second if solid else scene.first)
    return image, paraphrase(scene, rng), {"mask": mask.astype(np.float32)}


def deep(scene: Scene, rng: np.random.Generator, size: int) -> Rendered:
    """With its map of inverse depth."""
    image, layers = render_layers(scene, rng, size)
    return image, paraphrase(scene, rng), {"depth": layers.disparity}


FAMILIES: dict[str, Callable[[Scene, np.random.Generator, int], Rendered]] = {
    "plain": plain,
    "masked": masked,
    "deep": deep,
}


def rendered_scenes(
    seed: int, size: int = 64, pair_share: float = 0.65, family: str = "plain", held_out: bool = False
) -> Iterator[Rendered]:
    """Captioned renders in an endless stream: of held-out scenes alone, or of all the others."""
    rng = np.random.default_rng(seed)
    while True:
        scene = random_scene(rng, pair_share)
        if scenes.held_out(scene) == held_out:
            yield FAMILIES[family](scene, rng, size)


class Scenes:
    """Renders of random scenes, the first `images` of a seed's stream, with the maps that a family needs.

    `family` is "plain", "masked" or "deep". With `soften`, an upscaler's small images are among the maps:
    this share of them went through the first stage of `scenes-64`, for an upscaler is to know its soft
    images. All are rendered when the first is asked for, and kept in memory.
    """

    in_memory = True
    metadata: Mapping[str, list[Any]] = {}

    def __init__(
        self,
        seed: int,
        images: int,
        image_size: int,
        family: str = "plain",
        soften: float = 0.0,
        held_out: bool = False,
    ):
        if family not in FAMILIES:
            raise InputError(f"data: Scenes: family {family!r} is not one of {', '.join(FAMILIES)}")
        for name, value, least in (("seed", seed, 0), ("images", images, 1), ("image_size", image_size, 8)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(
                    f"data: Scenes: {name} must be a whole number of at least {least}, not {value!r}"
                )
        if not isinstance(held_out, bool):  # such as "no", which would be true for no scene
            raise InputError(f"data: Scenes: held_out must be true or false, not {held_out!r}")
        if not isinstance(soften, int | float) or not 0 <= soften <= 1:
            raise InputError(f"data: Scenes: soften must be a number from 0 to 1, not {soften!r}")
        self.seed, self.images, self.image_size = seed, images, image_size
        self.family, self.soften, self.held_out = family, soften, held_out
        self._pixels: np.ndarray | None = None

    @property
    def fingerprint(self) -> str:
        own = [self.seed, self.images, self.image_size, self.family, self.soften, self.held_out]
        return digest(["scenes", scenes.VERSION, *own])

    def __len__(self) -> int:
        return self.images

    def key(self, index: int) -> str:
        return f"scene {index} of seed {self.seed}"

    def caption(self, index: int) -> str:
        self._render()
        return self._captions[index]

    def size(self, index: int) -> tuple[int, int]:
        return self.image_size, self.image_size

    def __getitem__(self, index: int) -> Example:
        self._render()
        maps = {name: values[index] for name, values in self._maps.items()}
        return Example(self.key(index), self._pixels[index], self._captions[index], maps)

    def _render(self) -> None:
        if self._pixels is not None:
            return
        side = self.image_size
        pixels = np.empty((self.images, side, side, 3), np.uint8)
        captions: list[str] = []
        maps: dict[str, np.ndarray] = {}
        stream = rendered_scenes(self.seed, side, family=self.family, held_out=self.held_out)
        rendered = islice(stream, self.images)
        for i, (image, caption, found) in enumerate(tqdm(rendered, "rendering scenes", self.images)):
            pixels[i] = image
            captions.append(caption)
            for name, values in found.items():
                maps.setdefault(name, np.empty((self.images, side, side), np.float32))[i] = values
        if self.soften:
            maps["small"] = small_images(pixels, self.soften, self.seed)
        self._captions, self._maps, self._pixels = captions, maps, pixels


def small_images(images: np.ndarray, soften: float, seed: int) -> np.ndarray:
    """Images uint8 [n, h, w, 3] at a quarter of the side; a share of them decoded by scenes-64."""
    import torch
    import torch.nn.functional as F

    from ldm.images.pixels import to_float, to_uint8
    from ldm.weights.loading import SMALL_CONFIG, SMALL_WEIGHTS, find, load_model, read_config

    model = load_model(read_config(find(SMALL_CONFIG)), find(SMALL_WEIGHTS)).first_stage_model
    rng, small = np.random.default_rng(seed), []
    count = max(1, 64 * 64**2 // images.shape[1] ** 2)
    with torch.no_grad():
        for start in tqdm(range(0, len(images), count), "softening small images"):
            x = to_float(images[start : start + count])
            x = F.interpolate(x, scale_factor=1 / FACTOR, mode="area")
            chosen = torch.from_numpy(rng.random(len(x)) < soften)
            if chosen.any():
                x[chosen] = model.decode(model.encode(x[chosen]).mode())
            small.append(to_uint8(x))
    return np.concatenate(small)
