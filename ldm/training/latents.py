"""The training set of the second stage: all images, encoded once and kept in a file."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from ldm.images.pixels import to_float
from ldm.log import notice
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.scenes import scene
from ldm.training.config import TrainingConfig
from ldm.training.dataset import render_scenes
from ldm.training.families import concat_channels, example_of
from ldm.training.files import write_tensors
from ldm.weights.files import exists
from ldm.weights.loading import BUNDLED_CONFIG, BUNDLED_WEIGHTS, find, load_model, read_config


def cached_latents(model: LatentDiffusion, config: TrainingConfig, path: Path) -> dict[str, torch.Tensor]:
    """What `encode_scenes` returns, from the file `path` if that was made with the same `dependencies`.

    Otherwise the scenes are encoded, and the file is written anew.
    """
    wanted = dependencies(model, config)
    if exists(path):
        try:
            with safe_open(path, "pt") as file:
                found = file.metadata() or {}
                if found == wanted:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            why = "another " + ", ".join(name for name in wanted if found.get(name) != wanted[name])
        except (OSError, SafetensorError) as error:
            why = str(error)
        notice(f"the latents in {path} cannot be used ({why}): encoding the scenes again")
    latents = encode_scenes(model, config)
    write_tensors(latents, path, wanted)
    return latents


def dependencies(model: LatentDiffusion, config: TrainingConfig) -> dict[str, str]:
    """Everything that the latents depend on, by name."""
    return {
        "first stage": fingerprint(model.first_stage_model),
        "seed": str(config.seed),
        "images": str(config.images),
        "image_size": str(config.image_size),
        "soften": str(config.soften),
        "model": type(model).__name__,
        "version of the scenes": str(scene.VERSION),
    }


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of all names, shapes and values of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def encode_scenes(model: LatentDiffusion, config: TrainingConfig) -> dict[str, torch.Tensor]:
    """`mean` and `std` of the latents, float16 [n, c, h/8, w/8]; `tokens` of the captions, int32 [n, 77].

    For a model whose UNet has further input channels also these: `concat`, float16 [n, …, h/8, w/8].
    """
    images, captions, maps = render_scenes(config, example_of(model))
    generator = torch.Generator().manual_seed(config.seed)
    soft = bundled_first_stage(model.device) if config.soften else None
    data: dict[str, list[torch.Tensor]] = {"mean": [], "std": [], "concat": []}
    count = max(1, 64 * 64**2 // config.image_size**2)
    for i in tqdm(range(0, len(images), count), "encoding scenes"):
        x = to_float(images[i : i + count]).to(model.device, memory_format=torch.channels_last)
        given = None if maps is None else maps[i : i + count].to(model.device)
        with torch.autocast(x.device.type, torch.bfloat16):  # as precise as the training itself
            posterior = model.encode_first_stage(x)
            size = tuple(posterior.mean.shape[-2:])
            concat = concat_channels(model, x, given, size, generator)
            if soft is not None:
                softened = torch.rand(len(x), generator=generator) < config.soften
                concat[softened] = soft.decode(soft.encode(concat[softened]).mode()).to(concat.dtype)
        data["mean"].append(posterior.mean.half().cpu())
        data["std"].append(posterior.std.half().cpu())
        if concat is not None:
            data["concat"].append(concat.half().cpu())
    encoded = {name: torch.cat(parts).contiguous() for name, parts in data.items() if parts}
    return encoded | {"tokens": model.cond_stage_model.tokenizer(captions).to(torch.int32)}


def bundled_first_stage(device: torch.device) -> AutoencoderKL:
    """The first stage of the bundled 64x64 model: an upscaler is to know its soft images."""
    config = read_config(find(BUNDLED_CONFIG))
    return load_model(config, find(BUNDLED_WEIGHTS)).first_stage_model.to(device)
