"""The settings of an image, written into its file and read back; those of other tools' files, too.

Two texts say them: all of them as JSON, for us, and those that other tools read in the form of
AUTOMATIC1111's web UI. In a PNG file they are the text chunks `stable-diffusion` and `parameters`; in JPEG
and WebP the EXIF fields ImageDescription, as `{"stable-diffusion": {…}}`, and UserComment.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import InputError
from ldm.sampling import catalogue

METADATA_KEYWORD = "stable-diffusion"  # marks the JSON as ours
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}  # file name suffixes, and Pillow's names
EXIF_LIMIT = 65_533  # bytes, of a JPEG segment
DESCRIPTION_START = f'{{"{METADATA_KEYWORD}": '  # of an ImageDescription that holds it
IMAGE_DESCRIPTION, EXIF_IFD, USER_COMMENT = 0x010E, 0x8769, 0x9286  # EXIF tags
FILE_SETTINGS = ("config", "checkpoint", "init_img")  # recorded by file name: folders are nobody's business

A1111_SCHEDULES = {
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "sgm_uniform": "SGM Uniform",
    "ays": "Align Your Steps",
}


class NoSettings(InputError):
    """A picture that carries no settings that we know to read."""


def encode_image(
    image: np.ndarray, settings: dict[str, Any] | None, format: str = "png", quality: int = 95
) -> bytes:
    """A file of an image, uint8 [H, W, 3], in a format of `FORMATS`, with its settings, if any.

    `quality`, 1 to 100, is for JPEG and WebP. JPEG has all of its colour resolution, without which it would
    lose the watermark. Its settings have 64 kB: where both texts are longer it holds the JSON alone, and
    InputError if even that does not fit.
    """
    options: dict[str, Any] = {"png": {}, "jpg": {"subsampling": 0}, "webp": {}}[format]
    if format != "png":
        options["quality"] = quality
    if settings is not None:
        options |= {"pnginfo": text_chunks(settings)} if format == "png" else {"exif": exif(settings, format)}
    file = io.BytesIO()
    Image.fromarray(image).save(file, format=FORMATS[format], **options)
    return file.getvalue()


def text_chunks(settings: dict[str, Any]) -> PngInfo:
    """Settings as the text chunks of a PNG file."""
    parameters, own = _texts(settings)
    chunks = PngInfo()
    chunks.add_text("parameters", parameters)
    chunks.add_text(METADATA_KEYWORD, own)
    return chunks


def exif(settings: dict[str, Any], format: str) -> bytes:
    """Settings as the EXIF block of a JPEG or WebP file; InputError if they are too long for JPEG."""
    parameters, own = _texts(settings)
    description = f"{DESCRIPTION_START}{own}}}\0".encode("ascii")
    block = _exif_block(description, b"UNICODE\0" + parameters.encode("utf-16-be"))
    if format == "jpg" and len(block) > EXIF_LIMIT:
        block = _exif_block(description, None)
        if len(block) > EXIF_LIMIT:
            raise InputError(f"settings of {len(own):,} bytes do not fit into a JPEG file; use --format png")
    return block


def _texts(settings: dict[str, Any]) -> tuple[str, str]:
    """Settings without the user's folders, as A1111 writes them and as JSON."""
    settings = settings | {key: PurePath(settings[key]).name for key in FILE_SETTINGS if settings.get(key)}
    # A prompt typed in another encoding than UTF-8 holds lone surrogates, which JSON escapes and PNG refuses.
    parameters = a1111_parameters(settings).encode("utf-8", "replace").decode("utf-8")
    return parameters, json.dumps(settings)


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
def open_picture(path: str | Path) -> Iterator[Image.Image]:
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
        raise InputError(f"cannot read the picture {path}: {reason}") from error


