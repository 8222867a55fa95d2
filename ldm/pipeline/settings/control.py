"""ControlNets and the images that they follow."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePath
from typing import Any

from ldm.errors import FieldError
from ldm.fields import setting, settings_of

CONTROL = "control"  # the group of the settings
PREPROCESSORS = ("none", "canny", "depth", "invert")
FORM = "FILE:IMAGE[:weight[:start-end]]"
MOST_WEIGHT = 10.0
WEIGHT_FILES = (".safetensors", ".pth", ".ckpt", ".pt", ".bin")
CANNY = (100.0, 200.0)


@dataclass(frozen=True)
class Control:
    """One ControlNet, the image that it follows, and how much it has to say at which steps."""

    file: str  # its weights, or a folder of diffusers
    image: Any  # a file, or a PIL image
    weight: float = 1.0  # the factor on what it adds to the UNet's features
    start: float = 0.0  # as shares of the steps
    end: float = 1.0

    def __str__(self) -> str:
        """As `parse_control` reads it; a PIL image goes by its file's name."""
        image = self.image
        if not isinstance(image, str):
            image = str(getattr(image, "filename", "") or "image")
        whole = (self.start, self.end) == (0.0, 1.0)
        weight = "" if whole and self.weight == 1.0 else f":{self.weight:.12g}"
        return f"{self.file}:{image}{weight}" + ("" if whole else f":{self.start:.12g}-{self.end:.12g}")

    def without_folders(self) -> Control:
        """The same with files by their names alone."""
        image = PurePath(self.image).name if isinstance(self.image, str) else self.image
        return Control(PurePath(self.file).name, image, self.weight, self.start, self.end)


@lru_cache(maxsize=1024)
def parse_control(text: str) -> Control:
    """What FILE:IMAGE[:weight[:start-end]] says. FieldError for what is malformed.

    Paths may have colons: the longest path that is there counts, or else the first that has a suffix.
    """
    parts = text.split(":")
    at = _path_parts(parts[:-1], WEIGHT_FILES)
    file, rest = ":".join(parts[:at]), parts[at:]
    at = _path_parts(rest)
    image, rest = ":".join(rest[:at]), rest[at:]
    if not file or not image or len(rest) > 2:
        raise FieldError("{control} {text!r}: give {form}", text=text, form=FORM)
    weight, span = (*rest, "", "")[:2]
    return Control(file, image, _weight(text, weight), *_span(text, span))


def a1111_controls(controls: Sequence[str], preprocessors: Sequence[str]) -> dict[str, str]:
    """ControlNets as the web UI's extension for them (sd-webui-controlnet) writes them into its text."""
    found = {}
    for k, one in enumerate(map(parse_control, controls)):
        module = preprocessors[k if len(preprocessors) > 1 else 0] if preprocessors else "none"
        facts = {
            "Module": module,
            "Model": PurePath(one.file).stem,
            "Weight": f"{one.weight:.12g}",
            "Guidance Start": f"{one.start:.12g}",
            "Guidance End": f"{one.end:.12g}",
        }
        found[f"ControlNet {k}"] = ", ".join(f"{name}: {value}" for name, value in facts.items())
    return found


def _path_parts(parts: list[str], suffixes: tuple[str, ...] = ()) -> int:
    """How many of a text's parts between colons make up the path that it begins with."""
    paths = {count: ":".join(parts[:count]) for count in range(1, len(parts) + 1)}
    there = [count for count, path in paths.items() if "\0" not in path and os.path.exists(path)]
    if there:
        return there[-1]

    def is_whole(path: str) -> bool:
        suffix = PurePath(path.replace("\\", "/")).suffix.lower()
        return suffix in suffixes if suffixes else re.fullmatch(r"\.[a-z]\w*", suffix) is not None

    return next((count for count, path in paths.items() if is_whole(path)), 1)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _weight(text: str, weight: str) -> float:
    value = _number(weight) if weight else 1.0
    if not abs(value) <= MOST_WEIGHT:  # NaN is not
        raise FieldError(
            "{control} {text!r}: {weight!r} is no weight, which is a number from {low:g} to {high:g}; the "
            "form is {form}",
            text=text,
            weight=weight,
            low=-MOST_WEIGHT,
            high=MOST_WEIGHT,
            form=FORM,
        )
    return value


