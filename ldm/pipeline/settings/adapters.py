"""Files that change the networks: LoRA and its kin."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePath
from typing import Any, NamedTuple

from ldm.errors import InputError, ValueFieldError
from ldm.fields import setting
from ldm.pipeline.settings import without_none
from ldm.prompts.lora_tags import split_lora_tags, weight_of

SUFFIXES = ("safetensors", "ckpt", "pt", "pth", "bin")
WITH_SUFFIX = re.compile(rf"(.*\.(?:{'|'.join(SUFFIXES)}))((?::[^:]*)*)", re.IGNORECASE | re.DOTALL)
# without one, what follows a colon is a weight unless the colon is a drive's or a folder comes after it
WITHOUT_SUFFIX = re.compile(r"((?:[A-Za-z]:[\\/])?.*?)((?::[^:\\/]*)*)", re.DOTALL)


class NamedLora(NamedTuple):
    """A LoRA by its file, or its name in the folder of LoRAs, with its weights in UNet and text encoder."""

    file: str
    weight: float = 1.0
    text_weight: float = 1.0


@lru_cache(4096)
def parse_lora(text: str) -> NamedLora:
    """`FILE[:weight[:text_weight]]`; the file's path may have colons. InputError."""
    match = WITH_SUFFIX.fullmatch(text) or WITHOUT_SUFFIX.fullmatch(text)
    file, numbers = match[1].strip(), match[2].split(":")[1:]
    if not file:
        raise InputError(f"{text!r} names no file: give FILE, FILE:WEIGHT or FILE:WEIGHT:TEXT_WEIGHT")
    if len(numbers) > 2:
        raise InputError(f"{text!r} has {len(numbers)} weights: give one, or one for the UNet and the text's")
    weights = [weight_of(number, repr(text)) for number in numbers]
    return NamedLora(file, *weights) if len(weights) != 1 else NamedLora(file, weights[0], weights[0])


def a1111_loras(texts: Iterable[str]) -> str:
    """LoRAs as tags to be put behind a prompt, as the web UI has them."""
    named = map(parse_lora, texts)
    return "".join(f" <lora:{_stem(one.file)}:{one.text_weight:.12g}:{one.weight:.12g}>" for one in named)


def _stem(file: str) -> str:
    match = WITH_SUFFIX.fullmatch(PurePath(file).name)
    return PurePath(match[1]).stem if match else PurePath(file).name


def from_a1111_loras(prompt: str) -> dict[str, Any]:
    """The settings `prompt`, without tags, and `lora` of a prompt with tags; what is malformed stays text."""
    try:
        text, tags = split_lora_tags(prompt)
    except InputError:
        return {"prompt": prompt}
    loras = tuple(f"{name}:{weight:.12g}:{text_weight:.12g}" for name, weight, text_weight in tags)
    return {"prompt": text, "lora": loras} if loras else {"prompt": prompt}


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class AdapterSettings:
    """Files that change the networks: LoRA and its kin."""

    lora: tuple[str, ...] = setting(
        (),
        "a LoRA, LoCon, LoHa, LoKr or DoRA with its weight, and another one for the text encoder; may be "
        "given several times; a name is looked for in --lora_folder; none: not those of --like, but "
        "those that the prompt names stay",
        metavar="FILE[:WEIGHT[:TEXT_WEIGHT]]",
        default_text="",
        group="model",
        recorded=False,
    )

    def check_adapters(self) -> None:
        """FieldError for a malformed value."""
        without_none(self, "lora")
        for text in self.lora:
            try:
                parse_lora(text)
            except InputError as error:
                raise ValueFieldError("lora", str(error)) from None

    @property
    def loras(self) -> tuple[NamedLora, ...]:
        """Those of the setting and those that the prompt names. InputError for a malformed tag."""
        named = tuple(map(parse_lora, self.lora))
        if self.prompt_syntax == "a1111":
            named += tuple(NamedLora(*tag) for tag in split_lora_tags(self.prompt)[1])
        return named
