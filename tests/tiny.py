"""A miniature of Stable Diffusion v1 that samples in milliseconds: the real classes on stand-in weights."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from golden_files import pseudo_state_dict
from safetensors.torch import save_file

from ldm.util import instantiate_from_config

MODEL = {
    "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "params": {
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "channels": 4,
        "image_size": 2,
        "scale_factor": 0.18215,
        "conditioning_key": "crossattn",
        "use_ema": False,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {
                "in_channels": 4,
                "out_channels": 4,
                "model_channels": 32,
                "attention_resolutions": [1, 2],
                "num_res_blocks": 1,
                "channel_mult": [1, 2],
                "num_heads": 2,
                "context_dim": 32,
                "num_groups": 8,
            },
        },
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": 4,
                "ddconfig": {
                    "double_z": True,
                    "z_channels": 4,
                    "resolution": 64,
                    "in_channels": 3,
                    "out_ch": 3,
                    "ch": 32,
                    "ch_mult": [1, 1, 1, 1],
                    "num_res_blocks": 1,
                    "attn_resolutions": [],
                    "dropout": 0.0,
                    "num_groups": 8,
                },
            },
        },
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
            "params": {"width": 32, "layers": 1, "heads": 2},
        },
    },
}


def model_section(changes: dict[str, Any]) -> dict[str, Any]:
    """The `model:` section with other values below `params`: {"unet_config.params.num_heads": 4}."""
    section = copy.deepcopy(MODEL)
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = section["params"]
        for name in parents:
            place = place[name]
        place[last] = value
    return section


def write_config(path: Path, changes: dict[str, Any] | None = None) -> Path:
    """A model YAML (of which JSON is a part)."""
    path.write_text(json.dumps({"model": model_section(changes or {})}))
    return path


def state_dict() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = instantiate_from_config(MODEL)
    return pseudo_state_dict({name: ["float32", list(t.shape)] for name, t in model.state_dict().items()})


def write_weights(path: Path) -> Path:
    save_file(state_dict(), path)
    return path
