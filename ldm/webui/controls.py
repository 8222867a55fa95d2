"""Controls made from the settings of a request, and the request made from what the controls hold.

A `Control` is plain data: `ldm.webui.page` makes gradio's components of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ldm.errors import FieldError, InputError
from ldm.fields import Setting, listed_by_name, settings_of
from ldm.pipeline.request import IMAGE_SETTINGS, ImageRequest
from ldm.pipeline.settings.passes import LANCZOS, LATENT
from ldm.webui.tasks import EXTRA_GROUPS, Task

# Settings without a control of their own: images and files have those of the page, and the one stream of the
# original, or noise that all batches share, is of a whole run.
OWN = (*IMAGE_SETTINGS, "lora", "embedding", "control")
ABSENT = (*OWN, "prompt_template", "negative_template", "rng", "fixed_code", "start_seed")
IN_SIGHT = ("width", "height", "steps", "scale", "sampler", "seed", "strength")  # below the prompts
TITLES = {
    "prompt": "How prompts are read",
    "size": "Second pass, seamless tiles, panoramas",
    "sampling": "Sampling",
    "output": "Watermark",
    "control": "ControlNet",
}
LABELS = {
    "scale": "Guidance scale",
    "negative_prompt": "Negative prompt",
    "cfg_rescale": "CFG rescale",
    "cfg_pp": "CFG++",
    "apg_eta": "APG eta",
    "apg_norm": "APG norm",
    "apg_momentum": "APG momentum",
    "zero_snr": "Zero terminal SNR",
    "clip_skip": "CLIP skip",
    "hires": "Second pass: factor",
    "hires_strength": "Second pass: strength",
    "hires_steps": "Second pass: steps",
    "hires_upscaler": "Second pass: enlarged by",
    "s_churn": "Sigma churn",
    "s_tmin": "Sigma from",
    "s_tmax": "Sigma up to",
    "s_noise": "Sigma noise",
    "soft": "Soft mask",
    "control_preprocess": "Preprocessor",
    "control_resize": "How its image is fitted",
    "init_img": "Image",
    "mask": "Mask",
    "depth": "Depth map",
    "control": "ControlNet",
    "lora": "LoRA",
    "embedding": "Textual inversions",
}
AUTOMATIC = "automatic"  # the choice that stands for None
SWITCH = {"on": True, "off": False}  # the choices of a switch that may be None, too
EXACT = 2**53  # above it the browser's numbers are no longer whole ones


@dataclass(frozen=True)
class Control:
    """One control: `form` is "checkbox", "choice", "number", "slider" or "text". None is its empty value."""

    name: str
    form: str
    label: str
    help: str
    group: str
    value: Any = None
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    placeholder: str = ""
    keyboard: str = "text"  # that a phone shows: "text", "numeric" or "decimal"


def label_of(name: str) -> str:
    return LABELS.get(name) or name.replace("_", " ").capitalize()


def in_labels(error: InputError) -> str:
    """The message of an error, with the labels of controls for the names of settings."""
    message = error.spelled(label_of) if isinstance(error, FieldError) else str(error)
    return " ".join(message.splitlines())


@cache
def controls() -> Mapping[str, Control]:
    """The control of each setting that has one, by name, in the order of the fields."""
    return {name: _control(each) for name, each in settings_of(ImageRequest).items() if name not in ABSENT}


def _control(each: Setting) -> Control:
    facts: dict[str, Any] = {
        "name": each.name,
        "label": label_of(each.name),
        "help": _help(each),
        "group": each.group,
    }
    if each.name in ("prompt", "negative_prompt"):
        return Control(form="text", value="", **facts)
    choices = _choices(each)
    if each.kind is bool and not choices:
        return Control(form="checkbox", value=False, **facts)
    if choices:
        optional = each.default in (None, ())
        value = AUTOMATIC if optional else each.default
        return Control(form="choice", choices=(AUTOMATIC,) * optional + choices, value=value, **facts)
    placeholder = each.default_text or ""
    if each.kind in (int, float) and each.default is not None and (each.high or 0) < EXACT:
        facts |= {"low": each.low, "high": each.high}
        form = "slider" if (each.low, each.high) == (0, 1) else "number"
        return Control(form=form, value=each.default, **facts)
    # The browser's fields for numbers cannot be empty, which is how these are left to the model.
    keyboard = {int: "numeric", float: "decimal"}.get(each.kind, "text")
    value = each.default if isinstance(each.default, str) else ""
    return Control(form="text", value=value, placeholder=placeholder, keyboard=keyboard, **facts)


def _choices(each: Setting) -> tuple[str, ...]:
    """The values that a setting can have, () for any: a path is none that a page's user may give."""
    from ldm.sampling import catalogue

    if each.kind is bool:
        return tuple(SWITCH) if each.default is None else ()
    known = {
        "sampler": catalogue.SAMPLERS,
        "schedule": catalogue.SCHEDULES,
        "hires_upscaler": (LATENT, LANCZOS),
    }
    return tuple(known.get(each.name, each.choices))