def _span(text: str, span: str) -> tuple[float, float]:
    """The shares of the steps that "0.2-0.8" stands for; all of them without a text."""
    start, _, end = span.partition("-") if span else ("0", "-", "1")
    found = _number(start), _number(end)
    if not 0 <= found[0] < found[1] <= 1:
        raise FieldError(
            "{control} {text!r}: {span!r} is no range of the steps, which is START-END with "
            "0 <= START < END <= 1, such as 0-0.5",
            text=text,
            span=span,
        )
    return found


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class ControlSettings:
    """ControlNets and the images that they follow."""

    control: tuple[str, ...] = setting(  # or Control objects, whose image may be a PIL image
        (),
        "a ControlNet and the image that it follows, its weight and the shares of the steps when it acts; "
        "several may be given; none: without those of the image of --like",
        metavar=FORM,
        group=CONTROL,
        per_image=True,
        takes_objects=True,
        recorded=False,
    )
    control_preprocess: tuple[str, ...] = setting(
        (),
        "what makes the image that a ControlNet sees: canny draws edges, depth estimates distance, invert "
        "swaps black and white; one for all, or one for each --control",
        choices=PREPROCESSORS,
        group=CONTROL,
        per_image=True,
        recorded=False,
        default_text="none",
    )
    control_resize: str = setting(
        "stretch",
        "how a control image is fitted to the size",
        choices=("stretch", "crop", "pad"),
        group=CONTROL,
        per_image=True,
        recorded=False,
    )
    canny_thresholds: tuple[float, ...] = setting(
        CANNY,
        "of canny: edges above HIGH, and what continues them above LOW",
        low=0,
        high=10_000,
        metavar="LOW,HIGH",
        group=CONTROL,
        per_image=True,
        recorded=False,
        default_text="100,200",
    )

    @property
    def controls(self) -> tuple[Control, ...]:
        """The ControlNets with their images, in order."""
        return tuple(one if isinstance(one, Control) else parse_control(one) for one in self.control)

    @property
    def preprocessors(self) -> tuple[str, ...]:
        """What makes the image that each ControlNet sees, of `PREPROCESSORS`."""
        given = self.control_preprocess or ("none",)
        return given * len(self.control) if len(given) == 1 else given

    def control_key(self) -> tuple:
        """What images that are sampled together must agree in: all but the control images."""
        return tuple((one.file, one.weight, one.start, one.end) for one in self.controls)

    def check_control(self) -> None:
        """FieldError for values that do not go together. `none` alone resets all settings of this group."""
        if "none" in self.control and len(self.control) > 1:
            raise FieldError("{control} none stands alone: leave it, or the others, out")
        if self.control == ("none",):
            for name, each in settings_of(type(self)).items():
                if each.group == CONTROL:  # what is left of --like would be for nothing
                    object.__setattr__(self, name, each.default)
        for one in self.control:
            if not isinstance(one, str | Control):
                raise FieldError(
                    "{control} is an object of type {type}: give texts {form}, or Control objects",
                    type=type(one).__name__,
                    form=FORM,
                )
        count, given = len(self.controls), len(self.control_preprocess)
        if not count:
            for name, default in (("control_preprocess", ()), ("control_resize", "stretch")):
                if getattr(self, name) != default:
                    raise FieldError("{" + name + "} without {control}")
        if given > 1 and given != count:
            raise FieldError(
                "{control_preprocess} is given {given} times and {control} {count} times: give one for all, "
                "or one for each",
                given=given,
                count=count,
            )
        if self.canny_thresholds != CANNY:
            if "canny" not in self.preprocessors:
                raise FieldError("{canny_thresholds} without {control_preprocess} canny")
            shown = ",".join(f"{value:g}" for value in self.canny_thresholds)
            if len(self.canny_thresholds) != 2:
                raise FieldError("{canny_thresholds} {shown}: give two numbers LOW,HIGH", shown=shown)
            low, high = self.canny_thresholds
            if low > high:
                why = f"LOW, {low:g}, is above HIGH, {high:g}"
                raise FieldError("{canny_thresholds} {shown}: {why}", shown=shown, why=why)
