"""What a checkpoint is and what it can do, by its header: no weight is read, torch is not imported."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import InputError
from ldm.weights import lora_names
from ldm.weights.embedding import SDXL
from ldm.weights.families import FAMILIES, Family, family_of, variants
from ldm.weights.hashes import hashed_file, known_hash, quick_hash
from ldm.weights.header import Header, read_header
from ldm.weights.loading import bundled_family
from ldm.weights.lora import LoraFile
from ldm.weights.prediction import prediction_hint, stated_size

# The parts of a checkpoint by the beginnings of its weights' names.
PARTS = (
    (
        r"model_ema\.(decay|num_updates)$|low_scale_model\.|[a-z_\d]*(alphas|betas|posterior|cumprod)",
        "schedule",
    ),
    (r"model_ema\.", "UNet, averaged"),
    (r"model\.diffusion_model\.", "UNet"),
    (r"first_stage_model\.", "autoencoder"),
    (r"(cond_stage_model|conditioner)\.", "text encoder"),
    (r"depth_model\.", "depth estimator"),
    (r"control_model\.", "ControlNet"),
)
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
DO = {
    "text": (
        ("images of a text", 'txt2img.py --prompt "a cat"'),
        ("images of a text and an image", 'img2img.py --prompt "a cat" --init-img IMAGE'),
        ("parts of images anew", 'inpaint.py --prompt "a cat" --init-img IMAGE --mask MASK'),
    ),
    "inpaint": (("parts of images anew", 'inpaint.py --prompt "a cat" --init-img IMAGE --mask MASK'),),
    "depth": (("images with the depths of an image", 'depth2img.py --prompt "a cat" --init-img IMAGE'),),
    "upscale": (("images of four times the size", 'upscale.py --prompt "a cat" --init-img IMAGE'),),
}
# Files that a command takes beside a checkpoint, or in its place.
PARTNERS = {
    "a pixel upscaler": ("larger images", "upscale.py --init-img IMAGE --model {file}"),
    "an autoencoder alone": (
        "another autoencoder for a checkpoint",
        'txt2img.py --prompt "a cat" --vae {file}',
    ),
    "a LoRA": ("other images of a checkpoint", 'txt2img.py --prompt "a cat" --lora {file}'),
    "a ControlNet": (
        "images of a text that follow an image",
        'txt2img.py --prompt "a cat" --control {file_and_image}',
    ),
    "a textual inversion": ("images of its word", "txt2img.py --prompt {word} --embedding {file}"),
}
CONTEXT = re.compile(r".*\battn2\.to_k\.weight")  # of a ControlNet: [width, context width]


def model_info(path: str | Path) -> dict[str, Any]:
    """The facts about a checkpoint, fit for JSON. InputError for what `read_header` refuses, or no tensors.

    `model_hash` is None unless the cache folder has it: it takes reading the whole file.
    """
    path = Path(path)
    header = read_header(path)
    tensors = header.tensors or header.nested
    if not tensors:
        raise InputError(f"{path} is not a model checkpoint: it holds no tensors")
    family = bundled_family(path) or family_of(tensors)
    parts: Counter[str] = Counter()
    precisions: Counter[str] = Counter()
    for name, tensor in tensors.items():
        part = part_of(name, family)
        parts[part] += tensor.numel
        if part != "schedule":
            precisions[SHORT.get(tensor.dtype, tensor.dtype)] += tensor.numel
    prediction, known_by = _prediction(header, family)
    return {
        "file": str(path),
        "format": _format(header),
        "size": sum(file.stat().st_size for file in _files(path)),
        "family": family.name,
        "supported": family.config is not None,
        "config": " or ".join(_configs(header, family, prediction)) or None,
        "parameters": sum(parts.values()),
        "parts": dict(parts.most_common()),
        "precision": dict(precisions.most_common()),
        "weights": _weights(tensors),
        "global_step": header.global_step,
        "prediction": prediction,
        "prediction_known_by": known_by,
        "quick_hash": quick_hash(path),
        "model_hash": known_hash(path),
        "hashed_file": str(hashed_file(path)),
        "uses": _uses(path, family, tensors),
    }


def part_of(name: str, family: Family) -> str:
    """The part of a checkpoint that a weight belongs to."""
    known = next((part for pattern, part in PARTS if re.match(pattern, name)), None)
    return known or ("other" if family.config else re.sub(r"^(an?|the) | alone$", "", family.name))


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _format(header: Header) -> str:
    if header.path.is_dir():
        return "diffusers folder"
    return ".ckpt" if header.is_pickle else ".safetensors"


def _weights(tensors: Mapping[str, Any]) -> str | None:
    """Which of a UNet's weights there are: "raw", "ema", "raw and ema"; None for a file without a UNet."""
    averaged = any(name.startswith("model_ema.diffusion_model") for name in tensors)
    plain = any(name.startswith("model.diffusion_model.") for name in tensors)
    return " and ".join(["raw"] * plain + ["ema"] * averaged) or None


def _prediction(header: Header, family: Family) -> tuple[str | None, str | None]:
    """What the UNet predicts, and how that is known; (None, how it will be) where nothing in it says."""
    if family.config is None:
        return None, None
    rows = variants(family, stated_size(header))
    is_open = len({row.predicts for row in rows}) > 1 and not bundled_family(header.path)
    if hint := prediction_hint(header, by_name=is_open):
        return hint.parameterization, hint.why
    return (None, "a test when it is loaded") if is_open else (family.predicts, "its family")


def _configs(header: Header, family: Family, prediction: str | None) -> list[str]:
    """The configs that fit a file: the first of those that differ in nothing but the size of images."""
    if bundled_family(header.path):
        return [family.config]
    rows = [row for row in variants(family, stated_size(header)) if row.config]
    first: dict[str, str] = {}
    for row in rows:
        first.setdefault(row.predicts, row.config)
    return [config for predicts, config in first.items() if len(first) == 1 or prediction in (None, predicts)]


def _uses(path: Path, family: Family, tensors: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the file is good for, with the command; empty for what cannot be used here."""
    words = {"file": path, "file_and_image": f"{path}:IMAGE", "word": f"a photo of {path.stem}"}
    words = {name: shlex.quote(str(text)) for name, text in words.items()}
    options = f"--ckpt {words['file']}" + (" --weights ema" if _weights(tensors) == "ema" else "")
    uses = [(what, f"{command} {options}") for what, command in (DO[family.task] if family.config else ())]
    # the published ControlNets for v1 are whole checkpoints besides
    has_control = any(name.startswith("control_model.") for name in tensors)
    part = "a ControlNet" if has_control else family.name
    if part in PARTNERS and not _is_foreign(path, part, tensors):
        what, command = PARTNERS[part]
        uses.append((what, command.format(**words)))
    return [{"makes": what, "command": f"python scripts/{command}"} for what, command in uses]


def _is_foreign(path: Path, part: str, tensors: Mapping[str, Any]) -> bool:
    """Whether a file is for a model that cannot be run here, as far as its names and shapes say."""
    if part == "a textual inversion":
        return bool(SDXL & tensors.keys())
    model = ""
    if part == "a LoRA":
        try:
            model = lora_names.family(LoraFile(path).shapes)
        except InputError:  # whose layers are named in no way that is known here
            return True
    elif part == "a ControlNet":
        widths = (t.shape[1] for name, t in tensors.items() if CONTEXT.fullmatch(name) and len(t.shape) == 2)
        model = lora_names.WIDTHS.get(next(widths, None), "")
    return bool(model) and not any(row.config and row.name == model for row in FAMILIES)
