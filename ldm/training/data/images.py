"""Image files into arrays, and arrays into the size of a batch."""

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.training.data.example import DamagedExample, Example

SMALL = 4  # an upscaler's small images have this part of the side
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAPS = ("mask", "depth", "control", "small")
RESAMPLING = {
    "image": Image.Resampling.LANCZOS,
    "small": Image.Resampling.LANCZOS,
    "mask": Image.Resampling.NEAREST,
}
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112


def decode(data: bytes | Path, key: str) -> np.ndarray:
    """The pixels of an image file, upright, uint8 [h, w, 3]; what is transparent becomes white.

    DamagedExample if the file is not a whole image.
    """
    with _opened(data, key) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            return np.repeat(_shades(image)[..., None], 3, axis=2)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))


def decode_map(data: bytes | Path, name: str, key: str) -> np.ndarray:
    """An example's map from an image file, as `Example` has it: any depths, masks of 0 and 1."""
    if name in ("control", "small"):
        return decode(data, key)
    with _opened(data, key) as image:
        image = ImageOps.exif_transpose(image)
        if name == "mask":
            return (np.asarray(image.convert("L")) >= 128).astype(np.float32)
        if image.mode not in ("L", "F") and not image.mode.startswith("I"):
            image = image.convert("L")
        return np.asarray(image).astype(np.float32)


def decode_size(data: bytes | Path, key: str) -> tuple[int, int]:
    """Width and height of the upright image, of whose file only the beginning is looked at."""
    with _opened(data, key) as image:
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION) in _TURNED
        return (height, width) if turned else (width, height)


class EncodedSource:
    """The part of a source that decodes image files, whose bytes a subclass reads by number and name.

    A subclass has `captions`, `key`, `_read(index, name)`, the bytes of "image" or of a map, and
    `_maps(index)`, the names of an example's maps.
    """

    captions: Sequence[str]

    def caption(self, index: int) -> str:
        return self.captions[index]

    def size(self, index: int) -> tuple[int, int]:
        return decode_size(self._read(index, "image"), self.key(index))

    def __getitem__(self, index: int) -> Example:
        key = self.key(index)
        maps = {name: decode_map(self._read(index, name), name, key) for name in self._maps(index)}
        return Example(key, decode(self._read(index, "image"), key), self.caption(index), maps)


class _opened:
    """The image of a file or its bytes; whatever goes wrong in the block is a DamagedExample."""

    def __init__(self, data: bytes | Path, key: str):
        self.data, self.key = data, key

    def __enter__(self) -> Image.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of damaged EXIF data and large images
                self.image = Image.open(io.BytesIO(self.data) if isinstance(self.data, bytes) else self.data)
        except Exception as error:  # Pillow's readers raise what their libraries do
            raise DamagedExample(self.key, _why(error)) from error
        return self.image

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.image.close()
        if isinstance(error, Exception) and not isinstance(error, DamagedExample):
            raise DamagedExample(self.key, _why(error)) from error


def _why(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image"  # Pillow's message shows an address in memory
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _shades(image: Image.Image) -> np.ndarray:
    """An image of 16 or more bits in 256 shades, uint8 [h, w]."""
    values = np.asarray(image).astype(np.float32)
    return (values / (257.0 if values.max() > 255 else 1.0)).clip(0, 255).round().astype(np.uint8)


def crop_box(size: tuple[int, int], wanted: tuple[int, int], x: float, y: float) -> tuple[float, ...]:
    """The largest part of an image (width, height) that has the aspect ratio of `wanted`.

    x and y, 0 … 1, say where it is: 0.5 is in the middle. Left, top, right, bottom in pixels.
    """
    zoom = max(wanted[0] / size[0], wanted[1] / size[1])
    # A box of the whole width is not to reach a rounding error beyond it.
    width, height = min(wanted[0] / zoom, size[0]), min(wanted[1] / zoom, size[1])
    left, top = x * (size[0] - width), y * (size[1] - height)
    return left, top, min(left + width, size[0]), min(top + height, size[1])


def fitted(example: Example, wanted: tuple[int, int], x: float = 0.5, y: float = 0.5) -> Example:
    """The example with image and maps cut to an aspect ratio and resized to `wanted` (width, height).

    Images are resized with LANCZOS, masks to the nearest pixel, other maps linearly. A map may have more or
    fewer pixels than its image, and is as large afterwards; only "small" has a quarter of the side.
    DamagedExample for a map of another aspect ratio.
    """
    height, width = example.image.shape[:2]
    box = crop_box((width, height), wanted, x, y)

    def fit(name: str, values: np.ndarray) -> np.ndarray:
        rows, columns = values.shape[:2]
        # A size that was rounded may be a pixel off.
        if abs(columns * height - rows * width) > max(width, height, 0.01 * columns * height):
            sizes = f"{columns}x{rows} pixels, and the image {width}x{height}"
            raise DamagedExample(example.key, f"its {name} has another aspect ratio: {sizes}")
        size = tuple(max(1, round(side / SMALL)) for side in wanted) if name == "small" else wanted
        zoom = columns / width, rows / height
        own = [min(edge * zoom[k % 2], values.shape[1 - k % 2]) for k, edge in enumerate(box)]
        if size == (columns, rows) and np.allclose(own, (0, 0, *size), atol=1e-6):
            return values
        how = RESAMPLING.get(name, Image.Resampling.BILINEAR)
        return np.asarray(Image.fromarray(values).resize(size, how, tuple(own)))

    maps = {name: fit(name, values) for name, values in example.maps.items()}
    return Example(example.key, fit("image", example.image), example.caption, maps)


def mirrored(example: Example) -> Example:
    """The example with left and right exchanged."""
    maps = {name: values[:, ::-1] for name, values in example.maps.items()}
    return Example(example.key, example.image[:, ::-1], example.caption, maps)


def part(example: Example, side: int, x: float, y: float) -> Example:
    """A square of `side` pixels of image and maps; x and y, 0 … 1, say where it is."""
    height, width = example.image.shape[:2]
    # Maps may be smaller than the image by a whole factor; the square then begins at a pixel of theirs.
    step = max([1, *(height // values.shape[0] for values in example.maps.values())])
    top = int(y * ((height - side) // step + 1)) * step
    left = int(x * ((width - side) // step + 1)) * step

    def cut(values: np.ndarray) -> np.ndarray:
        factor = height // values.shape[0]
        rows, columns = (slice(start // factor, (start + side) // factor) for start in (top, left))
        return values[rows, columns]

    maps = {name: cut(values) for name, values in example.maps.items()}
    return Example(example.key, cut(example.image), example.caption, maps)


def tensors(example: Example) -> dict[str, Tensor]:
    """Image and "small" float32 [3, h, w] in [-1, 1], "control" in 0 … 1, "mask" and "depth" [1, h, w]."""
    values: Mapping[str, np.ndarray] = {"image": example.image, **example.maps}
    return {name: _tensor(name, each) for name, each in values.items()}


def _tensor(name: str, values: np.ndarray) -> Tensor:
    x = torch.from_numpy(np.array(values, order="C"))  # a copy: Pillow's arrays cannot be written to
    if name in ("mask", "depth"):
        return x[None]
    x = x.permute(2, 0, 1).float()
    return (x / 255.0 if name == "control" else x / 127.5 - 1.0).contiguous()
