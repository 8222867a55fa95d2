"""Options made from the fields of dataclasses."""

from dataclasses import dataclass

import pytest
from commands import script

from ldm.cli import tables
from ldm.cli.parser import (
    Parser,
    add_options,
    flag_of,
    help_text,
    in_flags,
    number,
    option_type,
    serve_parser,
    txt2img_parser,
)
from ldm.errors import FieldError, InputError, ValueFieldError
from ldm.fields import setting, settings_of
from ldm.pipeline.request import ImageRequest


@dataclass(frozen=True)
class Sized:
    """Settings of every kind."""

    whole: int = setting(3, "a whole number", low=1, high=9, flags=("--whole", "--integer"))
    share: float | None = setting(None, "a share, 100% at most", low=0, high=1, default_text="0.5")
    list: tuple[float, ...] | None = setting(None, "numbers", low=0, high=10)
    switch: bool = setting(False, "a switch", group="others")
    choice: str = setting("a", "one of two", choices=("a", "b"), group="others")
    often: str | None = setting(None, "with or without a value", choices=("some", "all"), bare="some")


@pytest.fixture
def parser() -> Parser:
    made = Parser(prog="x.py")
    add_options(made, Sized)
    return made


def test_only_given_options_are_in_the_result(parser: Parser) -> None:
    assert vars(parser.parse_args([])) == {}
    words = ["--integer", "4", "--share", "0.25", "--list", "9,5.5,1", "--switch", "--choice", "b", "--often"]
    given = {"whole": 4, "share": 0.25, "list": (9, 5.5, 1), "switch": True, "choice": "b", "often": "some"}
    assert vars(parser.parse_args(words)) == given


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--whole 10", "argument --whole/--integer: 10 is not a whole number in range: 1 … 9"),
        ("--whole 2.5", "argument --whole/--integer: 2.5 is not a whole number in range: 1 … 9"),
        ("--share nan", "argument --share: nan is not a number in range: 0 … 1"),
        ("--list 1,x", "argument --list: x is not a number in range: 0 … 10"),
        ("--choice c", "argument --choice: invalid choice: 'c'"),
        ("--often=--", "--often=-- has no value that can be used"),
        ("--nothing", "unrecognized arguments: --nothing"),
    ],
)
def test_errors_are_one_line(parser: Parser, words: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parser.parse_args(words.split())
    assert str(error.value).startswith(message)
    assert len(str(error.value).splitlines()) == 1


def test_help_shows_default_and_group(parser: Parser) -> None:
    text = " ".join(parser.format_help().split())
    assert "--whole WHOLE, --integer WHOLE a whole number" in text
    assert "a share, 100% at most" in text
    assert "others: --switch a switch --choice {a,b} one of two (a)" in text
    assert help_text(settings_of(Sized)["whole"]).endswith("(3)")
    assert help_text(settings_of(Sized)["share"]).endswith("(0.5)")
    assert help_text(settings_of(Sized)["whole"], {"whole": 7}).endswith("(7)")


def test_a_line_of_the_help_is_plain_letters() -> None:
    assert txt2img_parser().format_help().isascii()


def test_numbers_without_a_limit_are_finite() -> None:
    assert number(int, 1)("12") == 12
    for text in ("inf", "nan", "1e999"):
        with pytest.raises(Exception, match="is not a number in range: at least 0"):
            number(float, 0)(text)
    assert option_type(settings_of(ImageRequest)["steps"])("30") == 30


def test_names_of_settings_become_flags() -> None:
    """A setting of a class of its own had no flag: its errors ended in a KeyError."""
    assert [flag_of(name) for name in ("height", "steps", "init_img", "n_iter", "low_vram")] == [
        *("--H", "--ddim_steps", "--init-img", "--n_iter", "--low_vram")
    ]
    assert in_flags(FieldError("{height} {size} is odd", size=3)) == "--H 3 is odd"
    assert in_flags(ValueFieldError("steps", "no")) == "argument --ddim_steps/--steps: no"
    assert in_flags(ValueFieldError("unheard_of", "no")) == "argument --unheard_of: no"
    assert in_flags(InputError("{as it is}")) == "{as it is}"


def test_every_option_of_a_request_has_a_row_in_the_documentation() -> None:
    page = tables.options_page()
    for name, each in settings_of(ImageRequest).items():
        if name not in (
            "seed",
            "prompt_template",
            "negative_template",
        ):  # the run's, and what is only recorded
            assert f"`{each.spellings[0]}" in page


@pytest.mark.parametrize("command", ["serve", "webui"])
def test_so_are_those_of_the_services(command: str) -> None:
    """Their ranges had a dot-dot-dot that an ASCII terminal lacks: --help ended in a UnicodeEncodeError."""
    parser = serve_parser() if command == "serve" else script("webui").page_parser()
    assert parser.format_help().isascii()
