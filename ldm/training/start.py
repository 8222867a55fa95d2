"""What a training starts from: a model that is built from its config, and the weights that it begins with."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.fields import settings_of
from ldm.log import notice
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import (
    LatentDepth2ImageDiffusion,
    LatentDiffusion,
    LatentUpscaleDiffusion,
)
from ldm.modules.diffusionmodules.openaimodel import timestep_embedding
from ldm.modules.midas.api import MiDaSInference
from ldm.training.config import TrainingConfig
from ldm.training.linear import start_linear
from ldm.training.tasks import DepthTask, FirstStageTask, LatentDiffusionTask, Task
from ldm.util import get_obj_from_str, instantiate_from_config
from ldm.weights.checkpoint import load_weights, pick_weights, read_state_dict
from ldm.weights.files import exists
from ldm.weights.loading import default_weights, find, model_without_values, set_prediction

# Keys that say how a diffusion model is trained, and no autoencoder or depth estimator.
OF_DIFFUSION = ("compile", "checkpointing", "prompt_dropout", "min_snr_gamma", "noise_offset")
OF_DIFFUSION += ("zero_terminal_snr",)
FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
State = Mapping[str, Tensor]


def new_task(
    section: Mapping[str, Any], config: TrainingConfig, data: Any, allow_target: Iterable[str] = ()
) -> Task:
    """The task of a `model:` section, with the weights that its training starts from.

    InputError for a model that is not trained here, and for weights that are missing or another model's.
    """
    owner = get_obj_from_str(section["target"], allow_target)
    torch.manual_seed(config.seed)  # of the initial weights
    if issubclass(owner, LatentDiffusion):
        model = start_latent_diffusion(section, config, allow_target)
        if config.init and model.zero_terminal_snr:  # its file says so, and samplers rescale its schedule
            config = dataclasses.replace(config, zero_terminal_snr=True)
        task = LatentDiffusionTask(model, config, data)
        task.is_new = not config.init or config.first_stage is not None
        return task
    if config.linear_start and owner is not AutoencoderKL:
        raise InputError(f"training: linear_start: a {owner.__name__} has no linear start")
    if owner in (AutoencoderKL, MiDaSInference):
        _notice_unused(config, owner)
    if owner is AutoencoderKL:
        model = instantiate_from_config(section, allow_target)
        if config.linear_start:
            start_linear(model)
        if config.init:
            _fill(model, read_weights(config, "init", "first_stage_model."), config.init)
        return FirstStageTask(model, config, data)
    if owner is MiDaSInference:
        model = instantiate_from_config(section, allow_target)
        if config.init:
            _fill(model, read_weights(config, "init", "depth_model."), config.init)
        return DepthTask(model, config, data)
    raise InputError(f"the model is {owner.__name__}, which is not trained here")


def _notice_unused(config: TrainingConfig, owner: type) -> None:
    """A notice of the keys that are set and that only a diffusion model's training reads."""
    settings = settings_of(TrainingConfig)
    given = [name for name in OF_DIFFUSION if getattr(config, name) != settings[name].default]
    if given:
        notice(f"training: {', '.join(given)} without effect: a {owner.__name__} is no diffusion model")


def start_latent_diffusion(
    section: Mapping[str, Any], config: TrainingConfig, allow_target: Iterable[str] = ()
) -> LatentDiffusion:
    """A latent diffusion model with the weights of `init`, or new with the trained parts that are given.

    Parts that are given are taken in place of those of `init`. The UNet may have more input channels than
    that of `init`: their weights are zero, so that they change nothing at first. The embeddings of a new
    upscaler's noise levels are those of timesteps, so that neighbouring levels begin alike.
    """
    if config.init:
        model = _from_checkpoint(section, config, allow_target)
        if config.first_stage:
            state = read_weights(config, "first_stage", "first_stage_model.")
            _fill(model.first_stage_model, state, config.first_stage)
    else:
        model = _new(section, config, allow_target)
    if config.text_encoder:
        state = read_weights(config, "text_encoder", "cond_stage_model.")
        _fill(model.cond_stage_model, state, config.text_encoder)
    elif not (config.init or model.cond_stage_trainable):
        notice("training: without text_encoder the text encoder has random weights, and stays as it is")
    if config.depth_model:
        if not isinstance(model, LatentDepth2ImageDiffusion):
            raise InputError(f"training: depth_model: a {type(model).__name__} has no depth estimator")
        _fill(model.depth_model, read_weights(config, "depth_model", "depth_model."), config.depth_model)
    if config.linear_start and not isinstance(model, LatentUpscaleDiffusion):
        raise InputError(f"training: linear_start: a {type(model).__name__} is given no small image")
    return model


