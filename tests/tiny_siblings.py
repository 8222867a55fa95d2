"""The miniature of tiny.py as a depth model and as an x4 upscaler."""

import json
from pathlib import Path
from typing import Any

import tiny
import torch
from golden_files import pseudo_state_dict
from safetensors.torch import save_file

from ldm.util import instantiate_from_config

MODELS = "ldm.models.diffusion.ddpm"
MIDAS = {
    "image_size": 64,
    "width": 32,
    "layers": 4,
    "heads": 2,
    "backbone_width": 8,
    "backbone_depths": [1, 1, 1],
    "groups": 8,
    "features": 16,
    "classes": 0,
}


def depth_section(estimator: bool = True) -> dict[str, Any]:
    """The `model:` section of the depth model; 8 pixels to a latent, native images of 16x16."""
    changes: dict[str, Any] = {"conditioning_key": "hybrid", "unet_config.params.in_channels": 5}
    if estimator:
        target = "ldm.modules.midas.api.MiDaSInference"
        changes["depth_stage_config"] = {"target": target, "params": MIDAS}
    return tiny.model_section(changes) | {"target": f"{MODELS}.LatentDepth2ImageDiffusion"}


def upscaler_section(native: int = 16) -> dict[str, Any]:
    """The `model:` section of the x4 upscaler; 4 pixels to a latent, made for `native` latents."""
    noise = {"linear_start": 0.0001, "linear_end": 0.02}
    target = "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation"
    low_scale = {"noise_schedule_config": noise, "max_noise_level": 350}
    changes = {
        **noise,
        "parameterization": "v",
        "image_size": native,
        "scale_factor": 0.08333,
        "conditioning_key": "hybrid-adm",
        "low_scale_config": {"target": target, "params": low_scale},
        "unet_config.params.in_channels": 7,
        "unet_config.params.num_classes": 1000,
        "first_stage_config.params.ddconfig.ch_mult": [1, 1, 1],
    }
    return tiny.model_section(changes) | {"target": f"{MODELS}.LatentUpscaleDiffusion"}


def write_model(folder: Path, name: str, section: dict[str, Any]) -> tuple[Path, Path]:
    """(config, weights) of a section, as the `model` fixture has them."""
    with torch.device("meta"):
        model = instantiate_from_config(section)
    listed = {name: ["float32", list(t.shape)] for name, t in model.state_dict().items()}
    config, weights = folder / f"{name}.yaml", folder / f"{name}.safetensors"
    config.write_text(json.dumps({"model": section}))
    state = pseudo_state_dict(listed)
    bias = "depth_model.model.scratch.output_conv.4.bias"
    if bias in state:
        state[bias] += 2.0  # so that no estimate is cut off at 0
    save_file({name: t.clone() for name, t in state.items()}, weights)  # two schedules may be equal
    return config, weights
