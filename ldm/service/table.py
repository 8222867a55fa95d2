"""The tables of AzureML's scoring contract: lines of prompts in, an image for each of them out.

    {"input_data": {"columns": ["prompt"], "data": ["a red cube"], "index": [0],
                    "parameters": {"num_inference_steps": 50, "guidance_scale": 7.5}}}
    [{"prompt": "a red cube", "generated_image": "<base64 PNG>", "nsfw_content_detected": false}]

It is the one of the hosted stable-diffusion-v1-5 (Azure/azureml-assets, assets/models/system/
runwayml-stable-diffusion-v1-5/description.md). An image in which unwanted content is detected comes as a
black one, and a guidance scale of 1 or less samples without guidance, as in diffusers' pipelines.
Imports neither torch nor fastapi.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from ldm.errors import FieldError, InputError, ValueFieldError
from ldm.fields import Setting, listed_by_name, settings_of
from ldm.pipeline.request import MASK, ImageRequest, image_seed

COLUMNS = ("prompt", "negative_prompt", "seed", "image", "mask")
# The contract's names for settings, diffusers' among them.
NAMES = {
    "image": "init_img",
    "mask_image": "mask",
    "num_inference_steps": "steps",
    "guidance_scale": "scale",
}
# Settings that no line can have of its own, or that are made from it.
NOT_HERE = ("rng", "fixed_code", "start_seed", "prompt_template", "negative_template")
PARTS = ("columns", "data", "index", "parameters")
NOT_ENLARGED = ("mask", "outpaint", "depth", "hires", "tiling", "panorama")  # what upscalers cannot do
STRENGTH, MASK_STRENGTH, NOISE_LEVEL = {"text": 0.75, "depth": 0.9}, 1.0, 20  # the commands' defaults


@cache
def known_names() -> Mapping[str, Setting]:
    """The settings that columns and parameters may name, under the contract's names and under ours."""
    known = {name: each for name, each in listed_by_name(ImageRequest).items() if each.name not in NOT_HERE}
    settings = settings_of(ImageRequest)
    return known | {name: settings[own] for name, own in NAMES.items()}


