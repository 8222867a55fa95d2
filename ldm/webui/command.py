"""The command that makes the same image as the page."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm.fields import changed, settings_of
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.request import IMAGE_SETTINGS, ImageRequest
from ldm.pipeline.settings.control import Control
from ldm.pipeline.settings.text import A1111
from ldm.prompts.lora_tags import TAG
from ldm.webui.tasks import Task
from ldm.weights.loading import ROOT, ModelFiles, choose_model, find

ALWAYS = ("prompt", "strength", "noise_level")  # for which commands have defaults of their own
LORA_FOLDER = "models/loras"  # where commands look for a LoRA that a prompt names
NO_IMAGE_CHANGES = ("device", "batch_size")  # of RuntimeOptions
INPUT_FILES = {"init_img": "init.png", "mask": "mask.png", "depth": "depth.png", "control": "control.png"}


def command_line(
    task: Task,
    request: ImageRequest,
    images: int = 1,
    *,
    files: ModelFiles | None = None,
    runtime: RuntimeOptions | None = None,
    lora_folder: str | None = None,
    loras: Iterable[str] = (),
    safety: str = "auto",
    further: Iterable[str] = (),
    script: str | None = None,
) -> str:
    """A line for a shell that makes `images` images of a request with a seed, of which image k has seed + k.

    The request is the one that the page made, before the model decides on what it leaves open. Images stand
    under the names of `INPUT_FILES`. `files` are the model's, and `lora_folder` has the LoRAs that prompts
    name, or else `loras` has their files. `further` are words behind all others.
    """
    words = ["python", near(ROOT / "scripts" / (script or task.command))]
    settings = settings_of(type(request))
    given = changed(request) | {name: getattr(request, name) for name in ALWAYS}
    further = list(further)
    names_loras = request.prompt_syntax == A1111 and any(map(TAG.search, (request.prompt, *further)))
    if not names_loras or (lora_folder and find(lora_folder) == find(LORA_FOLDER)):
        lora_folder = None  # there commands look by themselves
    if lora_folder:
        given["prompt"], *further = with_paths((request.prompt, *further), loras, find(lora_folder))
    if request.sampler == "ddim" and not request.eta:
        given.pop("eta", None)
    for name, value in given.items():
        if value is None or name == "seed" or (request.init_img is None and name == "strength"):
            continue
        for text in _texts(name, value):
            words += _option(settings[name].spellings[0], text)
        if value is True:
            words.append(settings[name].spellings[0])
        if value is False:  # of a switch that the model may turn on
            words.append(f"--no-{name}")
    words += ["--seed", str(request.seed), "--n_samples", str(images), "--n_iter", "1"]
    words += _model_options(task, files)
    for name, value in changed(runtime or RuntimeOptions()).items():
        if name not in NO_IMAGE_CHANGES:
            words += [f"--{name}"] if value is True else _option(f"--{name}", _text(value))
    if lora_folder:
        words += _option("--lora_folder", near(find(lora_folder)))
    if safety != "auto":
        words += ["--safety", safety]
    return shlex.join([*words, *further])


def with_paths(texts: Iterable[str], loras: Iterable[str], folder: Path) -> list[str]:
    """Texts with the paths of those LoRAs that they name and that lie neither in a folder nor below it, where
    alone a command looks for names. What lies there goes first.
    """
    from ldm.pipeline.adapters import Adapters  # imports torch

    inside = Adapters(folder).names()
    paths = {
        name.casefold(): file
        for file in loras
        for name in (Path(file).name, Path(file).stem)
        if name.casefold() not in inside
    }

    def spelled(match: re.Match[str]) -> str:
        name, colon, weights = match[1].partition(":")
        path = paths.get(name.strip().casefold())
        return f"<lora:{path}{colon}{weights}>" if path else match[0]

    return [TAG.sub(spelled, text) for text in texts]


def _model_options(task: Task, files: ModelFiles | None) -> list[str]:
    """--config and --ckpt, unless the command takes this model by itself."""
    default = choose_model(None, None, task.does)
    if files is None or (files.config, files.weights) == (default.config, default.weights):
        return []
    return [*_option("--config", near(files.config)), *_option("--ckpt", near(files.weights))]


def near(path: Path) -> str:
    """A path as one types it: from the working folder, if it is inside."""
    here, path = Path.cwd(), path.absolute()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _option(flag: str, text: str) -> list[str]:
    """A flag with its value; argparse takes one that begins with a dash for another flag."""
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _texts(name: str, value: Any) -> list[str]:
    """The values of an option, which is given as often; none for a switch."""
    if isinstance(value, bool):
        return []
    if name in IMAGE_SETTINGS:
        return [INPUT_FILES[name]]
    if name == "control":
        return [str(_with_file(one)) for one in value]
    if isinstance(value, tuple) and all(isinstance(one, str) for one in value):
        return list(value)
    return [",".join(map(_text, value)) if isinstance(value, tuple) else _text(value)]


def _with_file(control: Control) -> Control:
    return Control(control.file, INPUT_FILES["control"], control.weight, control.start, control.end)


def _text(value: Any) -> str:
    """Numbers with all of their digits, whole ones without a point."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def input_images(request: ImageRequest) -> Mapping[str, Any]:
    """The images that a request starts from, under the names that its command has for them."""
    found = {INPUT_FILES[name]: getattr(request, name) for name in IMAGE_SETTINGS}
    for one in request.controls:
        found[INPUT_FILES["control"]] = one.image
    return {name: image for name, image in found.items() if image is not None}
