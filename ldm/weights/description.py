"""What a model's config and checkpoint say before the model is built."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.errors import InputError

if TYPE_CHECKING:
    import numpy as np

# What a model does besides text to image, by the name of its class.
TASKS = {
    "LatentInpaintDiffusion": "inpaint",
    "LatentDepth2ImageDiffusion": "depth",
    "LatentUpscaleDiffusion": "upscale",
}


@dataclass(frozen=True)
class Description:
    """A `model:` section in short. None where it leaves a value to the classes that it names."""

    channels: int | None  # of the latents
    factor: int | None  # pixels to a latent, in each direction
    native_size: int  # side in pixels of the images that the model was made for
    task: str = "text"  # or "inpaint", "depth", "upscale"
    in_channels: int | None = None  # of the UNet: latents, and what is concatenated to them
    context_dim: int | None = None  # width of what its cross-attention reads


def describe(config: Mapping[str, Any]) -> Description:
    """The description of a `model:` section; InputError if it describes no latent diffusion model."""
    try:
        params = config.get("params") or {}
        stage = (params.get("first_stage_config") or {}).get("params") or {}
        levels = (stage.get("ddconfig") or {}).get("ch_mult")
        factor = levels and 2 ** (len(levels) - 1)
        size = int(params.get("image_size", 64)) * (factor or 8)
        unet = (params.get("unet_config") or {}).get("params") or {}
        context = unet.get("context_dim")
        return Description(
            params.get("channels"),
            factor,
            size,
            TASKS.get(str(config.get("target")).rpartition(".")[2], "text"),
            unet.get("in_channels"),
            context[0] if isinstance(context, list) and context else context,
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"the config does not describe a latent diffusion model: {error}") from error


def alphas_of(config: Mapping[str, Any]) -> np.ndarray | None:
    """The alphas_cumprod, float32 [timesteps], that our classes make of a `model:` section.

    None for a class of another package, and for values that the class itself is to refuse.
    """
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.modules.diffusionmodules.util import make_beta_schedule, schedule_buffers

    if not str(config.get("target")).startswith("ldm."):
        return None
    parameters = inspect.signature(LatentDiffusion.__init__).parameters
    names = ("beta_schedule", "timesteps", "linear_start", "linear_end", "cosine_s")
    params = config.get("params") or {}
    try:
        betas = make_beta_schedule(*(params.get(name, parameters[name].default) for name in names))
        return schedule_buffers(betas)["alphas_cumprod"].numpy()
    except (TypeError, ValueError):
        return None


class Prediction(NamedTuple):
    parameterization: str | None  # "eps" or "v"; None where only the model itself shows it
    zero_snr: bool  # trained on a schedule with zero terminal SNR


def prediction_of(config: Mapping[str, Any], weights: Path, undecided: bool = False) -> Prediction:
    """What a checkpoint's UNet predicts, by its config or, where that is silent, by the file's hints.

    `undecided` says that the config's silence means nothing, as it was chosen for the file's shapes.
    """
    from ldm.weights.prediction import file_hints

    found = file_hints(weights, by_name=undecided)
    stated = (config.get("params") or {}).get("parameterization")
    parameterization = stated or (found.hint.parameterization if found.hint else None if undecided else "eps")
    return Prediction(parameterization, found.zero_snr and parameterization == "v")
