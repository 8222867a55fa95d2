"""LoRAs named in a prompt, as in AUTOMATIC1111's web UI: `a castle <lora:watercolour:0.8>`."""

from __future__ import annotations

import math
import re
from functools import lru_cache

from ldm.errors import InputError

TAG = re.compile(r"<\s*(?:lora|lyco)\s*:([^<>]*)>", re.IGNORECASE)
KEPT = 16384  # prompts whose reading is kept
PLACES = ("te", "unet")  # what the numbers behind a name are for, in their order

Tags = tuple[tuple[str, float, float], ...]


def split_lora_tags(prompt: str) -> tuple[str, Tags]:
    """The prompt without its tags, and (name, weight, text weight) of each of them, in order.

    `<lora:name:0.8>` is for UNet and text encoder, `<lora:name:0.5:0.8>` 0.5 for the text encoder and 0.8 for
    the UNet, as `<lora:name:te=0.5:unet=0.8>` is; a name alone is at 1. The order is the web UI's (its
    extensions-builtin/Lora/extra_networks_lora.py). InputError for a tag without a name or a number.
    """
    return (prompt, ()) if "<" not in prompt else _split(prompt)


@lru_cache(KEPT)
def _split(prompt: str) -> tuple[str, Tags]:
    tags = tuple(_tag(match) for match in TAG.finditer(prompt))
    return (re.sub(r" {2,}", " ", TAG.sub("", prompt)).strip() if tags else prompt), tags


def _tag(match: re.Match[str]) -> tuple[str, float, float]:
    name, *rest = (word.strip() for word in match[1].split(":"))
    if not name:
        raise InputError(f"{match[0]!r} in the prompt names no LoRA: write <lora:NAME:WEIGHT>")
    weights: dict[str, float] = {}
    for place, word in enumerate(rest):
        what, equals, number = word.rpartition("=")
        what = what.strip().lower() if equals else PLACES[place] if place < len(PLACES) else ""
        if what not in PLACES:
            raise InputError(f"{match[0]!r} in the prompt: {word!r} is neither te=NUMBER nor unet=NUMBER")
        weights[what] = weight_of(number, f"{match[0]!r} in the prompt")
    text = weights.get("te", 1.0)
    return name, weights.get("unet", text), text


def weight_of(word: str, where: str) -> float:
    """The number that a LoRA's weight is, -100 to 100. InputError that begins with `where`."""
    try:
        weight = float(word)
    except ValueError:
        weight = math.nan
    if not abs(weight) <= 100:  # NaN is not
        raise InputError(f"{where}: the weight {word.strip()!r} is not a number from -100 to 100")
    return weight
