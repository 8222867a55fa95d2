"""Init images: any file that Pillow decodes by itself, or a PIL image -> RGB pixels as a model takes them."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError

from ldm.errors import InputError
from ldm.log import notice

ImageSource = str | Path | Image.Image
# Those decoded in this process: Pillow would run Ghostscript on an EPS file.
READABLE = ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF")
LANCZOS = Image.Resampling.LANCZOS
MAX_PIXELS = 64_000_000  # of a file, and of what becomes of it
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values for images that lie on a side


def read_init_image(
    source: ImageSource,
    height: int | None = None,
    width: int | None = None,
    resize: str = "stretch",
    background: str = "white",
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """An image file, or a PIL image, fitted as the model takes it: uint8 [H, W, 3].

    See `open_init_image`, `target_size` and `fit`. InputError also if the result would have more than
    `max_pixels` pixels.
    """
    image = open_init_image(source, background, max_pixels)
    height, width = allowed_size(source, image.size, height, width, max_pixels)
    return np.asarray(fit(image, height, width, resize, background))


def open_init_image(
    source: ImageSource, background: str = "white", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The image in a file, the first if there are more: upright, opaque, RGB, in sRGB if it has a profile.

    A PIL image comes in the frame that it shows. Transparency shows `background`, a colour by name or as
    #rrggbb. 16-bit grey is scaled to 8 bits, as are integers in 0 … 65535 and floats in 0 … 1. InputError if
    the header says more than `max_pixels` pixels (nothing is decoded then), if the file cannot be read or if
    it is damaged.
    """
    colour = parse_colour(background)
    with _opened(source, max_pixels) as image:
        frames = getattr(image, "n_frames", 1)
        kind = image.format
        image.load()
        if image is source:
            image = image.copy()  # the user's own stays as it is
        turn_upright(image)
        rgb = _to_rgb(image, colour)
    if frames > 1 and kind != "MPO" and not isinstance(source, Image.Image):
        notice(f"{source} holds {frames} images; the first one is used")
    return rgb


def turn_upright(image: Image.Image) -> None:
    """Turn an image, in place, as its EXIF data say.

    In place the pixels are turned before the data are written anew: these may be broken as they like.
    """
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def read_grey(source: ImageSource, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A mask or depth map: the brightness of an image, upright, float32 [H, W] in 0 … 1, 16 bits kept.

    Transparent parts are black. InputError as for `open_init_image`.
    """
    with _opened(source, max_pixels) as image:
        image.load()
        if image.mode.startswith(("I", "F")) and "transparency" not in image.info:
            image = image.copy()
            turn_upright(image)
            values, top = np.asarray(image, dtype=np.float32), 1 if image.mode == "F" else 65535
            if not ((values >= 0) & (values <= top)).all():
                raise ValueError(f"its greys run from {values.min():g} to {values.max():g}, not 0 … {top}")
            return values / top
        if image is source:
            image = image.copy()
        turn_upright(image)
        grey = _to_rgb(image, (0, 0, 0)).convert("L")
    return np.asarray(grey, dtype=np.float32) / 255


def is_readable(path: ImageSource, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether a file is an image that `open_init_image` reads; it is decoded to find that out."""
    try:
        with _opened(path, max_pixels) as image:
            image.load()
    except InputError:
        return False
    return True


@contextmanager
def _opened(source: ImageSource, max_pixels: int) -> Iterator[Image.Image]:
    """The image in a file, not decoded yet, or the PIL image itself.

    InputError for what is none, and for whatever goes wrong with it inside the `with` block.
    """
    name = _name(source)
    try:
        with _pixel_limit(max_pixels):
            if isinstance(source, Image.Image):
                if (pixels := source.width * source.height) > max_pixels:
                    raise Image.DecompressionBombError(pixels)
                yield source
            else:
                with Image.open(source, formats=READABLE) as image:
                    yield image
    except Image.DecompressionBombError as error:
        pixels = int(re.search(r"\d+", str(error))[0])  # stands nowhere else
        raise InputError(f"{name} has {pixels:,} pixels, more than --max_pixels {max_pixels:,}") from error
    except UnidentifiedImageError as error:
        what = "is damaged or not an image"
        with suppress(OSError):
            what = what if Path(source).stat().st_size else "is empty, not an image"
        raise InputError(f"{name} {what}; these can be read: {', '.join(READABLE)}") from error
    except Exception as error:  # the decoders raise anything on a damaged file
        detail = str(error) or type(error).__name__
        reason = getattr(error, "strerror", None) or f"damaged or not supported ({detail})"
        raise InputError(f"cannot read the image {name}: {reason}") from error


def _name(source: ImageSource) -> str:
    """What messages call it."""
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "")) or "the init image"
    return str(source)


