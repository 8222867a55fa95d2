"""Init images as the model takes them; the ones used last are kept."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import numpy as np

from ldm.images.init_image import read_init_image
from ldm.pipeline.request import ImageRequest

MOST = 16  # images that are kept


class InitImages:
    """Reads and fits the init images of requests. Larger files than `max_pixels` are refused undecoded."""

    def __init__(self, max_pixels: int):
        self.max_pixels = max_pixels
        self._kept: OrderedDict[tuple, tuple[Any, np.ndarray]] = OrderedDict()
        self._digests: dict[tuple, str] = {}

    def __call__(self, request: ImageRequest) -> np.ndarray:
        """A request's init image, uint8 [H, W, 3]; the same object as long as it is kept. InputError."""
        source, fit = request.init_img, (request.resize, request.background)
        name = source if isinstance(source, str) else id(source)
        key = (name, request.height, request.width, *fit)
        if key not in self._kept:
            pixels = read_init_image(source, request.height, request.width, *fit, self.max_pixels)
            self._kept[key] = source, pixels  # an object that is kept shares its id with no other
            # under its own size, too, which a resolved request has
            self._kept[(name, *pixels.shape[:2], *fit)] = source, pixels
            while len(self._kept) > 2 * MOST:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key][1]

    def digest(self, request: ImageRequest) -> str:
        """Sixteen hex digits that distinguish the content of init images."""
        key = (request.init_img, request.height, request.width, request.resize, request.background)
        if key[0] is not None and not isinstance(key[0], str):
            return _digest(self(request))
        if key not in self._digests:
            self._digests[key] = _digest(self(request))
        return self._digests[key]

    def forget(self) -> None:
        """Read all files anew from now on."""
        self._kept.clear()
        self._digests.clear()


def _digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]
