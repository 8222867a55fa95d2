"""Diffusion sampling out of four independent choices: schedule, denoiser, sampler, noise."""

from ldm.sampling.denoiser import Denoiser
from ldm.sampling.run import sample
from ldm.sampling.samplers import SAMPLERS
from ldm.sampling.schedule import SCHEDULES, Discretization

__all__ = ["SAMPLERS", "SCHEDULES", "Denoiser", "Discretization", "sample"]
