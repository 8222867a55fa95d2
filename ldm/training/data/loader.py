"""Batches: examples brought to size, by worker processes, in the order that a seed decides."""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.errors import InputError
from ldm.log import notice
from ldm.training.config import TrainingConfig
from ldm.training.data.buckets import bucket_sizes, nearest_bucket
from ldm.training.data.config import DataConfig
from ldm.training.data.example import DamagedExample, Source
from ldm.training.data.images import fitted, mirrored, part, tensors
from ldm.training.data.masks import random_masks
from ldm.training.data.order import Order
from ldm.training.data.sources import examples_named, image_sizes
from ldm.training.files import whole, writing
from ldm.training.random import row_generator

VALIDATION = -1  # the step of a batch for validation: its random numbers are not those of any step
_TRIES = 1000  # damaged examples in a row, after which it is no use to go on
Batch = dict[str, Any]


class Items(Protocol):
    """What a loader reads: `Pixels` or the cached `Latents`.

    groups: numbers of the examples of each bucket, in rising order
    """

    data: DataConfig
    groups: list[np.ndarray]
    in_memory: bool
    left_out: Mapping[str, str]

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def caption(self, index: int) -> str: ...

    def load(self, index: int, group: int, generator: torch.Generator) -> dict[str, Any]:
        """The values of a batch for one example, without the axis of the batch; DamagedExample."""
        ...


class Pixels:
    """A source's images at the sizes of their buckets."""

    def __init__(self, data: DataConfig, source: Source, cache: Path | None = None):
        self.data, self.source = data, source
        self.in_memory = getattr(source, "in_memory", False)
        self.left_out = dict(getattr(source, "left_out", {}))
        self.masks = random_masks(data.masks)
        whole = self._with_all_maps()
        self.sizes, self.groups = [(data.size, data.size)], [np.flatnonzero(whole)]
        if data.buckets:
            found = image_sizes(source, cache)
            readable = np.flatnonzero(whole & found.all(axis=1))
            for index in np.flatnonzero(whole & ~found.all(axis=1)):
                self.left_out[source.key(int(index))] = "its size cannot be read"
            sizes = bucket_sizes(data.size, data.bucket_step)
            numbers = nearest_bucket(found[readable], sizes)
            used = np.unique(numbers)
            self.sizes = [sizes[number] for number in used]
            self.groups = [readable[numbers == number] for number in used]
        if not sum(map(len, self.groups)):
            raise InputError(f"data: none of the {len(source):,} examples can be read")

    def _with_all_maps(self) -> np.ndarray:
        """Which examples have every map that any of them has: a batch is of one sort. bool [n]"""
        whole = np.ones(len(self.source), bool)
        for name, has in getattr(self.source, "has_maps", {}).items():
            if name == "mask" and self.masks is not None:
                continue  # where there is none, one is drawn
            keys = [self.source.key(int(index)) for index in np.flatnonzero(whole & ~has)]
            self.left_out |= dict.fromkeys(keys, f"it has no {name}")
            whole &= has
            if keys:
                notice(
                    f"{len(keys):,} of {len(whole):,} examples are left out, because they have no {name}, "
                    f"which others have: {examples_named(keys)}"
                )
        return whole

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def key(self, index: int) -> str:
        return self.source.key(index)

    def caption(self, index: int) -> str:
        return self.source.caption(index)

    def load(self, index: int, group: int, generator: torch.Generator) -> dict[str, Any]:
        data, example = self.data, self.source[index]
        across, along, flip, left, top = torch.rand(5, generator=generator).tolist()
        if data.crop == "center":
            across = along = 0.5
        example = fitted(example, self.sizes[group], across, along)
        if flip < data.flip:
            example = mirrored(example)
        if self.masks is not None and "mask" not in example.maps:
            rng = np.random.default_rng(torch.randint(2**62, (), generator=generator).item())
            mask = self.masks.draw(*self.sizes[group], rng)
            example = type(example)(
                example.key, example.image, example.caption, {**example.maps, "mask": mask}
            )
        if data.patch:
            example = part(example, data.patch, left, top)
        return {"caption": example.caption, **tensors(example)}


