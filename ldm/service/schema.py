"""ImageRequest as JSON: read from what clients send, and described to them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.errors import InputError
from ldm.fields import Setting, listed_by_name, settings_of
from ldm.pipeline.request import IMAGE_SETTINGS, ImageRequest, image_seed
from ldm.pipeline.settings.control import Control
from ldm.pipeline.settings.passes import LANCZOS, LATENT
from ldm.pipeline.settings.text import EmbeddingFile
from ldm.prompts.lora_tags import weight_of
from ldm.sampling import catalogue
from ldm.service.errors import BadRequest, LimitExceeded, from_input_error
from ldm.service.inputs import file_of, files_in, image_of, shortened, text_of
from ldm.service.options import ServiceOptions
from ldm.service.table import with_strength

LONGEST_LIST = 1000  # entries
MOST_FILES = 8  # LoRAs, textual inversions or ControlNets of an image; a ControlNet brings an image along
LONGEST_VALUE = 80  # characters of a number, or of a name that there is
CONTROL_FIELDS = ("file", "image", "weight", "start", "end")
RECORDED_ONLY = ("prompt_template", "negative_template")  # what a command notes of its own work
FILES = {"lora": "lora_folder", "embedding": "embedding_folder", "control": "control_folder"}
NAMES = ("sampler", "schedule", "hires_upscaler")  # texts that are one of a list


def known_names() -> dict[str, Setting]:
    """The settings that clients may give by each of their names."""
    known = listed_by_name(ImageRequest)
    return {name: each for name, each in known.items() if each.name not in RECORDED_ONLY}


def request_of(values: Mapping[str, Any], options: ServiceOptions, *, task: str = "text") -> ImageRequest:
    """The request that JSON values by the settings' names stand for. BadRequest or LimitExceeded.

    Images are base64, and files plain names in the folders of the options. A value that is null is not given,
    and neither is a seed of -1. What starts from an image has the commands' strength where none is given;
    `task` is what the model does.
    """
    known, given, spelled = known_names(), {}, {}
    for name, value in values.items():
        each = known.get(name.replace("-", "_"))
        if each is None:
            near = difflib.get_close_matches(name[:80], known, 1)
            advice = f"; did you mean {near[0]}?" if near else ""
            raise BadRequest(f"{name[:80]!r} is no setting of an image{advice}")
        if each.name in spelled:
            raise BadRequest(f"{spelled[each.name]} and {name} are one setting; give one of them")
        spelled[each.name] = name
        if value is not None:
            given[each.name] = _read(each, value, name, options)
    if "prompt" not in given:
        raise BadRequest("prompt: it is missing")
    if given.get("seed") == -1:
        del given["seed"]
    check_texts(given, options.max_prompt)  # before a prompt is parsed, which takes longer than to read it
    try:
        return ImageRequest(**with_strength(given, task))
    except InputError as error:
        raise from_input_error(error, options.folders) from error


def check_texts(values: Mapping[str, Any], most: int) -> None:
    """LimitExceeded for a text of more than `most` characters, whatever it is for.

    `values` are a request's, by the settings' names.
    """
    for name, each in settings_of(ImageRequest).items():
        value = values.get(name) if each.kind in (str, list) else None
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str) and len(text) > most:
                raise LimitExceeded(f"{name}: {len(text):,} characters are more than this service's {most:,}")


def series(request: ImageRequest, count: int) -> list[ImageRequest]:
    """So many images of one request: image k has its seed and its variation seed plus k, as in a run.

    Without a seed each has the engine's.
    """
    if request.rng == "compvis":  # one stream for all images, in which none has a seed
        return [request] * count
    seeds = {name: getattr(request, name) for name in ("seed", "variation_seed")}
    return [
        request.twin(**{name: image_seed(seed, k) for name, seed in seeds.items() if seed is not None})
        for k in range(count)
    ]


def _read(each: Setting, value: Any, name: str, options: ServiceOptions) -> Any:
    """A setting's value, with what it names. The request checks types and ranges by itself."""
    is_list = isinstance(value, list | tuple)
    values, most = value if is_list else [value], MOST_FILES if each.name in FILES else LONGEST_LIST
    if len(values) > most:
        raise LimitExceeded(f"{name}: {len(values):,} entries are more than {most:,}")
    if each.name in IMAGE_SETTINGS:
        return image_of(value, name, options.max_pixels)
    if each.name in FILES:
        there = files_in(getattr(options, FILES[each.name]), name) if values else []
        if each.name == "control":
            return tuple(_control(one, name, there, options.max_pixels) for one in values)
        return tuple({"lora": _lora, "embedding": _embedding}[each.name](one, name, there) for one in values)
    if is_list and each.kind not in (list, tuple):
        raise BadRequest(f"{name}: a list is no value for it")
    for one in values:
        _check_plain(each, one, name)
    if each.name == "hires_upscaler" and value not in (LATENT, LANCZOS):
        raise BadRequest(f"{name}: this service has {LATENT} and {LANCZOS}")
    return tuple(value) if is_list else value


