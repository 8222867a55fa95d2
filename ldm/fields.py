"""Settings that are written once: dataclass fields with their range, their help and their names elsewhere.

The options of the command line, the checks, JSON lines, the settings in image files and the tables of the
documentation are all made from these fields. Imports neither torch nor numpy.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ldm.errors import ValueFieldError

LARGEST = 1e15  # of numbers without another limit: floats hold whole numbers exactly up to there


@dataclass(frozen=True)
class Setting:
    """What is known about a field besides its type and default."""

    help: str
    low: float | None = None  # of a number, or of each number of a list
    high: float | None = None
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()  # accepted in place of a number, such as "auto"
    bare: str | None = None  # the value of a flag that is given without one
    values: int = 1  # texts that a flag of a list takes at once; if several, the list has so many
    flags: tuple[str, ...] = ()  # on the command line, the usual one first; "--name" if empty
    a1111: str | None = None  # its name in the text that AUTOMATIC1111's web UI writes
    group: str = "sampling"  # in --help and in the documentation
    metavar: str | None = None
    default_text: str | None = None  # shown in place of the default, where that is found at run time
    per_image: bool = False  # images of one batch may differ in it
    takes_objects: bool = False  # anything that is no text is accepted as it is, such as an image
    recorded: bool = True  # also at its default; else an image's settings have it only where it differs
    name: str = ""
    kind: type = str  # int, float, str, bool, tuple for a list of floats, or list for a list of texts
    default: Any = None

    @property
    def spellings(self) -> tuple[str, ...]:
        return self.flags or (f"--{self.name}",)

    @property
    def shown_default(self) -> str:
        """The default as users read it; empty if there is none."""
        if self.default_text is not None:
            return self.default_text
        if self.default is None or self.default is False or self.default in ("", ()):
            return ""
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    @property
    def bounds(self) -> str:
        """The range in words."""
        low = _in_digits(-math.inf if self.low is None else self.low)
        return f"at least {low}" if self.high is None else f"{low} … {_in_digits(self.high)}"

    def parse(self, text: str) -> Any:
        """The value that a text stands for. ValueError with a message for the user if it stands for none."""
        if self.kind is bool:
            raise ValueError(f"{text} is no value for a switch")
        if self.kind is tuple:
            return tuple(self._number(word, float) for word in text.replace(",", " ").split())
        if self.kind in (str, list):  # of a list this is one text: its flag is given several times
            if self.choices and text not in self.choices:
                raise ValueError(f"invalid choice: {text!r} (choose from {', '.join(self.choices)})")
            return text
        return text if text in self.words else self._number(text, self.kind)

    def check(self, value: Any) -> Any:
        """The value in its field's type. ValueError, with a message for the user, if it is not fit."""
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if self.kind is bool and isinstance(value, bool):
            return value
        if self.kind is tuple and isinstance(value, Iterable) and not isinstance(value, str):
            return tuple(self._number(one, float) for one in value)
        if self.kind is tuple and isinstance(value, int | float) and not isinstance(value, bool):
            return (self._number(value, float),)
        if self.kind is list:
            texts = (
                (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else ()
            )
            objects = self.takes_objects or all(isinstance(text, str) for text in texts)
            if not objects or (not texts and value not in ((), [])):
                raise ValueError(f"{value!r} is no list of texts")
            if self.values > 1 and len(texts) != self.values:
                raise ValueError(f"{value!r}: {self.values} texts are needed, {self.metavar}")
            return tuple(self.parse(text) if isinstance(text, str) else text for text in texts)
        if isinstance(value, bool) or self.kind is bool:
            raise ValueError(f"{value!r} is not {'true or false' if self.kind is bool else 'a value for it'}")
        if self.kind in (int, float) and not isinstance(value, str):
            return self._number(value, self.kind)
        if isinstance(value, str):
            return self.parse(value)
        if self.takes_objects:
            return value
        raise ValueError(f"{value!r} is no text")

    def _number(self, value: Any, kind: type) -> Any:
        try:
            if kind is int and isinstance(value, float) and not value.is_integer():
                raise ValueError
            number = kind(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        low, high = (
            (-LARGEST if self.low is None else self.low),
            (LARGEST if self.high is None else self.high),
        )
        if not low <= number <= high:  # NaN is not
            what = "a whole number" if kind is int else "a number"
            words = "".join(f", or {word}" for word in self.words)
            raise ValueError(f"{value} is not {what} in range: {self.bounds}{words}")
        return number


def _in_digits(number: float) -> str:
    """A number with commas between thousands; a whole one without a point."""
    whole = isinstance(number, float) and number.is_integer()
    return f"{int(number) if whole else number:,}"


def setting(default: Any, help: str, **facts: Any) -> Any:
    """A dataclass field with its `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help, **facts)})


@cache
def settings_of(owner: type) -> Mapping[str, Setting]:
    """The settings of a dataclass by name, in the order of its fields; those given only by name come last."""
    hints = get_type_hints(owner)
    fields = sorted(dataclasses.fields(owner), key=lambda field: field.kw_only)
    return {
        field.name: dataclasses.replace(
            field.metadata["setting"], name=field.name, kind=_kind(hints[field.name]), default=field.default
        )
        for field in fields
        if "setting" in field.metadata
    }


def _kind(hint: Any) -> type:
    """int, float, str, bool, tuple or list out of an annotation such as `int | None` or `tuple[str, ...]`."""
    if get_origin(hint) in (Union, UnionType):
        kinds = [_kind(part) for part in get_args(hint) if part is not NoneType]
        return next((kind for kind in (tuple, list, int, float, bool) if kind in kinds), str)
    origin = get_origin(hint) or hint
    if origin is tuple and get_args(hint)[:1] == (str,):
        return list
    return origin if origin in (int, float, bool, tuple) else str


def check_fields(instance: Any) -> None:
    """Bring each given value of a frozen dataclass into its type. FieldError for one that is not fit."""
    for name, each in settings_of(type(instance)).items():
        value = getattr(instance, name)
        if value is each.default:
            continue
        try:
            object.__setattr__(instance, name, each.check(value))
        except ValueError as error:
            raise ValueFieldError(name, str(error)) from None


def listed_by_name(owner: type) -> dict[str, Setting]:
    """Each setting under its own name and under every spelling of its flag, with _ for -."""
    known: dict[str, Setting] = {}
    for name, each in settings_of(owner).items():
        for spelling in (name, *each.spellings):
            known[spelling.lstrip("-").replace("-", "_")] = each
    return known


def changed(instance: Any) -> dict[str, Any]:
    """The settings of a dataclass that differ from their defaults."""
    values = {name: getattr(instance, name) for name in settings_of(type(instance))}
    return {
        name: value for name, value in values.items() if value != settings_of(type(instance))[name].default
    }