def read_texts(path: str | Path) -> tuple[str | None, str | None]:
    """Our JSON and the A1111 text in a picture, each None if it has none; InputError if it cannot be read."""
    with open_picture(path) as image:
        if image.format == "PNG":
            chunks = image.text  # reads to the end of the file
            own, parameters = chunks.get(METADATA_KEYWORD), chunks.get("parameters")
            if own or parameters:
                return own, parameters
        block = image.getexif()
        description, comment = block.get(IMAGE_DESCRIPTION), block.get_ifd(EXIF_IFD).get(USER_COMMENT)
    ours = isinstance(description, str) and description.startswith(DESCRIPTION_START)
    own = description.removeprefix(DESCRIPTION_START).removesuffix("}") if ours else None
    return own, _comment_text(comment) if isinstance(comment, bytes) else None


def _comment_text(comment: bytes) -> str | None:
    """An EXIF UserComment without its prefix, None if it is empty."""
    prefix, rest = comment[:8], comment[8:]
    if prefix == b"UNICODE\0":  # the byte order is the writer's own; most of a prompt is below U+0100
        big = rest[0::2].count(0) >= rest[1::2].count(0)
        text = rest.decode("utf-16-be" if big else "utf-16-le", "replace").removeprefix("\ufeff")
    else:
        text = (rest if prefix in (b"ASCII\0\0\0", bytes(8)) else comment).decode("utf-8", "replace")
    return text.strip("\0") or None


