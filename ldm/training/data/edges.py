"""Images with their edges, which a ControlNet learns to follow."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.images.edges import canny
from ldm.training.data.example import Example
from ldm.training.data.images import fitted
from ldm.training.data.sources import build_source


class Edges:
    """The examples of another source, `{target: …, params: …}`, with edges by Canny's method to be followed.

    An image is first cut to a square in the middle and brought to `size` pixels, as the loader would do: an
    edge is a pixel wide at any size, so edges that are resized are not those that the sampling commands draw.
    """

    def __init__(self, source: Mapping[str, Any], size: int, low: float = 100.0, high: float = 200.0):
        self.source = build_source("source", source)
        self.side, self.low, self.high = size, low, high
        self.in_memory = getattr(self.source, "in_memory", False)
        self.left_out: Mapping[str, str] = getattr(self.source, "left_out", {})

    @property
    def fingerprint(self) -> str:
        text = f"{self.source.fingerprint} canny {self.side} {self.low} {self.high}"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def metadata(self) -> Mapping[str, Sequence[Any]]:
        return self.source.metadata

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        return self.source.key(index)

    def caption(self, index: int) -> str:
        return self.source.caption(index)

    def size(self, index: int) -> tuple[int, int]:
        return self.side, self.side

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        alone = Example(example.key, example.image, example.caption)
        image = fitted(alone, (self.side, self.side)).image
        return Example(example.key, image, example.caption, {"control": canny(image, self.low, self.high)})
