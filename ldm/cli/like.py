"""Settings of an image as those of the command that makes it again."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ldm.errors import InputError
from ldm.fields import settings_of
from ldm.pipeline.infotext import read_settings
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.request import INIT, SAMPLER_OPTIONS, ImageRequest

LEVELS = ("schedule", "rho", "timesteps", "sigmas")
# where the user gives the first, the image's second have no say
OVERRIDES = {
    **dict.fromkeys(("sampler", "plms", "dpm_solver"), ("sampler", *SAMPLER_OPTIONS, *LEVELS)),
    **dict.fromkeys(("schedule", "rho"), LEVELS),
    **dict.fromkeys(("timesteps", "sigmas"), ("steps", *LEVELS)),
    "steps": ("steps", "timesteps", "sigmas"),
    "ddim_eta": ("eta",),
    "from_file": ("prompt",),
    "seed": ("seed", "start_seed"),
    "rng": ("rng", "variation_seed", "variation_strength", "start_seed"),
}
RUNTIME = ("precision", "vae_tiling", "deepcache", "tome")  # of RuntimeOptions, what an image records


def settings_like(
    recorded: dict[str, Any],
    given: Collection[str],
    with_init: bool,
    owner: type[ImageRequest] = ImageRequest,
) -> dict[str, Any]:
    """Settings by name that make one image with what another one records.

    `given` are the options that the user chose, over which it has no say; `with_init` says whether the
    command starts from an image. InputError for an image that it cannot make again.
    """
    if ("init_img" in recorded or "strength" in recorded) and not with_init:
        source = recorded.get("init_img", "another image")
        raise InputError(f"it was made from {source} by image to image; use img2img.py with --init-img")
    if "init_img" in recorded and "init_img" not in given:
        raise InputError(f"it was made from {recorded['init_img']}; give that as --init-img")
    alone = recorded.get("image", 0) == 0 and recorded.get("batch_size", recorded.get("n_samples", 1)) == 1
    if recorded.get("rng") == "compvis" and "rng" not in given and not alone:
        raise InputError(
            f"it is image {recorded.get('image')} of a run in the original's one stream (--rng compvis), "
            "where no image can be made alone; repeat that run"
        )
    left_alone = {name for option in given for name in OVERRIDES.get(option, ())} | {*given, "init_img"}
    names = [name for name, each in settings_of(owner).items() if with_init or each.group != INIT]
    names += [*(name for name in settings_of(RuntimeOptions) if name in RUNTIME), "weights"]
    found = {name: recorded.get(name) for name in names if name not in left_alone}
    return {name: value for name, value in found.items() if value is not None and value is not False}


def read_image(path: str, owner: type[ImageRequest] = ImageRequest) -> dict[str, Any]:
    """The settings in an image file; InputError if it has none that can be used."""
    try:
        return read_settings(path, owner)
    except InputError as error:
        raise InputError(f"--like: {error}") from error