class Batches(Dataset):
    """Whole batches, by (step, rows, numbers of examples, group).

    Everything random about an example is drawn from its step's and its row's generator. In place of a damaged
    one its group's next whole example is taken, if `replace`, and otherwise it is left out. "damaged" has the
    keys of damaged ones, and why.
    """

    def __init__(self, items: Items, seed: int, replace: bool = True):
        self.items, self.seed, self.replace = items, seed, replace

    def __getitem__(self, place: tuple[int, np.ndarray, np.ndarray, int]) -> Batch:
        step, rows, indices, group = place
        loaded, kept, damaged = [], [], {}
        for row, index in zip(rows.tolist(), indices.tolist(), strict=True):
            for candidate in self._candidates(index, group):
                try:
                    generator = row_generator(self.seed, step, row)
                    loaded.append(self.items.load(candidate, group, generator))
                    kept.append((row, candidate))
                    break
                except DamagedExample as error:
                    damaged[error.key] = error.why
            else:
                if self.replace:
                    key, why = next(reversed(damaged.items()))
                    return {
                        "error": f"data: {len(damaged):,} examples in a row are damaged, such as {key}: {why}"
                    }
        batch: Batch = {"step": step, "row": torch.tensor([row for row, _ in kept], dtype=torch.int64)}
        batch |= {"index": [index for _, index in kept], "damaged": damaged}
        for name in loaded[0] if loaded else ():
            values = [one[name] for one in loaded]
            batch[name] = torch.stack(values) if isinstance(values[0], Tensor) else values
        return batch

    def _candidates(self, index: int, group: int) -> Iterator[int]:
        if not self.replace:
            yield index
            return
        members = self.items.groups[group]
        place = int(np.searchsorted(members, index))
        for k in range(min(len(members), _TRIES)):
            yield int(members[(place + k) % len(members)])


class Places(Sampler):
    """Where the batches of one process come from: the argument of `Batches`, one after the other."""

    def __init__(
        self,
        order: Order,
        drilled: Order | None,
        steps: range,
        rank: int,
        world: int,
        device_batch: int,
    ):
        self.order, self.drilled, self.steps = order, drilled, steps
        self.rank, self.world, self.device_batch = rank, world, device_batch
        self.batch_size = order.batch_size + (drilled.batch_size if drilled else 0)

    def __len__(self) -> int:
        return len(self.steps) * (self.batch_size // (self.device_batch * self.world))

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, np.ndarray, int]]:
        at_once = self.device_batch * self.world
        for step in self.steps:
            group, indices = self.order.batch(step)
            if self.drilled is not None:
                indices = np.concatenate([self.drilled.batch(step)[1], indices])
            for start in range(self.rank * self.device_batch, self.batch_size, at_once):
                rows = np.arange(start, start + self.device_batch)
                yield step, rows, indices[rows], group


class Loader(DataLoader):
    """A DataLoader that collects what was damaged: `damaged`, keys and reasons."""

    def __init__(self, items: Items, seed: int, places: Sampler, data: DataConfig):
        self.damaged = dict(items.left_out)
        workers = worker_count(items, data)
        super().__init__(
            Batches(items, seed),
            batch_size=None,
            sampler=places,
            num_workers=workers,
            prefetch_factor=data.prefetch if workers else None,
            persistent_workers=workers > 0,
            collate_fn=_unchanged,
        )

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if "error" in batch:
                raise InputError(batch["error"])
            self.damaged |= batch.pop("damaged")
            batch.pop("index")
            yield batch

    def report(self, path: Path) -> None:
        """Add the keys of what was left out to a file, and say so in one line, if there are any."""
        report(self.damaged, path)


def report(damaged: Mapping[str, str], path: Path, aloud: bool = True) -> None:
    """Add keys of what was left out, and why, to those in a file; one line to the user, if `aloud`."""
    with writing(path):
        earlier = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = [" ".join(f"{key}: {why}".split()) for key, why in damaged.items()]
        lines = list(dict.fromkeys([*earlier, *found]))
        if len(lines) > len(earlier):
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path) as unfinished:
                unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if lines and aloud:
        notice(f"{len(lines):,} left out of the data, listed in {path}: {examples_named(lines)}")


