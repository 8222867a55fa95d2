"""What a run makes: which image has which request, and which are sampled together. Imports no torch.

A run may have a million images of a thousand requests, and each of its processes has the whole plan. So what
can be worked out from an image's number is not kept: requests, batches and names are made when asked for.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import PurePath
from typing import Any, TypeVar

from ldm.images.names import FIELD, file_name, unique_names
from ldm.pipeline.batches import plan_batches
from ldm.pipeline.request import ImageRequest, image_name, image_seed

T = TypeVar("T")
# A template whose names differ as their numbers do, whatever else is in them.
NUMBERED = re.compile(r"\{number(:0[1-9][0-9]?)?\}([-_/]|\Z)")


class Computed(Sequence[T]):
    """A sequence whose items are made when they are asked for; equal to any sequence of equal items."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None


class Batches(Computed[tuple[int, ...]]):
    """The numbers of images that are sampled together, batch by batch.

    `groups` are the places in a round of requests that may share a batch, and `count` is the round's length.
    `rounds` rounds make a block within which each group's images fill batches of `size`, in order, one group
    after the other; there are `blocks` blocks.
    """

    def __init__(self, groups: Sequence[Sequence[int]], count: int, size: int, rounds: int, blocks: int):
        self.groups, self.count, self.size, self.rounds, self.blocks = groups, count, size, rounds, blocks
        # number of batches in a block up to the end of each group
        self.ends = list(accumulate(-(-len(group) * rounds // size) for group in groups))

    def __len__(self) -> int:
        return self.ends[-1] * self.blocks

    def __getitem__(self, i: int) -> tuple[int, ...]:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        block, i = divmod(i % len(self), self.ends[-1])
        which = bisect_right(self.ends, i)
        return self._batch(block, self.groups[which], i - (self.ends[which - 1] if which else 0))

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        for block in range(self.blocks):
            for group in self.groups:
                for i in range(-(-len(group) * self.rounds // self.size)):
                    yield self._batch(block, group, i)

    def _batch(self, block: int, group: Sequence[int], i: int) -> tuple[int, ...]:
        """Batch i of a group's images within a block."""
        start, of_block = i * self.size, block * self.rounds * self.count
        numbers = range(start, min(start + self.size, len(group) * self.rounds))
        return tuple(of_block + n // len(group) * self.count + group[n % len(group)] for n in numbers)

    def place(self, k: int) -> int:
        """Which image of its batch image k is."""
        iteration, i = divmod(k, self.count)
        for group in self.groups:  # each of which rises
            rank = bisect_left(group, i)
            if rank < len(group) and group[rank] == i:
                return (iteration % self.rounds * len(group) + rank) % self.size
        raise IndexError(k)


class Selected(Computed[T]):
    """Those items of a sequence that have these numbers."""

    def __init__(self, items: Sequence[T], numbers: Sequence[int]):
        self.items, self.numbers = items, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> T:
        return self.items[self.numbers[i]]


class Requests(Computed[ImageRequest]):
    """The request of each image: those of a round, with seeds, as often as there are rounds."""

    def __init__(self, of_round: Sequence[ImageRequest], seed: int, n_iter: int, batches: Batches):
        self.of_round, self.seed, self.n_iter, self.batches = of_round, seed, n_iter, batches

    def __len__(self) -> int:
        return len(self.of_round) * self.n_iter

    def __getitem__(self, k: int) -> ImageRequest:
        if not -len(self) <= k < len(self):
            raise IndexError(k)
        k %= len(self)
        iteration, i = divmod(k, len(self.of_round))
        request = _seeded(self.of_round[i], self.seed, k, iteration)
        if request.fixed_code and request.rng == "image":
            start = self.seed if request.start_seed is None else request.start_seed
            request = request.twin(start_seed=image_seed(start, self.batches.place(k)))
        return request


@dataclass(frozen=True)
class Plan:
    """The images of a run, numbered from 0, and the batches that they are made in."""

    requests: Requests
    batches: Batches

    def batch(self, numbers: Sequence[int]) -> list[ImageRequest]:
        return [self.requests[k] for k in numbers]

    def remaining(self, missing: Sequence[int]) -> Sequence[tuple[int, ...]]:
        """The batches with missing images; of one stream for all also those before, which draw from it."""
        if len(missing) == len(self.requests):
            return self.batches
        lacking = bytearray(len(self.requests))
        for k in missing:
            lacking[k] = True
        wanted = array("I", (i for i, batch in enumerate(self.batches) if any(lacking[k] for k in batch)))
        if self.requests.of_round[0].rng == "compvis":
            return Selected(self.batches, range(wanted[-1] + 1 if wanted else 0))
        return Selected(self.batches, wanted)

    def images_of_lines(self, batches: Iterable[Sequence[int]]) -> Counter[int]:
        """How many images of these batches each request of the round stands for, going by first images."""
        count, images = len(self.requests.of_round), Counter()
        for batch in batches:
            images[batch[0] % count] += len(batch)
        return images


def plan_run(
    round_of_requests: Sequence[ImageRequest], seed: int, n_iter: int, n_samples: int, batch_size: int | None
) -> Plan:
    """A run in the original's order: all requests, `n_samples` at a time, `n_iter` times over.

    Image k has the run's seed + k, or its request's own, which rises by one with each round. Requests that
    cannot share a batch go into different ones. With a `batch_size` images of all rounds share batches.
    With `fixed_code` each image starts from the noise of `start_seed`, by default the run's seed, plus its
    place in its batch.
    """
    count = len(round_of_requests)
    groups = plan_batches([request.batch_key() for request in round_of_requests], count)
    if batch_size is None:
        batches = Batches(groups, count, n_samples, 1, n_iter)
    else:
        batches = Batches(groups, count, batch_size, n_iter, 1)
    return Plan(Requests(round_of_requests, seed, n_iter, batches), batches)


def _seeded(request: ImageRequest, seed: int, k: int, iteration: int) -> ImageRequest:
    """Image k's own request; in the original's one stream all images have the run's seed."""
    if request.rng == "compvis":
        return request.twin(seed=seed)
    own = image_seed(seed, k) if request.seed is None else image_seed(request.seed, iteration)
    if request.variation_seed is None:
        return request.twin(seed=own)
    # beside a seed of its own, the line's number must not decide either
    shift = k if request.seed is None else iteration
    return request.twin(seed=own, variation_seed=image_seed(request.variation_seed, shift))


class Names(Computed[str]):
    """The file of each image as the template says, without suffix, whether or not another has the same."""

    def __init__(self, template: str, plan: Plan, first: int, model: Mapping[str, Any]):
        self.template, self.plan, self.first, self.model = template, plan, first, model
        self.fields = {field.partition(":")[0] for field in FIELD.findall(template)}

    def __len__(self) -> int:
        return len(self.plan.requests)

    def __getitem__(self, k: int) -> str:
        if not 0 <= k < len(self):
            raise IndexError(k)
        facts = {"image": k, "number": self.first + k}
        if self.fields - facts.keys():
            request = self.plan.requests[k]
            if "init_img" in self.fields and request.init_img is not None:
                facts["init_img"] = PurePath(image_name(request.init_img)).stem
            facts = {**request.settings(), **facts, **self.model}
        return file_name(self.template, facts)


def file_names(template: str, plan: Plan, first: int, model: Mapping[str, Any]) -> Sequence[str]:
    """The file of each image of a run, without suffix, as --filename says; `first` is image 0's number.

    `model` are the model's facts that a name may show: checkpoint and model_hash.
    """
    facts = {"model": PurePath(model["checkpoint"]).stem, "model_hash": model.get("model_hash")}
    names = Names(template, plan, first, facts)
    return names if NUMBERED.match(template) else unique_names(names)