@dataclass(frozen=True)
class Table:
    """The lines of a request. `cells[k]` are line k's values, one for each of `columns`, or an InputError
    for a line that has none; `parameters`, by the settings' names, are those of all lines.
    """

    columns: tuple[str, ...]
    cells: Sequence[Sequence[Any] | InputError]
    index: tuple[Any, ...] | None
    parameters: Mapping[str, Any]

    @classmethod
    def of(cls, content: Any) -> Table:
        """The table of a request's JSON. InputError that names what is wrong with it as a whole."""
        content = _object(content, "the request")
        table = _object(content.get("input_data"), "input_data")
        _check_beside(content)
        for name in table:
            if name not in PARTS:
                raise InputError(f"input_data has {name!r}, which is none of {', '.join(PARTS)}")
        columns = columns_of(table.get("columns"))
        if "data" not in table:
            raise InputError('input_data has no "data", which is a list of lines')
        cells = _cells(table["data"], columns)
        index = table.get("index")
        if index is not None:
            if not isinstance(index, list) or len(index) != len(cells):
                count = f"{len(index)} entries" if isinstance(index, list) else "no list of entries"
                raise InputError(f"index has {count} for {len(cells)} lines of data")
            if not all(isinstance(one, str | int | float) for one in index):
                raise InputError("index has an entry that is neither a number nor a text")
            index = tuple(index)
        given = table.get("parameters")
        return cls(
            columns, cells, index, parameters_of(_object({} if given is None else given, "parameters"))
        )

    def __len__(self) -> int:
        return len(self.cells)

    def values(self, k: int, settings: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """The settings of line k by their names, images as they are given. InputError.

        `settings` are those of all lines where neither they nor the parameters say otherwise. A seed among
        the parameters is line 0's, and rises by one with each line.
        """
        cells = self.cells[k]
        if isinstance(cells, InputError):
            raise cells
        if len(cells) != len(self.columns):
            raise InputError(
                f"{len(cells)} values for the {len(self.columns)} columns {', '.join(self.columns)}"
            )
        known = known_names()
        given = zip(self.columns, cells, strict=True)
        own = {known[name].name: value for name, value in given if value is not None}
        prompt = own.get("prompt")
        if not isinstance(prompt, str):
            raise InputError(
                "the prompt is missing" if prompt is None else f"the prompt {prompt!r:.40} is no text"
            )
        if own.get("seed") in (-1, "-1"):
            del own["seed"]
        values = {**settings, **self.parameters, **own}
        if "seed" in self.parameters and "seed" not in own:
            values["seed"] = image_seed(self.parameters["seed"], k)
        return by_the_rules(values)

    def label(self, k: int) -> Any:
        """Line k's entry of `index`; None where it only counts the lines."""
        plain = self.index is None or self.index == tuple(range(len(self)))
        return None if plain else self.index[k]


def by_the_rules(values: Mapping[str, Any]) -> dict[str, Any]:
    """A line's settings by the contract's rules: guidance only above 1, and what is for init images or masks
    alone has no effect on a line without one. FieldError.
    """
    found = dict(values)
    if _given(found, "scale"):
        found["scale"] = max(_checked("scale", found["scale"]), 1.0)
    of_mask = {name for name, each in settings_of(ImageRequest).items() if each.group == MASK}
    leave_out: set[str] = set()
    if not _given(found, "init_img"):
        leave_out = {"strength", "noise_level", *of_mask} - {"mask"}  # which is a mistake without an image
    elif not repaints(found):
        leave_out = of_mask
    return {name: value for name, value in found.items() if name not in leave_out}


def with_strength(values: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A line's settings with the commands' defaults for what starts from an image, by what the model does.

    FieldError for what a model that enlarges images does not do: ImageRequest would say that it does not go
    together with the noise level, which is added here.
    """
    if not _given(values, "init_img") or _given(values, "noise_level"):
        return dict(values)
    if task == "upscale":
        for name in NOT_ENLARGED:
            if values.get(name) not in (None, False, "none"):
                raise FieldError("{" + name + "} is not for this model, which enlarges an image as it is")
    if _given(values, "strength"):
        return dict(values)
    if task == "upscale":
        return {**values, "noise_level": NOISE_LEVEL}
    return {**values, "strength": MASK_STRENGTH if repaints(values) else STRENGTH.get(task, STRENGTH["text"])}


def repaints(values: Mapping[str, Any]) -> bool:
    return _given(values, "mask") or _given(values, "outpaint")


def columns_of(columns: Any) -> tuple[str, ...]:
    """The names of a table's columns, checked. InputError."""
    if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
        raise InputError(f'columns is no list of names such as ["prompt"]; there are {", ".join(COLUMNS)}')
    known = known_names()
    if len(columns) > len(known):  # each is compared with all others below
        raise InputError(f"{len(columns):,} columns are more than the {len(known)} names of settings")
    for name in columns:
        if name not in known:
            raise InputError(
                f"the column {name!r:.60} is not known; there are {', '.join(COLUMNS)} and the names of "
                "settings"
            )
    twice = [name for name in columns if [known[one].name for one in columns].count(known[name].name) > 1]
    if twice:
        raise InputError(f"the columns {' and '.join(twice)} are one")
    if "prompt" not in columns:
        raise InputError('there is no column "prompt"')
    return tuple(columns)


def parameters_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by the settings' names; those that are null are not given. InputError."""
    known, found = known_names(), {}
    for name, value in given.items():
        if name not in known or known[name].name == "prompt":
            raise InputError(
                f"the parameter {name!r:.60} is not known; there are num_inference_steps, guidance_scale "
                "and the names of settings"
            )
        own = known[name].name
        if own in found:
            raise InputError(f"the parameter {name} is given under two names")
        if value is not None:
            found[own] = value
    if found.get("seed") in (-1, "-1"):
        del found["seed"]
    if "seed" in found:
        found["seed"] = _checked("seed", found["seed"])
    return found


def json_of(text: str) -> Any:
    """JSON without NaN and infinities, 1e400 among them, which no JSON could repeat. ValueError."""
    return json.loads(text, parse_constant=_no_constant, parse_float=_finite)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits:.40} is too large a number")
    return number


def answer(prompt: str, image: str | None, nsfw: bool | None, label: Any = None) -> dict[str, Any]:
    """A line's part of the reply. `image` is base64 or a file's name; an index of its own is repeated."""
    found = {"prompt": prompt, "generated_image": image, "nsfw_content_detected": bool(nsfw)}
    return found if label is None else found | {"index": label}


THEIRS = {"init_img": "image", "steps": "num_inference_steps", "scale": "guidance_scale"}


def in_words(error: InputError) -> str:
    """The message of an error on one line, settings by the contract's names."""
    text = error.spelled(lambda name: THEIRS.get(name, name)) if isinstance(error, FieldError) else str(error)
    return " ".join(text.encode("utf-8", "backslashreplace").decode().splitlines())


def _checked(name: str, value: Any) -> Any:
    """The value in its setting's type. FieldError."""
    if not isinstance(value, str | int | float) or len(str(value)) > 80:
        raise ValueFieldError(name, "it is no number")
    try:
        return settings_of(ImageRequest)[name].check(value)
    except ValueError as error:
        raise ValueFieldError(name, str(error)) from None


def _given(values: Mapping[str, Any], name: str) -> bool:
    return values.get(name) is not None


def _check_beside(content: Mapping[str, Any]) -> None:
    """InputError for what stands beside input_data; an empty `params`, which MLflow's clients send, may."""
    for name, value in content.items():
        if name in PARTS:
            raise InputError(f"{name} is beside input_data; it belongs inside it")
        if name == "params" and value not in (None, {}):
            raise InputError("params has values; they belong into parameters, inside input_data")
        if name not in ("input_data", "params"):
            raise InputError(f"the request has {name!r:.60} beside input_data, where nothing belongs")


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        what = "is missing" if value is None else "is no JSON object"
        raise InputError(
            f'{name} {what}; the form is {{"input_data": {{"columns": ["prompt"], "data": ["a red cube"]}}}}'
        )
    return value


def _cells(data: Any, columns: tuple[str, ...]) -> list[Sequence[Any] | InputError]:
    """The lines of `data`: texts where there is one column, lists, or objects by column.

    pandas, of which the contract's form is, also takes an object of columns, and of a single line's values.
    """
    if isinstance(data, dict):
        data = _transposed(data)
    if not isinstance(data, list):
        raise InputError("data is no list of lines")
    return [_line(line, columns) for line in data]


def _transposed(data: dict[str, Any]) -> list[dict[str, Any]]:
    if not any(isinstance(column, list) for column in data.values()):
        return [data]
    if not all(isinstance(column, list) for column in data.values()):
        raise InputError("data has columns that are lists and others that are not")
    lengths = {name: len(column) for name, column in data.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name!r:.40} {length}" for name, length in lengths.items())
        raise InputError(f"the columns of data differ in their lengths: {shown}")
    return [dict(zip(data, line, strict=True)) for line in zip(*data.values(), strict=True)]


def _line(line: Any, columns: tuple[str, ...]) -> Sequence[Any] | InputError:
    if isinstance(line, list):
        return line
    if isinstance(line, dict):
        unknown = [name for name in line if name not in columns]
        if unknown:
            return InputError(f"{unknown[0]!r:.60} is none of the columns {', '.join(columns)}")
        return [line.get(name) for name in columns]
    if len(columns) == 1:
        return [line]
    return InputError(f"no list of values for the columns {', '.join(columns)}")
