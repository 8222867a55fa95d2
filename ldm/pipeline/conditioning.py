"""What a family's UNet is given besides the latents: cross-attention, concatenated channels, class labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.errors import FieldError, InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipeline.request import ImageRequest
from ldm.pipeline.settings.text import Reading, Texts
from ldm.sampling.denoiser import Conditioning, same_length
from ldm.sampling.staged import Composition, Condition

Embed = Callable[[str, Reading], Tensor]  # a prompt -> its embedding [1, n, d], n a multiple of 77


def check_task(task: str, request: ImageRequest) -> None:
    """FieldError if a model of this task ("text", "inpaint", "depth", "upscale") cannot make the request.

    An inpainting model makes any image: without a mask it paints all of it. Any model paints inside a mask.
    """
    if request.depth is not None and task != "depth":
        raise FieldError("{depth}: this model reads no depth map; take a Stable Diffusion 2 depth checkpoint")
    if request.noise_level is not None and task != "upscale":
        raise FieldError("{noise_level}: this model enlarges nothing; take a checkpoint of the x4 upscaler")
    if request.tile and task != "upscale":
        raise FieldError(
            "{tile} {side}: this model enlarges nothing, and has no tiles; leave it out", side=request.tile
        )
    if task == "upscale" and request.noise_level is None:
        if request.init_img is None:
            raise FieldError("this model enlarges images: give one as {init_img}")
        raise FieldError("{strength}: this model enlarges from pure noise; give {noise_level} in its place")
    if task == "depth" and request.init_img is None and request.depth is None:
        raise FieldError("this model paints over a depth map: give {init_img}, or a map as {depth}")


def prompt_stages(
    requests: Sequence[ImageRequest], steps: int, second: bool = False
) -> tuple[list[tuple[Texts, ...]], list[int]]:
    """The different texts of a batch over the steps of a run, or of its `second` pass, one for each request;
    and which of them each step reads."""
    stages: dict[tuple[Texts, ...], int] = {}
    order = []
    changing = any(request.changes_over_steps for request in requests)
    for step in range(1, max(1, steps) + 1):
        if order and not changing:
            order.append(0)
            continue
        texts = tuple(request.texts(step, max(1, steps), second) for request in requests)
        order.append(stages.setdefault(texts, len(stages)))
    return list(stages), order


def towards(embedding: Tensor, request: ImageRequest, embed: Embed) -> Tensor:
    """A prompt's embedding [1, n, d], mixed with that of the request's `prompt_to`; by 0 and 1 not mixed."""
    if not request.prompt_mix:
        return embedding
    other = embed(request.prompt_to, request.reading)
    if request.prompt_mix == 1.0:
        return other
    return torch.lerp(*same_length([embedding, other]), request.prompt_mix)


def context_lengths(request: ImageRequest, embed: Embed, second: bool = False) -> tuple[int, ...]:
    """The numbers of tokens that cross-attention reads of a request's texts, over the steps of a pass."""
    found: list[int] = []
    for (texts,) in prompt_stages([request], request.steps_to_run, second)[0]:
        found += [towards(embed(text, request.reading), request, embed).shape[1] for text, _ in texts.parts]
        if request.guided or request.parts:
            found.append(embed(texts.negative, request.reading).shape[1])
    return tuple(found)


def conditions(
    model: LatentDiffusion,
    requests: Sequence[ImageRequest],
    embed: Embed,
    texts: Sequence[Texts] | None = None,
    *,
    concat: Tensor | None = None,
    label: Tensor | None = None,
    control: Sequence[Tensor] = (),
) -> tuple[Condition, Conditioning | None]:
    """The conditions of a batch of requests, and the unconditional ones; None without guidance.

    `texts` are what the requests read, by default at their first step. Prompts may have different numbers of
    tokens. `concat` [b, c, h, w] are further input channels of the UNet (a mask, masked, depth or
    low-resolution latents) and `label` its class labels [b, …]; they are the same for both halves
    of guidance, as are the features of control images, `control` [b, c, h, w] for each ControlNet, which
    `control.ControlledModel` reads. InputError for a model that needs what is not given.
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

    def together(prompts: list[str], mixed: bool = False) -> Conditioning:
        embeddings = [embed(prompt, one.reading) for prompt, one in zip(prompts, requests, strict=False)]
        if mixed:
            embeddings = [towards(*each, embed) for each in zip(embeddings, requests, strict=True)]
        # a tensor of its own, also for one prompt: DeepCache knows a run by it
        context = torch.cat(same_length(embeddings))
        if given == {"crossattn"} and not control:
            return context
        rows = {"c_crossattn": [context.expand(len(requests), -1, -1)]}
        if concat is not None:
            rows["c_concat"] = [concat]
        if control:
            rows["c_control"] = list(control)
        return rows if label is None else rows | {"c_adm": label}

    if texts is None:
        texts = [request.texts(1, 1) for request in requests]
    columns = zip(*(one.parts for one in texts), strict=True)
    parts = [together([text for text, _ in each], mixed=True) for each in columns]
    cond: Condition = parts[0]
    if composed := requests[0].parts > 0:
        weights = torch.tensor([[weight for _, weight in one.parts] for one in texts], device=model.device)
        cond = Composition(parts, weights.T)
    if not (requests[0].guided or composed):
        return cond, None
    negative = [one.negative for one in texts]
    # one row stands for all of them where they agree
    agree = len({(text, one.reading) for text, one in zip(negative, requests, strict=True)}) == 1
    return cond, together(negative[:1] if agree else negative)
