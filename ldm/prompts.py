"""Prompts from a file, plain lines or JSON lines, and the batches they make."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from ldm.errors import InputError

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Line:
    """A prompt with the options of its own."""

    prompt: str
    options: tuple[tuple[str, Any], ...] = ()
    place: str = ""  # where it stands, for error messages: "prompts.jsonl, line 7"


def read_prompts(path: str) -> list[Line]:
    """The prompts of a UTF-8 text file, or of standard input for "-", in order, without blank lines.

    Plain text has one prompt per line; what is in a line stays as it is. If the first line is a JSON object,
    or the file's name ends in .jsonl or .json, each line is one, with "prompt" and options named as on the
    command line. A byte order mark and the line ends of any system are fine. InputError, with the number of
    the line, if the file cannot be read, is not UTF-8 text or JSON, or holds no prompt.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
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
        return [_json_line(line, f"{path}, line {i}") for i, line in json_lines]
    return [Line(line, place=f"{path}, line {i}") for i, line in lines]


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


def _json_line(text: str, place: str) -> Line:
    content = _json(text)
    if not isinstance(content, dict):
        raise InputError(f'--from-file {place}: no JSON object such as {{"prompt": "a red cube", "seed": 7}}')
    prompt = content.pop("prompt", None)
    if not isinstance(prompt, str):
        raise InputError(f'--from-file {place}: its "prompt" is missing or no text')
    for name, value in content.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            told = f"{json.dumps(name)[1:-1]:.50} {json.dumps(value):.50}"  # of one line, whatever they hold
            raise InputError(f"--from-file {place}: the {told} is no number or text")
    return Line(prompt, tuple(content.items()), place)


def _not_text(path: str, data: bytes, position: int) -> InputError:
    line = len((data[:position] + b".").splitlines())
    return InputError(
        f"--from-file {path}: line {line} holds the byte 0x{data[position]:02x}, which is not UTF-8 text; "
        "save the prompts as UTF-8"
    )


@dataclass(frozen=True)
class Batch:
    """Images that are sampled together."""

    prompts: tuple[str, ...]
    numbers: Sequence[int]  # of the images within the run, from 0
    seeds: tuple[int | None, ...] | None = None  # where they are not the run's seed + number
    kind: int = 0  # which of the run's settings
    position: int = 0  # of the first image within the batch that this one was cut from

    def __len__(self) -> int:
        return len(self.prompts)

    def parts(self, size: int) -> list[Batch]:
        """The same images, at most `size` at a time."""
        return [self._part(start, start + size) for start in range(0, len(self), size)]

    def _part(self, start: int, end: int) -> Batch:
        seeds = self.seeds and self.seeds[start:end]
        numbers = self.numbers[start:end]
        return Batch(self.prompts[start:end], numbers, seeds, self.kind, self.position + start)


def regroup(batches: Sequence[Batch], size: int) -> list[Batch]:
    """The same images, `size` at a time, of all rounds; those of a kind follow each other."""
    regrouped = []
    for kind, members in groupby(sorted(batches, key=lambda batch: batch.kind), lambda batch: batch.kind):
        parts = list(members)
        prompts = tuple(chain.from_iterable(part.prompts for part in parts))
        numbers = tuple(chain.from_iterable(part.numbers for part in parts))
        seeds = tuple(chain.from_iterable(part.seeds or [None] * len(part) for part in parts))
        own = seeds if any(seed is not None for seed in seeds) else None
        regrouped += Batch(prompts, numbers, own, kind).parts(size)
    return regrouped


def plan(
    prompts: Sequence[str],
    n_iter: int,
    n_samples: int,
    kinds: Sequence[int] | None = None,
    seeds: Sequence[int | None] | None = None,
) -> list[Batch]:
    """A run's batches in the original's order: all prompts, `n_samples` at a time, `n_iter` times over.

    Prompts of different `kinds` go into different batches. One with a seed of its own has the next one in the
    next round.
    """
    count, batches = len(prompts), []
    by_kind: dict[int, list[int]] = {}
    for i in range(count):
        by_kind.setdefault(kinds[i] if kinds else 0, []).append(i)
    for iteration in range(n_iter):
        for kind, members in by_kind.items():
            for start in range(0, len(members), n_samples):
                part = members[start : start + n_samples]
                own = None
                if seeds and any(seeds[i] is not None for i in part):
                    own = tuple(None if seeds[i] is None else seeds[i] + iteration for i in part)
                numbers = tuple(iteration * count + i for i in part)
                batches.append(Batch(tuple(prompts[i] for i in part), numbers, own, kind))
    return batches
