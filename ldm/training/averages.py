"""Exponential moving averages of the trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Averages:
    """Averages of weights, one update an optimiser step.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), as in the original. The weights may be the
    parts that a process has of sharded ones.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float):
        self.decay, self.updates = decay, 0
        self.weights = list(weights.values())
        self.averages = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, [weight.detach() for weight in self.weights], 1 - decay)

    @torch.no_grad()
    def take(self, updates: int) -> None:
        """Continue from averages that the weights hold at the moment, after so many updates."""
        self.updates = updates
        for average, weight in zip(self.averages, self.weights, strict=True):
            average.copy_(weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the weights have the values of their averages."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, weight in zip(self.averages, self.weights, strict=True):
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)
