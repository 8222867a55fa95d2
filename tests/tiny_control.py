"""Random ControlNets of diffusers for its tiny pipelines, and files of them in every layout."""

import functools
from pathlib import Path
from typing import Any

import torch
from diffusers_pipelines import tiny_pipeline
from safetensors.torch import save_file

from ldm.weights.controlnet import network, to_ours


@functools.cache
def tiny_controlnet(kind: str, seed: int = 0) -> Any:
    """A ControlNet of diffusers for `tiny_pipeline(kind)`, none of whose weights are zero."""
    import diffusers

    unet = tiny_pipeline(kind).unet
    torch.manual_seed(seed)
    net = diffusers.ControlNetModel.from_unet(unet)
    for weight in net.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.2)
    return net.eval().requires_grad_(False)


def original_state(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights of `tiny_controlnet(kind, seed)` as the original's files have them."""
    state = to_ours(tiny_controlnet(kind, seed).state_dict())
    return {f"control_model.{name}": t.clone() for name, t in state.items()}


def write_controlnet(path: Path, kind: str = "v1", seed: int = 0) -> Path:
    """`tiny_controlnet(kind, seed)` as a .pth, a .safetensors or, without a suffix, diffusers' folder."""
    if path.suffix == ".pth":
        torch.save(original_state(kind, seed), path)
    elif path.suffix:
        save_file(original_state(kind, seed), path)
    else:
        tiny_controlnet(kind, seed).save_pretrained(path)
    return path


def random_controlnet(path: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A file of a ControlNet with random weights for the model of a `model:` section."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: t.shape for name, t in network(config).state_dict().items()}
    state = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file({f"control_model.{name}": t for name, t in state.items()}, path)
    return path
