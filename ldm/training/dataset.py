"""The training set: captioned renders of random scenes, without the held-out ones."""

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

from ldm.scenes.scene import Scene, held_out, random_scene
from ldm.training.config import TrainingConfig
from ldm.training.families import Example, plain


def training_examples(
    seed: int,
    size: int = 64,
    pair_share: float = 0.65,
    example: Callable[[Scene, np.random.Generator, int], Example] = plain,
) -> Iterator[Example]:
    """Examples, as `example` makes them, in an endless stream without held-out scenes."""
    rng = np.random.default_rng(seed)
    while True:
        scene = random_scene(rng, pair_share)
        if not held_out(scene):
            yield example(scene, rng, size)


def render_scenes(
    config: TrainingConfig, example: Callable[[Scene, np.random.Generator, int], Example] = plain
) -> tuple[torch.Tensor, list[str], torch.Tensor | None]:
    """The whole training set: images uint8 [n, size, size, 3], captions, and maps float32 [n, 1, size, size].

    The maps are None where the examples have none.
    """
    images = np.empty((config.images, config.image_size, config.image_size, 3), np.uint8)
    captions, maps = [], []
    stream = training_examples(config.seed, config.image_size, example=example)
    rendered = islice(stream, config.images)
    for i, (image, caption, given) in enumerate(tqdm(rendered, "rendering scenes", config.images)):
        images[i] = image
        captions.append(caption)
        if given is not None:
            maps.append(given)
    return torch.from_numpy(images), captions, torch.from_numpy(np.stack(maps))[:, None] if maps else None


def random_crops(images: torch.Tensor, side: int, generator: torch.Generator) -> torch.Tensor:
    """A square [side, side] at a random place of each image [b, h, w, c]; the whole image for a side of 0."""
    if not side:
        return images
    height, width = images.shape[1:3]
    tops = torch.randint(height - side + 1, (len(images),), generator=generator).tolist()
    lefts = torch.randint(width - side + 1, (len(images),), generator=generator).tolist()
    cut = zip(images, tops, lefts, strict=True)
    return torch.stack([image[top : top + side, left : left + side] for image, top, left in cut])
