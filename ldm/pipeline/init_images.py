"""Init images, masks and depth maps as the model takes them; those used last are kept."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from ldm.images.init_image import open_init_image, read_grey, read_init_image
from ldm.pipeline.request import ImageRequest

MOST = 64  # images that are kept, as many as the largest batch has: a run reads them before it begins one
GREY = ("map", "grey")  # of a key; the name of a colour alone is that of a background
KEPT_BYTES = 2**30  # of what is kept, as far as that is more than one: photographs are large


class InitImages:
    """Reads and fits the images of requests. Larger files than `max_pixels` are refused undecoded."""

    def __init__(self, max_pixels: int):
        self.max_pixels = max_pixels
        self._kept: OrderedDict[tuple, tuple[Any, np.ndarray]] = OrderedDict()
        self._digests: dict[tuple, str] = {}

    def __call__(self, request: ImageRequest) -> np.ndarray:
        """A request's init image, uint8 [H, W, 3]; the same object as long as it is kept. InputError."""
        return self.fitted(request, request.height, request.width)

    def fitted(self, request: ImageRequest, height: int | None, width: int | None) -> np.ndarray:
        """A request's init image in another size than the request's, as `read_init_image` fits it."""
        source, fit = request.init_img, (request.resize, request.background)
        key = (_name(source), height, width, *fit)
        known = key in self._kept
        pixels = self._keep(
            key, source, lambda: read_init_image(source, height, width, *fit, self.max_pixels)
        )
        if not known:  # under its own size, too, which a resolved request has
            self._keep((key[0], *pixels.shape[:2], *fit), source, lambda: pixels)
        return pixels

    def whole(self, request: ImageRequest) -> np.ndarray:
        """A request's init image in the size of its file, uint8 [H, W, 3]. InputError."""
        source, background = request.init_img, request.background
        return self._keep(
            (_name(source), background),
            source,
            lambda: np.asarray(open_init_image(source, background, self.max_pixels)),
        )

    def grey(self, source: Any) -> np.ndarray:
        """A mask or depth map in the size of its file, float32 [H, W] in 0 … 1. InputError."""
        return self._keep(
            (_name(source), *GREY), source, lambda: read_grey(source, max_pixels=self.max_pixels)
        )

    def digests(self, request: ImageRequest) -> dict[str, str]:
        """Sixteen hex digits that distinguish the content of each image of a request."""
        found = {}
        if request.init_img is not None:
            fits = not request.repaints and request.noise_level is None
            size = (request.height, request.width, request.resize) if fits else ()
            read = self if fits else self.whole
            found["init image"] = self._digest(
                request.init_img, (*size, request.background), lambda: read(request)
            )
        for name, source in (("mask image", request.mask), ("depth map", request.depth)):
            if source is not None:
                found[name] = self._digest(source, GREY, lambda source=source: self.grey(source))
        return found

    def forget(self) -> None:
        """Read all files anew from now on."""
        self._kept.clear()
        self._digests.clear()

    def _keep(self, key: tuple, source: Any, read: Callable[[], np.ndarray]) -> np.ndarray:
        if key not in self._kept:
            self._kept[key] = source, read()  # an object that is kept shares its id with no other
            evict(self._kept, 2 * MOST, lambda kept: kept[1].nbytes)
        self._kept.move_to_end(key)
        return self._kept[key][1]

    def _digest(self, source: Any, how: tuple, read: Callable[[], np.ndarray]) -> str:
        if not isinstance(source, str):
            return _sha(read())
        key = (source, *how)
        if key not in self._digests:
            self._digests[key] = _sha(read())
        return self._digests[key]


def evict(kept: OrderedDict[Any, Any], most: int, size: Callable[[Any], int]) -> None:
    """Leave out the oldest of what is kept while they are more than `most`, or KEPT_BYTES by `size`."""
    while len(kept) > 1 and (len(kept) > most or sum(map(size, kept.values())) > KEPT_BYTES):
        kept.popitem(last=False)


def _name(source: Any) -> Any:
    return source if isinstance(source, str) else id(source)


def _sha(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]
