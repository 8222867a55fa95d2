"""Settings of a picture as arguments of the command that makes it again."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ldm.errors import InputError
from ldm.images.metadata import settings_from_picture

FLAGS = {  # what pictures tell, and the option that says it
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "height": "H",
    "width": "W",
    "sampler": "sampler",
    "steps": "ddim_steps",
    "schedule": "schedule",
    "rho": "rho",
    "timesteps": "timesteps",
    "sigmas": "sigmas",
    "zero_snr": "zero_snr",
    "eta": "eta",
    "s_churn": "s_churn",
    "s_tmin": "s_tmin",
    "s_tmax": "s_tmax",
    "s_noise": "s_noise",
    "strength": "strength",
    "scale": "scale",
    "cfg_rescale": "cfg_rescale",
    "guidance_start": "guidance_start",
    "guidance_end": "guidance_end",
    "seed": "seed",
    "variation_seed": "variation_seed",
    "variation_strength": "variation_strength",
    "rng": "rng",
    "fixed_code": "fixed_code",
    "start_seed": "start_seed",
    "weights": "weights",
    "precision": "precision",
    "vae_tiling": "vae_tiling",
    "deepcache": "deepcache",
    "tome": "tome",
    "watermark": "watermark",
    "resize": "resize",
    "background": "background",
}
SAMPLER = ("sampler", "eta", "s_churn", "s_tmin", "s_tmax", "s_noise")
GRID = ("schedule", "rho", "timesteps", "sigmas")
# where the user gives the first, the picture's second have no say
OVERRIDES = {
    **dict.fromkeys(("sampler", "plms", "dpm_solver"), (*SAMPLER, *GRID)),
    **dict.fromkeys(GRID, GRID),
    "ddim_steps": ("steps", "timesteps", "sigmas"),
    "ddim_eta": ("eta",),
    "from_file": ("prompt",),
    "seed": ("seed", "start_seed"),
    "rng": ("rng", "variation_seed", "variation_strength", "start_seed"),
}


def arguments_like(settings: dict[str, Any], given: Collection[str], known: Collection[str]) -> list[str]:
    """Words for the command line that make one picture with the settings that a picture tells.

    `given` are the options that the user chose, which the words leave alone, `known` those that the command
    has. InputError for a picture that it cannot make again.
    """
    if ("init_img" in settings or "strength" in settings) and "init_img" not in known:
        source = settings.get("init_img", "another picture")
        raise InputError(f"it was made from {source} by image to image; use img2img.py with --init-img")
    if "init_img" in settings and "init_img" not in given:
        raise InputError(f"it was made from {settings['init_img']}; give that as --init-img")
    alone = settings.get("image", 0) == 0 and settings.get("batch_size", settings.get("n_samples", 1)) == 1
    if settings.get("rng") == "compvis" and "rng" not in given and not alone:
        raise InputError(
            f"it is image {settings.get('image')} of a run in the original's one stream (--rng compvis), "
            "where no image can be made alone; repeat that run"
        )
    left_alone = {name for option in given for name in OVERRIDES.get(option, ())}
    words = ["--n_samples=1", "--n_iter=1"]
    for name, option in FLAGS.items():
        value = settings.get(name)
        if value is None or value is False or name in left_alone or option not in known:
            continue
        if isinstance(value, list):
            value = ",".join(map(str, value))
        words.append(f"--{option}" if value is True else f"--{option}={value}")
    return words


def read_picture(path: str) -> dict[str, Any]:
    """The settings in a picture; InputError if it has none that can be used."""
    try:
        return settings_from_picture(path)
    except InputError as error:
        raise InputError(f"--like: {error}") from error
