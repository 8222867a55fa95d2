"""Images that come in: what was dropped onto the page, and the mask that was drawn on it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.errors import InputError
from ldm.images.init_image import turn_upright
from ldm.images.metadata import open_image

MARKED = 32  # of 255: as opaque as this, a stroke of the brush is meant
PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")  # of Pillow, that a PNG file can have


def read_upload(path: str | None, what: str, max_pixels: int) -> Image.Image | None:
    """An uploaded file as an image that stands upright and that a PNG file can hold; None without one.

    InputError if it cannot be read or has more than `max_pixels` pixels, by its header.
    """
    if path is None:
        return None
    name = Path(path).name
    image = _opened(path, name, what, max_pixels)
    image.filename = name
    return image


def read_editor(
    value: Mapping[str, Any] | None, max_pixels: int
) -> tuple[Image.Image | None, Image.Image | None]:
    """The image below what was drawn, and the mask, white where something was; None for what is missing.

    `value` has the files as gradio's editor gives them: bytes, or objects with a `path`. InputError.
    """
    if value is None or value.get("background") is None:
        return None, None
    image = _layer(value["background"], "Image", max_pixels)
    if image.getextrema()[3] == (255, 255):
        image = image.convert("RGB")
    image.filename = "init.png"
    alpha = np.zeros((image.height, image.width), np.uint8)
    for drawn in value.get("layers") or ():
        layer = _layer(drawn, "Mask", max_pixels)
        if layer.size != image.size:
            layer = layer.resize(image.size)
        alpha = np.maximum(alpha, np.asarray(layer)[..., 3])
    if not (alpha >= MARKED).any():
        return image, None
    mask = Image.fromarray(np.where(alpha >= MARKED, 255, 0).astype(np.uint8))
    mask.filename = "mask.png"
    return image, mask


def in_words(error: InputError, path: object, name: str, max_pixels: int) -> str:
    """Why a file cannot be read, for the user: by its own name, as its folder is ours."""
    if isinstance(error.__cause__, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"{name} has too many pixels; --max_pixels allows {max_pixels:,}"
    if isinstance(error.__cause__, Image.UnidentifiedImageError):
        return f"cannot read the image {name}: it is no PNG, JPEG or WebP file"
    return str(error).replace(str(path), name)


def _layer(file: Any, what: str, max_pixels: int) -> Image.Image:
    """A file of the editor as an image in RGBA."""
    if isinstance(file, bytes):
        image = _opened(io.BytesIO(file), "that was sent", what, max_pixels)
    else:
        image = _opened(file.path, Path(file.path).name, what, max_pixels)
    return image.convert("RGBA")


def _opened(source: str | io.BytesIO, name: str, what: str, max_pixels: int) -> Image.Image:
    try:
        with open_image(source) as image:
            _check_size(image, max_pixels)
            upright = image.copy()
            turn_upright(upright)
    except InputError as error:
        raise InputError(f"{what}: {in_words(error, source, name, max_pixels)}") from error
    return upright if upright.mode in PNG_MODES else upright.convert("RGB")


def _check_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise InputError(
            f"{image.width}x{image.height} is {image.width * image.height:,} pixels; "
            f"--max_pixels allows {max_pixels:,}"
        )
