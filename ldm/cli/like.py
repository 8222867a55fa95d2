"""Settings of an image as those of the command that makes it again."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ldm.errors import InputError
from ldm.fields import settings_of
from ldm.log import printable
from ldm.pipeline.infotext import HIRES_RESIZE, read_settings
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.request import DEPTH, IMAGE_SETTINGS, INIT, MASK, SAMPLER_OPTIONS, UPSCALE, ImageRequest
from ldm.pipeline.settings.passes import LANCZOS, LATENT, PASSES
from ldm.pipeline.settings.text import EmbeddingFile

LEVELS = ("schedule", "rho", "timesteps", "sigmas")
WAY = ("prompt_to", "prompt_mix")  # of a walk's frame, from its prompt to another one
# where the user gives the first, the image's second have no say
OVERRIDES = {
    **dict.fromkeys(("sampler", "plms", "dpm_solver"), ("sampler", *SAMPLER_OPTIONS, *LEVELS)),
    **dict.fromkeys(("schedule", "rho"), LEVELS),
    **dict.fromkeys(("timesteps", "sigmas"), ("steps", *LEVELS)),
    "steps": ("steps", "timesteps", "sigmas"),
    "ddim_eta": ("eta",),
    "prompt": ("prompt_template", *WAY),
    "negative_prompt": ("negative_template",),
    "from_file": ("prompt", "prompt_template", *WAY),
    "seed": ("seed", "start_seed"),
    "rng": ("rng", "variation_seed", "variation_strength", "start_seed"),
}
# of an A1111 text, what says nothing about how the image is made
FACTS = (
    *("Init image hash", "Batch size", "Batch pos", "User", "Hashes", "Created Date"),
    *("Civitai resources", "Civitai metadata"),
)
RUNTIME = ("precision", "vae_tiling", "deepcache", "tome")  # of RuntimeOptions, what an image records


# How images were made that have a setting of a group, and the command that makes them, first match first.
MADE_BY = {
    "noise_level": (UPSCALE, "upscaling", "upscale.py"),
    "upscaler": (UPSCALE, "a pixel upscaler", "upscale.py"),
    "mask": (MASK, "inpainting", "inpaint.py"),
    "outpaint": (MASK, "inpainting", "inpaint.py"),
    "depth": (DEPTH, "depth to image", "depth2img.py"),
    "init_img": (INIT, "image to image", "img2img.py"),
    "strength": (INIT, "image to image", "img2img.py"),
}


def settings_like(
    recorded: dict[str, Any],
    given: Collection[str],
    groups: Collection[str] = (),
    owner: type[ImageRequest] = ImageRequest,
) -> dict[str, Any]:
    """Settings by name that make one image with what another one records.

    `given` are the options that the user chose, over which it has no say; `groups` are the groups of settings
    that the command has besides text to image's. InputError for an image that it cannot make again.
    """
    for name, (group, how, command) in MADE_BY.items():
        if recorded.get(name) is not None and group not in groups:
            source = recorded.get("init_img", "another image")
            raise InputError(f"it was made from {source} by {how}; use {command} with --init-img")
    for name in IMAGE_SETTINGS:
        if name in recorded and name not in given:
            raise InputError(f"it was made from {recorded[name]}; give that as {spelling(owner, name)}")
    if recorded.get("embedding") and "embedding" not in given:
        for text in texts_of(recorded["embedding"]):
            if not Path(EmbeddingFile.parse(text).path).is_file():
                raise InputError(f"it was made with the textual inversion {text}; give that as --embedding")
    if recorded.get("control") and "control" not in given:
        used = " ".join(texts_of(recorded["control"])) or recorded["control"]
        raise InputError(f"it was made with the ControlNet {used}; give that as --control")
    upscaler = recorded.get("hires_upscaler")
    if upscaler not in (None, LATENT, LANCZOS) and "hires_upscaler" not in given and UPSCALE not in groups:
        raise InputError(
            f"its second pass was over an enlargement by {upscaler}; give that file, {LATENT} or {LANCZOS} "
            "as --hires_upscaler"
        )
    resize = _others(recorded).get(HIRES_RESIZE)
    if resize and "hires" not in given and UPSCALE not in groups:
        why = f"its second pass was at {resize}, which no factor makes of its first one's size"
        raise InputError(f"{why}; give --hires FACTOR")
    if recorded.get("vae") and "vae" not in given:
        raise InputError(f"its autoencoder was {recorded['vae']}; give that as --vae")
    alone = recorded.get("image", 0) == 0 and recorded.get("batch_size", recorded.get("n_samples", 1)) == 1
    if recorded.get("rng") == "compvis" and "rng" not in given and not alone:
        raise InputError(
            f"it is image {recorded.get('image')} of a run in the original's one stream (--rng compvis), "
            "where no image can be made alone; repeat that run"
        )
    left_alone = {name for option in given for name in OVERRIDES.get(option, ())} | {*given, *IMAGE_SETTINGS}
    if UPSCALE in groups and recorded.get("noise_level") is None and recorded.get("upscaler") is None:
        left_alone |= {"height", "width", "strength", *PASSES, "tiling", "panorama"}  # of the small image
    absent = {group for group, *_ in MADE_BY.values()}.difference(groups)
    names = [name for name, each in settings_of(owner).items() if each.group not in absent]
    names += [*(name for name in settings_of(RuntimeOptions) if name in RUNTIME), "weights"]
    found = {name: recorded.get(name) for name in names if name not in left_alone}
    switches = {name for name, each in settings_of(owner).items() if each.default is None}
    return {
        name: value
        for name, value in found.items()
        if value is not None and (value is not False or name in switches)
    }


def not_taken_over(recorded: dict[str, Any], given: Collection[str] = ()) -> list[str]:
    """What of an A1111 text is no setting here, or another one, a line each.

    `given` are the options that the user chose.
    """
    lines = []
    if names := [name for name in _others(recorded) if name not in FACTS]:
        lines.append(f"not taken over: {printable(', '.join(names))}")
    asked = {"schedule", "sampler"}.intersection(given)
    if recorded.get("schedule") == "beta" and re.match("v[0-9]", str(recorded.get("version"))) and not asked:
        lines.append(
            "AUTOMATIC1111's schedule Beta places sigmas by a beta distribution, and beta here timesteps, as "
            "Forge and ComfyUI do: it will differ"
        )
    return lines


def _others(recorded: dict[str, Any]) -> dict[str, Any]:
    """The fields of an A1111 text that are no settings here."""
    other = recorded.get("other")
    return other if isinstance(other, dict) else {}  # a file may have anything in its place


def texts_of(value: Any) -> list[str]:
    """The texts of a list, or the only one; a file may have anything in their place."""
    return [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, str)]


def spelling(owner: type[ImageRequest], name: str) -> str:
    return settings_of(owner)[name].spellings[0]


def read_image(path: str, owner: type[ImageRequest] = ImageRequest) -> dict[str, Any]:
    """The settings in an image file; InputError if it has none that can be used."""
    try:
        return read_settings(path, owner)
    except InputError as error:
        raise InputError(f"--like: {error}") from error
