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
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.ema import LitEma
from ldm.sampling import Denoiser, ImageNoise, ImageSeeds, default_trajectory, sample
from ldm.scenes.captions import caption
from ldm.scenes.scene import held_out_scenes
from ldm.training.config import TrainingConfig
from ldm.training.dataset import render_scenes
from ldm.training.latents import cached_latents
from ldm.weights.checkpoint import load_weights, read_state_dict


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
        super().__init__(model, config)
        check_image_size(config, model)
        self.images, _ = render_scenes(config)

    def training_step(self, batch: int, _: int) -> torch.Tensor:
        generator = step_generator(self.config.seed, self.global_step)
        index = torch.randint(len(self.images), (self.config.batch_size,), generator=generator)
        x = to_float(self.images[index]).to(self.device, memory_format=torch.channels_last)
        size = self.config.image_size // self.model.factor
        noise = torch.randn(len(x), self.model.post_quant_conv.in_channels, size, size, generator=generator)
        reconstruction, posterior = self.model(x, noise)
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
        super().__init__(model, config)
        data = cached_latents(model, config, cache)
        self.mean, self.std, self.tokens = data["mean"], data["std"], data["tokens"]
        if isinstance(model.scale_factor, torch.Tensor) and not config.init:  # latents of unit variance
            variance = self.mean.float().var() + self.std.float().square().mean()
            model.scale_factor.fill_(1.0 / variance.sqrt())
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
        drilled = round(self.config.drill_share * count) if self.config.drill else 0
        if drilled:
            index[:drilled] = self.drill[index[:drilled] % len(self.drill)]
        mean, std = self.mean[index].float(), self.std[index].float()
        latents = mean + std * torch.randn(mean.shape, generator=generator)
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
            cond = self.model.cond_stage_model.forward_tokens(tokens)
            loss = self.model.p_losses(x0, cond, t.long().to(self.device), noise).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def sample_grid(self) -> np.ndarray:
        """Samples of held-out scenes, from averaged weights."""
        rng = np.random.default_rng(self.config.seed)
        scenes = held_out_scenes(rng, 8, pairs=False) + held_out_scenes(rng, 24, pairs=True)
        prompts = [caption(scene) for scene in scenes]
        size = self.config.image_size // self.model.first_stage_model.factor
        shape = (self.model.channels, size, size)
        noise = ImageNoise([ImageSeeds(k) for k in range(len(prompts))], shape, self.device)
        with self.averaged_weights():
            cond, uncond = (self.model.get_learned_conditioning(p) for p in (prompts, [""] * len(prompts)))
            denoiser = Denoiser(self.model, cond, uncond, scale=4.0)
            latents = sample(denoiser, "dpmpp_2m", default_trajectory(denoiser, "dpmpp_2m", 20), noise)
            images = self.model.decode_first_stage(latents)
        return make_grid(list(to_uint8(images)), 8)


def load_start(model: LatentDiffusion, config: TrainingConfig) -> None:
    """Load what the second stage starts from: the whole model of `init`, or just the first stage."""
    name, part = ("init", model) if config.init else ("first_stage", model.first_stage_model)
    path = getattr(config, name)
    if path is None:
        raise InputError("training: a second stage needs the weights of its first_stage, or those of init")
    if not os.path.exists(path):
        raise InputError(f"training: {name}: there is no file {path}")
    # The tensors are copied, for training must not write into the mapped file.
    state = {name: tensor.clone() for name, tensor in read_state_dict(path).items()}
    load_weights(part, state, path=path, dtype=torch.float32)


def check_image_size(config: TrainingConfig, first_stage: AutoencoderKL) -> None:
    if config.image_size % first_stage.factor:
        raise InputError(
            f"training: image_size must be a multiple of {first_stage.factor}, not {config.image_size}"
        )
