"""An image that came out of a pipeline, with all that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.errors import InputError
from ldm.images.metadata import FORMATS, encode_image
from ldm.images.source_type import source_type
from ldm.images.watermark import Watermarker
from ldm.pipeline.infotext import image_texts
from ldm.pipeline.request import ImageRequest

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline


@dataclass(frozen=True)
class GeneratedImage:
    """An image and what it was made from. `pixels` are uint8 [H, W, 3], None if it came out as NaN."""

    request: ImageRequest
    pixels: np.ndarray | None
    nsfw: bool | None  # None: nobody looked
    seconds: float
    pipeline: Pipeline = field(repr=False, compare=False)
    # the depth map that it was painted over, uint16 [H, W]
    depth: np.ndarray | None = field(default=None, repr=False, compare=False)
    # bool [H, W]: the pixels that are not the init image's own, where that was painted anew in part
    painted: np.ndarray | None = field(default=None, repr=False, compare=False)
    # what each of its ControlNets saw, uint8 [h, w, 3]
    controls: tuple[np.ndarray, ...] = field(default=(), repr=False, compare=False)

    @property
    def seed(self) -> int:
        """The seed of its noise; with `rng` compvis that of the one stream."""
        return self.request.seed

    @property
    def settings(self) -> dict[str, Any]:
        """All that is needed to make the image again, as image files and the manifest record it."""
        flags = {} if self.nsfw is None else {"nsfw_content_detected": self.nsfw}
        loras = self.pipeline.adapters.recorded(self.request) if self.request.loras else {}
        return self.pipeline.facts | self.request.settings() | loras | flags

    def save(
        self,
        path: str | Path,
        quality: int = 95,
        sign: Callable[[bytes, str, dict[str, Any]], bytes] | None = None,
    ) -> None:
        """Write a PNG, JPEG or WebP file with watermark and settings. InputError if it cannot be written.

        `sign` gives it a signature, such as `ldm.images.provenance.signer_of(cert, key)`.
        """
        path = Path(path)
        format = path.suffix.lower().lstrip(".").replace("jpeg", "jpg")
        if self.pixels is None:
            raise InputError(f"{path}: the image came out as NaN, and there is nothing to save")
        if format not in FORMATS:
            raise InputError(f"{path}: its suffix is none of {', '.join(FORMATS)}")
        data = self.encoded(format, quality, sign)
        try:
            path.write_bytes(data)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error

    def encoded(
        self,
        format: str = "png",
        quality: int = 95,
        sign: Callable[[bytes, str, dict[str, Any]], bytes] | None = None,
    ) -> bytes:
        """The bytes of the file that `save` writes, in a format of `FORMATS`; the image must not be NaN."""
        marked = Watermarker.of(self.request.watermark)(self.pixels, self.painted)
        settings = self.settings
        data = encode_image(marked, image_texts(settings), format, quality, source_type(settings))
        return data if sign is None else sign(data, format, settings)
