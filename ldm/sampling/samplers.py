"""Samplers by name: plain functions from noise to latents, in the sigma space of `ldm.sampling.schedule`.

Each takes `denoise(x, sigma) -> x0`, the noised latents x [b, c, h, w] at `sigmas[0]`, and the descending
`sigmas` [steps + 1] of the run, and returns the latents at `sigmas[-1]`. Stochastic ones draw a standard
normal tensor like x with `noise(sigma, sigma_next)`. `callback(step, x0)` comes after every step, from 1.
"""

from ldm.sampling.euler import (
    ddim,
    ddpm,
    dpm_2,
    dpm_2_ancestral,
    euler,
    euler_ancestral,
    heun,
    lcm,
    lms,
    plms,
)
from ldm.sampling.exponential import (
    dpm_adaptive,
    dpm_fast,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    dpmpp_sde,
    unipc,
)
from ldm.sampling.steps import Callback, Denoise, Noise

__all__ = ["SAMPLERS", "Callback", "Denoise", "Noise"]

SAMPLERS = {
    "ddim": ddim,
    "plms": plms,
    "ddpm": ddpm,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpm_2": dpm_2,
    "dpm_2_ancestral": dpm_2_ancestral,
    "lms": lms,
    "dpm_fast": dpm_fast,
    "dpm_adaptive": dpm_adaptive,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "unipc": unipc,
    "lcm": lcm,
}
