"""What a family's UNet is given besides the latents: cross-attention, concatenated channels, class labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.errors import FieldError, InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipeline.request import ImageRequest
from ldm.sampling.denoiser import Conditioning, same_length

Embed = Callable[[str], Tensor]  # a prompt -> its embedding [1, n, d], n a multiple of 77


def check_task(task: str, request: ImageRequest) -> None:
    """FieldError if a model of this task ("text", "inpaint", "depth", "upscale") cannot make the request.

    An inpainting model makes any image: without a mask it paints all of it. Any model paints inside a mask.
    """
    if request.depth is not None and task != "depth":
        raise FieldError("{depth}: this model reads no depth map; take a Stable Diffusion 2 depth checkpoint")
    if request.noise_level is not None and task != "upscale":
        raise FieldError("{noise_level}: this model enlarges nothing; take a checkpoint of the x4 upscaler")
    if task == "upscale" and request.noise_level is None:
        raise InputError("this model enlarges images: use upscale.py with --init-img")
    if task == "depth" and request.init_img is None and request.depth is None:
        raise InputError("this model paints over a depth map: use depth2img.py with --init-img or --depth")


def conditions(
    model: LatentDiffusion,
    requests: Sequence[ImageRequest],
    embed: Embed,
    *,
    concat: Tensor | None = None,
    label: Tensor | None = None,
) -> tuple[Conditioning, Conditioning | None]:
    """The conditions of a batch of requests, and the unconditional ones; None without guidance.

    Prompts may have different numbers of tokens. `concat` [b, c, h, w] are further input channels of the UNet
    (a mask, masked, depth or low-resolution latents) and `label` its class labels [b, …]; they are the same
    for both halves of guidance. InputError for a model that needs what is not given.
    """
    expected = set(model.conditioning_key.replace("hybrid", "concat-crossattn").split("-"))
    given = (
        {"crossattn"}
        | ({"concat"} if concat is not None else set())
        | ({"adm"} if label is not None else set())
    )
    if expected != given:
        lacking = ", ".join(sorted(expected ^ given))
        raise InputError(
            f"this model is conditioned by {model.conditioning_key}: nothing here gives it that ({lacking})"
        )

    def together(prompts: list[str]) -> Conditioning:
        # a tensor of its own, also for one prompt: DeepCache knows a run by it
        context = torch.cat(same_length([embed(prompt) for prompt in prompts]))
        if given == {"crossattn"}:
            return context
        rows = {"c_crossattn": [context.expand(len(requests), -1, -1)]}
        if concat is not None:
            rows["c_concat"] = [concat]
        return rows if label is None else rows | {"c_adm": label}

    cond = together([request.prompt for request in requests])
    if requests[0].scale == 1.0:
        return cond, None
    negative = [request.negative_prompt for request in requests]
    # one row stands for all of them where they agree
    return cond, together(negative[:1] if len(set(negative)) == 1 else negative)
