"""ControlNets from files: the original's layout or diffusers', whole checkpoints or the network alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ldm.errors import InputError
from ldm.weights import diffusers_names as names
from ldm.weights.diffusers_configs import unet_config, write_json
from ldm.weights.diffusers_layout import read_json, weight_files
from ldm.weights.families import Shapes, identify, recognise
from ldm.weights.files import exists, user_file
from ldm.weights.float8 import split_scales
from ldm.weights.header import read_header
from ldm.weights.writing import write_safetensors, written_whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ldm.modules.controlnet import ControlNet

T = TypeVar("T")
ORIGINAL = "control_model."  # before the names in the original's files
SHUFFLED = re.compile(r"control_v11e_sd15_shuffle(?![a-z])", re.I)  # the published file's name
SHUFFLE = "averages what it adds over the image (shuffle), which is not supported"
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
CONTEXT = re.compile(r"(input_blocks|middle_block)\..*\.attn2\.to_k\.weight")
BLOCKS = 6  # of diffusers' controlnet_cond_embedding
# what diffusers' config of a UNet says and that of a ControlNet does not
NOT_IN_CONTROLNETS = ("sample_size", "out_channels", "up_block_types", "mid_block_only_cross_attention")


def to_ours(state: Mapping[str, T]) -> dict[str, T]:
    """A ControlNet's weights under our names: those of the original without `control_model.`."""
    if any(name.startswith(ORIGINAL) for name in state):
        return {name.removeprefix(ORIGINAL): t for name, t in state.items() if name.startswith(ORIGINAL)}
    if not any(name.startswith("controlnet_cond_embedding.") for name in state):
        return dict(state)
    return names.rename(state, names.inverted(_pairs(state)))


def to_theirs(state: Mapping[str, T]) -> dict[str, T]:
    """A ControlNet's weights, under our names, under those of diffusers."""
    return names.rename(state, _pairs(state))


def _pairs(state: Mapping[str, T]) -> names.Pairs:
    """Our names and diffusers' of the modules of a ControlNet whose weights have either."""
    levels = names.unet_levels(state)
    pairs = names.unet_pairs(levels)
    pairs |= {"input_hint_block.0": "controlnet_cond_embedding.conv_in"}
    pairs |= {f"input_hint_block.{2 * i + 2}": f"controlnet_cond_embedding.blocks.{i}" for i in range(BLOCKS)}
    pairs |= {f"input_hint_block.{2 * BLOCKS + 2}": "controlnet_cond_embedding.conv_out"}
    skips = sum(level.blocks + 1 for level in levels)
    pairs |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(skips)}
    return pairs | {"middle_block_out.0": "controlnet_mid_block"}