def _check_plain(each: Setting, value: Any, name: str) -> None:
    """BadRequest for what is neither a text nor a number, or is too long to be one that the setting takes."""
    if not isinstance(value, str | int | float):
        what = {dict: "an object", list: "a list", bytes: "a file"}.get(type(value), shortened(value))
        raise BadRequest(f"{name}: {what} is no value for it")
    if isinstance(value, str):
        text_of(value, name)
    is_free = each.kind in (str, list) and not each.choices and each.name not in NAMES
    words = str(value).replace(",", " ").split() if each.kind is tuple else [str(value)]
    if not is_free and any(len(word) > LONGEST_VALUE for word in words):
        raise BadRequest(f"{name}: {shortened(value)} is no value for it")


def _lora(value: Any, field: str, there: Sequence[Path]) -> str:
    """NAME[:WEIGHT[:TEXT_WEIGHT]] of a LoRA in the service's folder."""
    name, *weights = text_of(value, field).split(":")
    try:
        numbers = [weight_of(weight, f"{field} {value[:80]!r}") for weight in weights]
    except InputError as error:
        raise from_input_error(error) from error
    if len(numbers) > 2:
        raise BadRequest(f"{field}: {value[:80]!r} is not of the form NAME:WEIGHT:TEXT_WEIGHT")
    file = file_of(name, field, there)
    return ":".join([str(file), *weights])


def _embedding(value: Any, field: str, there: Sequence[Path]) -> str:
    """NAME[:word] of a textual inversion in the service's folder, by its path."""
    name, _, word = text_of(value, field).partition(":")
    file = file_of(name, field, there)
    text = f"{file}:{word or file.stem}"
    try:
        EmbeddingFile.parse(text)
    except InputError:
        raise BadRequest(f"{field}: {value[:80]!r}: its name has no letter or digit") from None
    return text


def _control(value: Any, field: str, there: Sequence[Path], max_pixels: int) -> Control:
    """A ControlNet in the service's folder and its image."""
    form = "{file, image, weight, start, end}"
    if not isinstance(value, dict):
        raise BadRequest(f"{field}: give objects {form}, the image in base64")
    for name in value:
        if name not in CONTROL_FIELDS:
            raise BadRequest(f"{field}: {name[:80]!r} is none of {form}")
    numbers = {}
    for name, default, low, high in (("weight", 1.0, -10, 10), ("start", 0.0, 0, 1), ("end", 1.0, 0, 1)):
        number = value.get(name, default)
        if isinstance(number, bool) or not isinstance(number, int | float) or not low <= number <= high:
            raise BadRequest(f"{field}.{name}: it is no number in {low} … {high}")
        numbers[name] = float(number)
    if numbers["start"] >= numbers["end"]:
        raise BadRequest(f"{field}: start {numbers['start']:g} is not below end {numbers['end']:g}")
    file = file_of(value.get("file"), f"{field}.file", there)
    image = image_of(value.get("image"), f"{field}.image", max_pixels)
    return Control(str(file), image, **numbers)


