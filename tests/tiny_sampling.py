"""The miniature of tiny.py as a model in memory, sampled from, and recorded as a graph would be."""

from collections.abc import Callable

import tiny
import torch
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize.graph import Recording
from ldm.sampling import SAMPLERS, Denoiser, default_trajectory
from ldm.util import instantiate_from_config


def tiny_model() -> LatentDiffusion:
    with torch.inference_mode(False):
        model = instantiate_from_config(tiny.MODEL)
        model.load_state_dict(tiny.state_dict())
        return model.eval().requires_grad_(False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_difference(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def contexts(count: int, images: int = 1, tokens: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(images, tokens, 32, generator=generator) for _ in range(count)]


def guided_latents(model: LatentDiffusion, conds: list[Tensor], uncond: Tensor) -> list[Tensor]:
    """Latents of four guided steps for each prompt; guidance ends before the last."""
    results = []
    with torch.inference_mode():
        for cond in conds:
            denoiser = Denoiser(model, cond, uncond, 5.0, interval=(1.0, 1e9))
            run = default_trajectory(denoiser, "ddim", 4)
            x = normal(len(cond), 4, 8, 8, seed=7) * run.sigmas[0]
            results.append(SAMPLERS["ddim"](denoiser, x, run.sigmas))
    return results


class Recorder:
    """A `Capture` without CUDA: a replay calls again what was recorded, and only that."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0
        self.renewed = 0

    def __call__(self, call: Callable[[], Tensor]) -> Recording:
        output = call()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            output.copy_(call())

        return Recording(replay, output)

    def renew(self) -> None:
        self.renewed += 1
