"""The training set: captioned renders of random scenes, without the held-out ones."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

from ldm.scenes.captions import paraphrase
from ldm.scenes.renderer import render
from ldm.scenes.scene import held_out, random_scene
from ldm.training.config import TrainingConfig


def training_scenes(seed: int, size: int = 64, pair_share: float = 0.65) -> Iterator[tuple[np.ndarray, str]]:
    """Images, uint8 [size, size, 3], with captions, in an endless stream without held-out scenes."""
    rng = np.random.default_rng(seed)
    while True:
        scene = random_scene(rng, pair_share)
        if not held_out(scene):
            yield render(scene, rng, size), paraphrase(scene, rng)


def render_scenes(config: TrainingConfig) -> tuple[torch.Tensor, list[str]]:
    """The whole training set: uint8 [images, size, size, 3] and a caption for each."""
    images = np.empty((config.images, config.image_size, config.image_size, 3), np.uint8)
    captions = []
    rendered = islice(training_scenes(config.seed, config.image_size), config.images)
    for i, (image, caption) in enumerate(tqdm(rendered, "rendering scenes", config.images)):
        images[i] = image
        captions.append(caption)
    return torch.from_numpy(images), captions
