import numpy as np
import pytest
from commands import script

from ldm.errors import InputError
from ldm.webui.controls import controls, in_labels
from ldm.webui.sheets import Axis, sheet_of
from ldm.webui.tasks import ENLARGE, TEXT

HELD = {name: control.value for name, control in controls().items()} | {"prompt": "a cube"}


def test_cells_are_row_by_row_from_one_seed() -> None:
    sheet = sheet_of(TEXT, HELD, {}, 9, Axis.of("steps", "5, 10"), Axis.of("panorama", "false\ntrue"))
    assert [(cell.panorama, cell.steps, cell.seed) for cell in sheet.cells] == [
        (False, 5, 9),
        (False, 10, 9),
        (True, 5, 9),
        (True, 10, 9),
    ]
    assert sheet.words() == ["--x", "steps", "5", "10", "--y", "panorama", "false", "true"]


def test_prompts_with_commas_are_in_lines() -> None:
    assert Axis.of("prompt", "a cube, red\n\n a cone").values == ("a cube, red", "a cone")


def test_seeds_and_nothing_are_values() -> None:
    sheet = sheet_of(TEXT, HELD, {}, 9, Axis.of("seed", "1,2"), Axis.of("scale", "none, 3"))
    found = [(cell.seed, cell.scale) for cell in sheet.cells]
    assert found == [(1, None), (2, None), (1, 3.0), (2, 3.0)]


@pytest.mark.parametrize(
    ("task", "x", "y", "words"),
    [
        (TEXT, ("steps", "5,x"), ("scale", "1"), "Steps: x is not a whole number"),
        (TEXT, ("steps", " ,"), ("scale", "1"), "Steps has no values"),
        (TEXT, ("steps", "5"), ("steps", "6"), "both vary Steps"),
        (TEXT, ("strength", "0.5"), ("steps", "6"), "Strength is no setting of Text to image"),
        (TEXT, ("init_img", "/etc/passwd"), ("steps", "6"), "cannot be compared"),
        (TEXT, ("panorama", "perhaps"), ("steps", "6"), "give true or false"),
        (TEXT, ("sampler", "/etc/passwd"), ("steps", "6"), "/etc/passwd"),
        (ENLARGE, ("steps", "5"), ("scale", "1"), "Upscale has no comparison sheets"),
    ],
)
def test_mistakes_are_named(task: object, x: tuple, y: tuple, words: str) -> None:
    with pytest.raises(InputError) as caught:
        sheet_of(task, HELD, {}, 9, Axis.of(*x), Axis.of(*y))
    assert words in in_labels(caught.value)


def test_the_drawing_holds_every_image() -> None:
    sheet = sheet_of(TEXT, HELD, {}, 9, Axis.of("steps", "5, 10"), Axis.of("scale", "1, 2, 3"))
    colours = [(10 * k + 100, 3, 7) for k in range(6)]
    drawn = sheet.drawn([np.full((16, 16, 3), colour, np.uint8) for colour in colours])
    for colour in colours:
        assert (drawn == colour).all(-1).sum() == 128 * 128


def test_the_drawing_is_that_of_the_command() -> None:
    """The title had the page's labels and the seed, so that the command made another file."""
    compare = script("compare")
    table = compare.parse(
        ["--prompt", "a cube", "--seed", "9", "--x", "steps", "5", "10", "--y", "scale", "1", "2"]
    )
    sheet = sheet_of(TEXT, HELD, {}, 9, Axis.of("steps", "5, 10"), Axis.of("scale", "1, 2"))
    images = [np.full((16, 16, 3), 50 * k, np.uint8) for k in range(4)]
    (page,) = compare.pages(table, dict(enumerate(images)))
    assert np.array_equal(sheet.drawn(images), page.image)
    assert sheet.facts == page.facts


@pytest.mark.parametrize("name", ["zero_snr", "panorama"])
def test_a_switch_is_compared(name: str) -> None:
    """One that the model may turn on, for which the page has three choices, was refused with every value."""
    sheet = sheet_of(TEXT, HELD, {}, 9, Axis.of(name, "on,off"), Axis.of("steps", "5"))
    assert [getattr(cell, name) for cell in sheet.cells] == [True, False]
