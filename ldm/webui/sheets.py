"""Comparison sheets: the values of two settings across and down, each cell an image from the same noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm.errors import FieldError, InputError
from ldm.fields import settings_of
from ldm.images.pixels import of_one_size
from ldm.images.sheets import contact_sheet
from ldm.pipeline.request import ImageRequest
from ldm.webui.controls import as_held, controls, label_of, request_of, shown
from ldm.webui.tasks import Task

SCRIPT = "compare.py"
TASKS_WITH_SHEETS = ("text", "image")  # those of the command
NOT_COMPARED = ("watermark",)
NOTHING = "none"  # as a value: the setting is left out
WORDS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


@dataclass(frozen=True)
class Axis:
    """A setting and its values as the user writes them."""

    name: str
    values: tuple[str, ...]

    @classmethod
    def of(cls, name: str, text: str) -> Axis:
        """Values between commas, or one a line where there are several lines. InputError without any."""
        words = text.split("\n") if "\n" in text.strip() else text.split(",")
        values = tuple(word.strip() for word in words if word.strip())
        if name not in compared():
            raise InputError(f"{name!r} cannot be compared: choose from {', '.join(compared())}")
        if not values:
            raise InputError(f"{label_of(name)} has no values to compare: give some, separated by commas")
        return cls(name, values)

    def held(self, value: str) -> Any:
        """What the setting's control holds for a value. FieldError for one that is not fit."""
        each, control = settings_of(ImageRequest)[self.name], controls()[self.name]
        if value == NOTHING and each.kind is not str:
            return control.value
        if each.kind is bool:
            if value not in WORDS:
                raise FieldError("{" + self.name + "} {value}: give true or false", value=value)
            return as_held(control, each, WORDS[value])
        try:
            return as_held(control, each, value)
        except ValueError as error:
            raise FieldError("{" + self.name + "}: {why}", why=str(error)) from None


def compared() -> tuple[str, ...]:
    """The names of the settings that a sheet may be about."""
    return tuple(name for name in controls() if name not in NOT_COMPARED)


@dataclass(frozen=True)
class Sheet:
    """Columns and rows of a sheet, and the requests of its cells, row by row."""

    x: Axis
    y: Axis
    cells: Sequence[ImageRequest]

    @property
    def facts(self) -> dict[str, Any]:
        """What the sheet's file records of it."""
        return {axis: [each.name, *each.values] for axis, each in (("x", self.x), ("y", self.y))}

    def drawn(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """The sheet, uint8 [H, W, 3], of its cells' images, uint8 [h, w, 3], as compare.py draws it."""
        even, columns = of_one_size(list(images)), len(self.x.values)
        rows = [even[start : start + columns] for start in range(0, len(even), columns)]
        title = f"{self.y.name} by {self.x.name}"
        if "prompt" not in (self.x.name, self.y.name):
            title += f": {self.cells[0].prompt}"
        return contact_sheet(rows, self.x.values, self.y.values, title)

    def words(self) -> list[str]:
        """The options of compare.py that make it."""
        return ["--x", self.x.name, *self.x.values, "--y", self.y.name, *self.y.values]


def sheet_of(
    task: Task, held: Mapping[str, Any], inputs: Mapping[str, Any], seed: int, x: Axis, y: Axis
) -> Sheet:
    """The sheet of a task's controls, where those of the axes hold one value after the other. InputError."""
    if task.name not in TASKS_WITH_SHEETS:
        raise InputError(f"{task.title} has no comparison sheets: Text to image and Image to image have")
    if x.name == y.name:
        raise InputError(f"columns and rows both vary {label_of(x.name)}; choose different settings")
    for axis in (x, y):
        if not shown(controls()[axis.name], task):
            raise InputError(f"{label_of(axis.name)} is no setting of {task.title}")
    cells = []
    for row in y.values:
        for column in x.values:
            own = {y.name: y.held(row), x.name: x.held(column)}
            cell = request_of(task, {**held, **own}, inputs)
            cells.append(cell if cell.seed is not None else cell.twin(seed=seed))
    return Sheet(x, y, cells)
