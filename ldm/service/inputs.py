"""What clients send: JSON, and images in it as base64. Never a path, never an address."""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from starlette.concurrency import run_in_threadpool

from ldm.service.errors import BadRequest, LimitExceeded, ServiceError
from ldm.service.table import json_of

if TYPE_CHECKING:
    from fastapi import Request

FORMATS = ("PNG", "JPEG", "WEBP")
DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.=+-]+)*?;base64,", re.IGNORECASE)
SPACE = str.maketrans("", "", " \t\r\n")
LARGE = 65_536  # bytes of JSON above which it is read in a thread
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")  # of files that clients may name


async def json_object(http: Request) -> dict[str, Any]:
    """The JSON object that is a request's body. ServiceError that says where it is malformed."""
    body = await http.body()
    found = await run_in_threadpool(parsed, body) if len(body) > LARGE else parsed(body)
    if not isinstance(found, dict):
        raise BadRequest('the body is no JSON object, such as {"prompt": "a red cube"}')
    return found


def parsed(body: bytes) -> Any:
    """JSON of a request, in UTF-8, without NaN and infinities. ServiceError of status 400."""
    try:
        return json_of(body.decode("utf-8-sig"))
    except UnicodeDecodeError:
        why = "it is not UTF-8"
    except json.JSONDecodeError as error:
        why = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except RecursionError:
        why = "it is nested too deeply"
    except ValueError as error:  # of NaN and infinities, and of integers of thousands of digits
        why = str(error) if str(error).endswith("no JSON") else "a number in it is too long or too large"
    raise ServiceError(f"the body is no JSON: {why}", status=400, code="invalid_json")


def text_of(value: Any, field: str) -> str:
    """A text that UTF-8 can express, without NUL characters. BadRequest that names the field."""
    if not isinstance(value, str):
        raise BadRequest(f"{field}: {shortened(value)} is no text")
    if "\0" in value:
        raise BadRequest(f"{field}: the text has a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRequest(f"{field}: the text has half of a surrogate pair, which is no character") from None
    return value


def image_of(text: Any, field: str, max_pixels: int) -> Image.Image:
    """The image of a PNG, JPEG or WebP file in base64, plain or as a data: URL; it is decoded.

    BadRequest that names the field for anything else, and LimitExceeded for more than `max_pixels` pixels,
    by the file's header, before they are decoded.
    """
    if not isinstance(text, str):
        raise BadRequest(f"{field}: {shortened(text)} is no text; give the image's file in base64")
    return decoded(_bytes_of(text, field), field, max_pixels)


def decoded(data: bytes, field: str, max_pixels: int) -> Image.Image:
    """The image in a file's bytes, as `image_of` has it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF blocks
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise LimitExceeded(_too_large(field, f"{width}x{height}", max_pixels))
                image.load()
                return image.copy() if getattr(image, "n_frames", 1) > 1 else image
    except ServiceError:
        raise
    except Image.DecompressionBombError:
        raise LimitExceeded(_too_large(field, "the image", max_pixels)) from None
    except Image.UnidentifiedImageError:
        raise BadRequest(f"{field}: it is no image; {', '.join(FORMATS)} files can be read") from None
    except Exception:  # the decoders raise anything on a damaged file
        raise BadRequest(f"{field}: the image is damaged or cut off") from None


def _too_large(field: str, what: str, most: int) -> str:
    return f"{field}: {what} has more pixels than the {most:,} that this service takes"


def _bytes_of(text: str, field: str) -> bytes:
    if text[:5].lower() == "data:":
        match = DATA_URL.match(text[:200])
        if not match:
            raise BadRequest(f"{field}: the data: URL is not of the form data:image/png;base64,…")
        text = text[match.end() :]
    text = text.translate(SPACE)
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise BadRequest(
            f"{field}: it is no base64; give the image's file in base64, not its name or its address"
        )
    return data


def files_in(folder: str | None, field: str) -> list[Path]:
    """The weights that clients may name, in a folder or below. BadRequest without one."""
    if folder is None:
        raise BadRequest(f"{field}: this service has none")
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)


def file_of(name: Any, field: str, there: Sequence[Path]) -> Path:
    """The file of a plain name, suffix or not, among those there are. BadRequest that names the choices."""
    name = text_of(name, field)
    for path in there:
        if name in (path.name, path.stem):
            return path
    known = ", ".join(list(dict.fromkeys(path.stem for path in there))[:20]) or "none"
    raise BadRequest(f"{field}: there is no {shortened(name)}; this service has {known}")


def shortened(value: Any) -> str:
    """A client's value as a part of a message: on one line, and no longer than it has to be."""
    try:
        text = "a file" if isinstance(value, bytes) else json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:79]}…"
