"""Where random numbers come from: a stream for each image, or the original's one stream for the run.

Both are callables `noise(sigma, sigma_next)` for the samplers, with `start()` for the initial latents.
"""

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.prompts import Batch

MAX_SEED = 2**63 - 1


def image_generator(seed: int) -> torch.Generator:
    """A CPU generator for one image.

    torch's CPU generator reads only the low 32 bits of a seed; larger ones are folded so that they differ.
    """
    return torch.Generator().manual_seed(seed if seed < 2**32 else zlib.crc32(seed.to_bytes(8, "little")))


class ImageNoise:
    """Each image's own stream, on the CPU in float32: equal on any device and in any batch.

    `start_seeds` are other images' to start from (--fixed_code); the steps' noise stays the image's own.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Sequence[int],
        device: torch.device,
        start_seeds: Sequence[int] | None = None,
    ):
        self.generators = [image_generator(seed) for seed in seeds]
        self.starts = [image_generator(seed) for seed in start_seeds] if start_seeds else self.generators
        self.shape = tuple(shape)  # of one image: c, h, w
        self.device = device

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Standard normal [b, c, h, w]."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in generators]).to(self.device)

    def start(self) -> Tensor:
        own = self.draw(self.generators)  # drawn in any case: the steps must not see this noise again
        return own if self.starts is self.generators else self.draw(self.starts)

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        return self.draw(self.generators)

    def finish(self, unused: int) -> None:
        """A stream of one's own has nobody to keep in step with."""


class CompvisNoise:
    """The original's one generator for the whole run, on the run's device; also the draws it threw away."""

    def __init__(self, generator: torch.Generator, shape: Sequence[int], start_code: Tensor | None = None):
        self.generator = generator
        self.shape = tuple(shape)  # of the batch: b, c, h, w
        self.start_code = start_code  # --fixed_code: drawn once for all batches

    def draw(self) -> Tensor:
        return torch.randn(self.shape, generator=self.generator, device=self.generator.device)

    def start(self) -> Tensor:
        return self.draw() if self.start_code is None else self.start_code[: self.shape[0]]

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        return self.draw()

    def finish(self, unused: int) -> None:
        """Draw what the original's sampler draws and multiplies by zero."""
        for _ in range(unused):
            self.draw()


def noise_source(
    rng: str, seed: int, shape: Sequence[int], fixed_code: bool, device: torch.device, n_samples: int
) -> Callable[[Batch], ImageNoise | CompvisNoise]:
    """The noise of each batch of a run: `rng` is "image" or "compvis", `shape` is one image's [c, h, w].

    Image k has seed `seed + k`, modulo 2^63. `fixed_code` starts every batch from the first one's noise,
    drawn for `n_samples` images.
    """
    if rng == "compvis":
        generator = torch.Generator(device).manual_seed(seed)
        code = torch.randn(n_samples, *shape, generator=generator, device=device) if fixed_code else None
        return lambda batch: CompvisNoise(generator, (len(batch), *shape), code)

    def image_noise(batch: Batch) -> ImageNoise:
        seeds = [image_seed(seed, batch.first + i) for i in range(len(batch))]
        starts = [image_seed(seed, i) for i in range(len(batch))] if fixed_code else None
        return ImageNoise(seeds, shape, device, starts)

    return image_noise


def image_seed(seed: int, k: int) -> int:
    """The seed of image k of a run."""
    return (seed + k) % (MAX_SEED + 1)
