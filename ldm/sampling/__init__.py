"""Diffusion sampling out of four independent choices: schedule, denoiser, sampler, noise.

Everything is imported when it is first asked for, so that names and options can be checked without torch.
"""

from importlib import import_module
from typing import Any

_PLACES = {
    "Denoiser": "denoiser",
    "same_length": "denoiser",
    "default_trajectory": "run",
    "sample": "run",
    "CompvisStream": "noise",
    "ImageNoise": "noise",
    "ImageSeeds": "noise",
    "SAMPLERS": "samplers",
    "SCHEDULES": "schedule",
    "Discretization": "schedule",
    "Trajectory": "trajectory",
    "guidance_interval": "trajectory",
    "own_steps": "trajectory",
    "plan_trajectory": "trajectory",
}

__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"ldm.sampling.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
