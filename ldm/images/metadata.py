"""Texts inside image files: written, and read back from the files of other tools, too.

A file holds two texts about how it was made: the parameters in the form of AUTOMATIC1111's web UI, which many
tools read, and our own JSON. In a PNG file they are the text chunks `parameters` and `stable-diffusion`; in
JPEG and WebP the EXIF fields UserComment and, as `{"stable-diffusion": {…}}`, ImageDescription. What the
texts say is decided in `ldm.pipeline.infotext`. Beside them every file has an XMP packet with IPTC's digital
source type: the image was generated.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import FieldError, InputError
from ldm.images.source_type import TRAINED, source_type_in, xmp_packet

METADATA_KEYWORD = "stable-diffusion"  # marks the JSON as ours
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}  # file name suffixes, and Pillow's names
LARGEST = {"jpg": 65_500, "webp": 16_383}  # pixels on a side
PNG_LEVEL = 1  # of zlib, 0 … 9; Pillow's own 6 takes five times as long for files of 0.8 times the size
XMP_KEYWORD = "XML:com.adobe.xmp"  # of a PNG file's text chunk
EXIF_LIMIT = 65_533  # bytes, of a JPEG segment
DESCRIPTION_START = f'{{"{METADATA_KEYWORD}": '  # of an ImageDescription that holds the JSON
IMAGE_DESCRIPTION, EXIF_IFD, USER_COMMENT = 0x010E, 0x8769, 0x9286  # EXIF tags


def encode_image(
    image: np.ndarray,
    texts: tuple[str, str] | None,
    format: str = "png",
    quality: int = 95,
    source: str = TRAINED,
) -> bytes:
    """A file of an image, uint8 [H, W, 3], in a format of `FORMATS`.

    `texts` are the parameters as A1111 writes them, in any Unicode that UTF-8 can express, and our JSON, in
    ASCII; None leaves both out. `source` is the image's digital source type. `quality`, 1 to 100, is for JPEG
    and WebP. JPEG has all of its colour resolution, without which it would lose the watermark. Its texts have
    64 kB: where both are longer it holds the JSON alone, and InputError if even that does not fit. InputError
    also for a side that is longer than the format's longest.
    """
    check_sides(*image.shape[:2], format)
    own: dict[str, dict[str, Any]] = {"png": {"compress_level": PNG_LEVEL}, "jpg": {"subsampling": 0}}
    options = dict(own.get(format, {}))
    if format != "png":
        options["quality"] = quality
    if format == "png":
        options["pnginfo"] = text_chunks(texts, source)
    else:
        options["xmp"] = xmp_packet(source).encode("utf-8")
        if texts is not None:
            options["exif"] = exif(texts, format)
    file = io.BytesIO()
    Image.fromarray(image).save(file, format=FORMATS[format], **options)
    return file.getvalue()


def check_sides(height: int, width: int, format: str) -> None:
    """FieldError for an image, of a size in pixels, that no file of a format of `FORMATS` can hold."""
    longest = LARGEST.get(format)
    if longest is not None and max(height, width) > longest:
        raise FieldError(
            "an image of {size} pixels does not fit into a {kind} file, whose sides have {longest:,} at "
            "most; use {format} png",
            size=f"{width}x{height}",
            kind=FORMATS[format],
            longest=longest,
        )


def text_chunks(texts: tuple[str, str] | None, source: str) -> PngInfo:
    """Both texts and the XMP packet as the text chunks of a PNG file, A1111's first."""
    chunks = PngInfo()
    if texts is not None:
        parameters, own = texts
        chunks.add_text("parameters", parameters)
        chunks.add_text(METADATA_KEYWORD, own)
    chunks.add_itxt(XMP_KEYWORD, xmp_packet(source))
    return chunks


