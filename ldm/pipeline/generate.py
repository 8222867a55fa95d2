"""From prompts to pictures, batch by batch: what every sampling script does between loading and saving."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import pairwise

import numpy as np
import torch

from ldm.errors import InputError
from ldm.images.pixels import finite_images, to_float, to_uint8
from ldm.log import notice
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.sampling import SCHEDULES, Denoiser, Discretization, Trajectory, catalogue, sample, trajectory
from ldm.sampling.batches import Batch
from ldm.sampling.noise import Noise, noise_source
from ldm.sampling.schedule import to_first_alpha, zero_terminal_snr


@dataclass(frozen=True)
class Settings:
    """What a run samples with, the same for all its batches; None is left to the sampler or not used."""

    height: int  # pixels
    width: int
    sampler: str = "ddim"
    steps: int = 50
    scale: float = 7.5
    schedule: str | None = None
    rho: float | None = None  # of the schedule
    timesteps: tuple[float, ...] | None = None  # instead of a schedule, descending
    sigmas: tuple[float, ...] | None = None  # instead of a schedule, descending, the final one included
    options: Mapping[str, float] = field(default_factory=dict)  # the sampler's own
    strength: float | None = None  # image to image, 0 … 1
    cfg_rescale: float = 0.0
    guidance_start: float = 0.0  # guidance from this part of the steps on …
    guidance_end: float = 1.0  # … and up to this one
    zero_snr: bool = False
    negative_prompt: str = ""
    seed: int = 42
    variation_seed: int | None = None
    variation_strength: float | None = None
    rng: str = "image"
    fixed_code: bool = False
    start_seed: int | None = None  # of fixed_code, where it is not `seed`
    autocast: bool = False  # half precision on a GPU; a CPU always computes in the weights' precision

    @property
    def steps_to_run(self) -> int:
        """All steps of text to image; of image to image strength x steps, rounded down: 29 for 0.29 x 100."""
        return self.steps if self.strength is None else int(round(self.strength * self.steps, 6))


# as a part of sigma: what float32 can tell apart, and what a Brownian path's leaves can
SHORTEST_STEP = {False: 1e-6, True: 1e-3}


def plan_trajectory(discretization: Discretization, settings: Settings) -> Trajectory:
    """The noise levels that the settings ask for."""
    if settings.sigmas:
        grid, original = np.array(settings.sigmas, dtype=np.float64), False
    elif settings.timesteps:
        grid, original = to_first_alpha(discretization, settings.timesteps), False
    else:
        name = settings.schedule or catalogue.SAMPLERS[settings.sampler].schedule
        rho = {} if settings.rho is None else {"rho": settings.rho}
        grid, original = SCHEDULES[name](discretization, settings.steps, **rho), name == "leading"
    least = SHORTEST_STEP[catalogue.SAMPLERS[settings.sampler].noise == "brownian"]
    for sigma, sigma_next in pairwise(grid.tolist()):
        if sigma_next > sigma * (1 - least):
            raise InputError(
                f"noise levels {sigma:.6g} and {sigma_next:.6g} follow each other: too near for "
                f"{settings.sampler}; take fewer steps, another list or a smaller --rho"
            )
    return trajectory(grid, settings.steps_to_run, original)


def own_steps(run: Trajectory, discretization: Discretization) -> Trajectory:
    """A run for a sampler that chooses its steps: its ends, and the lowest level before there is no noise."""
    lowest = discretization.sigma(0.0)
    if run.sigmas[-1] > 0 or run.sigmas[0] <= lowest:
        return run
    return replace(run, sigmas=(run.sigmas[0], lowest, 0.0))


def guidance_interval(run: Trajectory, start: float, end: float) -> tuple[float, float]:
    """The sigmas (above, up to) of the steps from part `start` to part `end` of a run, of 0 … 1.

    Step i of n is within if start <= i / n < end. The run's own ends are open: a sampler may go beyond them.
    Calls within a step go by their own levels. InputError if no step is within.
    """
    first, last = (int(np.ceil(round(part * run.steps, 6))) for part in (start, end))
    if run.steps and first >= last:
        raise InputError(
            f"none of the {run.steps} steps is within --guidance_start {start:g} and --guidance_end {end:g}; "
            "--scale 1 samples without guidance"
        )
    low = run.sigmas[last] if last < run.steps else -np.inf
    return low, run.sigmas[first] if first else np.inf


def generate(
    model: LatentDiffusion,
    batches: Iterable[Batch],
    settings: Settings,
    on_step: Callable[[int], None] = lambda images: None,
    init_image: np.ndarray | None = None,
) -> Iterator[tuple[Batch, list[np.ndarray | None]]]:
    """Each batch with its pictures, uint8 [H, W, 3] in the prompts' order; None is one that came out as NaN.

    Starts from pure noise, or from `init_image`, uint8 [H, W, 3], where the strength is below 1. `on_step` is
    told after every step how many images took it. A prompt is encoded once, not once a batch: the last 2,048
    embeddings are kept (0.2 MB each for v1). A batch that needs more memory than there is is made in halves,
    and so are those after it; InputError if there is too little for one image.
    """
    factor = model.first_stage_model.factor
    shape = (model.channels, settings.height // factor, settings.width // factor)
    alphas = model.alphas_cumprod.cpu().numpy()
    if settings.zero_snr and model.parameterization == "eps":
        raise InputError("zero_snr is for v-prediction models; this one predicts the noise (eps)")
    discretization = Discretization(zero_terminal_snr(alphas) if settings.zero_snr else alphas)
    run = plan_trajectory(discretization, settings)
    interval = guidance_interval(run, settings.guidance_start, settings.guidance_end)
    if settings.sampler == "dpm_adaptive" and run.steps:
        run = own_steps(run, discretization)
    varied = settings.variation_seed is not None
    posterior = None
    # at full strength the picture would have no say
    if init_image is not None and settings.strength < 1:
        with torch.inference_mode():
            posterior = model.encode_first_stage(to_float([init_image]).to(model.device))

    @cache
    def noise_of() -> Callable[[Batch], Noise]:
        return noise_source(
            settings.rng,
            settings.seed,
            shape,
            settings.fixed_code,
            model.device,
            first_size,  # what the original draws once for all batches has that of the first: none is larger
            init_image=posterior is not None,
            brownian=catalogue.SAMPLERS[settings.sampler].noise == "brownian",
            variation=(settings.variation_seed, settings.variation_strength) if varied else None,
            start_seed=settings.start_seed,
        )

    embed = lru_cache(maxsize=2048)(lambda prompt: model.get_learned_conditioning([prompt]))

    def latents_of(batch: Batch, on_step: Callable[[int], None]) -> torch.Tensor:
        noise = noise_of()(batch)
        init = None
        if posterior is not None:
            init = model.get_first_stage_encoding(posterior, noise.posterior())
        denoiser = Denoiser(
            model,
            torch.cat([embed(prompt) for prompt in batch.prompts]),
            embed(settings.negative_prompt) if settings.scale != 1.0 else None,
            settings.scale,
            rescale=settings.cfg_rescale,
            interval=interval,
            discretization=discretization,
        )
        return sample(
            denoiser,
            settings.sampler,
            run,
            noise,
            init=init,
            options=settings.options,
            callback=lambda step, x0: on_step(len(batch)),
        )

    def pictures_of(batch: Batch) -> list[np.ndarray | None]:
        taken = 0  # steps, to be given back if they were for nothing

        def step(images: int) -> None:
            nonlocal taken
            taken += images
            on_step(images)

        # its step sizes would be those of the whole batch, and each picture another one in company
        parts = batch.parts(1) if settings.sampler == "dpm_adaptive" else [batch]
        try:
            with torch.inference_mode(), autocast:
                latents = torch.cat([latents_of(part, step) for part in parts])
                decoded = decode(model, latents)
                pixels = to_uint8(decoded)
                finite = finite_images(decoded)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            on_step(-taken)
            raise OutOfMemory from None  # without the frames that hold the tensors
        return [image if ok else None for image, ok in zip(pixels, finite, strict=True)]

    autocast = torch.autocast(model.device.type, enabled=settings.autocast and model.device.type != "cpu")
    first_size, largest = 0, None  # images; the largest batch that may fit, once one did not
    for batch in batches:
        first_size = first_size or len(batch)
        parts, pictures = batch.parts(largest or len(batch)), []
        while parts:
            try:
                pictures += pictures_of(parts[0])
                parts = parts[1:]
            except OutOfMemory:
                largest = _half(len(parts[0]), settings)
                parts = [smaller for part in parts for smaller in part.parts(largest)]
                if model.device.type == "cuda":
                    torch.cuda.empty_cache()
        yield batch, pictures


def decode(model: LatentDiffusion, latents: torch.Tensor) -> torch.Tensor:
    """Images [b, 3, h, w] of latents. A decoder that fails in low precision works in float32 from then on.

    Those of SD 1 and 2 hold values beyond what float16 can express on some pictures.
    """
    images = model.decode_first_stage(latents)
    single = torch.promote_types(images.dtype, torch.float32) == images.dtype
    if single or images.isfinite().all() or not latents.isfinite().all():
        return images
    notice("the autoencoder yields NaN in low precision: it decodes in float32 from here on")
    model.first_stage_model.float()
    with torch.autocast(model.device.type, enabled=False):
        return model.decode_first_stage(latents)


class OutOfMemory(Exception):
    """A batch did not fit."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or this machine, has no more memory; only CUDA has a class for it."""
    return isinstance(error, torch.OutOfMemoryError) or bool(
        re.search("out of memory|can't allocate memory|not enough memory", str(error))
    )


def _half(images: int, settings: Settings) -> int:
    """The size of batch to try after `images` did not fit. InputError if there is none."""
    size = f"{settings.width}x{settings.height}"
    if images == 1:
        raise InputError(f"out of memory with one image of {size}; take a smaller --H and --W")
    if settings.rng == "compvis":
        raise InputError(
            f"out of memory with {images} images of {size}; the original's stream (--rng compvis) is drawn "
            "for whole batches, so take a smaller --n_samples"
        )
    notice(f"out of memory with {images} images of {size} at once: going on with {images // 2}")
    return images // 2
