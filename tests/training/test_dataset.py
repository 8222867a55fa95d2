"""The training set is reproducible and has no held-out scenes."""

from itertools import islice

import numpy as np
import torch
from scene_words import parse
from tiny_training import TRAINING

from ldm.scenes.scene import held_out
from ldm.training.config import training_config
from ldm.training.dataset import render_scenes, training_examples


def test_no_scene_is_held_out():
    for _, text, _ in islice(training_examples(4), 1000):
        said = parse(text)
        if said.relation != "next to":
            assert not held_out(said), text


def test_the_stream_depends_on_the_seed_alone():
    first, again, other = (list(islice(training_examples(seed, size=32), 8)) for seed in (7, 7, 8))
    assert [text for _, text, _ in first] == [text for _, text, _ in again] != [text for _, text, _ in other]
    assert all(np.array_equal(a, b) for (a, *_), (b, *_) in zip(first, again, strict=True))


def test_the_training_set_is_the_start_of_the_stream():
    config = training_config(TRAINING | {"images": 5, "seed": 7})
    images, captions, maps = render_scenes(config)
    assert maps is None
    expected = list(islice(training_examples(7, size=32), 5))
    assert captions == [text for _, text, _ in expected]
    assert torch.equal(images, torch.from_numpy(np.stack([image for image, *_ in expected])))