def exif(texts: tuple[str, str], format: str) -> bytes:
    """Both texts as the EXIF block of a JPEG or WebP file; InputError if they are too long for JPEG."""
    parameters, own = texts
    description = f"{DESCRIPTION_START}{own}}}\0".encode("ascii")
    block = _exif_block(description, b"UNICODE\0" + parameters.encode("utf-16-be"))
    if format == "jpg" and len(block) > EXIF_LIMIT:
        block = _exif_block(description, None)
        if len(block) > EXIF_LIMIT:
            raise InputError(f"settings of {len(own):,} bytes do not fit into a JPEG file; use --format png")
    return block


def _exif_block(description: bytes, comment: bytes | None) -> bytes:
    """EXIF 2.3: a big-endian TIFF whose first directory has the description and a directory with the comment.

    By hand because Pillow gives the comment the type BYTE, at which piexif, and with it A1111, fails.
    """

    def entry(tag: int, kind: int, count: int, value: int) -> bytes:
        return struct.pack(">HHII", tag, kind, count, value)

    ascii_, long, undefined = 2, 4, 7
    entries = 1 if comment is None else 2
    start = 8 + 2 + 12 * entries + 4  # of what does not fit into the first directory
    directory = struct.pack(">H", entries) + entry(IMAGE_DESCRIPTION, ascii_, len(description), start)
    data = description
    if comment is not None:
        data += b"\0" * (len(data) % 2)
        inner = start + len(data)
        directory += entry(EXIF_IFD, long, 1, inner)
        data += struct.pack(">H", 1) + entry(USER_COMMENT, undefined, len(comment), inner + 2 + 12 + 4)
        data += bytes(4) + comment
    return b"Exif\0\0MM\0*" + struct.pack(">I", 8) + directory + bytes(4) + data


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """A PNG, JPEG or WebP file; InputError if it is none, damaged, or too large to be decoded safely."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about damaged EXIF blocks
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=list(FORMATS.values())) as image:
                yield image
    except InputError:
        raise
    except Exception as error:  # Pillow raises at least OSError, SyntaxError, ValueError, struct.error
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the image {path}: {reason}") from error


def read_texts(path: str | Path) -> tuple[str | None, str | None]:
    """The A1111 parameters and our JSON in an image file, each None if it has none.

    InputError if the file cannot be read.
    """
    with open_image(path) as image:
        return texts_of(image)


def texts_of(image: Image.Image) -> tuple[str | None, str | None]:
    """The texts of `read_texts` in an opened file."""
    if image.format == "PNG":
        chunks = image.text  # reads to the end of the file
        parameters, own = chunks.get("parameters"), chunks.get(METADATA_KEYWORD)
        if own or parameters:
            return parameters, own
    block = image.getexif()
    description, comment = block.get(IMAGE_DESCRIPTION), block.get_ifd(EXIF_IFD).get(USER_COMMENT)
    ours = isinstance(description, str) and description.startswith(DESCRIPTION_START)
    own = description.removeprefix(DESCRIPTION_START).removesuffix("}") if ours else None
    return _comment_text(comment) if isinstance(comment, bytes) else None, own


def read_source_type(path: str | Path) -> str | None:
    """IPTC's digital source type in an image file, None if it has none. InputError if it cannot be read."""
    with open_image(path) as image:
        chunks = image.text if image.format == "PNG" else {}
        return source_type_in(chunks.get(XMP_KEYWORD) or image.info.get("xmp"))


def _comment_text(comment: bytes) -> str | None:
    """An EXIF UserComment without its prefix, None if it is empty."""
    prefix, rest = comment[:8], comment[8:]
    if prefix == b"UNICODE\0":  # the byte order is the writer's own; most of a prompt is below U+0100
        big = rest[0::2].count(0) >= rest[1::2].count(0)
        text = rest.decode("utf-16-be" if big else "utf-16-le", "replace").removeprefix("\ufeff")
    else:
        text = (rest if prefix in (b"ASCII\0\0\0", bytes(8)) else comment).decode("utf-8", "replace")
    return text.strip("\0") or None
