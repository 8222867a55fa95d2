"""Which examples are in which step's batch.

Each bucket has an endless stream of its examples: a permutation of all of them for every epoch, one after the
other. A batch is the next piece of one bucket's stream, so the last part of an epoch goes on into the next
one and every example comes exactly once in each. The steps of an epoch take the buckets in random order. All
this depends on the seed and the number of the step alone: never on workers, devices or what was read before.
"""

from functools import lru_cache

import numpy as np
import torch

from ldm.training.random import row_generator


class Order:
    """The batches of `batch_size` examples that the steps take from groups of numbers of examples."""

    def __init__(self, groups: list[np.ndarray], batch_size: int, seed: int):
        self.groups, self.batch_size, self.seed = groups, batch_size, seed
        self.lengths = np.array([len(group) for group in groups], dtype=np.int64)
        self._permutation = lru_cache(2 * len(groups))(self._permutation)
        self._turns = lru_cache(1)(self._turns)

    def steps_before(self, epoch: int) -> int:
        """How many batches are full before the streams reach an epoch."""
        return int((epoch * self.lengths // self.batch_size).sum())

    def epoch(self, step: int) -> int:
        """The epoch in which a step's batch becomes full."""
        epoch = step * self.batch_size // int(self.lengths.sum())
        while self.steps_before(epoch + 1) <= step:
            epoch += 1
        return epoch

    def batch(self, step: int) -> tuple[int, np.ndarray]:
        """The group that the step takes its batch from, and the numbers of its examples [batch_size]."""
        epoch = self.epoch(step)
        turns = self._turns(epoch)
        turn = step - self.steps_before(epoch)
        group = int(turns[turn])
        length = int(self.lengths[group])
        number = epoch * length // self.batch_size + int((turns[:turn] == group).sum())
        place = number * self.batch_size + np.arange(self.batch_size)
        epochs, places = place // length, place % length
        batch = np.empty(self.batch_size, np.int64)
        for each in np.unique(epochs):
            chosen = epochs == each
            batch[chosen] = self.groups[group][self._permutation(int(each), group)[places[chosen]]]
        return group, batch

    def _turns(self, epoch: int) -> np.ndarray:
        """The group of each step of an epoch."""
        counts = (epoch + 1) * self.lengths // self.batch_size - epoch * self.lengths // self.batch_size
        groups = np.repeat(np.arange(len(self.groups)), counts)
        generator = row_generator(self.seed, epoch, 0, "order of buckets")
        return groups[torch.randperm(len(groups), generator=generator).numpy()]

    def _permutation(self, epoch: int, group: int) -> np.ndarray:
        generator = row_generator(self.seed, epoch, group, "order")
        return torch.randperm(int(self.lengths[group]), generator=generator).numpy()
