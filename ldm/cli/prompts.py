"""Prompts from a file, plain lines or JSON lines."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import InputError
from ldm.fields import listed_by_name
from ldm.pipeline.request import ImageRequest


@dataclass(frozen=True)
class Line:
    """A prompt with the options of its own."""

    prompt: str
    options: tuple[tuple[str, Any], ...] = ()
    place: str = ""  # where it stands, for error messages: "prompts.jsonl, line 7"


def read_prompts(path: str, owner: type[ImageRequest] = ImageRequest) -> list[Line]:
    """The prompts of a UTF-8 text file, or of standard input for "-", in order, without blank lines.

    Plain text has one prompt per line; what is in a line stays as it is. If the first line is a JSON object,
    or the file's name ends in .jsonl or .json, each line is one, with "prompt" and options named as on the
    command line: numbers and texts, true or false for `owner`'s switches, lists for its lists of numbers. A
    byte order mark and the line ends of any system are fine. InputError, with the number of the line, if the
    file cannot be read, is not UTF-8 text or JSON, or holds no prompt.
    """
    try:
        data = _standard_input() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"--from-file {path}: {error.strerror}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(path, data, error.start) from error
    if "\0" in text:
        raise _not_text(path, data, data.index(0))

    lines = _numbered(text.splitlines())
    if not lines:
        raise InputError(f"--from-file {path}: no prompt in it; write one per line")
    # In JSON text, what Unicode has for line ends beside these stands for itself.
    json_lines = _numbered(re.split(r"\r\n|\n|\r", text))
    if path.endswith((".jsonl", ".json")) or isinstance(_json(json_lines[0][1]), dict):
        kinds = {name: each.kind for name, each in listed_by_name(owner).items()}
        return [_json_line(line, f"{path}, line {i}", kinds) for i, line in json_lines]
    return [Line(line, place=f"{path}, line {i}") for i, line in lines]


def _standard_input() -> bytes:
    if sys.stdin is None:  # closed by the shell
        raise InputError("--from-file -: standard input is closed")
    return sys.stdin.buffer.read()


def _numbered(lines: list[str]) -> list[tuple[int, str]]:
    """Numbers, from 1, and content of lines that are not blank."""
    # Files put together with `cat` have byte order marks in the middle, too.
    numbered = [(i, line.removeprefix("\ufeff")) for i, line in enumerate(lines, 1)]
    return [(i, line) for i, line in numbered if line.strip()]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_line(text: str, place: str, kinds: Mapping[str, type]) -> Line:
    content = _json(text)
    if not isinstance(content, dict):
        raise InputError(f'--from-file {place}: no JSON object such as {{"prompt": "a red cube", "seed": 7}}')
    prompt = content.pop("prompt", None)
    if not isinstance(prompt, str):
        raise InputError(f'--from-file {place}: its "prompt" is missing or no text')
    for name, value in content.items():
        if not _fits(value, kinds.get(name)):
            shown = f"{json.dumps(name)[1:-1]:.50} {json.dumps(value):.50}"  # of one line, whatever they hold
            raise InputError(f"--from-file {place}: the {shown} is no number or text")
    options = ((name, tuple(value) if isinstance(value, list) else value) for name, value in content.items())
    return Line(prompt, tuple(options), place)


def _fits(value: Any, kind: type | None) -> bool:
    """Whether a JSON value can be that of an option of this kind; its range is the request's to check."""
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, list):
        return kind is tuple and all(type(one) in (int, float) for one in value)
    return isinstance(value, str | int | float)


def _not_text(path: str, data: bytes, position: int) -> InputError:
    line = len((data[:position] + b".").splitlines())
    return InputError(
        f"--from-file {path}: line {line} holds the byte 0x{data[position]:02x}, which is not UTF-8 text; "
        "save the prompts as UTF-8"
    )
