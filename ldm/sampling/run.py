"""One run of a sampler: start latents, steps, and back to the model's scale."""

from collections.abc import Mapping

from torch import Tensor

from ldm.sampling import catalogue
from ldm.sampling.denoiser import Denoiser
from ldm.sampling.noise import Noise
from ldm.sampling.samplers import SAMPLERS, Callback
from ldm.sampling.schedule import SCHEDULES, Trajectory, trajectory


def default_trajectory(denoiser: Denoiser, sampler: str, steps: int) -> Trajectory:
    """`steps` steps from pure noise on the sampler's own grid."""
    return trajectory(SCHEDULES[catalogue.SAMPLERS[sampler].schedule](denoiser.discretization, steps))


def sample(
    denoiser: Denoiser,
    sampler: str,
    run: Trajectory,
    noise: Noise,
    *,
    init: Tensor | None = None,
    options: Mapping[str, float] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Latents [b, c, h, w] at the model's scale, from pure noise or from `init` noised to the run's start.

    `init` is alike [b, c, h, w]; without steps it comes back as it is. `options` are the sampler's own.
    """
    options = dict(options or {})
    if run.steps == 0:
        return init
    first, last = run.sigmas[0], run.sigmas[-1]
    x = noise.start()
    if init is not None:
        x = (init + run.start * x) * (1.0 + run.start**2) ** -0.5
    x = x * (1.0 + first**2) ** 0.5
    if sampler == "dpmpp_2m":
        options.setdefault("lower_order_final", run.steps < 15)  # as the original
    x = SAMPLERS[sampler](denoiser, x, run.sigmas, noise=noise, callback=callback, **options)
    noise.finish(unused_draws(sampler, run.steps, options.get("eta", 0.0)))
    return x * (1.0 + last**2) ** -0.5


def unused_draws(sampler: str, steps: int, eta: float) -> int:
    """How often the original's sampler drew noise only to multiply it by zero."""
    return {"ddim": 0 if eta else steps, "plms": steps + 1}.get(sampler, 0)
