"""Choices and wildcards in prompts: `a {red|blue} cube`, `__colours__` for a line of colours.txt.

The syntax is that of the dynamic-prompts extension
(https://github.com/adieyal/sd-dynamic-prompts/blob/main/docs/SYNTAX.md), without its variables. A prompt is
read once into a `Template`, which is checked as a whole, files included: how long its prompts can get and how
many there are is known before any of them is made, so that no template runs away.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, permutations, product
from pathlib import Path
from random import Random
from typing import Any

from ldm.errors import FieldError, InputError

MAX_DEPTH = 50  # choices and files within each other
MAX_PICKS = 100  # options that one choice joins
MAX_SIZE = 20_000  # characters, and steps, of one expansion
MAX_STARS = 4  # in the name of a wildcard
MAX_COUNT = 10**18  # of combinations: more are counted as so many
SHOWN = 3  # names in an error

_TEMPLATE = re.compile(r"[{}\\]|__")  # what no plain prompt has
_TOKEN = re.compile(
    r"(?P<escape>\\(?:__|.))|__(?!_)(?P<name>[\w*](?:[\w .*/-]{0,200}?(?:[^\W_]|\*))??)__"
    r"|(?P<variable>\$\{)|[{}|\[\]]",
    re.S,
)
_HEAD = re.compile(r"(?=[0-9-])(?P<low>[0-9]*)(?P<to>-(?P<high>[0-9]*))?\$\$(?:(?P<between>[^{}$]*)\$\$)?")
_WEIGHT = re.compile(r"\s*(?P<weight>[\w.+-]+)::")
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+")


@dataclass(frozen=True)
class Text:
    """Parts in a row: literal texts and choices."""

    parts: tuple[str | Choice, ...]

    @cached_property
    def size(self) -> int:
        """At least the characters of any expansion, and the steps that it takes."""
        return 1 + sum(len(part) if isinstance(part, str) else part.size for part in self.parts)

    @cached_property
    def depth(self) -> int:
        return max((part.depth for part in self.parts if not isinstance(part, str)), default=0)

    @cached_property
    def count(self) -> int:
        """Number of combinations, at most MAX_COUNT; two of them may read the same."""
        counts = (part.count for part in self.parts if not isinstance(part, str))
        return min(MAX_COUNT, math.prod(counts))

    def draw(self, random: Random) -> str:
        return "".join(part if isinstance(part, str) else part.draw(random) for part in self.parts)

    def all(self) -> Iterator[str]:
        """Every combination; what stands last changes first."""
        lists = [[part] if isinstance(part, str) else list(part.all()) for part in self.parts]
        return map("".join, product(*lists))


@dataclass(frozen=True, eq=False)
class Choice:
    """`low` to `high` of the options, each at most once and in any order, with `between` between them."""

    options: Sequence[Text]
    weights: Sequence[float]
    low: int = 1
    high: int = 1
    between: str = ", "
    is_file: bool = False  # the options are the lines of wildcard files

    @cached_property
    def size(self) -> int:
        longest = max((option.size for option in self.options), default=0)
        return 1 + self.high * (longest + len(self.between))

    @cached_property
    def depth(self) -> int:
        return 1 + max((option.depth for option in self.options), default=0)

    @cached_property
    def count(self) -> int:
        subsets = [1] + [0] * self.high  # by their size: the elementary symmetric polynomials of the counts
        for option in self.options:
            for n in range(self.high, 0, -1):
                subsets[n] = min(MAX_COUNT, subsets[n] + subsets[n - 1] * option.count)
        return min(MAX_COUNT, sum(subsets[n] * math.factorial(n) for n in range(self.low, self.high + 1)))

    @cached_property
    def _cumulative(self) -> list[float]:
        return list(accumulate(self.weights))

    def draw(self, random: Random) -> str:
        # Of the generator's methods, random() alone gives the same numbers in every version of Python.
        n = self.low + int(random.random() * (self.high - self.low + 1))
        if n == 1:
            return self.options[_pick(self._cumulative, random)].draw(random)
        options, weights, found = list(self.options), list(self.weights), []
        for _ in range(n):
            i = _pick(list(accumulate(weights)), random)
            found.append(options.pop(i).draw(random))
            weights.pop(i)
        return self.between.join(found)

    def all(self) -> Iterator[str]:
        lists = [list(option.all()) for option in self.options]
        for n in range(self.low, self.high + 1):
            for picked in permutations(lists, n):
                yield from map(self.between.join, product(*picked))


def _pick(cumulative: Sequence[float], random: Random) -> int:
    """A number by its weight; rounding must not lead behind the last one."""
    return min(bisect_right(cumulative, random.random() * cumulative[-1]), len(cumulative) - 1)


@dataclass(frozen=True)
class Template:
    """A prompt with choices and wildcards, or a plain one, of which the only expansion is the prompt."""

    text: str
    parsed: Text

    @property
    def is_plain(self) -> bool:
        """Whether it means itself."""
        return self.parsed.parts == (self.text,)

    @property
    def count(self) -> int:
        """Number of combinations, at most MAX_COUNT."""
        return self.parsed.count

    def draw(self, random: Random) -> str:
        """One expansion; the generator's state decides which, in every version of Python."""
        return self.parsed.draw(random)

    def all(self) -> list[str]:
        """Every different expansion in order: what stands last changes first. See `count`."""
        return list(dict.fromkeys(self.parsed.all()))


