"""Which images are sampled together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Batch:
    """Images that are sampled together."""

    prompts: tuple[str, ...]
    numbers: Sequence[int]  # of the images within the run, from 0
    seeds: tuple[int | None, ...] | None = None  # where they are not the run's seed + number
    kind: int = 0  # which of the run's settings
    position: int = 0  # of the first image within the batch that this one was cut from

    def __len__(self) -> int:
        return len(self.prompts)

    def parts(self, size: int) -> list[Batch]:
        """The same images, at most `size` at a time."""
        return [self._part(start, start + size) for start in range(0, len(self), size)]

    def _part(self, start: int, end: int) -> Batch:
        seeds = self.seeds and self.seeds[start:end]
        numbers = self.numbers[start:end]
        return Batch(self.prompts[start:end], numbers, seeds, self.kind, self.position + start)


def regroup(batches: Sequence[Batch], size: int) -> list[Batch]:
    """The same images, `size` at a time, of all rounds; those of a kind follow each other."""
    regrouped = []
    for kind, members in groupby(sorted(batches, key=lambda batch: batch.kind), lambda batch: batch.kind):
        parts = list(members)
        prompts = tuple(chain.from_iterable(part.prompts for part in parts))
        numbers = tuple(chain.from_iterable(part.numbers for part in parts))
        seeds = tuple(chain.from_iterable(part.seeds or [None] * len(part) for part in parts))
        own = seeds if any(seed is not None for seed in seeds) else None
        regrouped += Batch(prompts, numbers, own, kind).parts(size)
    return regrouped


def plan(
    prompts: Sequence[str],
    n_iter: int,
    n_samples: int,
    kinds: Sequence[int] | None = None,
    seeds: Sequence[int | None] | None = None,
) -> list[Batch]:
    """A run's batches in the original's order: all prompts, `n_samples` at a time, `n_iter` times over.

    Prompts of different `kinds` go into different batches. One with a seed of its own has the next one in the
    next round.
    """
    count, batches = len(prompts), []
    by_kind: dict[int, list[int]] = {}
    for i in range(count):
        by_kind.setdefault(kinds[i] if kinds else 0, []).append(i)
    for iteration in range(n_iter):
        for kind, members in by_kind.items():
            for start in range(0, len(members), n_samples):
                part = members[start : start + n_samples]
                own = None
                if seeds and any(seeds[i] is not None for i in part):
                    own = tuple(None if seeds[i] is None else seeds[i] + iteration for i in part)
                numbers = tuple(iteration * count + i for i in part)
                batches.append(Batch(tuple(prompts[i] for i in part), numbers, own, kind))
    return batches
