"""Tiny models for fine-tuning, with the weights of diffusers' pipelines."""

import copy
from typing import Any

import torch
from diffusers_pipelines import tiny_config, tiny_pipeline
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.config import TrainingConfig
from ldm.training.data.config import DataConfig
from ldm.util import instantiate_from_config
from ldm.weights.diffusers_names import open_clip_to_ours, unet_to_ours

DATA = DataConfig(train={"target": "ldm.training.data.folder.ImageFolder"}, size=64)


def model_and_pipeline(kind: str) -> tuple[LatentDiffusion, Any]:
    """One of our models and a pipeline of diffusers, both with copies of the same weights."""
    pipeline = copy.deepcopy(tiny_pipeline(kind))
    model = instantiate_from_config(tiny_config(kind)).eval().requires_grad_(False)
    model.model.diffusion_model.load_state_dict(unet_to_ours(pipeline.unet.state_dict()))
    text = pipeline.text_encoder.state_dict()
    if kind.startswith("v1"):
        names = model.cond_stage_model.transformer.state_dict()
        prefix = next(iter(names)).partition(".")[0]
        own = {f"{prefix}.{name.removeprefix('text_model.')}": t for name, t in text.items()}
        missing = model.cond_stage_model.transformer.load_state_dict(own, strict=False).missing_keys
        assert not missing
    else:
        own = open_clip_to_ours({name.removeprefix("text_model."): t for name, t in text.items()})
        model.cond_stage_model.model.load_state_dict(own, strict=False)
    return model, pipeline


def config(**changes: Any) -> TrainingConfig:
    """Settings without anything that a plain step of AdamW does not have."""
    plain = {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "precision": "full", "ema_decay": 0.0}
    plain |= {"prompt_dropout": 0.0, "gradient_clip": 0.0, "warmup": 0, "schedule": "constant"}
    return TrainingConfig(**plain | {"logs": (), "sample_every": 0} | changes)


def batch(captions: tuple[str, ...] = ("a zqx cube", "a zqx cube on top of a red cone")) -> dict[str, Any]:
    """A batch of two latents, [2, 4, 8, 8]."""
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(len(captions), 4, 8, 8, generator=generator)
    row = torch.arange(len(captions))
    return {
        "step": 5,
        "row": row,
        "caption": list(captions),
        "mean": mean,
        "std": 0.1 * torch.ones_like(mean),
    }


def their_loss(pipeline: Any, x0: Tensor, noise: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """The loss as diffusers' training scripts compute it, of latents [b, 4, h, w]; the mean over all."""
    noisy = pipeline.scheduler.add_noise(x0, noise, t)
    predicted = pipeline.unet(noisy, t, context, return_dict=False)[0]
    target = noise
    if pipeline.scheduler.config.prediction_type == "v_prediction":
        target = pipeline.scheduler.get_velocity(x0, noise, t)
    return torch.nn.functional.mse_loss(predicted.float(), target.float(), reduction="mean")