def diffusers_config(config: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` of diffusers' ControlNetModel says of weights, under our names.

    `config` is the `model:` section of the model that they are for.
    """
    theirs = to_theirs(state)
    unet = unet_config(config["params"], theirs | {"conv_out.weight": theirs["conv_in.weight"]})
    own = {"_class_name": "ControlNetModel", "controlnet_conditioning_channel_order": "rgb"}
    hint = [state[f"input_hint_block.{i}.weight"].shape for i in (0, 4, 8, 12)]
    own |= {
        "conditioning_channels": hint[0][1],
        "conditioning_embedding_out_channels": [shape[0] for shape in hint],
    }
    return {name: value for name, value in unet.items() if name not in NOT_IN_CONTROLNETS} | own


def fits_diffusers(state: Mapping[str, Tensor]) -> bool:
    """Whether diffusers has this architecture: its first level is as wide as its first convolution."""
    theirs = to_theirs(state)
    return theirs["conv_in.weight"].shape[0] == theirs["down_blocks.0.resnets.0.conv1.weight"].shape[0]


def write_diffusers(state: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Write a ControlNet's weights, under our names, as the folder that diffusers loads them from.

    `config` is the `model:` section of the model that they are for. What was at `folder` is replaced.
    """
    with written_whole(folder) as unfinished:
        unfinished.mkdir()
        write_json(unfinished / "config.json", diffusers_config(config, state))
        write_safetensors(to_theirs(state), unfinished / "diffusion_pytorch_model.safetensors")


def network(config: Mapping[str, Any]) -> ControlNet:
    """The ControlNet for the model of a `model:` section, on the meta device. InputError if there is none."""
    import torch

    from ldm.modules.controlnet import ControlNet

    params = config.get("params") or {}
    unet = params.get("unet_config") or {}
    if unet.get("target") != UNET:
        raise InputError("a ControlNet is for a model with the UNet of this toolkit, described by its config")
    with torch.device("meta"):
        net = ControlNet(params.get("channels", 4), **(unet.get("params") or {}))
    return net.eval().requires_grad_(False)


def check_controlnet(path: str | Path, config: Mapping[str, Any]) -> None:
    """InputError unless a file, or diffusers folder, is a ControlNet for the model of a `model:` section.

    Only headers are read, and the network is built without values.
    """
    path = Path(path)
    tensors = _read(path, lambda file: dict(read_header(file).tensors))
    state, _ = split_scales(to_ours(tensors), path)
    if "input_hint_block.0.weight" not in state:
        raise InputError(f"{path} looks like {identify(tensors)}, and is no ControlNet")
    if "difference" in tensors:
        raise InputError(
            f"{path} holds a ControlNet's difference to a model: give the whole ControlNet as published"
        )
    params = config.get("params") or {}
    unet = (params.get("unet_config") or {}).get("params") or {}
    context = next((t.shape[1] for name, t in state.items() if CONTEXT.fullmatch(name)), None)
    wanted = {name: tuple(t.shape) for name, t in network(config).state_dict().items()}
    if context != unet.get("context_dim"):
        theirs = recognise(Shapes(params.get("channels", 4), context)).name
        ours = recognise(Shapes(unet.get("in_channels"), unet.get("context_dim"))).name
        raise InputError(
            f"{path} is a ControlNet for {theirs} ({context} channels of text), but the model is "
            f"{ours} ({unet.get('context_dim')})"
        )
    given = {name: tuple(t.shape) for name, t in state.items()}
    faults = [name for name, shape in wanted.items() if given.get(name) != shape]
    if faults:
        raise InputError(
            f"the ControlNet {path} does not fit the model: {len(faults)} of its {len(wanted)} weights are "
            f"missing or have another shape (first {faults[0]})"
        )


def load_controlnet(path: str | Path, config: Mapping[str, Any], dtype: torch.dtype) -> ControlNet:
    """A checked file's ControlNet on the CPU with weights in `dtype`, mapped where they have it."""
    from ldm.weights.checkpoint import load_weights, read_state_dict

    net = network(config)
    load_weights(net, to_ours(_read(Path(path), read_state_dict)), path=path, dtype=dtype)
    return net.requires_grad_(False)


def _read(path: Path, read: Callable[[Path], dict[str, T]]) -> dict[str, T]:
    """The weights of a file, or of all files of a diffusers folder, by the names that they have there."""
    if not _is_folder(path):
        if not exists(path):
            raise InputError(f"no ControlNet at {path}: there is no such file")
        if SHUFFLED.search(path.name):  # nothing in the file says so
            raise InputError(f"{path}, by its name, {SHUFFLE}")
        if path.stem.startswith("diffusion_pytorch_model"):  # of a folder
            _check_pooling(path, path.parent)
        return read(path)
    _check_pooling(path, path)
    found: dict[str, T] = {}
    for file in weight_files(path):
        found |= read(file)
    return found


def _check_pooling(path: Path, folder: Path) -> None:
    """InputError that names `path` if its diffusers folder's config asks for what is not supported here."""
    config = folder / "config.json"
    if exists(config) and read_json(config).get("global_pool_conditions"):
        raise InputError(f"{path} {SHUFFLE}")


def weights_file(path: str | Path) -> Path:
    """The file that stands for a ControlNet where one is needed: its weights, or their first shard."""
    path = Path(path)
    return weight_files(path)[0] if _is_folder(path) else path


def _is_folder(path: Path) -> bool:
    """InputError where the system refuses to say, as of a name that is too long."""
    with user_file(path):
        return path.is_dir()