def _parse_json(text: str) -> dict[str, Any] | None:
    """The object that a JSON text is, None if it is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """The settings that we wrote into a picture, as they were given when it was saved; None if it has none.

    InputError if the picture, or the text that holds them, cannot be read.
    """
    text, _ = read_texts(path)
    settings = None if text is None else _parse_json(text)
    if text is not None and settings is None:
        raise InputError(f"the settings in {path} are damaged: they are no JSON object")
    return settings


def settings_from_picture(path: str | Path) -> dict[str, Any]:
    """The settings in a picture: ours if they are there and whole, else those of its A1111 text.

    InputError if it cannot be read or a value is malformed, `NoSettings` if it carries none.
    """
    own, parameters = read_texts(path)
    if own is not None and (settings := _parse_json(own)) is not None:
        return settings
    if parameters is None or not parameters.strip():
        raise NoSettings(f"{path} carries no settings: neither this project's nor an A1111 text")
    try:
        return parse_a1111(parameters)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def a1111_parameters(settings: dict[str, Any]) -> str:
    """Settings as the text that AUTOMATIC1111's web UI writes and many tools read.

    Needs prompt, width and height; any other setting that is missing or None is left out. Source:
    `create_infotext` in its modules/processing.py and `quote` in modules/infotext_utils.py.
    """
    sampler, schedule, checkpoint = (settings.get(key) for key in ("sampler", "schedule", "checkpoint"))
    known = catalogue.SAMPLERS.get(sampler)
    model = (
        PurePath(checkpoint).name.removesuffix(".ckpt").removesuffix(".safetensors") if checkpoint else None
    )
    fields = {
        "Steps": settings.get("steps"),
        "Sampler": known.aliases[0] if known else sampler,
        "Schedule type": A1111_SCHEDULES.get(schedule),
        "CFG scale": settings.get("scale"),
        "Seed": settings.get("seed"),
        "Size": f"{settings['width']}x{settings['height']}",
        "Model hash": settings.get("model_hash"),
        "Model": model,
        "Variation seed": settings.get("variation_seed"),
        "Variation seed strength": settings.get("variation_strength"),
        "Denoising strength": settings.get("strength"),
        "Eta": settings.get("eta"),
        "Version": settings.get("version"),
    }
    lines = [settings["prompt"]]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in fields.items() if value is not None))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search("[,:\n]", text) else text


# --- and back

A1111_FIELDS = {  # the web UI's names, ours, and what the values are
    "Steps": ("steps", int),
    "Sampler": ("sampler", str),
    "Schedule type": ("schedule", str),
    "CFG scale": ("scale", float),
    "Seed": ("seed", int),
    "Size": ("size", str),
    "Model hash": ("model_hash", str),
    "Model": ("checkpoint", str),
    "Variation seed": ("variation_seed", int),
    "Variation seed strength": ("variation_strength", float),
    "Denoising strength": ("strength", float),
    "Eta": ("eta", float),
    "Version": ("version", str),
}
_FIELD = re.compile(r'[ \t]*(\w[\w /-]{0,60}):[ \t]*("(?:\\.|[^"\\])*"[ \t]*(?=,|$)|[^,]*)(?:,|$)')
NEGATIVE_PROMPT = "Negative prompt:"


def parse_a1111(text: str) -> dict[str, Any]:
    """Settings, under our names, out of a text as `a1111_parameters`, or another tool, writes it.

    Prompt and negative prompt may have many lines; the settings are the last line that begins with one. A
    sampler's name becomes ours, and gives the schedule that it implies ("DPM++ 2M Karras"); a sampler or
    schedule that we do not have keeps its name. Fields of which we know nothing come as text under `other`.
    InputError if the value of a known one is malformed.
    """
    lines = text.split("\n")
    at = next((i for i in reversed(range(len(lines))) if _begins_settings(lines[i])), None)
    words, fields = (lines, {}) if at is None else (lines[:at], _fields(lines[at]))
    negative = next((i for i, line in enumerate(words) if line.startswith(NEGATIVE_PROMPT)), len(words))
    settings: dict[str, Any] = {"prompt": "\n".join(words[:negative])}
    if negative < len(words):
        first = words[negative].removeprefix(NEGATIVE_PROMPT).removeprefix(" ")
        settings["negative_prompt"] = "\n".join([first, *words[negative + 1 :]])
    for name, value in fields.items():
        if name in A1111_FIELDS:
            key, kind = A1111_FIELDS[name]
            settings[key] = _value(name, value, kind)
        else:
            settings.setdefault("other", {})[name] = value
    if "size" in settings:
        match = re.fullmatch(r"([0-9]{1,6}) ?x ?([0-9]{1,6})", size := settings.pop("size"))
        if not match:
            raise InputError(f"the A1111 text has Size: {_short(size)}, which is not WIDTHxHEIGHT")
        settings |= {"width": int(match[1]), "height": int(match[2])}
    if any(name.startswith("Hires ") for name in fields):
        settings.pop("strength", None)  # of a second pass, not of an init image
    return settings | _sampling(settings.get("sampler"), settings.pop("schedule", None))


def _begins_settings(line: str) -> bool:
    match = _FIELD.match(line)
    return match is not None and match[1] in A1111_FIELDS


def _fields(line: str) -> dict[str, str]:
    """`name: value, …` with values in quotes where they have commas; of a name given twice the first."""
    fields: dict[str, str] = {}
    at = 0
    while at < len(line):
        match = _FIELD.match(line, at)
        if match:
            fields.setdefault(match[1], _unquoted(match[2].strip()))
            at = match.end()
        else:
            at = (line.find(",", at) + 1) or len(line)
    return fields


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        with suppress(ValueError):
            return str(json.loads(value, strict=False))
    return value


def _value(name: str, text: str, kind: type) -> Any:
    try:
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise InputError(f"the A1111 text has {name}: {_short(text)}, which is not {what}") from None
    return value


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _sampling(sampler: str | None, schedule: str | None) -> dict[str, str]:
    """The web UI's names of sampler and schedule as ours; its "Automatic" is none."""
    found: dict[str, str | None] = {"sampler": sampler}
    if sampler is not None:
        with suppress(InputError):
            found["sampler"], found["schedule"] = catalogue.resolve(sampler)
    if schedule is not None and schedule.lower() != "automatic":
        names = {"Uniform": "linspace"} | {theirs: ours for ours, theirs in A1111_SCHEDULES.items()}
        found["schedule"] = schedule
        with suppress(InputError):
            found["schedule"] = names.get(schedule) or catalogue.resolve_schedule(schedule)
    return {key: value for key, value in found.items() if value is not None}
