"""Tiny random pipelines of diffusers, and the `model:` sections of our models that fit them.

Kinds: "v1", "v2" (eps), "v2-v", "inpainting" (of v2), "v1-inpainting", "depth", "x4".
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.weights.diffusers_configs import write_tokenizer

KINDS = ("v1", "v2", "v2-v", "v1-inpainting", "inpainting", "depth", "x4")
WIDTH = 32  # of the text encoder, and of the first level of UNet and autoencoder
GROUPS = 8
IN_CHANNELS = {"v1-inpainting": 9, "inpainting": 9, "depth": 5, "x4": 7}
CLASSES = {"v1-inpainting": "LatentInpaintDiffusion", "inpainting": "LatentInpaintDiffusion"} | {
    "depth": "LatentDepth2ImageDiffusion",
    "x4": "LatentUpscaleDiffusion",
}
DEPTH_SIZE = 64  # pixels
DEPTH = {
    "image_size": DEPTH_SIZE,
    "width": 32,
    "layers": 4,
    "heads": 2,
    "backbone_width": 8,
    "backbone_depths": [1, 2, 1],
    "groups": 4,
    "features": 16,
    "classes": 0,
}


def is_v1(kind: str) -> bool:
    return kind.startswith("v1")


def predicts_v(kind: str) -> bool:
    return kind in ("v2-v", "x4")


def tiny_config(kind: str) -> dict[str, Any]:
    """The `model:` section of the model that `tiny_pipeline(kind)` is."""
    is_x4 = kind == "x4"
    heads = {"num_heads": 2} if is_v1(kind) or is_x4 else {"num_head_channels": 16}
    unet = {
        "in_channels": IN_CHANNELS.get(kind, 4),
        "out_channels": 4,
        "model_channels": WIDTH,
        "num_res_blocks": 1,
        "attention_resolutions": [2, 4] if is_x4 else [1, 2],
        "channel_mult": [1, 1, 2] if is_x4 else [1, 2],
        "context_dim": WIDTH,
        "num_groups": GROUPS,
        "use_linear_in_transformer": not is_v1(kind),
        **heads,
    }
    if is_x4:
        unet |= {"num_classes": 1000, "disable_self_attentions": [True, True, False]}
    text = {"width": WIDTH, "heads": 2}
    embedder = "FrozenCLIPEmbedder" if is_v1(kind) else "FrozenOpenCLIPEmbedder"
    # the last of OpenCLIP's blocks is never run, and not in a pipeline of diffusers
    text |= {"layers": 2} if is_v1(kind) else {"layers": 3, "layer": "penultimate"}
    params = {
        "linear_start": 0.0001 if is_x4 else 0.00085,
        "linear_end": 0.02 if is_x4 else 0.012,
        "channels": 4,
        "image_size": 8,
        "scale_factor": 0.08333 if is_x4 else 0.18215,
        "conditioning_key": "hybrid-adm" if is_x4 else "hybrid" if kind in CLASSES else "crossattn",
        "use_ema": False,
        "parameterization": "v" if predicts_v(kind) else "eps",
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": 4,
                "ddconfig": {
                    "z_channels": 4,
                    "ch": WIDTH,
                    "ch_mult": [1, 1, 2] if is_x4 else [1, 1, 1, 2],
                    "num_res_blocks": 1,
                    "num_groups": GROUPS,
                },
            },
        },
        "cond_stage_config": {"target": f"ldm.modules.encoders.modules.{embedder}", "params": text},
    }
    if kind == "depth":
        target = "ldm.modules.midas.api.MiDaSInference"
        params["depth_stage_config"] = {"target": target, "params": DEPTH}
    if is_x4:
        target = "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation"
        schedule = {"linear_start": 0.0001, "linear_end": 0.02}
        noise = {"noise_schedule_config": schedule, "max_noise_level": 350}
        params["low_scale_config"] = {"target": target, "params": noise}
    return {"target": f"ldm.models.diffusion.ddpm.{CLASSES.get(kind, 'LatentDiffusion')}", "params": params}


@functools.cache
def tiny_pipeline(kind: str, seed: int = 0) -> Any:
    """A pipeline of diffusers with random weights, the same object each time."""
    import diffusers

    torch.manual_seed(seed)
    is_x4 = kind == "x4"
    attention = (False, True, True) if is_x4 else (True, True)
    widths = (WIDTH, WIDTH, 2 * WIDTH) if is_x4 else (WIDTH, 2 * WIDTH)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=IN_CHANNELS.get(kind, 4),
        down_block_types=tuple(f"{'CrossAttn' * has}DownBlock2D" for has in attention),
        up_block_types=tuple(f"{'CrossAttn' * has}UpBlock2D" for has in reversed(attention)),
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=GROUPS,
        cross_attention_dim=WIDTH,
        attention_head_dim=2 if is_v1(kind) or is_x4 else tuple(width // 16 for width in widths),
        use_linear_projection=not is_v1(kind),
        only_cross_attention=(True, True, False) if is_x4 else False,
        num_class_embeds=1000 if is_x4 else None,
    )
    levels = (WIDTH, WIDTH, 2 * WIDTH) if is_x4 else (WIDTH, WIDTH, WIDTH, 2 * WIDTH)
    vae = diffusers.AutoencoderKL(
        block_out_channels=levels,
        down_block_types=("DownEncoderBlock2D",) * len(levels),
        up_block_types=("UpDecoderBlock2D",) * len(levels),
        layers_per_block=1,
        norm_num_groups=GROUPS,
        scaling_factor=0.08333 if is_x4 else 0.18215,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_act="quick_gelu" if is_v1(kind) else "gelu",
            projection_dim=WIDTH,
        )
    )
    schedule = {
        "beta_start": 0.0001 if is_x4 else 0.00085,
        "beta_end": 0.02 if is_x4 else 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "prediction_type": "v_prediction" if predicts_v(kind) else "epsilon",
    }
    scheduler = diffusers.DDIMScheduler(**schedule, set_alpha_to_one=False, steps_offset=1)
    parts = {"vae": vae, "text_encoder": text, "tokenizer": tokenizer(is_v1(kind)), "unet": unet}
    parts["scheduler"] = scheduler
    for module in (unet, vae, text):
        module.eval().requires_grad_(False)
    if kind == "depth":
        from transformers import DPTForDepthEstimation, DPTImageProcessor

        from ldm.modules.midas.api import MiDaSInference

        config = MiDaSInference(**DEPTH).network[0].dpt.config
        parts["depth_estimator"] = DPTForDepthEstimation(config).eval().requires_grad_(False)
        size = {"height": DEPTH_SIZE, "width": DEPTH_SIZE}
        shape = {"size": size, "ensure_multiple_of": 32, "keep_aspect_ratio": True}
        parts["feature_extractor"] = DPTImageProcessor(**shape)
        return diffusers.StableDiffusionDepth2ImgPipeline(**parts)
    if is_x4:
        noise = diffusers.DDPMScheduler(**schedule | {"prediction_type": "epsilon"})
        return diffusers.StableDiffusionUpscalePipeline(low_res_scheduler=noise, **parts)
    inpaints = kind.endswith("inpainting")
    name = "StableDiffusionInpaintPipeline" if inpaints else "StableDiffusionPipeline"
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, name)(**parts, **nothing)


@functools.cache
def tokenizer(is_v1: bool) -> CLIPTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), pads_with_zero=not is_v1)
        return CLIPTokenizer.from_pretrained(folder)


def outputs(pipeline: Any, kind: str) -> dict[str, torch.Tensor]:
    """What the networks of a pipeline, or of one of our models, make of the same inputs."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    ids = torch.randint(49408, (2, 77), generator=generator)
    x, context, t = randn(2, IN_CHANNELS.get(kind, 4), 8, 8), randn(2, 77, WIDTH), torch.tensor([3, 700])
    labels = torch.tensor([4, 20]) if kind == "x4" else None
    image, latents = randn(1, 3, 64, 64), randn(1, 4, 8, 8)
    with torch.inference_mode():
        if hasattr(pipeline, "first_stage_model"):
            found = {
                "text": pipeline.cond_stage_model.forward_tokens(ids),
                "unet": pipeline.model.diffusion_model(x, t, context=context, y=labels),
                "encoder": pipeline.first_stage_model.encode(image).mode(),
                "decoder": pipeline.first_stage_model.decode(latents),
            }
            return found | ({"depth": pipeline.depth_model(image)[:, 0]} if kind == "depth" else {})
        found = {
            "text": pipeline.text_encoder(ids).last_hidden_state,
            "unet": pipeline.unet(x, t, context, class_labels=labels).sample,
            "encoder": pipeline.vae.encode(image).latent_dist.mode(),
            "decoder": pipeline.vae.decode(latents).sample,
        }
        return found | ({"depth": pipeline.depth_estimator(image).predicted_depth} if kind == "depth" else {})
