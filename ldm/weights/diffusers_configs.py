"""What a diffusers folder says besides its weights, made from a `model:` section and the weights' shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import InputError
from ldm.weights.diffusers_layout import DEPTH, INPAINT, TEXT, UPSCALE
from ldm.weights.diffusers_names import unet_levels, vae_levels

if TYPE_CHECKING:
    from torch import Tensor

    State = Mapping[str, Tensor]

# the oldest version of diffusers whose layout this is
VERSION = "0.21.0"
# what schedules are called there
BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
START, END, V2_PADDING = "<|startoftext|>", "<|endoftext|>", "!"
HEADS = {"clip": 12, "open_clip": 16}  # of ViT-L/14 and ViT-H/14


def pipeline_of(unet: State, parts: Mapping[str, Any]) -> str:
    """The pipeline class for a UNet, by its input channels and the parts beside it.

    InputError if there is none.
    """
    if "depth_estimator" in parts:
        return DEPTH
    if "class_embedding.weight" in unet:
        return UPSCALE
    channels = unet["conv_in.weight"].shape[1]
    if channels not in (4, 9):
        raise InputError(f"diffusers has no pipeline for this UNet of {channels} input channels")
    return TEXT if channels == 4 else INPAINT


def unet_config(params: Mapping[str, Any], unet: State) -> dict[str, Any]:
    """`unet/config.json`; `params` are the `model:` section's, `unet` the weights in their names."""
    config = params["unet_config"]["params"]
    levels = unet_levels(unet)
    widths = [unet[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(len(levels))]
    blocks = [level.blocks for level in levels]
    attention = "mid_block.attentions.0"
    heads = config.get("num_heads", -1)
    if heads == -1:
        heads = [width // config["num_head_channels"] for width in widths]
    is_linear = unet[f"{attention}.proj_in.weight"].ndim == 2
    labels = unet.get("class_embedding.weight")
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "sample_size": params.get("image_size", 64),
        "in_channels": unet["conv_in.weight"].shape[1],
        "out_channels": unet["conv_out.weight"].shape[0],
        "down_block_types": [f"{'CrossAttn' * level.attention}DownBlock2D" for level in levels],
        "up_block_types": [f"{'CrossAttn' * level.attention}UpBlock2D" for level in reversed(levels)],
        "block_out_channels": widths,
        "layers_per_block": blocks[0] if len(set(blocks)) == 1 else blocks,
        "norm_num_groups": config.get("num_groups", 32),
        "cross_attention_dim": unet[f"{attention}.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_head_dim": heads,  # which is what diffusers calls their number
        "transformer_layers_per_block": config.get("transformer_depth", 1),
        "only_cross_attention": config.get("disable_self_attentions") or False,
        "mid_block_only_cross_attention": config.get("disable_middle_self_attn", False),
        "use_linear_projection": is_linear,
        "upcast_attention": is_linear,  # v2's attention overflows in half precision
        "num_class_embeds": None if labels is None else labels.shape[0],
    }


def vae_config(params: Mapping[str, Any], vae: State, scale_factor: float) -> dict[str, Any]:
    """`vae/config.json`."""
    config = params["first_stage_config"]["params"]["ddconfig"]
    levels = vae_levels(vae)
    widths = [vae[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(len(levels))]
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "sample_size": params.get("image_size", 64) * 2 ** (len(levels) - 1),
        "in_channels": vae["encoder.conv_in.weight"].shape[1],
        "out_channels": vae["decoder.conv_out.weight"].shape[0],
        "latent_channels": vae["decoder.conv_in.weight"].shape[1],
        "down_block_types": [f"{'Attn' * level.attention}DownEncoderBlock2D" for level in levels],
        "up_block_types": [f"{'Attn' * level.attention}UpDecoderBlock2D" for level in reversed(levels)],
        "block_out_channels": widths,
        "layers_per_block": levels[0].blocks,
        "norm_num_groups": config.get("num_groups", 32),
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in vae,
        "scaling_factor": scale_factor,
    }


def text_config(params: Mapping[str, Any], text: State, is_open_clip: bool) -> dict[str, Any]:
    """`text_encoder/config.json`."""
    config = params["cond_stage_config"].get("params") or {}
    vocabulary, width = text["text_model.embeddings.token_embedding.weight"].shape
    layers = sum(name.endswith(".layer_norm1.weight") for name in text)
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": text["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": config.get("heads", HEADS["open_clip" if is_open_clip else "clip"]),
        "max_position_embeddings": text["text_model.embeddings.position_embedding.weight"].shape[0],
        "hidden_act": "gelu" if is_open_clip else config.get("activation", "quick_gelu"),
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0 if is_open_clip else vocabulary - 1,
    }


def scheduler_config(params: Mapping[str, Any], parameterization: str, zero_snr: bool) -> dict[str, Any]:
    """`scheduler/scheduler_config.json`: DDIM on the model's schedule."""
    return _schedule(params) | {
        "_class_name": "DDIMScheduler",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[parameterization],
        "rescale_betas_zero_snr": zero_snr,
        "timestep_spacing": "trailing" if zero_snr else "leading",
    }


def low_res_scheduler_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """`low_res_scheduler/scheduler_config.json` of the x4 upscaler: the noise of the small image."""
    noise = (params["low_scale_config"].get("params") or {}).get("noise_schedule_config") or {}
    return _schedule(noise) | {"_class_name": "DDPMScheduler", "prediction_type": "epsilon"}


def _schedule(params: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "_diffusers_version": VERSION,
        "num_train_timesteps": params.get("timesteps", 1000),
        "beta_schedule": BETA_SCHEDULES[params.get("beta_schedule", "linear")],
        "beta_start": params.get("linear_start", 1e-4),
        "beta_end": params.get("linear_end", 2e-2),
        "clip_sample": False,
    }


def depth_preprocessor(size: int) -> dict[str, Any]:
    """`feature_extractor/preprocessor_config.json` of a depth model for images of `size` pixels."""
    return {
        "image_processor_type": "DPTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "ensure_multiple_of": 32,
        "keep_aspect_ratio": True,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def model_index(pipeline: str) -> dict[str, Any]:
    """`model_index.json`."""
    index = {
        "_class_name": pipeline,
        "_diffusers_version": VERSION,
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    match pipeline:
        case "StableDiffusionDepth2ImgPipeline":
            index["depth_estimator"] = ["transformers", "DPTForDepthEstimation"]
            index["feature_extractor"] = ["transformers", "DPTImageProcessor"]
        case "StableDiffusionUpscalePipeline":
            index["low_res_scheduler"] = ["diffusers", "DDPMScheduler"]
            index["max_noise_level"] = 350
        case _:
            index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
            index["requires_safety_checker"] = False
    return index


def write_tokenizer(folder: Path, pads_with_zero: bool) -> None:
    """CLIP's vocabulary for transformers' CLIPTokenizer; v2 pads with token 0, v1 with the end token."""
    from ldm.modules.encoders import tokenizer as clip

    try:
        clip.CLIPTokenizer().bpe.model.save(str(folder))  # vocab.json and merges.txt
    except Exception as error:  # the library has no other for what the system refuses
        raise OSError(str(error)) from error
    path = folder / "vocab.json"
    names = {clip.START: START, clip.END: END}
    ids = json.loads(path.read_text("utf-8"))
    write_json(path, {names.get(token, token): i for token, i in ids.items()})
    padding = V2_PADDING if pads_with_zero else END
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": padding}
    write_json(folder / "special_tokens_map.json", tokens)
    facts = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", facts | tokens)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
