"""Errors that a user is meant to read."""

from collections.abc import Callable
from typing import Any


class InputError(ValueError):
    """Something the user gave cannot be used. Scripts print its message as one line and exit with code 2.

    The message names the value, says what is wrong with it and what would do instead.
    """


class FieldError(InputError):
    """An InputError about settings, whose names the reader's surface spells.

    `template` is a format string. Its placeholders are `values`, or else names of settings: Python shows
    these as they are ("height 510 is not …"), the command line as its flags ("--H 510 is not …").
    """

    def __init__(self, template: str, **values: Any):
        self.template, self.values = template, values
        super().__init__(self.spelled(lambda name: name))

    def spelled(self, spell: Callable[[str], str]) -> str:
        """The message with `spell(name)` for the name of each setting."""
        return self.template.format_map(_Spelling(self.values, spell))


class ValueFieldError(FieldError):
    """A single value that is malformed or out of range; `{name}` is the setting."""

    def __init__(self, name: str, why: str):
        super().__init__("{" + name + "}: {why}", why=why)


class _Spelling(dict):
    def __init__(self, values: dict[str, Any], spell: Callable[[str], str]):
        super().__init__(values)
        self.spell = spell

    def __missing__(self, name: str) -> str:
        return self.spell(name)
