"""Samplers by name: plain functions from noise to latents, in the sigma space of `ldm.sampling.schedule`.

Each takes `denoise(x, sigma) -> x0`, the noised latents x [b, c, h, w] at `sigmas[0]`, and the descending
`sigmas` [steps + 1] of the run, and returns the latents at `sigmas[-1]`. Stochastic ones draw a standard
normal tensor like x with `noise(sigma, sigma_next)`. `callback(step, x0)` comes after every step, from 1.
Importing them imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ldm.sampling import distilled, euler, exponential, facts, multistep

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    name: function
    for module in (euler, exponential, multistep, distilled)
    for name, function in vars(module).items()
    if name in facts.SAMPLERS and function.__module__ == module.__name__
}
