"""Which model is this file? Answered by the names and shapes of its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Family:
    """A kind of model. One that cannot be run here has no config."""

    name: str
    # Matches a line of: "unet <input channels> <context width>", and below that the names of the weights.
    pattern: str
    config: str | None = None
    task: str = "text"  # as in Description
    # What its UNet predicts. Rows of one name differ in this, or in `size`: their weights show neither.
    predicts: str = "eps"
    folder: str | None = None  # below models/ldm/, where users link its weights
    download: str = ""  # what the published file is called
    bundled: str | None = None  # its weights, if they come with this repository
    size: int | None = None  # side in pixels of its images, where rows of one name differ in it


SD, BUNDLED = "configs/stable-diffusion/", "configs/scenes/"
V1 = Family(
    "Stable Diffusion v1", r"^unet 4 768", f"{SD}v1-inference.yaml",
    folder="stable-diffusion-v1", download="sd-v1-4.ckpt",
)  # fmt: skip
LAION = Family(
    "LAION-400M text2img-large", r"^unet 4 1280", "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    folder="text2img-large", download="model.ckpt",
)  # fmt: skip
# The first row that matches names the model. Those of one task are in the order in which the commands prefer
# linked weights.
FAMILIES = (
    Family("Stable Diffusion XL", r"^conditioner\.embedders\.|^unet . 2048"),
    Family("Stable Diffusion 3", r"\bjoint_blocks\."),
    Family("FLUX", r"\bdouble_blocks\."),
    Family("Stable Video Diffusion", r"\.time_stack\."),
    Family("Stable unCLIP", r"^model\.diffusion_model\.label_emb\.0\.0\.weight|^noise_augmentor\."),
    Family("a latent diffusion model with a VQ autoencoder", r"^(first_stage_model\.)?quantize\.embedding\."),
    V1,
    Family(
        "Stable Diffusion v2", r"^unet 4 1024", f"{SD}v2-inference.yaml",
        folder="stable-diffusion-v2-base", download="v2-1_512-ema-pruned.ckpt",
    ),
    Family(
        "Stable Diffusion v2", r"^unet 4 1024", f"{SD}v2-inference-v.yaml", predicts="v",
        folder="stable-diffusion-v2-768", download="v2-1_768-ema-pruned.ckpt",
    ),
    LAION,
    Family(
        "Stable Diffusion v1 inpainting", r"^unet 9 768", f"{SD}v1-inpainting-inference.yaml", "inpaint",
        folder="stable-diffusion-v1-inpainting", download="sd-v1-5-inpainting.ckpt",
    ),
    Family(
        "Stable Diffusion v2 inpainting", r"^unet 9 1024", f"{SD}v2-inpainting-inference.yaml", "inpaint",
        folder="stable-diffusion-v2-inpainting", download="512-inpainting-ema.ckpt",
    ),
    Family(
        "Stable Diffusion v2 depth", r"^unet 5 1024", f"{SD}v2-midas-inference.yaml", "depth",
        folder="stable-diffusion-v2-depth", download="512-depth-ema.ckpt",
    ),
    Family(
        "the Stable Diffusion x4 upscaler", r"^unet 7 1024", f"{SD}x4-upscaling.yaml", "upscale", "v",
        folder="stable-diffusion-x4-upscaler", download="x4-upscaler-ema.ckpt",
    ),
    Family(
        "the bundled model", r"^unet 4 64$", f"{BUNDLED}scenes-128.yaml", size=128,
        bundled="models/scenes-128/model.safetensors",
    ),
    Family(
        "the bundled model", r"^unet 4 64$", f"{BUNDLED}scenes-64.yaml", size=64,
        bundled="models/scenes-64/model.safetensors",
    ),
    Family(
        "the bundled model", r"^unet 4 64$", f"{BUNDLED}scenes-64-v.yaml", predicts="v", size=64,
        bundled="models/scenes-64-v/model.safetensors",
    ),
    Family(
        "the bundled inpainting model", r"^unet 9 64$", f"{BUNDLED}scenes-128-inpainting.yaml", "inpaint",
        size=128, bundled="models/scenes-128-inpainting/model.safetensors",
    ),
    Family(
        "the bundled inpainting model", r"^unet 9 64$", f"{BUNDLED}scenes-64-inpainting.yaml", "inpaint",
        size=64, bundled="models/scenes-64-inpainting/model.safetensors",
    ),
    Family(
        "the bundled depth model", r"^unet 5 64$", f"{BUNDLED}scenes-128-depth.yaml", "depth",
        size=128, bundled="models/scenes-128-depth/model.safetensors",
    ),
    Family(
        "the bundled depth model", r"^unet 5 64$", f"{BUNDLED}scenes-64-depth.yaml", "depth",
        size=64, bundled="models/scenes-64-depth/model.safetensors",
    ),
    Family(
        "the bundled x4 upscaler", r"^unet 7 64$", f"{BUNDLED}scenes-x4.yaml", "upscale", "v",
        bundled="models/scenes-x4/model.safetensors",
    ),
    Family("InstructPix2Pix", r"^unet 8 \d"),
    # what may also lie beside the weights of one of the models above
    Family("a ControlNet", r"^control_model\.|^controlnet_cond_embedding\.|^input_hint_block\."),
    Family("a LoRA", r"\blora_|_lora\.|\.lora\.|\.lora_|\.hada_w\d|\.lokr_w\d"),
    Family("a textual inversion", r"^(emb_params|clip_[gl]|tensor|<.+>)$|^string_to_param\b"),
    Family("a diffusers UNet", r"^(unet\.)?down_blocks\."),
    Family("a pixel upscaler", r"\bRRDB_trunk\.|\bbody\.\d+\.rdb1\.|^(params(_ema)?\.)?model\.1\.sub\."),
    Family("a latent diffusion model of an unlisted kind", r"^model(_ema)?\.diffusion_model"),
    Family("an autoencoder alone", r"^(first_stage_model\.|vae\.)?(en|de)coder\.(conv_in|mid)"),
    Family(
        "a text encoder alone",
        r"^(cond_stage_model\.transformer\.)?(text_model|embeddings)\.|\bresblocks\.",
    ),
    Family("an unknown model", r""),
)  # fmt: skip

RAW, EMA = r"model\.diffusion_model\.", r"model_ema\.diffusion_model"
UNET_INPUT = "model.diffusion_model.input_blocks.0.0.weight"  # [width, input channels, 3, 3]
EMA_INPUT = "model_ema.diffusion_modelinput_blocks00weight"
# [width, context width]
UNET_CONTEXT = re.compile(rf"{RAW}(input|middle|output)_block.*\.attn2\.to_k\.weight|{EMA}.*attn2to_kweight")
ENCODER_LEVEL = re.compile(r"first_stage_model\.encoder\.down\.(\d{1,2})\.")


class Shapes(NamedTuple):
    """The numbers that make a model's family; None for those that are not known."""

    in_channels: int | None  # of the UNet
    context_dim: int | None  # of its cross-attention
    factor: int | None = None  # pixels to a latent


