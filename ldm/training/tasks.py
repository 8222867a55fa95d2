"""What is trained: the weights of each stage, their loss, and what a run shows of them.

Everything random about an example comes from generators of its own (ldm/training/random.py), so that a
resumed run continues as if it had never stopped, and several processes equal one.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.errors import InputError
from ldm.images.pixels import make_grid, to_uint8
from ldm.log import notice
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.sampling import Denoiser, ImageNoise, ImageSeeds, default_trajectory, sample
from ldm.sampling.denoiser import Conditioning
from ldm.sampling.schedule import zero_terminal_snr
from ldm.training.config import TrainingConfig
from ldm.training.data.config import DataConfig
from ldm.training.data.example import Source
from ldm.training.data.sources import open_sources
from ldm.training.export import export_weights
from ldm.training.families import concat_channels, conditions, has_channels
from ldm.training.linear import keep_blind, start_from_small_image
from ldm.training.objective import draw_timesteps, min_snr_weights
from ldm.training.random import normal, uniform
from ldm.weights.checkpoint import PARTS, unused_weights
from ldm.weights.header import let_go
from ldm.weights.prediction import markers

Batch = Mapping[str, Any]
FEW_LATENTS = (
    32 * 32
)  # below, a CPU computes the gradient of plain attention faster than that of fused attention


class Task(pl.LightningModule):
    """A model, its trained weights, and their loss.

    A batch is a mapping with `step` (int), `row` int64 [b] (the examples' positions in the step's global
    batch), `caption` (list of b texts), and `image` float32 [b, 3, h, w] in [-1, 1] or the posterior of its
    latents, `mean` and `std` [b, c, h/f, w/f]; where the model needs it, `mask` or `depth` [b, 1, h, w], or
    `concat` [b, c', h/f, w/f]. `data` is a DataConfig.

    Attributes: `figures` has the means of further quantities over the last batch, for the logs. `whole` says
    whether checkpoints have the frozen weights, too; `is_new`, whether `start` is to be called, as there are
    new parts.
    `method_options` are kept in checkpoints; `output_option` names a run's folder on the command line.
    """

    whole = True
    is_new = False
    method_options: Mapping[str, Any] = {}
    output_option = "--logdir"
    section: Mapping[str, Any] = {}  # the `model:` section, where a YAML file has one
    opened: tuple[Source, Source | None] | None = None  # what `sources` returns, if it was opened before

    def __init__(self, model: nn.Module, config: TrainingConfig, data: DataConfig | None = None):
        super().__init__()
        self.model, self.config, self.data = model, config, data
        self.figures: dict[str, Tensor] = {}
        self._check_dropout()
        model.eval().requires_grad_(False)
        for weight in self.trained().values():
            mapped = weight.data  # perhaps from a file, whose pages need not be held beside the copy
            weight.data = mapped.clone()
            let_go(mapped)
            weight.requires_grad_(True)

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimiser is given, by its name in a checkpoint."""
        return dict(self.model.named_parameters())

    def _check_dropout(self) -> None:
        """A notice for a part that is trained and whose config asks for dropout, which is not applied here.

        Its random numbers would be none of an example's own, so that a resumed run had another curve.
        """
        trained = {id(weight) for weight in self.trained().values()}
        for name, part in self.model.named_children():
            if trained.isdisjoint(map(id, part.parameters())):
                continue
            for layer in part.modules():
                if isinstance(layer, nn.Dropout) and layer.p:
                    notice(
                        f"model: the {PARTS.get(name, name)} has dropout {layer.p:g} in its config; training "
                        "here applies none"
                    )
                    break

    def names(self) -> dict[str, str]:
        """The checkpoint's name of each weight that it has, by the weight's name in this module."""
        by_identity = {id(weight): name for name, weight in self.trained().items()}
        return {
            name: by_identity.get(id(weight), name.removeprefix("model."))
            for name, weight in self.state_dict(keep_vars=True).items()
            if id(weight) in by_identity or (self.whole and name.startswith("model."))
        }

    def identity(self) -> dict[str, str]:
        """What else has to agree in a run that is resumed."""
        return {"task": type(self).__name__, "model": type(self.model).__name__}

    def sources(self, cache: Path) -> tuple[Source, Source | None]:
        """The examples to train on and those for validation; a folder keeps what is known about them."""
        return self.opened or open_sources(self.data, cache=cache)

    def start(self, batch: Batch) -> None:
        """What a new model takes from some of the data, before the first step."""

    def losses(self, batch: Batch) -> Tensor:
        """The weighted loss of each example, [b]."""
        raise NotImplementedError

    def training_step(self, batch: Batch, _: int = 0) -> Tensor:
        return self.losses(batch).mean()

    @torch.no_grad()
    def validation_losses(self, batch: Batch) -> Tensor:
        """The loss of each example of a validation batch, [b], with nothing random about it."""
        return self.losses(batch)

    def sample_grid(self, batch: Batch) -> np.ndarray:
        """Images uint8 [h, w, 3] that show what the weights have learned, for a validation batch."""
        raise NotImplementedError

    def export(self, folder: Path) -> list[Path]:
        """Write the files that a finished run leaves, while the model has its averaged weights."""
        return [export_weights(self.exported_state(), folder / "model.safetensors")]

    def markers(self) -> dict[str, Tensor]:
        """The empty tensors by which programs know what a checkpoint's network predicts."""
        return {}

    def exported_state(self) -> dict[str, Tensor]:
        """The weights by their names in a checkpoint. The loop sets `gathered` where they are sharded."""
        gathered = self.__dict__.get("gathered")
        return self.model.state_dict() if gathered is None else gathered

    def normal(self, batch: Batch, shape: tuple[int, ...], purpose: str) -> Tensor:
        """Standard normal numbers of each example, [b, *shape], on the device."""
        numbers = normal(self.config.seed, batch["step"], batch["row"].tolist(), shape, purpose)
        return numbers.to(self.device)

    def uniform(self, batch: Batch, purpose: str) -> Tensor:
        """A number in 0 <= u < 1 of each example, float64 [b], on the CPU."""
        return uniform(self.config.seed, batch["step"], batch["row"].tolist(), purpose)


class LatentDiffusionTask(Task):
    """Trains the UNet and, if `cond_stage_trainable`, the text encoder. Its parts can be overridden.

    `sampler` makes the samples.
    """

    model: LatentDiffusion
    sampler = "dpmpp_2m"

    def __init__(self, model: LatentDiffusion, config: TrainingConfig, data: DataConfig | None = None):
        last = {
            "drill_timesteps": config.drill_timesteps[1] - 1 if config.drills else 0,
            "validation_timesteps": max(config.validation_timesteps) if config.validation_every else 0,
        }
        for name, t in last.items():
            if t >= model.num_timesteps:
                raise InputError(
                    f"training: {name}: {t} is none of the model's timesteps, 0 … {model.num_timesteps - 1}"
                )
        if config.zero_terminal_snr:
            rescale_schedule(model)
        if data is not None:
            data.check_factor(model.first_stage_model.factor)
        super().__init__(model, config, data)
        self.unet.use_checkpoint = config.checkpointing
        if config.linear_start:
            keep_blind(self.unet)

    @property
    def unet(self) -> nn.Module:
        return self.model.model.diffusion_model

    def trained(self) -> dict[str, nn.Parameter]:
        parts = ["model.", *(["cond_stage_model."] if self.model.cond_stage_trainable else [])]
        spare = unused_weights(self.model)  # their gradient would be missing
        return {
            name: weight
            for name, weight in self.model.named_parameters()
            if name.startswith(tuple(parts)) and name not in spare
        }

    def identity(self) -> dict[str, str]:
        zero = {"zero_terminal_snr": "true"} if self.config.zero_terminal_snr else {}
        return super().identity() | {"parameterization": self.model.parameterization} | zero

    @torch.no_grad()
    def start(self, batch: Batch) -> None:
        """Scale the latents to unit variance; a new upscaler may start as a linear map."""
        mean, std = self.posterior(batch)
        if isinstance(self.model.scale_factor, Tensor):
            self.model.scale_factor.fill_(1.0 / (mean.var() + std.square().mean()).sqrt())
        if self.config.linear_start and not self.config.init:
            small = self.concat(batch)
            start_from_small_image(self.unet, small[:64].float(), self.model.scale_factor * mean[:64])

    @torch.no_grad()
    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, float32 [b, c, h/f, w/f], unscaled.

        Computed in float32, as those that are kept in files: bf16 would be off by more than the deviation.
        """
        if "mean" in batch:
            return batch["mean"].float(), batch["std"].float()
        with torch.autocast(self.device.type, enabled=False):
            posterior = self.model.encode_first_stage(batch["image"])
        return posterior.mean.float(), posterior.std.float()

    def latents(self, batch: Batch) -> Tensor:
        """A sample of each example's scaled latents, float32 [b, c, h/f, w/f]."""
        mean, std = self.posterior(batch)
        return self.model.scale_factor * (mean + std * self.normal(batch, mean.shape[1:], "posterior"))

    def noise(self, batch: Batch, shape: tuple[int, ...]) -> Tensor:
        """The noise to be predicted, [b, *shape]."""
        noise = self.normal(batch, shape, "noise")
        if self.config.noise_offset:
            noise = noise + self.config.noise_offset * self.normal(batch, (shape[0], 1, 1), "offset")
        return noise

    def whole_captions(self, batch: Batch) -> list[str]:
        """The examples' captions, none of them dropped, as validation and samples have them."""
        return list(batch["caption"])

    def captions(self, batch: Batch) -> list[str]:
        """The examples' captions, some of them replaced by the empty one."""
        dropped = (self.uniform(batch, "caption") < self.config.prompt_dropout).tolist()
        texts = self.whole_captions(batch)
        return ["" if drop else text for drop, text in zip(dropped, texts, strict=True)]

    def embed(self, captions: list[str]) -> Tensor:
        """Text embeddings [b, n, d], with gradients where the text encoder is trained."""
        trained = any(weight.requires_grad for weight in self.model.cond_stage_model.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self.model.get_learned_conditioning(captions)

    @torch.no_grad()
    def concat(self, batch: Batch) -> Tensor | None:
        """The UNet's further input channels [b, c, h/f, w/f], without noise; None if it has none.

        Computed in float32, as those that are kept in files.
        """
        if "concat" in batch:
            return batch["concat"].float()
        if not has_channels(self.model):
            return None
        size = self.latent_shape(batch)[1:]
        with torch.autocast(self.device.type, enabled=False):
            return concat_channels(
                self.model, batch["image"], batch, size, lambda *shape: self.normal(batch, shape, "concat")
            )

    def latent_shape(self, batch: Batch) -> tuple[int, int, int]:
        if "mean" in batch:
            return tuple(batch["mean"].shape[1:])
        factor = self.model.first_stage_model.factor
        return (self.model.channels, *(side // factor for side in batch["image"].shape[2:]))

    def conditioning(self, batch: Batch, context: Tensor) -> Conditioning:
        """What `apply_model` takes, from a batch and its text embeddings [b, n, d]."""
        return conditions(
            self.model,
            context,
            self.concat(batch),
            lambda: self.uniform(batch, "level"),
            lambda *shape: self.normal(batch, shape, "small"),
        )

    def losses(self, batch: Batch) -> Tensor:
        x0 = self.latents(batch)
        t = draw_timesteps(self.config, batch["step"], batch["row"].cpu(), self.model.num_timesteps)
        with self.attention(x0):
            cond = self.conditioning(batch, self.embed(self.captions(batch)))
            return self.denoising_losses(x0, cond, t.to(self.device), self.noise(batch, x0.shape[1:]))

    def denoising_losses(self, x0: Tensor, cond: Conditioning, t: Tensor, noise: Tensor) -> Tensor:
        """The weighted loss, [b], of latents x0 [b, c, h, w] that are noised to timesteps t [b]."""
        losses = self.model.p_losses(x0, cond, t, noise)
        if gamma := self.config.min_snr_gamma:
            losses = losses * min_snr_weights(
                self.model.alphas_cumprod, t, self.model.parameterization, gamma
            )
        return losses

    @torch.no_grad()
    def validation_losses(self, batch: Batch) -> Tensor:
        """The mean over fixed timesteps, with captions, without weights."""
        x0 = self.model.scale_factor * self.posterior(batch)[0]
        noise = self.normal(batch, x0.shape[1:], "noise")
        with self.attention(x0):
            cond = self.conditioning(batch, self.embed(self.whole_captions(batch)))
            times = (torch.full((len(x0),), t, device=x0.device) for t in self.config.validation_timesteps)
            return torch.stack([self.model.p_losses(x0, cond, t, noise) for t in times]).mean(dim=0)

    def attention(self, x: Tensor) -> Any:
        """The way to compute attention over latents x [b, c, h, w]."""
        few = x.device.type == "cpu" and x[0, 0].numel() < FEW_LATENTS
        few &= not self.config.checkpointing  # what is computed again for the gradients is so outside of this
        return sdpa_kernel(SDPBackend.MATH) if few else nullcontext()

    @torch.no_grad()
    def sample_grid(self, batch: Batch) -> np.ndarray:
        """Samples of the prompts, 8 in a row; masks and the like are those of the batch's examples."""
        prompts = list(self.config.sample_prompts or self.whole_captions(batch))
        further = self.concat(batch)
        if further is not None:
            batch = first(batch, len(prompts))
            prompts = prompts[: len(batch["row"])]
        shape = self.latent_shape(batch)
        noise = ImageNoise(
            [ImageSeeds(self.config.seed + k) for k in range(len(prompts))], shape, self.device
        )
        cond, uncond = (
            self.conditioning(batch, self.embed(texts)) for texts in (prompts, [""] * len(prompts))
        )
        denoiser = Denoiser(self.model, cond, uncond, scale=self.config.sample_scale)
        steps = default_trajectory(denoiser, self.sampler, self.config.sample_steps)
        images = self.model.decode_first_stage(sample(denoiser, self.sampler, steps, noise))
        return make_grid(list(to_uint8(images.float())), 8)

    def markers(self) -> dict[str, Tensor]:
        return markers(self.model.parameterization, self.config.zero_terminal_snr) if self.whole else {}

    def export(self, folder: Path) -> list[Path]:
        """The whole model, in half precision."""
        model = self.model
        path = folder / "model.safetensors"
        zero = self.config.zero_terminal_snr
        size = model.image_size * model.first_stage_model.factor
        return [export_weights(self.exported_state(), path, True, model.parameterization, zero, size)]


def first(batch: Batch, count: int) -> dict[str, Any]:
    """The first `count` examples of a batch."""
    return {
        name: value[:count] if isinstance(value, Tensor | list) else value for name, value in batch.items()
    }


@torch.no_grad()
def rescale_schedule(model: LatentDiffusion) -> None:
    """Shift and scale a v-model's noise schedule so that its end is nothing but noise.

    Lin et al. 2023, https://arxiv.org/abs/2305.08891, algorithm 1. InputError for an eps-model, whose output
    says nothing about the image there.
    """
    if model.parameterization != "v":
        raise InputError("training: zero_terminal_snr needs a model with parameterization: v")
    alphas = torch.from_numpy(zero_terminal_snr(model.alphas_cumprod.cpu().numpy())).to(model.device)
    model.alphas_cumprod.copy_(alphas)
    model.sqrt_alphas_cumprod.copy_(alphas.sqrt())
    model.sqrt_one_minus_alphas_cumprod.copy_((1 - alphas).sqrt())


class FirstStageTask(Task):
    """Trains an autoencoder: absolute and squared differences at four resolutions, and a little KL."""

    model: AutoencoderKL

    def __init__(self, model: AutoencoderKL, config: TrainingConfig, data: DataConfig | None = None):
        if data is not None:
            data.check_factor(model.factor)
        super().__init__(model, config, data)

    def trained(self) -> dict[str, nn.Parameter]:
        frozen = ("encoder.", "quant_conv.") if self.config.decoder_only else ()
        return {
            name: weight
            for name, weight in self.model.named_parameters()
            if not (frozen and name.startswith(frozen))
        }

    def losses(self, batch: Batch) -> Tensor:
        x = batch["image"].contiguous(memory_format=torch.channels_last)
        posterior = self.model.encode(x)
        noise = self.normal(batch, posterior.mean.shape[1:], "posterior")
        reconstruction = self.model.decode(posterior.sample(noise) + self.config.latent_noise * noise)
        error = reconstruction.float() - x
        losses = self.config.kl_weight * posterior.kl() / x[0].numel()
        for scale in (1, 2, 4, 8):  # coarse differences keep flat colours from settling on the median image
            coarse = F.avg_pool2d(error, scale)
            losses = losses + (coarse.abs() + coarse.square()).mean(dim=(1, 2, 3))
        self.figures["psnr"] = (-10 * torch.log10(error.square().mean(dim=(1, 2, 3)) / 4)).mean().detach()
        return losses

    @torch.no_grad()
    def sample_grid(self, batch: Batch) -> np.ndarray:
        """Images above their reconstructions."""
        x = batch["image"]
        y = self.model.decode(self.model.encode(x).mode())
        return make_grid([*to_uint8(x), *to_uint8(y.float())], len(x))


class DepthTask(Task):
    """Trains a depth estimator: the absolute difference to inverse depths, times `depth_scale`."""

    def truth(self, batch: Batch) -> Tensor:
        if "depth" not in batch:
            raise InputError("data: its examples have no depth maps, which a depth estimator is trained on")
        return self.config.depth_scale * batch["depth"]

    def losses(self, batch: Batch) -> Tensor:
        truth = self.truth(batch)
        depth = self.model(batch["image"]).float()
        return (depth - truth).abs().mean(dim=(1, 2, 3))

    @torch.no_grad()
    def sample_grid(self, batch: Batch) -> np.ndarray:
        """Images above their estimated and their true depths."""
        x, truth = batch["image"], self.truth(batch)
        maps = (2 * depth.float() / depth.amax() - 1 for depth in (self.model(x), truth))
        rows = [x, *(depth.expand(-1, 3, -1, -1) for depth in maps)]
        return make_grid([image for row in rows for image in to_uint8(row)], len(x))