def loader(
    data: DataConfig,
    source: Source | Items,
    config: TrainingConfig,
    rank: int = 0,
    world: int = 1,
    device_batch: int | None = None,
    first_step: int = 0,
) -> Loader:
    """The batches that process `rank` of `world` takes in the steps first_step … config.steps - 1.

    A step's global batch of config.batch_size examples is cut into batches of `device_batch`, which the
    processes take in turn: batch_size / (device_batch world) of them each. Which example is in which row does
    not depend on rank, world, device_batch or first_step. `config.drill` gives the first rows to examples
    whose captions have one of its words. InputError where the batch does not divide.

    A batch has "step", "row" int64 [b], "caption" (b texts), "image" float32 [b, 3, h, w] in [-1, 1], and the
    maps of its examples; of cached latents, as `source`, what `Latents.load` returns.
    """
    items = _items(data, source)
    device_batch = device_batch or max(1, config.batch_size // world)
    if config.batch_size % (device_batch * world):
        raise InputError(
            f"batch_size {config.batch_size} is no multiple of {device_batch * world} = {device_batch} "
            f"examples at a time x {world} processes"
        )
    drilled, count = None, round(config.drill_share * config.batch_size) if config.drill else 0
    if count:
        if len(items.groups) > 1:
            raise InputError(
                "training: drill and buckets do not go together: a drilled batch would mix sizes"
            )
        drilled = Order([_drilled(items, config.drill)], count, config.seed + 1)
    if count == config.batch_size:
        order, drilled = drilled, None
    else:
        order = Order(items.groups, config.batch_size - count, config.seed)
    steps = range(first_step, config.steps)
    return Loader(items, config.seed, Places(order, drilled, steps, rank, world, device_batch), data)


def validation_batches(
    data: DataConfig,
    source: Source | Items,
    config: TrainingConfig,
    rank: int = 0,
    world: int = 1,
    device_batch: int | None = None,
) -> Loader:
    """Once through config.validation_count examples, the same ones every time and for any number of
    processes.

    "step" is -1 and "row" the number of an example among them. All processes get equally many batches;
    "weight" float32 [b] is 0 in those that only fill up.
    """
    items = _plain(_items(data, source))
    at_a_time = device_batch or max(1, config.batch_size // world)
    generator = row_generator(0, VALIDATION, 0, "order")
    chosen = torch.randperm(len(items), generator=generator)[: config.validation_count].sort().values.numpy()
    every = np.sort(np.concatenate(items.groups))[chosen]
    places, row = [], 0
    for group, members in enumerate(items.groups):
        indices = np.intersect1d(members, every)
        for start in range(0, len(indices), at_a_time):
            batch = indices[start : start + at_a_time]
            places.append((VALIDATION, np.arange(row, row + len(batch)), batch, group))
            row += len(batch)
    filled = -len(places) % world
    own = list(range(rank, len(places) + filled, world))
    whole = [number < len(places) for number in own]
    return _Validation(items, 0, [places[min(number, len(places) - 1)] for number in own], data, whole)


class _Validation(Loader):
    def __init__(self, items: Items, seed: int, places: list, data: DataConfig, whole: list[bool]):
        self.whole = whole
        super().__init__(items, seed, places, data)

    def __iter__(self) -> Iterator[Batch]:
        for batch, counts in zip(super().__iter__(), self.whole, strict=True):
            yield batch | {"weight": torch.full((len(batch["row"]),), float(counts))}


def worker_count(items: Items, data: DataConfig) -> int:
    """How many processes read images: none where they are in memory already."""
    if data.workers is not None:
        return data.workers
    if items.in_memory:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, cores - 1))


def _items(data: DataConfig, source: Source | Items) -> Items:
    return source if hasattr(source, "groups") else Pixels(data, source)


def _plain(items: Items) -> Items:
    """The same items, whole and not mirrored."""
    plain = copy.copy(items)
    plain.data = replace(items.data, flip=0.0, crop="center", patch=0)
    return plain


def _drilled(items: Items, words: tuple[str, ...]) -> np.ndarray:
    """The numbers of examples whose captions have one of the words."""
    wanted = {word.lower() for word in words}

    def fits(index: int) -> bool:
        try:
            return not wanted.isdisjoint(items.caption(index).lower().replace(",", " ").split())
        except DamagedExample:
            return False

    found = np.array([index for index in items.groups[0].tolist() if fits(index)], np.int64)
    if not len(found):
        raise InputError(f"drill: no caption has one of the words {', '.join(words)}")
    return found


def _unchanged(batch: Batch) -> Batch:
    return batch
