"""What a step minimises, and how fast it learns: timesteps, weights of the loss, the learning rate."""

import math

import torch
from torch import Tensor

from ldm.training.config import TrainingConfig
from ldm.training.random import uniform


def draw_timesteps(config: TrainingConfig, step: int, rows: Tensor, count: int = 1000) -> Tensor:
    """Timesteps of a step's examples, int64 [b], for their positions `rows` [b] in the global batch.

    Each example draws from its own part of 0 … count - 1 (stratified sampling): the loss of the batch has
    less variance than with independent timesteps. The first `config.drilled` rows share their own range.
    """
    low, high = config.drill_timesteps
    u = uniform(config.seed, step, rows.tolist(), "timestep")
    drilled, rest = config.drilled, config.batch_size - config.drilled
    in_drill = low + (rows + u) / max(drilled, 1) * (high - low)
    others = (rows - drilled + u) / max(rest, 1) * count
    return torch.where(rows < drilled, in_drill, others).floor().long()


def min_snr_weights(alphas: Tensor, t: Tensor, parameterization: str, gamma: float) -> Tensor:
    """Weights [b] of the loss at timesteps t [b]: min(SNR, gamma) of the loss of x0.

    `alphas` are the model's alphas_cumprod [timesteps]. The loss of eps is SNR times that of x0, and the
    loss of v is SNR + 1 times that (Hang et al. 2023, https://arxiv.org/abs/2303.09556).
    """
    snr = alphas[t] / (1 - alphas[t])
    return snr.clamp(max=gamma) / (snr if parameterization == "eps" else snr + 1)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The learning rate of a step, 0 being the first: it rises through the warmup, then stays or falls."""
    rising = (step + 1) / config.warmup if config.warmup else 1.0
    later = 1.0 if config.schedule == "constant" else 0.5 + 0.5 * math.cos(math.pi * step / config.steps)
    return config.learning_rate * min(rising, later)
