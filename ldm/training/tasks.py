"""What is trained: the loss of each stage, the random numbers of each step, and the averaged weights.

Everything random about step n comes from a generator seeded with (seed, n), so a resumed run continues as if
it had never stopped.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.errors import InputError
from ldm.images.pixels import make_grid, to_float, to_uint8
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import (
    LatentDepth2ImageDiffusion,
    LatentDiffusion,
    LatentUpscaleDiffusion,
)
from ldm.modules.diffusionmodules.openaimodel import timestep_embedding
from ldm.modules.ema import LitEma
from ldm.sampling import Denoiser, ImageNoise, ImageSeeds, default_trajectory, sample
from ldm.scenes.captions import caption
from ldm.scenes.scene import held_out_scenes
from ldm.training.config import TrainingConfig
from ldm.training.dataset import random_crops, render_scenes
from ldm.training.families import concat_channels, conditions, deep, example_of
from ldm.training.latents import cached_latents
from ldm.training.linear import start_from_small_image, start_linear
from ldm.weights.checkpoint import load_weights, read_state_dict

DEPTH_SCALE = 10.0  # of a render's inverse depths, 0.3 to 0.55, in the depth estimator's output


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def stratified(count: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """A random number from each of `count` equal parts of low <= t < high, float32 [count].

    Their mean has less variance than that of independent numbers.
    """
    numbers = low + (torch.arange(count) + torch.rand(count, generator=generator)) * (high - low) / count
    # The sum in the last part can round up to `high`, which is no timestep any more.
    below_high = torch.nextafter(torch.tensor(float(high)), torch.tensor(float(low)))
    return numbers.clamp(max=below_high)


class Task(pl.LightningModule):
    """What both stages share: optimiser, learning-rate schedule, weight averages."""

    def __init__(self, model: torch.nn.Module, config: TrainingConfig):
        super().__init__()
        self.model = model
        self.config = config
        self.ema = LitEma(model, config.ema_decay)

    def train_dataloader(self) -> range:
        return range(self.config.steps)  # a batch is drawn by its step's generator

    def configure_optimizers(self) -> dict[str, Any]:
        weights = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            weights, lr=self.config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        warmup, steps = self.config.warmup, self.config.steps

        def factor(step: int) -> float:
            rising = (step + 1) / warmup if warmup else 1.0
            return min(rising, 0.5 + 0.5 * math.cos(math.pi * step / steps))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        if self.global_step:  # the first call comes before any update
            self.ema(self.model)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model has its averaged weights inside the block, and the trained ones again after it."""
        self.ema.store(self.model)
        self.ema.copy_to(self.model)
        try:
            yield
        finally:
            self.ema.restore(self.model)

    def averaged_state(self) -> dict[str, torch.Tensor]:
        """A copy of the model's state dict with averaged weights."""
        with self.averaged_weights():
            return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}


class FirstStageTask(Task):
    """Trains an autoencoder: absolute and squared differences at four resolutions, and a little KL."""

    model: AutoencoderKL

    def __init__(self, model: AutoencoderKL, config: TrainingConfig):
        check_image_size(config, model)
        if config.linear_start:
            start_linear(model)
        if config.init:
            load_weights(model, _read(config, "init"), path=config.init, dtype=torch.float32)
        if config.decoder_only:
            model.encoder.requires_grad_(False)
            model.quant_conv.requires_grad_(False)
        super().__init__(model, config)
        self.images, _, _ = render_scenes(config)

    def training_step(self, batch: int, _: int) -> torch.Tensor:
        generator = step_generator(self.config.seed, self.global_step)
        index = torch.randint(len(self.images), (self.config.batch_size,), generator=generator)
        images = random_crops(self.images[index], self.config.crop, generator)
        x = to_float(images).to(self.device, memory_format=torch.channels_last)
        size = x.shape[-1] // self.model.factor
        noise = torch.randn(len(x), self.model.post_quant_conv.in_channels, size, size, generator=generator)
        posterior = self.model.encode(x)
        reconstruction = self.model.decode(posterior.sample(noise) + self.config.latent_noise * noise)
        error = reconstruction.float() - x
        loss = self.config.kl_weight * posterior.kl().mean() / x[0].numel()
        for scale in (1, 2, 4, 8):  # coarse differences keep flat colours from settling on the median image
            coarse = F.avg_pool2d(error, scale)
            loss = loss + coarse.abs().mean() + coarse.square().mean()
        self.log("psnr", -10 * torch.log10(error.square().mean() / 4), prog_bar=True)
        self.log("loss", loss)
        return loss

    @torch.no_grad()
    def sample_grid(self) -> np.ndarray:
        """Originals above their reconstructions, from the weights as they are."""
        x = to_float(self.images[:16]).to(self.device)
        y = self.model.decode(self.model.encode(x).mode())
        return make_grid([*to_uint8(x), *to_uint8(y)], len(x))