# The schema


def request_schema(options: ServiceOptions | None = None) -> dict[str, Any]:
    """The JSON schema of an ImageRequest, within the limits of a service's options."""
    settings = {name: each for name, each in settings_of(ImageRequest).items() if name not in RECORDED_ONLY}
    return {
        "type": "object",
        "properties": {name: _property(each, options) for name, each in settings.items()},
        "additionalProperties": False,
    }


def _property(each: Setting, options: ServiceOptions | None) -> dict[str, Any]:
    """The schema of a setting."""
    found: dict[str, Any] = {"description": _description(each)}
    if each.name in IMAGE_SETTINGS:
        found |= {"type": ["string", "null"], "contentEncoding": "base64"}
    elif each.name == "control":
        found |= {"type": "array", "items": _control_schema(), "maxItems": MOST_FILES}
    elif each.kind is tuple:
        nullable = ["array", "null"] if each.default is None else "array"
        found |= {"type": nullable, "items": {"type": "number", **_range(each, None)}}
    elif each.kind is list:
        choices = {"enum": list(each.choices)} if each.choices else {}
        found |= {"type": "array", "items": {"type": "string", **choices}}
        if each.name in FILES:
            found["maxItems"] = MOST_FILES
    else:
        plain = {bool: "boolean", int: "integer", float: "number", str: "string"}[each.kind]
        found |= {"type": [plain, "null"] if each.default is None else plain, **_range(each, options)}
        if each.choices:
            found["enum"] = list(each.choices)
        if each.name == "sampler":
            found["examples"] = list(catalogue.SAMPLERS)
        if each.name == "schedule":
            found["examples"] = list(catalogue.schedules())
        if each.name == "hires_upscaler":
            found["enum"] = [None, LATENT, LANCZOS]
    if each.default not in (None, ()):
        found["default"] = list(each.default) if isinstance(each.default, tuple) else each.default
    return found


def _range(each: Setting, options: ServiceOptions | None) -> dict[str, Any]:
    if each.kind not in (int, float, tuple):
        return {}
    low, high = each.low, each.high
    if each.name == "seed":
        low = -1  # by chance
    if options and each.name in ("steps", "hires_steps"):
        high = min(high, options.max_steps)
    if options and each.name in ("height", "width"):
        high = min(high, options.max_pixels // 8 // 8 * 8)
    found = {"minimum": low, "maximum": high}
    if each.name in ("height", "width"):
        found["multipleOf"] = 8
    return {name: value for name, value in found.items() if value is not None}


def _description(each: Setting) -> str:
    """The help of a setting, other settings by their names in JSON, its default, its further names."""
    known = known_names()

    def named(match: re.Match) -> str:
        found = known.get(match[1].replace("-", "_"))
        return found.name if found else match[1]

    text = re.sub(r"--([\w-]+)", named, each.help)
    if each.default is None and each.shown_default:
        text += f"; without it {each.shown_default}"
    others = [
        spelling for one in each.spellings if (spelling := one.lstrip("-").replace("-", "_")) != each.name
    ]
    return text + (f" (also {', '.join(others)})" if others else "")


def _control_schema() -> dict[str, Any]:
    share = {"type": "number", "minimum": 0, "maximum": 1}
    return {
        "type": "object",
        "properties": {
            "file": {"type": "string", "description": "the name of a ControlNet of this service"},
            "image": {"type": "string", "contentEncoding": "base64"},
            "weight": {"type": "number", "minimum": -10, "maximum": 10, "default": 1.0},
            "start": share | {"default": 0.0},
            "end": share | {"default": 1.0},
        },
        "required": ["file", "image"],
        "additionalProperties": False,
    }


def number_of(value: Any, field: str, low: float, high: float, *, whole: bool = False) -> Any:
    """A JSON number in a range. BadRequest that names the field."""
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        what = "whole number" if whole else "number"
        raise BadRequest(f"{field}: it is no {what} in {low:g} … {high:g}")
    return value
