"""From prompts to pictures, batch by batch: what every sampling script does between loading and saving."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ldm.images import finite_images, to_uint8
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.prompts import Batch
from ldm.sampling import Denoiser, sample
from ldm.sampling.noise import noise_source


@dataclass(frozen=True)
class Settings:
    """What a run samples with, the same for all its batches."""

    height: int  # pixels
    width: int
    sampler: str = "ddim"
    steps: int = 50
    scale: float = 7.5
    eta: float = 0.0
    negative_prompt: str = ""
    seed: int = 42
    rng: str = "image"
    fixed_code: bool = False
    autocast: bool = False  # half precision on a GPU; a CPU always computes in the weights' precision


def generate(
    model: LatentDiffusion,
    batches: Sequence[Batch],
    settings: Settings,
    on_step: Callable[[int], None] = lambda images: None,
) -> Iterator[tuple[Batch, list[np.ndarray | None]]]:
    """Each batch with its pictures, uint8 [H, W, 3] in the prompts' order; None is one that came out as NaN.

    `on_step` is told after every step how many images took it. A prompt is encoded once, not once a batch:
    the last 2,048 embeddings are kept (0.2 MB each for v1).
    """
    factor = model.first_stage_model.factor
    shape = (model.channels, settings.height // factor, settings.width // factor)
    # --fixed_code draws the start of the first batch: none is larger
    noise_of = noise_source(
        settings.rng, settings.seed, shape, settings.fixed_code, model.device, len(batches[0])
    )
    embed = lru_cache(maxsize=2048)(lambda prompt: model.get_learned_conditioning([prompt]))

    autocast = torch.autocast(model.device.type, enabled=settings.autocast and model.device.type != "cpu")
    for batch in batches:
        with torch.inference_mode(), autocast:
            cond = torch.cat([embed(prompt) for prompt in batch.prompts])
            uncond = embed(settings.negative_prompt) if settings.scale != 1.0 else None
            latents = sample(
                Denoiser(model, cond, uncond, settings.scale),
                settings.sampler,
                settings.steps,
                noise_of(batch),
                eta=settings.eta,
                callback=lambda step, x0, batch=batch: on_step(len(batch)),
            )
            decoded = model.decode_first_stage(latents)
            pixels = to_uint8(decoded)
            finite = finite_images(decoded)
        yield batch, [image if ok else None for image, ok in zip(pixels, finite, strict=True)]
