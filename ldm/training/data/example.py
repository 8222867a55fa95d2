"""One captioned image, and what a source of them has to offer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Example:
    """A captioned image, and what belongs to its pixels. Maps may have more or fewer pixels than the image.

    key: unique in its source; it names the example in messages
    image: uint8 [h, w, 3]
    maps: "mask" float32 [h, w], 1 where the image is to be repainted; "depth" float32 [h, w], inverse
        depth in any unit; "control" uint8 [h, w, 3]; "small" uint8 [h/4, w/4, 3], what an upscaler is given
    """

    key: str
    image: np.ndarray
    caption: str
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)


class DamagedExample(Exception):
    """An example that cannot be read. Whoever reads a source skips, counts and reports it."""

    def __init__(self, key: str, why: str):
        super().__init__(key, why)
        self.key, self.why = key, why

    def __str__(self) -> str:
        return f"{self.key}: {self.why}"


class Source(Protocol):
    """Captioned images by number, 0 … len - 1. Worker processes read it, too, so it has to be picklable.

    fingerprint: changes whenever the examples do; cached latents depend on it
    metadata: one value an example for each named column, for `filters`; None where an example lacks it

    A source may also say what it has `left_out`, {key: why}; with `in_memory = True` that there is nothing to
    decode, so that no worker processes are started; and with `has_maps`, {name: bool [n]}, which examples
    have which maps: those that lack one which others have are left out of the batches.
    """

    fingerprint: str
    metadata: Mapping[str, Sequence[Any]]

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def caption(self, index: int) -> str: ...

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels, without decoding these; DamagedExample if that cannot be found out."""
        ...

    def __getitem__(self, index: int) -> Example:
        """DamagedExample if the example cannot be read."""
        ...


class InMemory:
    """Examples that are there already, such as a handful of images to fine-tune on."""

    in_memory = True

    def __init__(self, examples: Sequence[Example], metadata: Mapping[str, Sequence[Any]] | None = None):
        self.examples, self.metadata = list(examples), metadata or {}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything in the examples."""
        import hashlib

        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(f"{example.key}\0{example.caption}\0".encode())
            for name, values in {"image": example.image, **example.maps}.items():
                digest.update(f"{name}{values.dtype}{values.shape}".encode())
                digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    @property
    def has_maps(self) -> dict[str, np.ndarray]:
        names = dict.fromkeys(name for example in self.examples for name in example.maps)
        return {name: np.array([name in example.maps for example in self.examples]) for name in names}

    def __len__(self) -> int:
        return len(self.examples)

    def key(self, index: int) -> str:
        return self.examples[index].key

    def caption(self, index: int) -> str:
        return self.examples[index].caption

    def size(self, index: int) -> tuple[int, int]:
        height, width = self.examples[index].image.shape[:2]
        return width, height

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]
