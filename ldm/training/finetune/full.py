"""Fine-tuning of all weights of the UNet and, if asked for, the text encoder."""

from collections.abc import Sequence
from pathlib import Path

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.finetune.methods import Full, Sampling, Setup
from ldm.training.tasks import LatentDiffusionTask


def check(setup: Setup, options: Full) -> None:
    """Everything is trained: there is nothing to choose."""


def new_task(model: LatentDiffusion, setup: Setup, options: Full) -> LatentDiffusionTask:
    model.cond_stage_trainable = options.text_encoder
    return LatentDiffusionTask(model, setup.config, setup.data)


def sampling(files: Sequence[Path], setup: Setup, options: Full) -> Sampling:
    return Sampling(ckpt=files[0])
