"""What a model's config and checkpoint say before the model is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ldm.errors import InputError


@dataclass(frozen=True)
class Description:
    """A `model:` section in short. None where it leaves a value to the classes that it names."""

    channels: int | None  # of the latents
    factor: int | None  # pixels to a latent, in each direction
    native_size: int  # side in pixels of the images that the model was made for


def describe(config: Mapping[str, Any]) -> Description:
    """The description of a `model:` section; InputError if it describes no latent diffusion model."""
    try:
        params = config.get("params") or {}
        stage = (params.get("first_stage_config") or {}).get("params") or {}
        levels = (stage.get("ddconfig") or {}).get("ch_mult")
        factor = levels and 2 ** (len(levels) - 1)
        size = int(params.get("image_size", 64)) * (factor or 8)
        return Description(params.get("channels"), factor, size)
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"the config does not describe a latent diffusion model: {error}") from error


class Prediction(NamedTuple):
    parameterization: str  # "eps" or "v"
    zero_snr: bool  # trained on a schedule with zero terminal SNR


def prediction_of(config: Mapping[str, Any], weights: Path) -> Prediction:
    """What a checkpoint's UNet predicts, by its config or, where that is silent, by the file's markers."""
    from ldm.weights.checkpoint import read_state_dict
    from ldm.weights.families import prediction_markers

    v_pred, zero_snr = prediction_markers(read_state_dict(weights))
    stated = (config.get("params") or {}).get("parameterization")
    parameterization = stated or ("v" if v_pred else "eps")
    return Prediction(parameterization, zero_snr and parameterization == "v")