def _help(each: Setting) -> str:
    """What a setting does, with its range and what is taken without it, by the labels of the page."""
    text = each.help.replace(", or the FILE of a pixel upscaler such as ESRGAN", "")
    if each.kind in (int, float) and each.high is not None and each.high <= 10_000 and "0 to 1" not in text:
        text += f", {each.low:,g} to {each.high:,g}"
    if each.default_text and each.name not in ("prompt", "lora"):
        state = AUTOMATIC if _choices(each) else "off" if each.kind is bool else "empty"
        text += f"; {state}: {each.default_text}"
    known = listed_by_name(ImageRequest)

    def label(match: re.Match[str]) -> str:
        found = known.get(match[1].replace("-", "_"))
        return f"“{label_of(found.name)}”" if found else match[0]

    text = re.sub(r"--(\w[\w-]*)", label, text)
    return text[0].upper() + text[1:]


def has_group(task: Task, group: str) -> bool:
    """Whether a task has a group of settings."""
    return group in task.groups if group in EXTRA_GROUPS else group not in task.lacks


def shown(control: Control, task: Task) -> bool:
    """Whether a task has the control."""
    return has_group(task, control.group) and control.name not in task.leave_out


def settings_from(task: Task, held: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a task's controls give, without those that are empty or at their default.

    FieldError for a value that is not fit.
    """
    settings = settings_of(ImageRequest)
    found: dict[str, Any] = {}
    for name, control in controls().items():
        value = held.get(name)
        if isinstance(value, str) and control.form != "choice" and name not in ("prompt", "negative_prompt"):
            value = value.strip()
        if not shown(control, task) or value in (None, "", AUTOMATIC, []) or value is False:
            continue
        if name == "seed" and value == "-1":  # by chance, as the commands have it
            continue
        if control.choices and value not in control.choices:
            raise FieldError(
                "{" + name + "} {value!r}: choose from {choices}",
                value=value,
                choices=", ".join(control.choices),
            )
        if settings[name].kind is list:
            value = (value,)
        if settings[name].kind is bool:
            value = SWITCH.get(value, value)
        if value != settings[name].default:
            found[name] = value
    return found


def request_of(task: Task, held: Mapping[str, Any], inputs: Mapping[str, Any]) -> ImageRequest:
    """The request of a task by what its controls hold and its `inputs`: images, and names of files.

    It is the one that the task's command makes of the same values. FieldError.
    """
    settings = {**task.defaults, **settings_from(task, held), **inputs}
    if settings.get("init_img") is None:
        if task.groups and settings.get("depth") is None:
            wanted = "an image, or a depth map" if task.name == "depth" else "an image"
            raise InputError(f"{task.title} starts from {wanted}: drop one into its place")
        settings.pop("strength", None)
    if task.name == "inpaint" and settings.get("mask") is None and settings.get("outpaint") is None:
        raise InputError(
            f"{task.title} needs a mask: draw on the image where it is to be painted anew, "
            f"or fill in {label_of('outpaint')}"
        )
    request = ImageRequest(**settings)
    if request.sampler == "ddim" and request.eta is None:
        request = request.twin(eta=0.0)  # as the commands do for the original's --ddim_eta
    return request


def held_by(task: Task, recorded: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What a task's controls have to hold for the settings that an image records, and notes for the user.

    All controls are in it: what the image does not record is at its default.
    """
    settings = settings_of(ImageRequest)
    held: dict[str, Any] = {}
    notes: list[str] = []
    for name, control in controls().items():
        held[name] = control.value
        if name in task.defaults and name != "prompt":
            held[name] = f"{task.defaults[name]:g}"
        value = recorded.get(name)
        if value is None or not shown(control, task):
            continue
        try:
            held[name] = as_held(control, settings[name], value)
        except (ValueError, InputError) as error:
            notes.append(f"{control.label}: {error}")
    return held, notes


def as_held(control: Control, each: Setting, value: Any) -> Any:
    """A recorded value as its control holds it. ValueError or InputError if it can hold no such value."""
    from ldm.sampling import catalogue

    value = each.check(value)
    if each.name == "sampler":
        value = catalogue.resolve(value)[0]
    elif each.name == "schedule":
        value = catalogue.resolve_schedule(value)
    if each.kind is list:
        value = value[0] if len(value) == 1 else AUTOMATIC
    if each.kind is bool and control.choices:
        value = "on" if value else "off"
    if control.form == "choice" and value not in control.choices:
        raise ValueError(f"{value} is none of {', '.join(control.choices)}")
    if each.kind is tuple:
        return ",".join(f"{one:.12g}" for one in value)
    if control.form != "text":
        return value
    return f"{value:.12g}" if isinstance(value, float) else str(value)
