"""A model's weights, configs and tokenizer as a folder that diffusers loads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import InputError
from ldm.weights import diffusers_configs as configs
from ldm.weights import diffusers_names as names
from ldm.weights.diffusers_layout import (
    CLIP,
    CLIP_PART,
    DEPTH,
    INDEX,
    MIDAS,
    MIDAS_PART,
    OPEN_CLIP,
    OPEN_CLIP_PART,
    UNET,
    UNET_PART,
    UPSCALE,
    VAE,
    VAE_PART,
    translated,
)
from ldm.weights.writing import Report, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

    State = Mapping[str, Tensor]

TEXT_MODEL = re.compile(r"(embeddings|encoder|final_layer_norm)\.(?!position_ids)")
# What a diffusers folder cannot hold, in words.
NOT_HELD = (
    (r"(low_scale_model\.)?(alphas|betas|log_one|posterior|sqrt|lvlb).*", "buffers of the schedule"),
    (r".*\.position_ids|.*\.attn_mask", "position ids"),
    (r"cond_stage_model\.model\.transformer\.resblocks\..*", "the text encoder's unused last block"),
    (r"cond_stage_model\..*(logit_scale|text_projection.*)", "the text encoder's unused projection"),
    (r"depth_model\..*", "the depth estimator's unused classifier"),
    (r"model_ema\..*", "EMA weights"),
    (r".*", "others"),
)


def with_text_model(state: State) -> State:
    """`state` with the `text_model.` in CLIP's names that some files lack, such as NovelAI's."""
    bare = CLIP.removesuffix("text_model.")
    if f"{bare}embeddings.token_embedding.weight" not in state:
        return state
    return {CLIP + name.removeprefix(bare) if name.startswith(bare) else name: t for name, t in state.items()}


def write_folder(
    state: State,
    folder: Path,
    config: Mapping[str, Any],
    parameterization: str,
    zero_snr: bool = False,
    precision: str | None = None,
    report: Report = lambda count: None,
) -> None:
    """Write the weights of a model, with the configs and the tokenizer that diffusers loads them by.

    `config` is the `model:` section of the model. InputError for a model that diffusers has no pipeline for.
    """
    params = config["params"]
    parts, depth = folder_parts(state, config)
    is_open_clip = any(name.startswith(OPEN_CLIP) for name in state)
    pipeline = configs.pipeline_of(parts["unet"], parts)
    scale = float(state["scale_factor"]) if "scale_factor" in state else params.get("scale_factor", 1.0)
    contents = {
        INDEX: configs.model_index(pipeline),
        "unet/config.json": configs.unet_config(params, parts["unet"]),
        "vae/config.json": configs.vae_config(params, parts["vae"], scale),
        "text_encoder/config.json": configs.text_config(params, parts["text_encoder"], is_open_clip),
        "scheduler/scheduler_config.json": configs.scheduler_config(params, parameterization, zero_snr),
    }
    if pipeline == UPSCALE:
        contents["low_res_scheduler/scheduler_config.json"] = configs.low_res_scheduler_config(params)
    if pipeline == DEPTH:
        contents["depth_estimator/config.json"] = depth
        preprocessor = configs.depth_preprocessor(depth["image_size"])
        contents["feature_extractor/preprocessor_config.json"] = preprocessor
    for name, content in contents.items():
        configs.write_json(folder / name, content)
    (folder / "tokenizer").mkdir()
    configs.write_tokenizer(folder / "tokenizer", is_open_clip)
    for part, weights in parts.items():
        stem = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
        write_safetensors(weights, folder / part / f"{stem}.safetensors", precision, report=report)


def folder_parts(
    state: State, config: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The weights of each network's folder in diffusers' names, and the depth estimator's config if any.

    InputError for a model that diffusers has no pipeline for.
    """
    from ldm.weights.families import identify

    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}

    unet, vae, clip, open_clip, midas = map(below, (UNET, VAE, CLIP, OPEN_CLIP, MIDAS))
    if not (unet and vae and (clip or open_clip)):
        raise InputError(f"diffusers has no pipeline for {identify(state)}: choose .safetensors or .ckpt")
    text = clip or names.open_clip_to_theirs(_used_blocks(open_clip, config))
    halves = {name: t for name, t in vae.items() if name.startswith(names.AUTOENCODER)}
    parts = {
        "unet": {name: t for name, t in names.unet_to_theirs(unet).items() if name not in unet},
        "vae": names.vae_to_theirs(halves),
        "text_encoder": {f"text_model.{name}": t for name, t in text.items() if TEXT_MODEL.match(name)},
    }
    if not midas:
        return parts, {}
    network = _depth_network(config)
    twins = {ours: [name.removeprefix("dpt.") for name in theirs] for ours, theirs in network.twins.items()}
    depth = network.network[0].dpt.config.to_dict() | {"architectures": ["DPTForDepthEstimation"]}
    return parts | {"depth_estimator": names.midas_to_theirs(midas, twins)}, depth


def _used_blocks(text: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """OpenCLIP's weights without the blocks behind the one whose states are read."""
    import torch

    from ldm.util import instantiate_from_config

    with torch.device("meta"):
        unused = set(instantiate_from_config(config["params"]["cond_stage_config"]).model.unused_weights)
    return {name: t for name, t in text.items() if name not in unused}


def _depth_network(config: Mapping[str, Any]) -> Any:
    """The model's depth estimator, without values."""
    import torch

    from ldm.util import instantiate_from_config

    with torch.device("meta"):
        return instantiate_from_config(config["params"]["depth_stage_config"])


def not_held(state: State, config: Mapping[str, Any]) -> dict[str, int]:
    """How many tensors of a model a diffusers folder cannot hold, by what they are.

    They are found by translating the names of what would be written back.
    """
    parts, _ = folder_parts(state, config)
    is_open_clip = any(name.startswith(OPEN_CLIP) for name in state)
    readers = {part.folder: part for part in (UNET_PART, VAE_PART, MIDAS_PART)}
    readers["text_encoder"] = OPEN_CLIP_PART if is_open_clip else CLIP_PART
    held = {"scale_factor", "v_pred", "ztsnr"}  # which the configs state
    for folder, weights in parts.items():
        outlines = {name: names.Outline("", tuple(t.shape)) for name, t in weights.items()}
        held |= translated(readers[folder], outlines).keys()
    counts: dict[str, int] = {}
    for name in state:
        if name not in held:
            what = next(what for pattern, what in NOT_HELD if re.fullmatch(pattern, name))
            counts[what] = counts.get(what, 0) + 1
    return counts
