"""Both stages of training on a few tiny images: the YAML files, and the command run in this process."""

from pathlib import Path
from typing import Any

import yaml
from commands import script

from ldm.cli import entry
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import instantiate_from_config

DDCONFIG = {"ch": 8, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4, "num_groups": 4}
FIRST_STAGE = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"embed_dim": 4, "ddconfig": DDCONFIG},
}
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 8,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [1],
    "num_heads": 2,
    "context_dim": 8,
    "num_groups": 4,
}
SECOND_STAGE = {
    "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "params": {
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET},
        "first_stage_config": FIRST_STAGE,
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
            "params": {"width": 8, "layers": 1, "heads": 2},
        },
        "channels": 4,
        "image_size": 4,
        "cond_stage_trainable": True,
        "scale_by_std": True,
        "use_ema": False,
        "linear_start": 0.00085,
        "linear_end": 0.012,
    },
}
TRAINING = {
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "precision": "full",
    "warmup": 2,
    "log_every": 1,
    "logs": ["csv"],
    "checkpoint_every": 3,
    "sample_every": 0,
    "sample_steps": 2,
}


def scenes(images: int = 64, size: int = 32, **params: Any) -> dict[str, Any]:
    """A `data:` section of renders."""
    train = {"seed": 0, "images": images, "image_size": size, **params}
    return {"train": {"target": "ldm.scenes.source.Scenes", "params": train}, "size": size}


def write_yaml(
    path: Path, model: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **training: Any
) -> list[str]:
    """A YAML file with all sections, or without a model with a `training:` section alone.

    Returns the arguments that train it beside the file.
    """
    sections = {"model": model, "data": data or scenes()} if model else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(sections | {"training": (TRAINING if model else {}) | training}))
    return ["--base", str(path), "--logdir", str(path.parent)]


def second_stage(
    folder: Path, first_stage: Path, data: dict[str, Any] | None = None, **training: Any
) -> list[str]:
    """Arguments that train a second stage in `folder`, by its second.yaml, on cached latents."""
    data = scenes() | {"latents": True} if data is None else data
    return write_yaml(
        folder / "second.yaml", SECOND_STAGE, data, **{"first_stage": str(first_stage)} | training
    )


def run_train(*arguments: str) -> int:
    """The exit code of scripts/train.py."""
    return entry.run(script("train").main, list(arguments))


def new_model() -> LatentDiffusion:
    """A second stage with random weights."""
    return instantiate_from_config(SECOND_STAGE)


def family(target: str, in_channels: int, **params: Any) -> dict[str, Any]:
    """The second stage as another class, whose UNet has further input channels and a frozen text encoder."""
    unet = {**UNET, "in_channels": in_channels, **params.pop("unet", {})}
    own = {
        **SECOND_STAGE["params"],
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "conditioning_key": "hybrid",
        "cond_stage_trainable": False,
        **params,
    }
    return {"target": f"ldm.models.diffusion.ddpm.{target}", "params": own}


ESTIMATOR = {
    "target": "ldm.modules.midas.api.MiDaSInference",
    "params": {
        "model_type": "dpt_hybrid",
        "image_size": 32,
        "width": 16,
        "layers": 4,
        "heads": 2,
        "backbone_width": 4,
        "backbone_depths": [1, 1, 1],
        "groups": 2,
        "features": 8,
        "classes": 0,
    },
}
INPAINTING = family("LatentInpaintDiffusion", 9)
DEPTH = family("LatentDepth2ImageDiffusion", 5, depth_stage_config=ESTIMATOR)
LOW_SCALE = {
    "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
    "params": {"noise_schedule_config": {"linear_start": 1e-4, "linear_end": 2e-2}, "max_noise_level": 350},
}
FIRST_STAGE_X4 = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 4,
        "ddconfig": {"ch": 16, "ch_mult": [1, 1, 2], "num_res_blocks": 1, "z_channels": 4, "num_groups": 1},
    },
}
UPSCALER = family(
    "LatentUpscaleDiffusion",
    7,
    unet={
        "num_classes": 1000,
        "model_channels": 32,
        "channel_mult": [2, 2],
        "num_groups": 4,
        "attention_resolutions": [],
    },
    first_stage_config=FIRST_STAGE_X4,
    low_scale_config=LOW_SCALE,
    conditioning_key="hybrid-adm",
    parameterization="v",
)
