"""Diffusion sampling out of four independent choices: schedule, denoiser, sampler, noise."""

from ldm.sampling.denoiser import Denoiser
from ldm.sampling.run import default_trajectory, sample
from ldm.sampling.samplers import SAMPLERS
from ldm.sampling.schedule import SCHEDULES, Discretization, Trajectory, trajectory

__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "Denoiser",
    "Discretization",
    "Trajectory",
    "default_trajectory",
    "sample",
    "trajectory",
]