def allowed_size(
    source: ImageSource,
    size: tuple[int, int],
    height: int | None,
    width: int | None,
    max_pixels: int,
) -> tuple[int, int]:
    """(height, width) that an image of `size`, (width, height), gets; InputError if that is too large."""
    width, height = target_size(size, height, width)
    if width * height > max_pixels:
        raise InputError(
            f"{_name(source)} would become {width}x{height}: more than --max_pixels {max_pixels:,}"
        )
    return height, width


def parse_colour(text: str) -> tuple[int, int, int]:
    """A colour by name or as #rrggbb -> (red, green, blue), each 0 … 255; InputError for another."""
    try:
        return ImageColor.getcolor(text, "RGB")
    except ValueError as error:
        raise InputError(f"--background {text!r} is no colour; white and #ff8000 are") from error


def target_size(size: tuple[int, int], height: int | None, width: int | None) -> tuple[int, int]:
    """(width, height) that an image of `size`, also (width, height), gets.

    With neither given, both are the image's, floored to multiples of 64 as in the original, at least 64.
    With one given, the other follows the aspect ratio, rounded to a multiple of 8, at least 8.
    """
    if height is None and width is None:
        return max(64, size[0] // 64 * 64), max(64, size[1] // 64 * 64)
    width = width or max(8, round(height * size[0] / size[1] / 8) * 8)
    return width, height or max(8, round(width * size[1] / size[0] / 8) * 8)


def fit(image: Image.Image, height: int, width: int, how: str, background: str = "white") -> Image.Image:
    """An RGB image in a new size, by LANCZOS: "stretch" ignores the aspect ratio, "crop" keeps the middle
    of what covers the size, "pad" keeps the whole image, centred on the background colour."""
    size = (width, height)
    if how == "crop":
        return ImageOps.fit(image, size, LANCZOS)
    if how == "pad":
        return ImageOps.pad(image, size, LANCZOS, color=parse_colour(background))
    return image.resize(size, LANCZOS)


@contextmanager
def _pixel_limit(max_pixels: int) -> Iterator[None]:
    """Pillow raises DecompressionBombError beyond `max_pixels`, also inside its decoders, and never warns.

    Its own limit, which is one for the whole process, comes back at the end.
    """
    before = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = max_pixels / 2  # it warns above this, and raises above twice this
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A loaded image of any mode -> RGB."""
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.has_transparency_data or image.mode == "P":
        image = image.convert("RGBA")
    if profile := image.info.get("icc_profile"):
        with suppress(Exception):  # broken, or not for this mode: colours as they are
            mode = "RGBA" if image.mode == "RGBA" else "RGB"
            source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, source, target, outputMode=mode)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of integers in 0 … 65535 or floats in 0 … 1 -> L, or LA if one grey is transparent."""
    values, top = np.asarray(image), 1 if image.mode == "F" else 65535
    if not ((values >= 0) & (values <= top)).all():
        raise ValueError(f"its greys run from {values.min():g} to {values.max():g}, not within 0 … {top}")
    grey = Image.fromarray((values * (255 / top)).round().astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.uint8(255) * (values != image.info["transparency"])))
    return grey