class Wildcards:
    """The text files of a folder, and of the folders in it, as lists that prompts draw from.

    `__name__` is a line of name.txt, `__folder/name__` one of a file in a folder, and * in a name stands for
    anything but /. Lines are templates themselves and may have a weight (`0.5::red`). Blank ones, and those
    that begin with #, are left out. InputError if the folder is not there.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and not self.folder.is_dir():
            what = "is a file; give a folder of text files" if self.folder.exists() else "is not there"
            raise FieldError("{wildcards} {folder}: the folder {what}", folder=self.folder, what=what)
        self._templates: dict[str, Template] = {}
        self._choices: dict[str, Choice] = {}  # by the name in the template
        self._open: list[str] = []  # names of the files that are being read, one because of the one before

    def template(self, text: str) -> Template:
        """A prompt as a template. InputError for malformed syntax, with its position, and for its files."""
        if text not in self._templates:
            if _TEMPLATE.search(text) is None:
                self._templates[text] = Template(text, Text((text,)))
            else:
                parsed = self._parse(text)
                if parsed.size > MAX_SIZE:
                    raise InputError(
                        f"{_short(text)} can become longer than {MAX_SIZE:,} characters; take fewer wildcards"
                    )
                self._templates[text] = Template(text, parsed)
        return self._templates[text]

    @cached_property
    def files(self) -> dict[str, Path]:
        """The folder's text files by their names as wildcards, in order."""
        found = {}
        for where, _, names in os.walk(self.folder):
            for name in names:
                if name.endswith(".txt"):
                    path = Path(where) / name
                    found[path.relative_to(self.folder).as_posix().removesuffix(".txt")] = path
        return dict(sorted(found.items()))

    def _parse(self, text: str) -> Text:
        """A text as its parts. Nothing recurs but wildcard files."""
        groups = [_Group(text, 0)]
        at = 0
        for token in _tokens(text):
            group = groups[-1]
            group.add(text[max(at, group.begin) : token.start])
            at = token.end
            if token.what == "escape":
                group.add(token.value)
            elif token.what == "wildcard":
                group.add(self._wildcard(token.value, text, token.start))
            elif token.what == "open":
                groups.append(_Group(text, token.end, token))
            elif token.what == "bar":
                group.end_option()
                group.begin_option(token.end)
            else:
                group.end_option()
                groups.pop()
                groups[-1].add(group.choice())
        groups[0].add(text[at:])
        found = Text(tuple(groups[0].parts))
        if found.depth > MAX_DEPTH:
            raise InputError(f"{_short(text)}: more than {MAX_DEPTH} choices and files within each other")
        return found

    def _wildcard(self, name: str, text: str, at: int) -> Choice:
        if name not in self._choices:
            if self.folder is None:
                raise FieldError(
                    "__{name}__ is a wildcard, and there are none without {wildcards} DIR: {where}",
                    name=name,
                    where=pointed(text, at),
                )
            lines = [line for file in self._matching(name, text, at) for line in self._read(file)]
            options, weights = zip(*lines, strict=True)
            self._choices[name] = Choice(options, weights, is_file=True)
        return self._choices[name]

    def _matching(self, name: str, text: str, at: int) -> list[str]:
        """The files that a name stands for, by name. InputError with the nearest ones if there is none."""
        found = [name] if name in self.files else []
        if name.count("*") > MAX_STARS:
            raise InputError(f"more than {MAX_STARS} stars in a wildcard's name: {pointed(text, at)}")
        if "*" in name:
            pattern = ".*".join("[^/]*".join(map(re.escape, part.split("*"))) for part in name.split("**"))
            found = [file for file in self.files if re.fullmatch(pattern, file)]
        if found:
            return found
        if not self.files:
            raise FieldError("{wildcards} {folder}: no .txt file in it", folder=self.folder)
        near = _nearest(name, self.files)
        known = near or [*list(self.files)[:SHOWN], *["…"] * (len(self.files) > SHOWN)]
        raise InputError(
            f"no wildcard file {name}.txt in {self.folder}; {'the nearest are' if near else 'there are'} "
            f"{', '.join(known)}: {pointed(text, at)}"
        )

    def _read(self, name: str) -> list[tuple[Text, float]]:
        """The lines of a file with their weights. `_FileError`s for it, and for the files that it names."""
        path = self.files[name]
        if name in self._open:
            circle = " -> ".join([*self._open[self._open.index(name) :], name])
            raise _FileError(f"circular wildcards in {self.folder}: {circle}")
        if len(self._open) >= MAX_DEPTH:
            raise _FileError(f"{path}: more than {MAX_DEPTH} wildcard files within each other")
        self._open.append(name)
        lines: list[tuple[Text, float]] = []
        try:
            for number, line in _lines(path):
                try:
                    weight, begin = _weight(line, 0)
                    if weight:
                        lines.append((self._parse(line[begin:]), weight))
                except _FileError:
                    raise
                except InputError as error:
                    raise _FileError(f"{path}, line {number}: {error}") from error
        finally:
            self._open.pop()
        if not lines:
            raise _FileError(f"the wildcard file {path} has no line to choose from")
        return lines


