"""How an upscaler's UNet is given the small image (Ho et al. 2021, https://arxiv.org/abs/2106.15282, 4)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ldm.modules.diffusionmodules.util import make_beta_schedule, schedule_buffers
from ldm.util import check_params


class SimpleImageConcat(nn.Module):
    """The small image as it is, at noise level 0."""

    max_noise_level = 0

    def register_schedule(self) -> None:
        """There is no noise and no schedule of it."""

    def forward(
        self, x: torch.Tensor, noise_level: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images x [b, 3, h, w], and levels int64 [b], which can only be 0; `noise` is not looked at."""
        return x, noise_level


class ImageConcatWithNoiseAugmentation(nn.Module):
    """The small image, noised to a level, so that the UNet does not copy its faults.

    `noise_schedule_config` are `make_beta_schedule`'s arguments, `max_noise_level` is the largest level that
    the model was trained on. `to_cuda` is accepted and ignored: the model is moved as a whole.
    """

    training_params = frozenset({"to_cuda"})

    def __init__(self, noise_schedule_config: Mapping[str, Any], max_noise_level: int = 1000):
        super().__init__()
        check_params(make_beta_schedule, noise_schedule_config, {"beta_schedule"})
        self.max_noise_level = max_noise_level
        self.noise_schedule = {
            "schedule": noise_schedule_config.get("beta_schedule", "linear"),
            "timesteps": 1000,
            "linear_start": 1e-4,
            "linear_end": 2e-2,
            **{name: value for name, value in noise_schedule_config.items() if name != "beta_schedule"},
        }
        self.register_schedule()

    def register_schedule(self) -> None:
        """Compute the float32 buffers [timesteps] that checkpoints carry, which are not the posterior's."""
        for name, values in schedule_buffers(make_beta_schedule(**self.noise_schedule)).items():
            if not name.startswith("posterior"):
                self.register_buffer(name, values)

    def forward(
        self, x: torch.Tensor, noise_level: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images x [b, 3, h, w] in [-1, 1] with `noise` like them, at levels int64 [b]; and the levels."""
        a = self.sqrt_alphas_cumprod[noise_level][:, None, None, None]
        b = self.sqrt_one_minus_alphas_cumprod[noise_level][:, None, None, None]
        return a * x + b * noise, noise_level