def _from_checkpoint(
    section: Mapping[str, Any], config: TrainingConfig, allow_target: Iterable[str]
) -> LatentDiffusion:
    path = _existing(config, "init")
    state = read_state_dict(path)
    averaged = any(name.startswith("model_ema.diffusion_model") for name in state)
    params = section.get("params") or {}
    which = config.init_weights or (default_weights(section, state) if averaged else "raw")
    parts = [*state, *(["depth_model."] if config.depth_model else [])]
    model = model_without_values(dict(section), parts, allow_target)
    if config.depth_model and isinstance(model, LatentDepth2ImageDiffusion):
        model.depth_model.to_empty(device="cpu")
        state = {f"depth_model.{name}": t for name, t in model.depth_model.state_dict().items()} | state
    model.register_schedule()  # now with values
    names = [name for name, _ in model.named_parameters()]
    picked = grown(pick_weights(state, which, path=path, names=names), model)
    if isinstance(model.scale_factor, Tensor) and "scale_factor" not in picked:
        picked["scale_factor"] = torch.tensor(float(params.get("scale_factor", 1.0)))
    load_weights(model, picked, path=path, dtype=torch.float32)
    set_prediction(model, path, params.get("parameterization"), False)
    return model.requires_grad_(False)


def _new(section: Mapping[str, Any], config: TrainingConfig, allow_target: Iterable[str]) -> LatentDiffusion:
    if not config.first_stage:
        raise InputError(
            "training: a latent diffusion model needs the weights of its first_stage, or of init"
        )
    state = read_weights(config, "first_stage", "first_stage_model.")
    params = {**(section.get("params") or {}), "use_ema": False}  # the loop averages
    model = instantiate_from_config({**section, "params": params}, allow_target)
    _fill(model.first_stage_model, state, config.first_stage)
    if isinstance(model, LatentUpscaleDiffusion):
        embedding = model.model.diffusion_model.label_emb.weight
        embedding.data.copy_(timestep_embedding(torch.arange(len(embedding)), embedding.shape[1]))
    return model


def grown(state: State, model: LatentDiffusion) -> dict[str, Tensor]:
    """The weights of a UNet whose first convolution takes fewer channels, with zeros for the others."""
    wanted, given = model.state_dict()[FIRST_CONVOLUTION], state.get(FIRST_CONVOLUTION)
    if given is None or given.shape[1] >= wanted.shape[1]:
        return dict(state)
    return {**state, FIRST_CONVOLUTION: F.pad(given, (0, 0, 0, 0, 0, wanted.shape[1] - given.shape[1]))}


def read_weights(config: TrainingConfig, name: str, prefix: str) -> dict[str, Tensor]:
    """The weights of a part of a model from the file that a key names: the part's own, or a whole model's."""
    state = read_state_dict(_existing(config, name))
    part = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
    return part or dict(state)


def _existing(config: TrainingConfig, name: str) -> Path:
    path = find(getattr(config, name))
    if not exists(path):
        raise InputError(f"training: {name}: there is no file {getattr(config, name)}")
    return path


def _fill(module: nn.Module, state: State, path: str) -> None:
    load_weights(module, state, path=path, dtype=torch.float32)