class _FileError(InputError):
    """An InputError that names its wildcard file."""


@dataclass(frozen=True)
class _Token:
    start: int
    end: int
    what: str  # escape, wildcard, open, bar or close
    value: Any = None  # the escape's meaning, the wildcard's name, or the match of what follows {


def _tokens(text: str) -> list[_Token]:
    """What is no literal text, in order. A | within [ ], as in the prompt language's [a|b], is literal.

    InputError for braces without their other half, and for more than MAX_DEPTH within each other.
    """
    found: list[_Token] = []
    open_at: list[int] = []  # of each { and [ that is not closed yet
    bars: list[int] = []  # of each | whose group is not closed yet
    braces = at = 0
    while match := _TOKEN.search(text, at):
        start, at = match.span()
        mark = text[start]
        if match["variable"]:
            why = r"${…} is a variable, of which there are none here ($\{ stands for itself)"
            raise InputError(f"{why}: {pointed(text, start)}")
        if escape := match["escape"]:
            if escape[1:] in ("{", "}", "|", "__"):
                found.append(_Token(start, at, "escape", escape[1:]))
        elif name := match["name"]:
            found.append(_Token(start, at, "wildcard", name))
        elif mark == "{":
            braces += 1
            if braces > MAX_DEPTH:
                raise InputError(f"more than {MAX_DEPTH} braces within each other: {pointed(text, start)}")
            head = _HEAD.match(text, at)
            at = head.end() if head else at
            found.append(_Token(start, at, "open", head))
            open_at.append(start)
        elif mark == "}":
            while open_at and text[open_at[-1]] == "[":
                open_at.pop()
            if not open_at:
                raise InputError(f"a }} without its {{ (\\}} stands for itself): {pointed(text, start)}")
            begin = open_at.pop()
            braces -= 1
            found.append(_Token(start, at, "close"))
            while bars and bars[-1] > begin:
                found.append(_Token(bars[-1], bars.pop() + 1, "bar"))
        elif mark == "[":
            open_at.append(start)
        elif mark == "]":
            if open_at and text[open_at[-1]] == "[":
                begin = open_at.pop()
                while bars and bars[-1] > begin:
                    bars.pop()
        elif braces:
            bars.append(start)
    if braces:
        first = next(start for start in open_at if text[start] == "{")
        raise InputError(f"a {{ without its }} (\\{{ stands for itself): {pointed(text, first)}")
    return sorted(found, key=lambda token: token.start)


