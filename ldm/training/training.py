"""Training of both stages with pytorch-lightning, on rendered scenes.

Everything random about step n comes from a generator seeded with (seed, n), so a resumed run continues as if
it had never stopped.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ldm.errors import InputError
from ldm.images.pixels import make_grid, to_float, to_uint8
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.ema import LitEma
from ldm.sampling import Denoiser, default_trajectory, sample
from ldm.sampling.noise import ImageNoise
from ldm.scenes import scenes
from ldm.util import check_params
from ldm.weights.checkpoint import load_weights, read_state_dict


@dataclass(frozen=True)
class TrainingConfig:
    """The `training:` section of a YAML file."""

    steps: int
    batch_size: int
    learning_rate: float
    images: int  # size of the training set: rendered (and for the second stage encoded) once
    image_size: int  # pixels
    init: str | None = None  # checkpoint of the whole model to start from
    first_stage: str | None = None  # second stage without init: safetensors file of the trained first stage
    kl_weight: float = 1e-3  # first stage only: of the KL divergence in nats per pixel value
    prompt_dropout: float = 0.1  # second stage only: share of captions replaced by the empty prompt
    warmup: int = 500  # steps over which the learning rate rises; then it falls along a cosine to 0
    drill: tuple[str, ...] = ()  # second stage: words, one of which `drill_share` of the captions have
    drill_share: float = 0.7
    drill_timesteps: tuple[int, int] = (0, 1000)  # at which these are trained; the others at all of them
    ema_decay: float = 0.999
    seed: int = 0
    checkpoint_every: int = 500
    sample_every: int = 1000


def training_config(section: Mapping[str, Any]) -> TrainingConfig:
    """The `training:` section of a YAML file, its names checked."""
    check_params(TrainingConfig, section)
    return TrainingConfig(**section)


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def stratified(count: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """A random number from each of `count` equal parts of low … high: less variance than independent ones."""
    return low + (torch.arange(count) + torch.rand(count, generator=generator)) * (high - low) / count


def render_scenes(config: TrainingConfig) -> tuple[torch.Tensor, list[str]]:
    """The training set: uint8 [images, size, size, 3] and a caption for each."""
    images = np.empty((config.images, config.image_size, config.image_size, 3), np.uint8)
    captions = []
    rendered = islice(scenes.training_scenes(config.seed, config.image_size), config.images)
    for i, (image, caption) in enumerate(tqdm(rendered, "rendering scenes", config.images)):
        images[i] = image
        captions.append(caption)
    return torch.from_numpy(images), captions


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
            return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        if self.global_step:  # the first call comes before any update
            self.ema(self.model)

    def averaged_state(self) -> dict[str, torch.Tensor]:
        """The model's state dict with averaged weights."""
        self.ema.store(self.model)
        self.ema.copy_to(self.model)
        state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self.ema.restore(self.model)
        return state


class FirstStageTask(Task):
    """Trains an autoencoder: absolute and squared differences at four resolutions, and a little KL."""

    model: AutoencoderKL

    def __init__(self, model: AutoencoderKL, config: TrainingConfig):
        super().__init__(model, config)
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
        for scale in (1, 2, 4, 8):  # coarse differences keep flat colours from settling on the median picture
            coarse = F.avg_pool2d(error, scale)
            loss = loss + coarse.abs().mean() + coarse.square().mean()
        self.log("psnr", -10 * torch.log10(error.square().mean() / 4), prog_bar=True)
        self.log("loss", loss)
        return loss

    @torch.no_grad()
    def pictures(self) -> np.ndarray:
        """Originals above their reconstructions."""
        x = to_float(self.images[:16]).to(self.device)
        y = self.model.decode(self.model.encode(x).mode())
        return make_grid([*to_uint8(x), *to_uint8(y)], 16)