class LatentDiffusionTask(Task):
    """Trains the UNet and, if `cond_stage_trainable`, the text encoder on latents encoded once."""

    model: LatentDiffusion

    def __init__(self, model: LatentDiffusion, config: TrainingConfig, cache: Path):
        check_image_size(config, model.first_stage_model)
        last = config.drill_timesteps[1]
        if config.drill and last > model.num_timesteps:
            raise InputError(f"training: drill_timesteps must end by {model.num_timesteps}, not {last}")
        load_start(model, config)
        data = cached_latents(model, config, cache)
        mean, std, concat = data["mean"], data["std"], data.get("concat")
        if isinstance(model.scale_factor, torch.Tensor) and not config.init:  # latents of unit variance
            variance = mean.float().var() + std.float().square().mean()
            model.scale_factor.fill_(1.0 / variance.sqrt())
        if config.linear_start:
            if not isinstance(model, LatentUpscaleDiffusion):
                raise InputError(f"training: linear_start: a {type(model).__name__} is given no small image")
            latents = model.scale_factor * mean[:64].float()
            start_from_small_image(model.model.diffusion_model, concat[:64].float(), latents)
        super().__init__(model, config)
        self.mean, self.std, self.concat, self.tokens = mean, std, concat, data["tokens"]
        tokenizer = model.cond_stage_model.tokenizer
        self.empty = tokenizer([""])
        drilled = torch.tensor([tokenizer.encode(word)[0] for word in config.drill], dtype=torch.int32)
        self.drill = torch.isin(self.tokens, drilled).any(dim=1).nonzero()[:, 0]
        if config.drill and not len(self.drill):
            raise InputError(f"drill: no caption has one of the words {', '.join(config.drill)}")

    def training_step(self, batch: int, _: int) -> torch.Tensor:
        generator = step_generator(self.config.seed, self.global_step)
        count = self.config.batch_size
        index = torch.randint(len(self.mean), (count,), generator=generator)
        drilled = round(self.config.drill_share * count) if self.config.drills else 0
        if self.config.drill:
            index[:drilled] = self.drill[index[:drilled] % len(self.drill)]
        mean, std = self.mean[index].float(), self.std[index].float()
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        concat = None if self.concat is None else self.concat[index].float()
        if self.config.crop:
            latents, concat = self.cropped(latents, concat, generator)
        x0 = latents.to(self.device) * self.model.scale_factor
        noise = torch.randn(x0.shape, generator=generator).to(self.device)
        t = torch.cat(
            [
                stratified(drilled, *self.config.drill_timesteps, generator),
                stratified(count - drilled, 0, self.model.num_timesteps, generator),
            ]
        )
        dropped = torch.rand(count, 1, generator=generator) < self.config.prompt_dropout
        tokens = torch.where(dropped, self.empty, self.tokens[index].long()).to(self.device)
        # On a CPU the gradient of fused attention over so few tokens would take half of the step.
        with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext():
            context = self.model.cond_stage_model.forward_tokens(tokens)
            concat = None if concat is None else concat.to(self.device)
            cond = conditions(self.model, context, concat, generator)
            loss = self.model.p_losses(x0, cond, t.long().to(self.device), noise).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def cropped(
        self, latents: torch.Tensor, concat: torch.Tensor | None, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same random part of latents and further channels, both [b, …, h, w]."""
        both = latents if concat is None else torch.cat([latents, concat], dim=1)
        side = self.config.crop // self.model.first_stage_model.factor
        both = random_crops(both.permute(0, 2, 3, 1), side, generator).permute(0, 3, 1, 2)
        latents, rest = both.split([latents.shape[1], both.shape[1] - latents.shape[1]], dim=1)
        return latents, None if concat is None else rest

    @torch.no_grad()
    def sample_grid(self) -> np.ndarray:
        """Samples of held-out scenes, from averaged weights."""
        rng = np.random.default_rng(self.config.seed)
        pairs = 24 if self.config.image_size <= 64 else 4
        scenes = held_out_scenes(rng, 8, pairs=False) + held_out_scenes(rng, pairs, pairs=True)
        prompts = [caption(scene) for scene in scenes]
        side = self.config.image_size // self.model.first_stage_model.factor
        shape = (self.model.channels, side, side)
        noise = ImageNoise([ImageSeeds(k) for k in range(len(prompts))], shape, self.device)
        concat = None
        if self.concat is not None:
            examples = [example_of(self.model)(scene, rng, self.config.image_size) for scene in scenes]
            x = to_float([image for image, _, _ in examples]).to(self.device)
            given = [one for _, _, one in examples if one is not None]
            maps = torch.from_numpy(np.stack(given))[:, None].to(self.device) if given else None
            generator = step_generator(self.config.seed, 0)
            concat = concat_channels(self.model, x, maps, (side, side), generator)
        with self.averaged_weights():
            cond, uncond = (
                conditions(
                    self.model,
                    self.model.get_learned_conditioning(p),
                    concat,
                    step_generator(self.config.seed, 0),  # equal noise in both
                )
                for p in (prompts, [""] * len(prompts))
            )
            denoiser = Denoiser(self.model, cond, uncond, scale=4.0 if concat is None else 2.0)
            latents = sample(denoiser, "dpmpp_2m", default_trajectory(denoiser, "dpmpp_2m", 20), noise)
            images = self.model.decode_first_stage(latents)
        return make_grid(list(to_uint8(images)), 8)


class DepthTask(Task):
    """Trains a depth estimator on renders: the absolute difference to their inverse depths."""

    def __init__(self, model: torch.nn.Module, config: TrainingConfig):
        super().__init__(model, config)
        self.images, _, self.maps = render_scenes(config, deep)

    def training_step(self, batch: int, _: int) -> torch.Tensor:
        generator = step_generator(self.config.seed, self.global_step)
        index = torch.randint(len(self.images), (self.config.batch_size,), generator=generator)
        depth = self.model(to_float(self.images[index]).to(self.device))
        loss = (depth.float() - DEPTH_SCALE * self.maps[index].to(self.device)).abs().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def sample_grid(self) -> np.ndarray:
        """Images above their estimated and their true depths, from the weights as they are."""
        x = to_float(self.images[:16]).to(self.device)
        truth = DEPTH_SCALE * self.maps[:16].to(self.device)
        maps = (2 * depth.float() / depth.amax() - 1 for depth in (self.model(x), truth))
        rows = [x, *(depth.expand(-1, 3, -1, -1) for depth in maps)]
        return make_grid([image for row in rows for image in to_uint8(row)], len(x))


def load_start(model: LatentDiffusion, config: TrainingConfig) -> None:
    """Load what the second stage starts from: a whole model (`init`), or the trained parts that are given.

    The UNet may have more input channels than that of `init`: their weights are zero, so that they change
    nothing at first. A depth estimator comes from its own file or stays as built. The embeddings of an
    upscaler's noise levels are those of timesteps at first, so that neighbouring levels begin alike.
    """
    if config.init:
        state = _grown(_read(config, "init"), model)
        depth = {name: t for name, t in model.state_dict().items() if name.startswith("depth_model.")}
        load_weights(model, depth | state, path=config.init, dtype=torch.float32)
    elif config.first_stage:
        state = _read(config, "first_stage")
        load_weights(model.first_stage_model, state, path=config.first_stage, dtype=torch.float32)
        if isinstance(model, LatentUpscaleDiffusion):
            embedding = model.model.diffusion_model.label_emb.weight
            embedding.data.copy_(timestep_embedding(torch.arange(len(embedding)), embedding.shape[1]))
    else:
        raise InputError("training: a second stage needs the weights of its first_stage, or those of init")
    if config.text_encoder:
        prefix = "cond_stage_model."
        state = _read(config, "text_encoder")
        state = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        load_weights(model.cond_stage_model, state, path=config.text_encoder, dtype=torch.float32)
    if config.depth_model:
        if not isinstance(model, LatentDepth2ImageDiffusion):
            raise InputError(f"training: depth_model: a {type(model).__name__} has no depth estimator")
        state = _read(config, "depth_model")
        load_weights(model.depth_model, state, path=config.depth_model, dtype=torch.float32)


def _read(config: TrainingConfig, name: str) -> dict[str, torch.Tensor]:
    path = getattr(config, name)
    if not os.path.exists(path):
        raise InputError(f"training: {name}: there is no file {path}")
    # The tensors are copied, for training must not write into the mapped file.
    return {name: tensor.clone() for name, tensor in read_state_dict(path).items()}


def _grown(state: dict[str, torch.Tensor], model: LatentDiffusion) -> dict[str, torch.Tensor]:
    """The weights of a model whose first convolution takes fewer channels, with zeros for the others."""
    name = "model.diffusion_model.input_blocks.0.0.weight"
    wanted, given = model.state_dict()[name], state.get(name)
    if given is None or given.shape[1] >= wanted.shape[1]:
        return state
    return state | {name: F.pad(given, (0, 0, 0, 0, 0, wanted.shape[1] - given.shape[1]))}


def check_image_size(config: TrainingConfig, first_stage: AutoencoderKL) -> None:
    for name in ("image_size", "crop"):
        size = getattr(config, name)
        if size % first_stage.factor:
            raise InputError(f"training: {name} must be a multiple of {first_stage.factor}, not {size}")
    if config.crop > config.image_size:
        raise InputError(f"training: crop must be at most image_size, {config.image_size}, not {config.crop}")