class _Group:
    """What stands between braces, or the whole text, while it is read. `begin` is where literal text may."""

    def __init__(self, text: str, start: int, braces: _Token | None = None):
        self.text, self.braces = text, braces
        self.options: list[Text] = []
        self.weights: list[float] = []
        self.begin_option(start)

    def begin_option(self, at: int) -> None:
        self.parts: list[str | Choice] = []
        self.weight, self.begin = (1.0, at) if self.braces is None else _weight(self.text, at)

    def add(self, part: str | Choice) -> None:
        if isinstance(part, str) and self.parts and isinstance(self.parts[-1], str):
            self.parts[-1] += part
        elif part != "":
            self.parts.append(part)

    def end_option(self) -> None:
        if self.weight:
            self.options.append(Text(tuple(self.parts)))
            self.weights.append(self.weight)

    def choice(self) -> Choice:
        """All options have ended. InputError if none has a weight, or their number is out of order."""
        options, weights, start = self.options, self.weights, self.braces.start
        if not options:
            raise InputError(f"all options have the weight 0: {pointed(self.text, start)}")
        head = self.braces.value
        if head is None:
            return Choice(options, weights)
        if len(options) == 1 and len(options[0].parts) == 1:
            (only,) = options[0].parts
            if isinstance(only, Choice) and only.is_file:  # {2$$__name__}: two of the file's lines
                options, weights = only.options, only.weights
        low = _whole(head["low"]) if head["low"] else 1
        high = low if not head["to"] else _whole(head["high"]) if head["high"] else len(options)
        if head["to"] and head["high"] and low > high:
            raise InputError(
                f"{low}-{high}$$: the first number is above the second: {pointed(self.text, start)}"
            )
        low, high = min(low, len(options)), min(high, len(options))
        if high > MAX_PICKS:
            raise InputError(f"{high} options at once, {MAX_PICKS} are the most: {pointed(self.text, start)}")
        between = ", " if head["between"] is None else head["between"]
        return Choice(options, weights, min(low, high), high, between)


def _weight(text: str, at: int) -> tuple[float, int]:
    """The weight of an option that begins there, 1 without one, and where its text begins."""
    match = _WEIGHT.match(text, at)
    if match is None:
        return 1.0, at
    if not _NUMBER.fullmatch(match["weight"]):
        where = pointed(text, match.start("weight"))
        raise InputError(f"the weight {_short(match['weight'])} is no number from 0 on: {where}")
    return min(float(match["weight"]), 1e9), match.end()


def _whole(digits: str) -> int:
    return int(digits) if len(digits) < 10 else 10**9


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers, from 1, and content of the lines of a wildcard file that are neither blank nor comments."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _FileError(f"the wildcard file {path} cannot be read: {error.strerror}") from error
    at = data.find(b"\0")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start
    if at >= 0:
        line = len((data[:at] + b".").splitlines())
        raise _FileError(
            f"the wildcard file {path} is no UTF-8 text: line {line} holds the byte 0x{data[at]:02x}"
        )
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        if (line := line.strip()) and line[0] != "#":
            yield number, line


def _nearest(name: str, names: Iterable[str]) -> list[str]:
    """The names that look like this one, as a whole or by their last part."""
    names = list(names)
    near = difflib.get_close_matches(name, names, SHOWN, 0.6)
    last = {one.rpartition("/")[2]: one for one in reversed(names)}
    near += [last[one] for one in difflib.get_close_matches(name.rpartition("/")[2], last, SHOWN, 0.6)]
    return list(dict.fromkeys(near))[:SHOWN]


def pointed(text: str, at: int) -> str:
    """Where something is in a text, in words on one line, with a ^ before the character."""
    begin, end = max(0, at - 30), at + 30
    before = ("…" if begin else "") + text[begin:at]
    after = text[at:end] + ("…" if end < len(text) else "")
    return f"character {at + 1}, at the ^: {before + '^' + after!r}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")
