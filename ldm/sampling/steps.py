"""What all samplers share: their arguments' types, and the way from one noise level to the next."""

from collections.abc import Callable

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[float, float], Tensor]
Callback = Callable[[int, Tensor], None]


def toward(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """x at sigma_next if x0 is where it all leads: Euler's step, DDIM's, and DPM-Solver++'s first order."""
    return x0 + (x - x0) * (sigma_next / sigma)


def ancestral_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """How far to go down without noise, and how much noise to add, to arrive at sigma_next (DDIM, eq. 16)."""
    up = min(sigma_next, eta * sigma_next * max(0.0, 1.0 - (sigma_next / sigma) ** 2) ** 0.5)
    return max(0.0, sigma_next**2 - up**2) ** 0.5, up
