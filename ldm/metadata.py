"""The settings of an image, written into its PNG file and read back."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import InputError

METADATA_KEYWORD = "stable-diffusion"  # the PNG text chunk that holds the settings as JSON
FILE_SETTINGS = ("config", "checkpoint", "init_img")  # recorded by file name: folders are nobody's business

A1111_SAMPLERS = {
    "ddim": "DDIM",
    "plms": "PLMS",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpm_fast": "DPM fast",
    "dpm_adaptive": "DPM adaptive",
    "unipc": "UniPC",
    "lcm": "LCM",
}
A1111_SCHEDULES = {
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "sgm_uniform": "SGM Uniform",
    "ays": "Align Your Steps",
}


def encode_png(image: np.ndarray, settings: dict[str, Any] | None) -> bytes:
    """A PNG file of an image, uint8 [H, W, 3], with its settings, if any, in two text chunks.

    `stable-diffusion` holds them all as JSON, `parameters` the ones other tools read (`a1111_parameters`).
    """
    file = io.BytesIO()
    Image.fromarray(image).save(
        file, format="PNG", pnginfo=None if settings is None else text_chunks(settings)
    )
    return file.getvalue()


def text_chunks(settings: dict[str, Any]) -> PngInfo:
    settings = settings | {key: PurePath(settings[key]).name for key in FILE_SETTINGS if settings.get(key)}
    chunks = PngInfo()
    # A prompt typed in another encoding than UTF-8 holds lone surrogates, which JSON escapes and PNG refuses.
    chunks.add_text("parameters", a1111_parameters(settings).encode("utf-8", "replace").decode("utf-8"))
    chunks.add_text(METADATA_KEYWORD, json.dumps(settings))
    return chunks


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """The settings in a PNG file, as they were given when it was saved; None if it has none."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.text.get(METADATA_KEYWORD)
    except OSError as error:
        raise InputError(f"cannot read the PNG file {path}: {error.strerror or error}") from error
    return None if text is None else json.loads(text)


def a1111_parameters(settings: dict[str, Any]) -> str:
    """Settings as the text that AUTOMATIC1111's web UI writes and many tools read.

    Needs prompt, width and height; any other setting that is missing or None is left out. Source:
    `create_infotext` in its modules/processing.py and `quote` in modules/infotext_utils.py.
    """
    sampler, schedule, checkpoint = (settings.get(key) for key in ("sampler", "schedule", "checkpoint"))
    model = (
        PurePath(checkpoint).name.removesuffix(".ckpt").removesuffix(".safetensors") if checkpoint else None
    )
    fields = {
        "Steps": settings.get("steps"),
        "Sampler": A1111_SAMPLERS.get(sampler, sampler),
        "Schedule type": A1111_SCHEDULES.get(schedule),
        "CFG scale": settings.get("scale"),
        "Seed": settings.get("seed"),
        "Size": f"{settings['width']}x{settings['height']}",
        "Model hash": settings.get("model_hash"),
        "Model": model,
        "Variation seed": settings.get("variation_seed"),
        "Variation seed strength": settings.get("variation_strength"),
        "Denoising strength": settings.get("strength"),
        "Eta": settings.get("eta"),
        "Version": settings.get("version"),
    }
    lines = [settings["prompt"]]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in fields.items() if value is not None))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search("[,:\n]", text) else text
