"""diffusers' models with our weights: their configurations for Stable Diffusion v1, their names for ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

V1_UNET = {  # stable-diffusion-v1-5/unet/config.json, where it differs from UNet2DConditionModel's defaults
    "cross_attention_dim": 768,
    "attention_head_dim": 8,  # diffusers' old mistake: it is the number of heads
    "block_out_channels": (320, 640, 1280, 1280),
    "sample_size": 64,
}

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def diffusers_name(name: str) -> str:
    """`input_blocks.1.0.in_layers.0.bias` -> `down_blocks.0.resnets.0.norm1.bias`, for two blocks a level."""
    module, leaf = name.rsplit(".", 1)
    if module in ENDS:
        return f"{ENDS[module]}.{leaf}"
    side, *path = module.split(".")
    if side == "middle_block":
        block, index = "mid_block", int(path.pop(0)) // 2  # resnet, attention, resnet
    else:
        # a level is two blocks and a downsampler on the way down, three blocks on the way up
        level, index = divmod(int(path.pop(0)) - (side == "input_blocks"), 3)
        block = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}"
        path.pop(0)  # the layer's place within our block
    match path:
        case ["op"]:
            return f"{block}.downsamplers.0.conv.{leaf}"
        case ["conv"]:
            return f"{block}.upsamplers.0.conv.{leaf}"
    inner = ".".join(path)
    if inner in RESNET:
        return f"{block}.resnets.{index}.{RESNET[inner]}.{leaf}"
    return f"{block}.attentions.{index}.{inner}.{leaf}"


V1_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
VAE_PLACES = (
    (r"^encoder\.down\.(\d)\.block\.(\d)", r"encoder.down_blocks.\1.resnets.\2"),
    (r"^encoder\.down\.(\d)\.downsample", r"encoder.down_blocks.\1.downsamplers.0"),
    (r"^decoder\.up\.(\d)\.block\.(\d)", lambda m: f"decoder.up_blocks.{3 - int(m[1])}.resnets.{m[2]}"),
    (r"^decoder\.up\.(\d)\.upsample", lambda m: f"decoder.up_blocks.{3 - int(m[1])}.upsamplers.0"),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def vae_name(name: str) -> str:
    """`decoder.up.3.block.0.norm1.bias` -> `decoder.up_blocks.0.resnets.0.norm1.bias`."""
    for pattern, place in VAE_PLACES:
        name = re.sub(pattern, place, name)
    return name


def save_for_diffusers(model: LatentDiffusion, folder: Path) -> None:
    """A v1 model in diffusers' layout, without tokenizer and scheduler."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text_config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
    )
    unet = {diffusers_name(name): t for name, t in model.model.diffusion_model.state_dict().items()}
    vae = {vae_name(name): t for name, t in model.first_stage_model.state_dict().items()}
    vae = {name: t.flatten(1) if "attentions" in name and t.dim() == 4 else t for name, t in vae.items()}
    text = model.cond_stage_model.transformer.state_dict()
    with torch.device("meta"):
        parts = {
            "unet": (UNet2DConditionModel(**V1_UNET), unet),
            "vae": (AutoencoderKL(**V1_VAE), vae),
            "text_encoder": (CLIPTextModel(text_config), text),
        }
    for name, (part, state) in parts.items():
        names = part.state_dict().keys()
        shorter = {key.removeprefix("text_model."): key for key in names}  # as transformers 5 has it, or not
        state = {
            key if key in names else shorter[key.removeprefix("text_model.")]: t for key, t in state.items()
        }
        part.load_state_dict(state, assign=True)
        part.save_pretrained(folder / name)