def shapes_of(state: Mapping[str, Any]) -> Shapes:
    """The shapes of a state dict, or of a header's tensors."""
    first = state[UNET_INPUT] if UNET_INPUT in state else state.get(EMA_INPUT)
    channels = first.shape[1] if first is not None and len(first.shape) == 4 else None
    widths = (t.shape[1] for name, t in state.items() if UNET_CONTEXT.fullmatch(name) and len(t.shape) == 2)
    levels = {int(match[1]) for name in state if (match := ENCODER_LEVEL.match(name))}
    return Shapes(channels, next(widths, None), 2 ** max(levels) if levels else None)


def recognise(shapes: Shapes, names: Iterable[str] = ()) -> Family:
    """The family of a model of these shapes, with weights of these names."""
    unet = "" if shapes.in_channels is None else f"unet {shapes.in_channels} {shapes.context_dim}"
    lines = "\n".join((unet, *names))
    return next(family for family in FAMILIES if re.search(family.pattern, lines, re.M))


def family_of(state: Mapping[str, Any]) -> Family:
    """The family that a state dict, or a header's tensors, belong to."""
    return recognise(shapes_of(state), state)


def variants(family: Family, size: int | None = None) -> list[Family]:
    """The rows of that name, which differ in what their UNet predicts, or in the size of their images.

    With the size that a file states, those of this size, if there are any.
    """
    rows = [row for row in FAMILIES if row.name == family.name]
    return [row for row in rows if size is not None and row.size == size] or rows


def identify(state: Mapping[str, Any]) -> str:
    """Which model a state dict belongs to, in words such as "Stable Diffusion v2 depth"."""
    return family_of(state).name


def in_words(family: Family) -> str:
    """The family and the config that fits it, for a message."""
    configs = [row.config.rpartition("/")[2] for row in variants(family) if row.config]
    return (
        f"{family.name} ({'its config is ' + ' or '.join(configs) if configs else 'no config here fits it'})"
    )


def supported() -> str:
    """The names of all families that can be run, for a message."""
    return ", ".join(dict.fromkeys(family.name for family in FAMILIES if family.folder))
