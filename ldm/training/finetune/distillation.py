"""A LoRA with which a model needs few steps, and no guidance: what it makes in many steps is taught to it.

Latent consistency (Luo et al. 2023, https://arxiv.org/abs/2311.05556) for `--sampler lcm`, and trajectory
consistency (Zheng et al. 2024, https://arxiv.org/abs/2402.19159) for `tcd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipeline.pipeline import SCALE
from ldm.sampling.denoiser import Conditioning
from ldm.training.finetune import lora
from ldm.training.finetune.lora import LoraTask
from ldm.training.finetune.methods import Distillation, Sampling, Setup
from ldm.training.tasks import Batch
from ldm.weights.loading import advised_scale

LEVELS = 50  # noise levels of the trajectories that are taught; the schedule "lcm" visits the same
HUBER = 1e-3  # differences far below it count squared, larger ones as they are
NO_NOISE = -1  # stands for the timestep of images


class DistillationTask(LoraTask):
    """Trains a LoRA so that every level of a trajectory leads to the same end in one step.

    The trajectory is that of the model without the LoRA at the guidance scale `scale`: a step of DDIM leads
    from a level to the one below. From both, the model with the LoRA goes to the same end: to the image for
    "lcm", for "tcd" to any level below. The further down it began, the better it knows the end, so that the
    upper prediction learns from the lower one.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        config: Any,
        data: Any = None,
        *,
        sampler: str = "lcm",
        scale: float = SCALE,
        **options: Any,
    ):
        super().__init__(model, config, data, **options)
        self.sampler, self.scale = sampler, scale
        self.advice = f"--sampler {sampler} --steps 4 --scale 1"
        alphas = torch.cat([torch.ones(1), model.alphas_cumprod.double().cpu()])  # of NO_NOISE, 0, 1, …
        self.register_buffer("signal", alphas.sqrt().float(), persistent=False)
        self.register_buffer("spread", (1 - alphas).sqrt().float(), persistent=False)

    def losses(self, batch: Batch) -> Tensor:
        x0 = self.latents(batch)
        t, below, end = (level.to(self.device) for level in self.levels(batch))
        x = self.model.q_sample(x0, t, self.noise(batch, x0.shape[1:]))
        with self.attention(x0):
            texts = self.captions(batch)
            cond, uncond = (self.conditioning(batch, self.embed(each)) for each in (texts, [""] * len(texts)))
            with torch.no_grad():
                with self.model.lora.left_out():
                    plain = self.predict(x, t, uncond)
                    guided = plain + self.scale * (self.predict(x, t, cond) - plain)
                x_below = self.move(x, guided, t, below)
                x0_below = self.predict(x_below, below.clamp(min=0), cond)
                target = self.move(x_below, x0_below, below.clamp(min=0), end)
                target = torch.where((below > NO_NOISE)[:, None, None, None], target, x_below)
            found = self.move(x, self.predict(x, t, cond), t, end)
        return (((found - target).square() + HUBER**2).sqrt() - HUBER).mean((1, 2, 3))

    def levels(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps of each example, int64 [b]: the level, the one below, and the end, at most the latter.

        The levels of a batch are spread evenly, as in `draw_timesteps`.
        """
        rows, stride = batch["row"].cpu(), self.model.num_timesteps // LEVELS
        share = (rows + self.uniform(batch, "timestep")) / self.config.batch_size
        t = stride * ((share * LEVELS).floor().long() + 1) - 1
        below = t - stride
        if self.sampler == "lcm":
            return t, below, torch.full_like(t, NO_NOISE)
        return t, below, (self.uniform(batch, "end") * (below + 2)).floor().long() - 1

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The images x0 [b, c, h, w], float32, that the model sees in latents x at timesteps t [b]."""
        model = self.model
        output = model.apply_model(x, t, cond).float()
        to_x0 = (
            model.predict_start_from_noise
            if model.parameterization == "eps"
            else model.predict_start_from_z_and_v
        )
        return to_x0(x, t, output)

    def move(self, x: Tensor, x0: Tensor, t: Tensor, end: Tensor) -> Tensor:
        """A step of DDIM without noise from timesteps t [b] to `end` [b], towards x0 (Song et al. 2020)."""
        (a, b), (a_end, b_end) = (
            (self.signal[at + 1][:, None, None, None], self.spread[at + 1][:, None, None, None])
            for at in (t, end)
        )
        return a_end * x0 + b_end * (x - a * x0) / b

    def validation_losses(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self.losses(batch)


def check(setup: Setup, options: Distillation) -> None:
    """InputError for layers that the model lacks, by its file's header."""
    lora.check(setup, options)


def new_task(model: LatentDiffusion, setup: Setup, options: Distillation) -> DistillationTask:
    scale = advised_scale(setup.files.config, SCALE) if options.scale is None else options.scale
    return DistillationTask(
        model, setup.config, setup.data, sampler=options.sampler, scale=scale, **lora.lora_options(options)
    )


def sampling(files: Sequence[Path], setup: Setup, options: Distillation) -> Sampling:
    """Before: as many steps of the usual sampler with guidance, which call the model twice as often."""
    return Sampling(fields={"lora": (str(files[0]),), "sampler": options.sampler, "scale": 1.0})
