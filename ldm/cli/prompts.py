"""Prompts from a file, plain lines or JSON lines."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import InputError
from ldm.fields import Setting, listed_by_name
from ldm.pipeline.request import IMAGE_SETTINGS, ImageRequest


@dataclass(frozen=True)
class Line:
    """A prompt with the options of its own."""

    prompt: str
    options: tuple[tuple[str, Any], ...] = ()
    place: str = ""  # where it stands, for error messages: "prompts.jsonl, line 7"
    # with --expand, beside the options:
    negative: str = ""
    templates: tuple[str, str] = ("", "")  # of prompt and negative prompt, where they have been expanded


def read_prompts(path: str, known: Mapping[str, Setting] | None = None) -> list[Line]:
    """The prompts of a UTF-8 text file, or of standard input for "-", in order, without blank lines.

    Plain text has one prompt per line; what is in a line stays as it is. If the first line is a JSON object,
    or the file's name ends in .jsonl or .json, each line is one, with "prompt" and options named as on the
    command line: numbers and texts, true or false for switches, lists for lists. Images that
    it names are looked for beside the file, then in the working folder. A byte order mark and the line ends
    of any system are fine. InputError, with the number of the line, if the file cannot be read, is not UTF-8
    text or JSON, holds no prompt, gives an option twice in a line, or names an image that is not there.
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
        known = listed_by_name(ImageRequest) if known is None else known
        folder = Path() if path == "-" else Path(path).parent
        return [_json_line(line, f"{path}, line {i}", known, folder) for i, line in json_lines]
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


def _json(text: str, as_object: Callable[[list[tuple[str, Any]]], Any] = dict) -> Any:
    """What a JSON text says, None if it is none; `as_object` makes an object of its names and values."""
    try:
        return json.loads(text, object_pairs_hook=as_object)
    except (ValueError, RecursionError):
        return None


def _json_line(text: str, place: str, known: Mapping[str, Setting], folder: Path) -> Line:
    repeated: list[str] = []

    def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return dict(pairs)

    content = _json(text, as_object)
    if not isinstance(content, dict):
        raise InputError(f'--from-file {place}: no JSON object such as {{"prompt": "a red cube", "seed": 7}}')
    if repeated:  # of which JSON itself takes the last
        name = f"{json.dumps(repeated[0])[1:-1]:.50}"
        raise InputError(f"--from-file {place}: it has {name} more than once; give it once")
    prompt = content.pop("prompt", None)
    if not isinstance(prompt, str):
        raise InputError(f'--from-file {place}: its "prompt" is missing or no text')
    for name, value in content.items():
        each = known.get(name)
        if not _fits(value, each and each.kind):
            shown = f"{json.dumps(name)[1:-1]:.50} {json.dumps(value):.50}"  # of one line, whatever they hold
            raise InputError(f"--from-file {place}: the {shown} is no number or text")
        if each and each.name in IMAGE_SETTINGS and isinstance(value, str):
            content[name] = _beside(folder, value, name, place)
    options = ((name, tuple(value) if isinstance(value, list) else value) for name, value in content.items())
    return Line(prompt, tuple(options), place)


def _beside(folder: Path, name: str, option: str, place: str) -> str:
    """The path of a file, or folder, that a line names. InputError if it is nowhere."""
    if not name or os.path.isabs(name):
        return name
    path = os.path.join(folder, name)
    if os.path.exists(path):
        return path
    if os.path.exists(name):
        return name
    where = f"the working folder {os.getcwd()}"
    if folder != Path():
        where = f"{folder}, beside the prompts, or in {where}"
    raise InputError(f"--from-file {place}: {option} {name} is not there; it was looked for in {where}")


def _fits(value: Any, kind: type | None) -> bool:
    """Whether a JSON value can be that of an option of this kind; its range is the request's to check."""
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, list):
        kinds = {tuple: (int, float), list: (str,)}.get(kind, ())
        return bool(kinds) and all(type(one) in kinds for one in value)
    return isinstance(value, str | int | float)


def _not_text(path: str, data: bytes, position: int) -> InputError:
    line = len((data[:position] + b".").splitlines())
    return InputError(
        f"--from-file {path}: line {line} holds the byte 0x{data[position]:02x}, which is not UTF-8 text; "
        "save the prompts as UTF-8"
    )
