"""Which model is this file? Answered by the names and shapes of its weights."""

import re
from collections.abc import Mapping

from torch import Tensor

# The first row that matches names the model. A pattern sees the weight names, a line each, below a first line
# "unet <input channels> <context width>", and the last column is the config that fits.
FAMILIES = (
    (r"^conditioner\.embedders\.|^unet . 2048", "Stable Diffusion XL", None),
    (r"\bjoint_blocks\.", "Stable Diffusion 3", None),
    (r"\bdouble_blocks\.", "FLUX", None),
    (r"^control_model\.|^controlnet_cond_embedding\.", "a ControlNet", None),
    (r"\blora_|\.lora\.", "a LoRA", None),
    (r"^emb_params$|^clip_[gl]$", "a textual inversion", None),
    (r"^(unet\.)?down_blocks\.", "a diffusers UNet", None),
    (r"^model\.diffusion_model\.label_emb\.0\.0\.weight", "Stable unCLIP", None),
    (r"^unet 4 768", "Stable Diffusion v1", "v1-inference.yaml"),
    (r"^unet 9 768", "Stable Diffusion v1 inpainting", "v1-inpainting-inference.yaml"),
    (r"^unet 8 768", "InstructPix2Pix", None),
    (r"^unet 4 1024", "Stable Diffusion v2", "v2-inference.yaml, or v2-inference-v.yaml for 768 pixels"),
    (r"^unet 9 1024", "Stable Diffusion v2 inpainting", "v2-inpainting-inference.yaml"),
    (r"^unet 5 1024", "Stable Diffusion v2 depth", "v2-midas-inference.yaml"),
    (r"^unet 7 1024", "the Stable Diffusion x4 upscaler", "x4-upscaling.yaml"),
    (r"^unet 4 1280", "LAION-400M text2img-large", "txt2img-1p4B-eval.yaml"),
    (r"^model(_ema)?\.diffusion_model", "a latent diffusion model of an unlisted kind", None),
    (r"^(first_stage_model\.|vae\.)?(en|de)coder\.(conv_in|mid)", "an autoencoder alone", None),
    (r"^(cond_stage_model\.transformer\.)?text_model\.|\bresblocks\.", "a text encoder alone", None),
    (r"", "an unknown model", None),
)
# [width, input channels, 3, 3] and [width, context width]
UNET_INPUT = "model.diffusion_model.input_blocks.0.0.weight"
UNET_CONTEXT = re.compile(r"model\.diffusion_model\.input_blocks\..*\.attn2\.to_k\.weight")


def family(state: Mapping[str, Tensor]) -> tuple[str, str | None]:
    """(name, config that fits) of the model that a state dict belongs to, from its row of FAMILIES."""
    shapes = {name: t.shape for name, t in state.items()}
    contexts = [
        shape[1] for name, shape in shapes.items() if UNET_CONTEXT.fullmatch(name) and len(shape) == 2
    ]
    inputs = shapes.get(UNET_INPUT, ())
    unet = f"unet {inputs[1]} {next(iter(contexts), None)}" if len(inputs) == 4 else ""
    names = "\n".join((unet, *state))
    return next((name, config) for pattern, name, config in FAMILIES if re.search(pattern, names, re.M))


def identify(state: Mapping[str, Tensor]) -> str:
    """Which model a state dict belongs to, in words such as "Stable Diffusion v2 depth"."""
    return family(state)[0]


def prediction_markers(state: Mapping[str, Tensor]) -> tuple[bool, bool]:
    """(v_pred, ztsnr): whether the file says that its UNet predicts v, and that it was trained on a schedule
    rescaled to zero terminal SNR (Lin et al. 2023, https://arxiv.org/abs/2305.08891).

    Trainers and merging tools mark such files with a tensor of that name; its values mean nothing.
    """
    return "v_pred" in state, "ztsnr" in state
