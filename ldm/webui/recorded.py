"""The settings of an image that was dropped onto the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import InputError
from ldm.pipeline.infotext import read_settings
from ldm.pipeline.request import IMAGE_SETTINGS
from ldm.pipeline.settings.adapters import parse_lora
from ldm.pipeline.settings.control import parse_control
from ldm.pipeline.settings.text import EmbeddingFile
from ldm.webui.controls import held_by, label_of
from ldm.webui.files import Files
from ldm.webui.inputs import in_words
from ldm.webui.tasks import TASKS, Task

# How images were made that have a setting, and the task that makes them; the first match counts.
MADE_BY = {
    "noise_level": "upscale",
    "upscaler": "upscale",
    "mask": "inpaint",
    "outpaint": "inpaint",
    "depth": "depth",
    "init_img": "image",
}


@dataclass(frozen=True)
class Recorded:
    """What the page has to show so that it makes an image again: the task, what its controls hold, the files
    by name with their weights, and notes for the user.
    """

    task: Task
    held: Mapping[str, Any]
    loras: Mapping[str, str]
    embeddings: tuple[str, ...]
    model_hash: str
    notes: tuple[str, ...]


def read_dropped(path: str | Path, files: Files, max_pixels: int) -> Recorded:
    """The settings in an image file, ours or an A1111 text. InputError if it has none."""
    try:
        found = read_settings(path)
    except InputError as error:
        raise InputError(in_words(error, path, Path(path).name, max_pixels)) from error
    task = TASKS[next((name for key, name in MADE_BY.items() if found.get(key) is not None), "text")]
    held, notes = held_by(task, found)
    for name in ("prompt", "negative_prompt"):
        held[name] = str(found.get(name) or "")
    for name in IMAGE_SETTINGS:
        if found.get(name) is not None:
            notes.append(f"it was made from {found[name]}: drop that into {label_of(name)}, too")
    loras, embeddings = {}, []
    for text in _texts(found.get("lora")):
        try:
            lora = parse_lora(text)
        except InputError as error:
            notes.append(str(error))
            continue
        name = _known(lora.file, files.loras)
        if name is None:
            notes.append(f"there is no LoRA {lora.file} here")
        else:
            own = "" if lora.text_weight == lora.weight else f":{lora.text_weight:g}"
            loras[name] = f"{lora.weight:g}{own}"
    for text in _texts(found.get("embedding")):
        try:
            name = _known(EmbeddingFile.parse(text).path, files.embeddings)
        except InputError:
            name = None
        if name is None:
            notes.append(f"there is no textual inversion {text} here")
        else:
            embeddings.append(name)
    for text in _texts(found.get("control")):
        try:
            control = parse_control(text)
            notes.append(f"it followed {control.image} by the ControlNet {control.file}: choose that, too")
        except InputError as error:
            notes.append(str(error))
    if found.get("rng") == "compvis":
        notes.append("its noise is of the original's one stream, which the page does not draw")
    for name in ("hires_upscaler", "upscaler", "vae"):
        if found.get(name) not in (None, "latent", "lanczos"):
            notes.append(f"{label_of(name)} {found[name]} is not on this page")
    return Recorded(
        task, held, loras, tuple(embeddings), str(found.get("model_hash") or ""), tuple(dict.fromkeys(notes))
    )


def _texts(value: Any) -> list[str]:
    """The texts of a list, or the only one; a file may have anything in their place."""
    return [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, str)]


def _known(file: str, known: Mapping[str, str]) -> str | None:
    """The name under which the page has a file, by its own name, with suffix or without."""
    wanted = Path(file).name.casefold()
    return next((name for name in known if wanted in (name.casefold(), Path(name).stem.casefold())), None)
