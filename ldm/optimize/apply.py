"""The runtime options, put on a built model: the only place that reads them."""

from typing import Protocol

import torch

from ldm.errors import InputError
from ldm.log import notice
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.optimize.approximate import merge_similar_tokens, reuse_deep_features
from ldm.optimize.autocast import keep_casts
from ldm.optimize.compile import compile_model
from ldm.optimize.context import keep_context
from ldm.optimize.graph import graph_unet
from ldm.optimize.guidance import share_prefix
from ldm.optimize.layers import KERNELS, choose_kernels, use_kernels
from ldm.optimize.memory import keep_memory, return_memory
from ldm.optimize.offload import offload
from ldm.optimize.openvino import compile_with_openvino
from ldm.optimize.slicing import slice_attention
from ldm.optimize.tiling import tile_first_stage
from ldm.optimize.timesteps import keep_timesteps


class Options(Protocol):
    """The options read here; each has the name of its flag."""

    attention_slicing: bool
    vae_tiling: bool
    tome: float  # 0 … 0.75, the share of merged tokens
    deepcache: int  # 1 or more, the calls for which deep features are used
    low_vram: str | None  # None, "parts" or "max"
    eager: bool
    graphs: bool
    kernels: str  # "measured", or the name of a set of them
    compile: bool
    precision: str | None


def check_options(options: Options, device: torch.device) -> None:
    """InputError for options that exclude each other on `device`; callers may check before loading."""
    if options.compile and options.low_vram and device.type != "cpu":
        raise InputError(
            "--compile and --low_vram exclude each other: compiled code expects its weights to stay on the "
            f"{device.type} device; leave one of them out"
        )
    if options.graphs and options.low_vram and device.type == "cuda":
        raise InputError(
            "--graphs and --low_vram exclude each other: a recorded step expects its weights to stay on the "
            "device; leave one of them out"
        )


def before_loading(options: Options, device: torch.device) -> None:
    """What a model that `apply` will be called for needs before its weights come into memory.

    InputError as `check_options`.
    """
    check_options(options, device)
    if device.type == "cpu" and not options.eager:
        keep_memory()


def apply(model: LatentDiffusion, options: Options, device: torch.device) -> None:
    """Bring `model` to `device`, with what the options ask for and what makes it fast there.

    The model is changed in place, for inference only, and once: its weights must be final. InputError for
    options that exclude each other, or that this model cannot have; a notice for those without an effect.
    """
    check_options(options, device)
    # the functions that are about the UNet know ours, not one of another package (--allow_target)
    unet = model.model.diffusion_model
    ours = isinstance(unet, UNetModel)
    if not ours and (options.tome or options.deepcache > 1):
        raise InputError(f"--tome and --deepcache are for the UNet of this toolkit, not for {_name(unet)}")
    if options.attention_slicing:
        slice_attention(model)
    if options.vae_tiling:
        tile_first_stage(model)
    if options.tome and not merge_similar_tokens(model, options.tome):
        notice("--tome: this model has no self-attention at the latents' resolution; going on without")
    if not ours:
        for flag in ("compile", "graphs", "kernels"):
            if getattr(options, flag) not in (False, "measured"):
                notice(f"--{flag} is for the UNet of this toolkit: not applied to {_name(unet)}")
    if ours and options.graphs and device.type != "cuda":
        notice(f"--graphs: a {device.type} device records no steps; going on without")
    if ours and options.kernels != "measured" and (device.type != "cpu" or options.eager):
        notice(f"--kernels {options.kernels}: for a CPU without --eager; going on without")
    if options.precision == "autocast" and device.type == "cpu":
        notice("--precision autocast: on a CPU all is computed in float32, as with full")
    if options.low_vram and device.type != "cpu":
        offload(model, device, by_layer=options.low_vram == "max")
    else:
        if options.low_vram:
            notice("--low_vram: on a CPU there is only one memory, and nothing to save")
        model.to(device)
        if device.type == "cpu" and not options.eager and keep_memory():
            return_memory(model)
        if ours and not options.eager:
            speed_up(model, options, device)
    if options.deepcache > 1:
        reuse_deep_features(model, options.deepcache)  # after the compiler, which must not see its decisions


def speed_up(model: LatentDiffusion, options: Options, device: torch.device) -> None:
    """Apply what makes a model with our UNet fast on `device`, where it already is.

    On CUDA no bit of the result changes; elsewhere, and with `compile`, results change by rounding.
    """
    if options.compile and device.type == "cpu":
        # before what changes the weights that it converts
        compile_with_openvino(model, unet_too=options.deepcache == 1, report=notice)
    elif options.compile:
        compile_model(model)
    if device.type == "cpu":
        use_kernels(model, KERNELS.get(options.kernels) or choose_kernels(model))
        share_prefix(model)
    if device.type == "cuda" and (options.graphs or options.compile):
        if options.precision == "autocast":
            keep_casts(model)
        graph_unet(model)
        keep_context(model)
        keep_timesteps(model)


def _name(module: torch.nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
