r"""The prompt language of AUTOMATIC1111's web UI, as text: no model is known here, and no tensor.

    (a) [a] (a:1.3) \(     weights: times 1.1, divided by 1.1, times 1.3; a bracket that is meant
    a BREAK b              b begins a new chunk of the text encoder
    [a:b:5] [b:5] [a::5]   a up to step 5, b after it; a number with a point is a share of the steps
    [a|b|c]                a in the first step, b in the second, …, and again
    a AND b:0.5            two conditions, each guided by itself, the second by half

What these mean is taken from the web UI's documentation (its wiki, "Features") and from the examples in its
prompt_parser.py; brackets that are not closed, or closed twice, mean what they mean there. A prompt of which
only a mistake can be made sense of is an error with the place of the mistake.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from ldm.errors import InputError

ROUND, SQUARE = 1.1, 1 / 1.1  # what a pair of brackets multiplies its weight by
LARGEST_WEIGHT = 1e4
KEPT = 16384  # prompts whose reading is kept
CARET = "^"
SHOWN = 40  # characters on either side of a mistake

Mistake = tuple[str, int]  # what is wrong, and at which character
Sections = tuple[tuple[tuple[str, float], ...], ...]


class PromptError(InputError):
    """A mistake in a prompt; the message shows the place with a caret before it."""

    def __init__(self, why: str, text: str, at: int, numbered: bool = True):
        self.why, self.text, self.at = why, text, at
        before, after = text[max(0, at - SHOWN) : at], text[at : at + SHOWN]
        start, end = "…" * (at > SHOWN), "…" * (at + SHOWN < len(text))
        shown = f"{start}{before}{CARET}{after}{end}".replace("\n", " ").replace("\r", " ")
        number = f"character {at + 1}, " if numbered else ""
        super().__init__(f"{number}at the {CARET}: {shown!r}: {why}")

    def within(self, prompt: str) -> PromptError:
        """The error of a text that was taken from this prompt: numbered only where the place is its, too."""
        return PromptError(self.why, self.text, self.at, numbered=prompt.startswith(self.text))


# Schedules and alternation: what is read at which step


class Scheduled(NamedTuple):
    """`before` up to step `when`, `after` from the next one."""

    before: Items
    after: Items
    when: str


class Alternated(NamedTuple):
    """One of `options` a step, in turn."""

    options: tuple[Items, ...]


Items = tuple[str | Scheduled | Alternated, ...]

TOKENS = re.compile(r"\\.|[][():|]|[^\\\[\]():|]+|\\")
NUMBER = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
CLOSED_BY = {"(": ")", "[": "]"}


class Open:
    """A bracket that is not closed yet: what it holds between its colons or bars."""

    def __init__(self, bracket: str, at: int):
        self.bracket, self.at = bracket, at
        self.parts: list[list] = [[]]
        self.separators: list[tuple[str, int]] = []

    def items(self) -> list:
        """All that was read, the bracket and the separators as text."""
        found: list = [self.bracket, *self.parts[0]]
        for (separator, _), part in zip(self.separators, self.parts[1:], strict=True):
            found += [separator, *part]
        return found

    def closed(self) -> list | None:
        """What the bracket and the one that closes it are together; None if that is no construct."""
        separators = "".join(separator for separator, _ in self.separators)
        if self.bracket == "(":
            return [*self.items(), ")"] if separators in ("", ":") else None
        if not separators:
            return [*self.items(), "]"]
        options = [tuple(part) for part in self.parts]
        if set(separators) == {"|"}:
            return [Alternated(tuple(options))]
        when = self.when()
        if when is None or separators not in (":", "::"):
            return None
        return [Scheduled(options[0] if len(options) == 3 else (), options[-2], when)]

    def when(self) -> str | None:
        """The number behind the last colon."""
        last = self.parts[-1]
        found = NUMBER.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
        return found and found[1]

    def mistake(self) -> Mistake | None:
        """What is wrong with a pair of square brackets that has colons and is no construct."""
        colons = [at for separator, at in self.separators if separator == ":"]
        if self.bracket == "(" or not colons:
            return None
        if len(colons) != len(self.separators):
            return (
                r"[a|b] and [a:b:0.5] do not mix; nest them, or write \: for a colon that is meant",
                colons[0],
            )
        if len(colons) > 2:
            return r"[a:b:0.5] has two colons; one that is meant is written \:", colons[2]
        return (
            r"here a step, or a share of them such as 0.5, is expected; a colon that is meant is written \:",
            colons[-1] + 1,
        )


class Tree(NamedTuple):
    items: Items
    mistake: Mistake | None  # which the web UI reads as text


@lru_cache(KEPT)
def parse(text: str) -> Tree:
    """The schedules of a prompt; everything else in it stays text.

    Where a bracket has no partner, it is text, and so are all those around it. A bar outside of square
    brackets, or a backslash with nothing after it, makes the whole prompt text, as in the web UI.
    """
    if "[" not in text:
        return Tree((text,) if text else (), None)
    done: list = []  # outside of all brackets
    opened: list[Open] = []
    mistake: Mistake | None = None
    bar: int | None = None

    def put(items: list) -> None:
        (opened[-1].parts[-1] if opened else done).extend(items)

    def give_up() -> None:
        """All open brackets are text."""
        nonlocal bar
        for each in opened:
            done.extend(each.items())
            bar = next((at for separator, at in each.separators if separator == "|"), bar)
        opened.clear()

    for match in TOKENS.finditer(text):
        token, at = match.group(), match.start()
        if token in CLOSED_BY:
            opened.append(Open(token, at))
        elif token in (")", "]"):
            if opened and CLOSED_BY[opened[-1].bracket] == token:
                closed = opened[-1].closed()
                if closed is not None:
                    opened.pop()
                    put(closed)
                    continue
                mistake = mistake or opened[-1].mistake()
            give_up()
            done.append(token)
        elif token in (":", "|") and opened:
            opened[-1].separators.append((token, at))
            opened[-1].parts.append([])
        else:
            if token in ("|", "\\"):
                bar = at
            put([token])
    give_up()
    items = tuple(_joined(done))
    if bar is not None:
        if mistake is None and any(not isinstance(item, str) for item in items):
            mistake = (
                r"a bar outside of [a|b], or a backslash before nothing, makes the web UI read every "
                r"[a:b:0.5] and [a|b] of the prompt as text; write \| or \\ for it",
                bar,
            )
        items = (text,)
    return Tree(items, mistake)


def _joined(items: Sequence) -> Iterator:
    """Texts that follow each other as one."""
    texts: list[str] = []
    for item in items:
        if isinstance(item, str):
            texts.append(item)
            continue
        if texts:
            yield "".join(texts)
        texts = []
        yield item
    if texts:
        yield "".join(texts)


def changes(text: str) -> bool:
    """Whether a prompt reads differently at different steps."""
    return any(not isinstance(item, str) for item in parse(text).items)


def _last_step(when: str, steps: int, second: bool) -> int:
    """The last step of what comes before `when`: a share of the steps if that has a point.

    Shares beyond 1 are those of a second pass; the steps of the first are over then. A rounding
    error of floats must not move the switch one step earlier: 0.58 of 50 steps is 28.999999 in floats.
    """
    if second:
        number = (float(when) - 1.0) * steps if "." in when else 0.0
    else:
        number = float(when) * steps if "." in when else float(when)
    return int(round(max(-1.0, min(float(steps), number)), 6))


def text_at(items: Items, step: int, steps: int, second: bool = False) -> str:
    """What a parsed prompt reads at a step, from 1, of the `steps` of a run, or of its `second` pass."""
    return _text_of(items, lambda when: step <= _last_step(when, steps, second), step - 1)


def _text_of(items: Items, is_before: Callable[[str], bool], turn: int) -> str:
    """The text of a parsed prompt, with the alternatives of this turn, from 0."""
    found: list[str] = []
    left: list = [iter(items)]  # no recursion: brackets may be nested a thousand deep
    while left:
        item = next(left[-1], None)
        if item is None:
            left.pop()
        elif isinstance(item, str):
            found.append(item)
        elif isinstance(item, Scheduled):
            left.append(iter(item.before if is_before(item.when) else item.after))
        else:
            left.append(iter(item.options[turn % len(item.options)]))
    return "".join(found)


def _last_steps(items: Items, steps: int, second: bool) -> list[int]:
    """The steps, rising, after which a parsed prompt may read otherwise, and the last one of the run."""
    last_steps, left = {steps}, [items]
    while left:
        for item in left.pop():
            if isinstance(item, Scheduled):
                last_steps.add(_last_step(item.when, steps, second))
                left += [item.before, item.after]
            elif isinstance(item, Alternated):
                last_steps.update(range(1, steps + 1))
                left += item.options
    return [step for step in sorted(last_steps) if step > 0]


@lru_cache(KEPT)
def schedule(text: str, steps: int, second: bool = False) -> tuple[tuple[int, str], ...]:
    """What a prompt reads in which steps: (the last step, text), … as the web UI lists it."""
    items = parse(text).items
    return tuple((step, text_at(items, step, steps, second)) for step in _last_steps(items, steps, second))


def readings(text: str, steps: int, second: bool = False) -> Iterator[str]:
    """What the text encoder reads of a prompt without ANDs, one text after the other: without marks, and with
    a space where the weight changes or a chunk ends, since no word goes on there. PromptError.
    """
    items = parse(text).items
    for step in _last_steps(items, steps, second):
        sections = weighted(text_at(items, step, steps, second))
        yield " ".join(part for section in sections for part, _ in section)


@lru_cache(KEPT)
def switching(texts: tuple[str, ...], steps: int, second: bool = False) -> tuple[tuple[int, int], ...]:
    """Which of their readings texts have together in which steps: (the last step, number), … from 0.

    Empty if it is the same one at all steps.
    """
    schedules = [schedule(text, steps, second) for text in texts]
    ends = [[last for last, _ in each] for each in schedules]
    numbers: dict[tuple[str, ...], int] = {}
    found: list[tuple[int, int]] = []
    for last in sorted(set().union(*ends)):
        places = [bisect_left(own, last) for own in ends]
        together = tuple(each[place][1] for each, place in zip(schedules, places, strict=True))
        number = numbers.setdefault(together, len(numbers))
        if found and found[-1][1] == number:
            found.pop()
        found.append((last, number))
    return tuple(found) if len(numbers) > 1 else ()


# Weights

WEIGHTED = re.compile(
    r"""
    \\[()\[\]\\:]                       # a character that is meant
    | \\
    | :\s*([+-]?[.0-9]+)\s*\)           # the end of (a:1.3)
    | [()\[\]:]
    | [^\\()\[\]:]+
    """,
    re.VERBOSE,
)
BREAK = re.compile(r"\s*\bBREAK\b\s*")
SECTION = None  # stands between sections while they are read


@lru_cache(KEPT)
def weighted(text: str) -> Sections:
    """The sections of a text between its BREAKs, each a sequence of (text without marks, weight).

    Texts of one weight that follow each other are one. PromptError for a weight that is no number.
    """
    found: list[list | None] = []
    round_open: list[list[int]] = []  # [place in found, character, character behind the last colon in it]
    square_open: list[int] = []

    def multiply(first: int, factor: float) -> None:
        for each in found[first:]:
            if each is not SECTION:
                each[1] *= factor

    for match in WEIGHTED.finditer(text):
        token, number, at = match.group(), match[1], match.start()
        if token.startswith("\\"):
            found.append([token[1:], 1.0])
        elif token == "(":
            round_open.append([len(found), at, 0])
        elif token == "[":
            square_open.append(len(found))
        elif number is not None and round_open:
            multiply(round_open.pop()[0], _weight(number, text, match.start(1)))
        elif token == ")" and round_open:
            first, _, colon = round_open.pop()
            if colon:
                raise PromptError(
                    r"here a weight such as 1.2 is expected; a colon that is meant is written \:", text, colon
                )
            multiply(first, ROUND)
        elif token == "]" and square_open:
            multiply(square_open.pop(), SQUARE)
        else:
            if token.startswith(":") and round_open:
                round_open[-1][2] = at + 1
            for k, part in enumerate(BREAK.split(token) if "BREAK" in token else (token,)):
                if k:
                    found.append(SECTION)
                found.append([part, 1.0])
    for first, *_ in round_open:
        multiply(first, ROUND)
    for first in square_open:
        multiply(first, SQUARE)
    return _sections(found, text)


def _weight(number: str, text: str, at: int) -> float:
    try:
        return float(number)
    except ValueError:
        raise PromptError(f"the weight {number} is no number", text, at) from None


def _sections(found: Sequence[list | None], text: str) -> Sections:
    sections: list[list[tuple[str, float]]] = [[]]
    for each in found:
        if each is SECTION:
            sections.append([])
            continue
        part, weight = each
        if not abs(weight) <= LARGEST_WEIGHT:
            raise PromptError(f"a weight is beyond {LARGEST_WEIGHT:,.0f}", text, max(0, text.find(part)))
        if sections[-1] and sections[-1][-1][1] == weight:
            part = sections[-1].pop()[0] + part
        sections[-1].append((part, weight))
    return tuple(tuple(section) or (("", 1.0),) for section in sections)


# Composition

AND = re.compile(r"\bAND\b")
PART_WEIGHT = re.compile(r"\s*([-+]?(?:[0-9]+\.?|[0-9]*\.[0-9]+))")


def composed(text: str) -> tuple[tuple[str, float], ...]:
    """The conditions between a prompt's ANDs, each with the weight behind a colon at its end, by default 1.

    A prompt without AND may have a weight, too.
    """
    return tuple(_with_weight(part) for part in AND.split(text))


def _with_weight(part: str) -> tuple[str, float]:
    part = part.rstrip()
    text, colon, number = part.rpartition(":")
    found = PART_WEIGHT.fullmatch(number) if colon and not text.endswith("\\") else None
    if found is None:
        return part, 1.0
    return text.rstrip(), max(-LARGEST_WEIGHT, min(LARGEST_WEIGHT, float(found[1])))


def _readings(items: Items) -> list[str]:
    """Texts of a parsed prompt, in which each alternative of each schedule and alternation comes up."""
    if all(isinstance(item, str) for item in items):
        return ["".join(items)]
    most, left = 1, [items]
    while left:
        for item in left.pop():
            if isinstance(item, Scheduled):
                left += [item.before, item.after]
            elif isinstance(item, Alternated):
                most = max(most, len(item.options))
                left += item.options
    turns = [(before, k) for before in (True, False) for k in range(most)]
    return list(dict.fromkeys(_text_of(items, lambda _, before=before: before, k) for before, k in turns))


def check(text: str, *, negative: bool = False, prompt: str | None = None) -> None:
    """PromptError for a text with a mistake in its schedules or weights.

    `prompt` is what it was taken from, by default the text itself: characters are counted in it.
    """
    try:
        for part, _ in ((text, 1.0),) if negative else composed(text):
            if (mistake := parse(part).mistake) is not None:
                why, at = mistake
                raise PromptError(why, part, at)
            for reading in _readings(parse(part).items):
                weighted(reading)
    except PromptError as error:
        raise error.within(text if prompt is None else prompt) from None
