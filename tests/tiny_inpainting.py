"""The miniature of tiny.py grown to the nine input channels of an inpainting model, also for diffusers."""

from pathlib import Path
from typing import Any

import tiny
import tiny_siblings
from safetensors.torch import load_file


def section() -> dict[str, Any]:
    """The `model:` section."""
    changes = {"conditioning_key": "hybrid", "unet_config.params.in_channels": 9}
    return tiny.model_section(changes) | {"target": f"{tiny_siblings.MODELS}.LatentInpaintDiffusion"}


def write_model(folder: Path) -> tuple[Path, Path]:
    """(config, weights), as the `model` fixture has them."""
    return tiny_siblings.write_model(folder, "inpainting", section())


def diffusers_pipeline(weights: Path) -> Any:
    """The model of these weights as a `StableDiffusionInpaintPipeline` that takes embeddings of prompts."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
    from diffusers.loaders import single_file_utils

    unet = UNet2DConditionModel(
        sample_size=2,
        in_channels=9,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=32,
    )
    vae = AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
    )
    state = load_file(weights)
    unet.load_state_dict(single_file_utils.convert_ldm_unet_checkpoint(dict(state), unet.config))
    vae.load_state_dict(single_file_utils.convert_ldm_vae_checkpoint(dict(state), vae.config))
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionInpaintPipeline(
        vae, None, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