class LatentDiffusionTask(Task):
    """Trains the UNet and, if `cond_stage_trainable`, the text encoder on latents encoded once."""

    model: LatentDiffusion

    def __init__(self, model: LatentDiffusion, config: TrainingConfig, cache: Path):
        if config.init:
            # copies: training must not write into the mapped file
            state = {name: tensor.clone() for name, tensor in read_state_dict(config.init).items()}
            load_weights(model, state, path=config.init, dtype=torch.float32)
        else:
            model.first_stage_model.load_state_dict(load_file(config.first_stage))
        super().__init__(model, config)
        if not cache.exists():
            save_file(encode_scenes(model, config), cache)
        data = load_file(cache)
        self.mean, self.std, self.tokens = data["mean"], data["std"], data["tokens"]
        if isinstance(model.scale_factor, torch.Tensor) and not config.init:  # latents of unit variance
            model.scale_factor.fill_(
                1.0 / (self.mean.float().var() + self.std.float().square().mean()).sqrt()
            )
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
        x0 = (mean + std * torch.randn(mean.shape, generator=generator)).to(
            self.device
        ) * self.model.scale_factor
        noise = torch.randn(x0.shape, generator=generator).to(self.device)
        t = torch.cat(
            [
                stratified(drilled, *self.config.drill_timesteps, generator),
                stratified(count - drilled, 0, self.model.num_timesteps, generator),
            ]
        )
        dropped = torch.rand(count, 1, generator=generator) < self.config.prompt_dropout
        tokens = torch.where(dropped, self.empty, self.tokens[index].long()).to(self.device)
        # the gradient of fused attention over so few tokens is slow on a CPU: half of the step
        with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext():
            cond = self.model.cond_stage_model.forward_tokens(tokens)
            loss = self.model.p_losses(x0, cond, t.long().to(self.device), noise).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def pictures(self) -> np.ndarray:
        """Samples of held-out scenes, from averaged weights."""
        rng = np.random.default_rng(self.config.seed)
        unseen = scenes.held_out_scenes(rng, 8, pairs=False) + scenes.held_out_scenes(rng, 24, pairs=True)
        prompts = [scenes.caption(scene) for scene in unseen]
        size = self.config.image_size // self.model.first_stage_model.factor
        shape = (self.model.channels, size, size)
        self.ema.store(self.model)
        self.ema.copy_to(self.model)
        cond, uncond = (self.model.get_learned_conditioning(p) for p in (prompts, [""] * len(prompts)))
        denoiser = Denoiser(self.model, cond, uncond, scale=4.0)
        noise = ImageNoise(list(range(len(prompts))), shape, self.device)
        latents = sample(denoiser, "dpmpp_2m", default_trajectory(denoiser, "dpmpp_2m", 20), noise)
        images = self.model.decode_first_stage(latents)
        self.ema.restore(self.model)
        return make_grid(list(to_uint8(images)), 8)


@torch.no_grad()
def encode_scenes(model: LatentDiffusion, config: TrainingConfig) -> dict[str, torch.Tensor]:
    """Mean and deviation of all latents, float16 [n, c, h/8, w/8], and the captions' tokens [n, 77]."""
    images, captions = render_scenes(config)
    means, deviations = [], []
    for i in tqdm(range(0, len(images), 64), "encoding scenes"):
        x = to_float(images[i : i + 64]).to(model.device, memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16):  # as precise as the training itself
            posterior = model.encode_first_stage(x)
        means.append(posterior.mean.half().cpu())
        deviations.append(posterior.std.half().cpu())
    return {
        "mean": torch.cat(means).contiguous(),
        "std": torch.cat(deviations).contiguous(),
        "tokens": model.cond_stage_model.tokenizer(captions).to(torch.int32),
    }


class PictureLog(Callback):
    """Saves the task's pictures every `every` steps."""

    def __init__(self, folder: Path, every: int):
        self.folder, self.every = folder, every

    def on_train_batch_end(self, trainer: pl.Trainer, task: Task, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            task.eval()
            Image.fromarray(task.pictures()).save(self.folder / f"step-{trainer.global_step:06}.png")
            task.train()


def train(task: Task, folder: Path, stop_at: int) -> None:
    """Run a task up to a step, from its last checkpoint in `folder` if there is one."""
    config = task.config
    last = folder / "last.ckpt"
    trainer = pl.Trainer(
        max_steps=stop_at,
        precision="bf16-mixed",
        devices=1,
        gradient_clip_val=1.0,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=min(50, stop_at),
        callbacks=[
            ModelCheckpoint(
                folder, save_last=True, save_top_k=0, every_n_train_steps=config.checkpoint_every
            ),
            PictureLog(folder, config.sample_every),
            TQDMProgressBar(),
        ],
        enable_model_summary=False,
    )
    trainer.fit(task, ckpt_path=last if last.exists() else None, weights_only=False)
    trainer.save_checkpoint(last)


def save_weights(task: Task, path: Path) -> Path:
    """Write the averaged weights: a first stage as it is, the whole model in half precision."""
    state = task.averaged_state()
    if isinstance(task, LatentDiffusionTask):
        # scalars such as the latent scale stay as they are
        state = {name: t.half() if t.ndim and t.is_floating_point() else t for name, t in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path
