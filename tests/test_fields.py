"""Settings that are written once: their types, ranges and names."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from ldm.errors import FieldError
from ldm.fields import Setting, changed, check_fields, listed_by_name, setting, settings_of


@dataclass(frozen=True)
class Cake:
    layers: int = setting(2, "layers of sponge", low=1, high=9, flags=("--layers", "--L"))
    sugar: float | None = setting(None, "grams", low=0, default_text="to taste")
    icing: str = setting("none", "on top", choices=("none", "white"))
    slices: int | str = setting(8, "pieces", low=1, words=("auto",))
    candles: tuple[float, ...] | None = setting(None, "heights")
    vegan: bool = setting(False, "without eggs")
    photo: str | Any | None = setting(None, "printed on it", takes_objects=True)
    names: tuple[str, ...] = setting((), "written on it")
    baker: str = "nobody"  # no setting

    def __post_init__(self) -> None:
        check_fields(self)


def test_kinds_are_read_from_the_annotations() -> None:
    kinds = {name: each.kind for name, each in settings_of(Cake).items()}
    assert kinds == {
        "layers": int,
        "sugar": float,
        "icing": str,
        "slices": int,
        "candles": tuple,
        "vegan": bool,
        "photo": str,
        "names": list,
    }


def test_values_come_into_their_types() -> None:
    photo = object()
    cake = Cake(layers=3.0, sugar="7", slices="auto", candles=[1, "2.5"], vegan=True, photo=photo)
    assert (cake.layers, cake.sugar, cake.slices, cake.candles) == (3, 7.0, "auto", (1.0, 2.5))
    assert (type(cake.layers), type(cake.sugar)) == (int, float)
    assert cake.photo is photo
    assert Cake(candles="3, 2 1").candles == (3.0, 2.0, 1.0)
    assert Cake(candles=3).candles == (3.0,)
    assert (Cake().names, Cake(names="a").names, Cake(names=["a", "b"]).names) == ((), ("a",), ("a", "b"))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"names": 3}, "names: 3 is no list of texts"),
        ({"names": ["a", 3]}, r"names: \['a', 3\] is no list of texts"),
        ({"layers": 0}, "layers: 0 is not a whole number in range: 1 … 9"),
        ({"layers": 2.5}, "layers: 2.5 is not a whole number in range"),
        ({"layers": "x"}, "layers: x is not a whole number in range"),
        ({"layers": True}, "layers: True is not a value for it"),
        ({"layers": None}, "layers: None is not a whole number in range"),
        ({"layers": float("inf")}, "layers: inf is not a whole number in range"),
        ({"layers": [1]}, r"layers: \[1\] is not a whole number in range"),
        ({"sugar": -1}, "sugar: -1 is not a number in range: at least 0"),
        ({"sugar": float("nan")}, "sugar: nan is not a number in range"),
        ({"sugar": 1e300}, "sugar: 1e.300 is not a number in range"),
        ({"icing": "pink"}, r"icing: invalid choice: 'pink' \(choose from none, white\)"),
        ({"icing": 3}, "icing: 3 is no text"),
        ({"icing": None}, "icing: None is no text"),
        ({"slices": "many"}, "slices: many is not a whole number in range: at least 1, or auto"),
        ({"candles": [1, "x"]}, "candles: x is not a number in range"),
        ({"candles": object()}, "candles: <object .* is no text"),
        ({"vegan": 1}, "vegan: 1 is not true or false"),
        ({"vegan": "yes"}, "vegan: 'yes' is not true or false"),
    ],
)
def test_what_is_refused_by_the_name_of_its_field(own: dict, message: str) -> None:
    """None for a field without that default, as JSON's null gives it, was a TypeError where it was used."""
    with pytest.raises(FieldError, match=f"^{message}"):
        Cake(**own)


def test_names_and_spellings() -> None:
    known = listed_by_name(Cake)
    assert known["L"] is known["layers"] is settings_of(Cake)["layers"]
    assert "baker" not in known
    assert settings_of(Cake)["sugar"].spellings == ("--sugar",)


def test_defaults_as_users_read_them() -> None:
    shown = {name: each.shown_default for name, each in settings_of(Cake).items()}
    assert shown == {
        "layers": "2",
        "sugar": "to taste",
        "icing": "none",
        "slices": "8",
        "candles": "",
        "vegan": "",
        "photo": "",
        "names": "",
    }
    assert Setting("", default=0.5).shown_default == "0.5"


def test_what_was_changed() -> None:
    assert changed(Cake()) == {}
    assert changed(Cake(layers=3, baker="me", vegan=True)) == {"layers": 3, "vegan": True}


def test_neither_torch_nor_numpy_is_imported() -> None:
    code = "import sys, ldm.fields; assert not {'torch', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
