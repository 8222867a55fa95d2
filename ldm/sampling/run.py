"""One run of a sampler: start latents, steps, and back to the model's scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ldm.sampling import catalogue
from ldm.sampling.denoiser import Denoiser
from ldm.sampling.noise import NoiseSource
from ldm.sampling.samplers import SAMPLERS
from ldm.sampling.schedule import SCHEDULES
from ldm.sampling.trajectory import Trajectory, own_steps

if TYPE_CHECKING:
    from ldm.sampling.known import KnownRegion
    from ldm.sampling.steps import Callback


def default_trajectory(denoiser: Denoiser, sampler: str, steps: int) -> Trajectory:
    """`steps` steps from pure noise on the sampler's own grid."""
    return Trajectory.of(SCHEDULES[catalogue.SAMPLERS[sampler].schedule](denoiser.discretization, steps))


def sample(
    denoiser: Denoiser,
    sampler: str,
    run: Trajectory,
    noise: NoiseSource,
    *,
    init: Tensor | None = None,
    known: KnownRegion | None = None,
    options: Mapping[str, float] | None = None,
    callback: Callback = None,
) -> Tensor:
    """Latents [b, c, h, w] at the model's scale, from pure noise or from `init` noised to the run's start.

    `init` is alike [b, c, h, w]; without steps it comes back as it is. `known` is kept. `options` are the
    sampler's own.
    """
    if run.steps == 0:
        return init
    facts, options = catalogue.SAMPLERS[sampler], dict(options or {})
    if facts.by_timesteps:
        options["discretization"] = denoiser.discretization
    if facts.adaptive:
        run = own_steps(run, denoiser.discretization)
    first, last = run.sigmas[0], run.sigmas[-1]
    x = noise.start()
    if init is not None:
        x = (init + run.start * x) * (1.0 + run.start**2) ** -0.5
    x = x * (1.0 + first**2) ** 0.5
    denoise = denoiser
    if known is not None:
        x, denoise = known.put(x, first), known.denoiser(denoiser)
    x = SAMPLERS[sampler](denoise, x, run.sigmas, noise=noise, callback=callback, **options)
    noise.finish(facts.unused_draws(run.steps, options.get("eta", 0.0)))
    x = x * (1.0 + last**2) ** -0.5
    return x if known is None else known.restore(x)
