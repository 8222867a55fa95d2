"""The networks of every family, and small ones, for tests."""

from pathlib import Path

import pytest
import torch
from golden_files import case, manifest, pseudo_state_dict
from torch import nn

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import UNetModel

ROOT = Path(__file__).parents[1]
V1_YAML = ROOT / "configs/stable-diffusion/v1-inference.yaml"
YAMLS = {  # the configs of each checkpoint layout
    "sd-v1": ["stable-diffusion/v1-inference"],
    "sd-v1-inpainting": ["stable-diffusion/v1-inpainting-inference"],
    "sd-v2": ["stable-diffusion/v2-inference", "stable-diffusion/v2-inference-v"],
    "sd-v2-inpainting": ["stable-diffusion/v2-inpainting-inference"],
    "sd-v2-depth": ["stable-diffusion/v2-midas-inference"],
    "x4-upscaler": ["stable-diffusion/x4-upscaling"],
    "ldm-text2img-large": ["latent-diffusion/txt2img-1p4B-eval"],
}
MINI_YAML = ROOT / "tests/golden/configs/mini-v1.yaml"
IDENTITY = {"target": "torch.nn.Identity"}
V1_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "context_dim": 768,
}
V2_UNET = {
    **V1_UNET,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "context_dim": 1024,
}
X4_UNET = {
    **V1_UNET,
    "num_classes": 1000,
    "in_channels": 7,
    "model_channels": 256,
    "attention_resolutions": [2, 4, 8],
    "channel_mult": [1, 2, 2, 4],
    "disable_self_attentions": [True, True, True, False],
    "use_linear_in_transformer": True,
    "context_dim": 1024,
}
KL_F8 = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 4}
KL_F4 = {**KL_F8, "ch_mult": [1, 2, 4]}
MINI_UNET = {
    **V1_UNET,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2, 2, 2],
    "num_heads": 4,
}
MINI_KL = {**KL_F8, "ch": 32, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 1}
FAMILIES = {
    "mini-v1": (MINI_UNET, MINI_KL),
    "mini-v1-ema": (MINI_UNET, MINI_KL),
    "sd-v1": (V1_UNET, KL_F8),
    "sd-v1-inpainting": ({**V1_UNET, "in_channels": 9}, KL_F8),
    "sd-v2": (V2_UNET, KL_F8),
    "sd-v2-inpainting": ({**V2_UNET, "in_channels": 9}, KL_F8),
    "sd-v2-depth": ({**V2_UNET, "in_channels": 5}, KL_F8),
    "x4-upscaler": (X4_UNET, KL_F4),
    "ldm-text2img-large": ({**V1_UNET, "context_dim": 1280}, KL_F8),
}
SCALE_FACTORS = {"x4-upscaler": 0.08333}
TINY_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 8,
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "channel_mult": [1, 2],
    "num_heads": 2,
    "context_dim": 6,
    "num_groups": 4,
}


def build(family: str, part: str) -> nn.Module:
    """The UNet or the first stage of a family, without values."""
    unet, ddconfig = FAMILIES[family]
    with torch.device("meta"):
        return UNetModel(**unet) if part == "model.diffusion_model" else AutoencoderKL(4, ddconfig)


def load(family: str, part: str) -> nn.Module:
    """A part of a family with its stand-in weights."""
    listed = {name: entry for name, entry in manifest(family).items() if name.startswith(f"{part}.")}
    state = {name.removeprefix(f"{part}."): value for name, value in pseudo_state_dict(listed).items()}
    model = build(family, part)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def shapes(module: nn.Module) -> dict[str, list]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def types_and_shapes(module: nn.Module) -> dict[str, list]:
    """In the manifests' form."""
    state = module.state_dict()
    return {name: [str(v.dtype).removeprefix("torch."), list(v.shape)] for name, v in state.items()}


def tiny_unet(**params) -> UNetModel:
    """A UNet with random weights everywhere (some start as zeros, which would hide the rest)."""
    unet = UNetModel(**{**TINY_UNET, **params}).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in unet.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    return unet


def random_tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def latent_diffusion(**params) -> LatentDiffusion:
    """A model around the smallest UNet, without a first stage and a text encoder."""
    target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    unet = {"target": target, "params": {**TINY_UNET, **params.pop("unet", {})}}
    model = LatentDiffusion(unet, IDENTITY, IDENTITY, **{"use_ema": False, **params})
    model.model.diffusion_model.load_state_dict(tiny_unet(**unet["params"]).state_dict())
    return model


RECORDED = [  # v2's UNets are tested together, in models/test_families.py
    "mini-v1",
    pytest.param("sd-v1", marks=pytest.mark.slow),
    pytest.param("x4-upscaler", marks=pytest.mark.slow),
    pytest.param("ldm-text2img-large", marks=pytest.mark.slow),
]


def golden(family: str) -> dict[str, torch.Tensor]:
    return case(f"components_{family}")[0]
