"""Errors whose settings are named as the reader's surface names them."""

import pytest

from ldm.cli.parser import in_flags
from ldm.errors import FieldError, InputError, ValueFieldError


def test_python_shows_fields_and_the_command_line_flags() -> None:
    error = FieldError("{height} {size} is not {what}", size=510, what="a multiple of {8}")
    assert str(error) == "height 510 is not a multiple of {8}"
    assert in_flags(error) == "--H 510 is not a multiple of {8}"
    assert isinstance(error, InputError)


def test_the_error_of_one_value() -> None:
    error = ValueFieldError("steps", "0 is {not} a number")
    assert str(error) == "steps: 0 is {not} a number"
    assert in_flags(error) == "argument --ddim_steps/--steps: 0 is {not} a number"


@pytest.mark.parametrize("message", ["{braces}", "100 %", ""])
def test_other_errors_are_shown_as_they_are(message: str) -> None:
    assert in_flags(InputError(message)) == message
