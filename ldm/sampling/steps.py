"""What samplers share: their arguments' types, the levels of each step, and the ways between levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    Denoise = Callable[[Tensor, float], Tensor]  # (x, sigma) -> x0
    Draw = Callable[[float, float], Tensor]  # (sigma, sigma_next) -> a standard normal tensor like x
    Noise = Draw | None
    Callback = Callable[[int, Tensor], None] | None  # (step, from 1; x0)
    Sigmas = Sequence[float] | Tensor  # descending, [steps + 1]


def steps(sigmas: Sigmas) -> Iterator[tuple[int, float, float]]:
    """(i, sigma, sigma_next) of every step, i from 0, the levels as plain floats."""
    for i, (sigma, sigma_next) in enumerate(pairwise(map(float, sigmas))):
        yield i, sigma, sigma_next


def toward(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """x at sigma_next if x0 is where it all leads: Euler's step, DDIM's, and DPM-Solver++'s first order."""
    return x0 + (x - x0) * (sigma_next / sigma)


def ancestral_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """How far to go down without noise, and how much noise to add, to arrive at sigma_next (DDIM, eq. 16)."""
    up = min(sigma_next, eta * sigma_next * max(0.0, 1.0 - (sigma_next / sigma) ** 2) ** 0.5)
    return max(0.0, sigma_next**2 - up**2) ** 0.5, up


def churn(x: Tensor, sigma: float, gamma: float, s_noise: float, noise: Draw) -> tuple[Tensor, float]:
    """x and sigma, raised by the part gamma, at most sqrt(2) - 1 (Karras et al. 2022, algorithm 2)."""
    raised = sigma * (1 + min(gamma, math.sqrt(2) - 1))
    return x + noise(raised, sigma) * (s_noise * (raised**2 - sigma**2) ** 0.5), raised
