"""One run of a sampler: schedule, start noise, steps, and back to the model's scale."""

from torch import Tensor

from ldm.sampling.denoiser import Denoiser
from ldm.sampling.noise import CompvisNoise, ImageNoise
from ldm.sampling.samplers import SAMPLERS, Callback
from ldm.sampling.schedule import SCHEDULES


def sample(
    denoiser: Denoiser,
    sampler: str,
    steps: int,
    noise: ImageNoise | CompvisNoise,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """Latents [b, c, h, w] from pure noise in `steps` steps, as the original's command computes them."""
    sigmas = SCHEDULES["uniform" if sampler == "dpmpp_2m" else "leading"](
        denoiser.discretization, steps
    ).tolist()
    x = noise.start() * (1.0 + sigmas[0] ** 2) ** 0.5
    match sampler:
        case "ddim":
            options, unused = {"eta": eta}, 0 if eta else steps
        case "plms":
            options, unused = {}, steps + 1
        case "dpmpp_2m":
            options, unused = {"lower_order_final": steps < 15}, 0
    x = SAMPLERS[sampler](denoiser, x, sigmas, noise=noise, callback=callback, **options)
    noise.finish(unused)
    return x * (1.0 + sigmas[-1] ** 2) ** -0.5
