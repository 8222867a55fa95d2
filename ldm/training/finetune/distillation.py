"""Trains a LoRA with which a model makes in a few unguided steps what it makes in many guided ones.

Latent consistency (Luo et al. 2023, https://arxiv.org/abs/2311.05556) for `--sampler lcm`, and trajectory
consistency (Zheng et al. 2024, https://arxiv.org/abs/2402.19159) for `tcd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipeline.pipeline import SCALE, TASK_SCALE
from ldm.sampling.denoiser import Conditioning
from ldm.sampling.schedule import LCM_LEVELS, lcm_timesteps
from ldm.training.finetune import lora
from ldm.training.finetune.lora import LoraTask
from ldm.training.finetune.methods import Distillation, Sampling, Setup
from ldm.training.objective import draw_timesteps
from ldm.training.tasks import Batch
from ldm.weights.description import describe
from ldm.weights.loading import advised_scale

HUBER = 1e-3  # c of the loss sqrt(d^2 + c^2) - c of a difference d (pseudo-Huber)
NO_NOISE = -1  # stands for the timestep of images


class DistillationTask(LoraTask):
    """Trains a LoRA so that every level of a trajectory leads to the same end in one step.

    The trajectory is that of the model without the LoRA at the guidance scale `scale`: a step of DDIM leads
    from a level to the one below. From both, the model with the LoRA makes one step to the same end: for
    "lcm" to the image, for "tcd" to any level further below. The step from the lower level is the more
    accurate one, so it is the target, without a gradient, for the step from the upper level.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        config: Any,
        data: Any = None,
        *,
        sampler: str = "tcd",
        scale: float = SCALE,
        **options: Any,
    ):
        if model.num_timesteps < LCM_LEVELS:
            raise InputError(
                f"a distillation takes {LCM_LEVELS} of a model's timesteps, and this one has "
                f"{model.num_timesteps}"
            )
        super().__init__(model, config, data, **options)
        self.sampler, self.scale = sampler, scale
        how = f"--steps {config.sample_steps} --scale {config.sample_scale:g}"
        self.advice = f"--sampler {sampler} {how}"
        self.taught = torch.tensor([NO_NOISE, *lcm_timesteps(model.num_timesteps)])
        alphas = torch.cat([torch.ones(1), model.alphas_cumprod.double().cpu()])  # of NO_NOISE, 0, 1, …
        self.register_buffer("signal", alphas.sqrt().float(), persistent=False)
        self.register_buffer("spread", (1 - alphas).sqrt().float(), persistent=False)

    def identity(self) -> dict[str, str]:
        return super().identity() | {"sampler": self.sampler, "scale": f"{self.scale:g}"}

    def losses(self, batch: Batch) -> Tensor:
        t = draw_timesteps(self.config, batch["step"], batch["row"].cpu(), self.model.num_timesteps)
        return self.losses_at(batch, t, self.uniform(batch, "end"), self.captions(batch))

    @torch.no_grad()
    def validation_losses(self, batch: Batch) -> Tensor:
        """The mean over fixed timesteps, with captions; "tcd" goes half of the way down to the image."""
        half, captions = torch.full((len(batch["row"]),), 0.5), self.whole_captions(batch)
        times = (torch.full((len(half),), t) for t in self.config.validation_timesteps)
        return torch.stack([self.losses_at(batch, t, half, captions) for t in times]).mean(dim=0)

    def losses_at(self, batch: Batch, t: Tensor, share: Tensor, captions: list[str]) -> Tensor:
        """The loss of each example, [b], at the levels near timesteps t [b]; see `levels` for `share` [b]."""
        x0, concat = self.latents(batch), self.concat(batch)
        if concat is not None:  # as it costs a call of the first stage
            batch = {**batch, "concat": concat}
        level, below, end = (at.to(self.device) for at in self.levels(t, share))
        x = self.model.q_sample(x0, level, self.noise(batch, x0.shape[1:]))
        with self.attention(x0):
            cond = self.conditioning(batch, self.embed(captions))
            with torch.no_grad():
                x_below = self.move(x, self.teach(x, level, cond, batch), level, below)
                asked = below.clamp(min=0)
                target = self.move(x_below, self.predict(x_below, asked, cond), asked, end)
                # Below the lowest level are images, which are their own end. LCM's weights c_skip and c_out
                # say so, too; at the levels they are within 1e-5 of 0 and 1, and left out.
                target = torch.where((below > NO_NOISE)[:, None, None, None], target, x_below)
            found = self.move(x, self.predict(x, level, cond), level, end)
        return (((found - target).square() + HUBER**2).sqrt() - HUBER).mean((1, 2, 3))

    def teach(self, x: Tensor, t: Tensor, cond: Conditioning, batch: Batch) -> Tensor:
        """The guided images x0 [b, c, h, w] that the model sees without the LoRA."""
        with self.model.lora.left_out():
            if self.scale == 1:
                return self.predict(x, t, cond)
            # Copies, as torch.compile would compile the UNet once more for the strides of a view of one row.
            empty = self.embed([""]).repeat(len(x), 1, 1)
            plain = self.predict(x, t, self.conditioning(batch, empty))
            return plain if self.scale == 0 else plain + self.scale * (self.predict(x, t, cond) - plain)

    def levels(self, t: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps int64 [b]: the level that is taught next to t [b], the one below it, and the end.

        The end is the image for "lcm"; for "tcd" a timestep below, or the same, by `share` [b], 0 for the
        image and nearly 1 for the level below.
        """
        number = t * LCM_LEVELS // self.model.num_timesteps
        level, below = self.taught[number + 1], self.taught[number]
        if self.sampler == "lcm":
            return level, below, torch.full_like(level, NO_NOISE)
        return level, below, (share * (below + 2)).floor().long() - 1

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The images x0 [b, c, h, w], float32, that the model sees in latents x at timesteps t [b]."""
        return self.model.predict_start(x, t, self.model.apply_model(x, t, cond).float())

    def move(self, x: Tensor, x0: Tensor, t: Tensor, end: Tensor) -> Tensor:
        """A step of DDIM without noise from timesteps t [b] to `end` [b], towards x0 (Song et al. 2020)."""
        (a, b), (a_end, b_end) = (
            (self.signal[at + 1][:, None, None, None], self.spread[at + 1][:, None, None, None])
            for at in (t, end)
        )
        return a_end * x0 + b_end * (x - a * x0) / b


def check(setup: Setup, options: Distillation) -> None:
    """InputError for layers that the model lacks, and for weights of a loss that is not computed here."""
    if gamma := setup.config.min_snr_gamma:
        raise InputError(
            f"training: min_snr_gamma {gamma:g} weighs the loss of predicted noise, and a distillation has "
            "another one: leave it out"
        )
    lora.check(setup, options)


def new_task(model: LatentDiffusion, setup: Setup, options: Distillation) -> DistillationTask:
    scale = options.scale
    if scale is None:  # that of the command that the model is for
        scale = advised_scale(setup.files.config, TASK_SCALE.get(describe(setup.section).task, SCALE))
    return DistillationTask(
        model, setup.config, setup.data, sampler=options.sampler, scale=scale, **lora.lora_options(options)
    )


def sampling(files: Sequence[Path], setup: Setup, options: Distillation) -> Sampling:
    """Before: as many steps of the usual sampler with guidance, which call the model twice as often."""
    how = {"sampler": options.sampler, "scale": setup.config.sample_scale}
    return Sampling(fields={"lora": (str(files[0]),), **how})
