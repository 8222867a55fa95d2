"""Where random numbers come from: a stream for each image, or the original's one stream for the run.

All are callables `noise(sigma, sigma_next)` for the samplers, with `start()` for the initial latents and
`posterior()` for the draw of an init image's latents.
"""

import math
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ldm.sampling.batches import MAX_SEED, Batch


def image_generator(seed: int) -> torch.Generator:
    """A CPU generator for one image.

    torch's CPU generator reads only the low 32 bits of a seed; larger ones are folded so that they differ.
    """
    return torch.Generator().manual_seed(seed if seed < 2**32 else zlib.crc32(seed.to_bytes(8, "little")))


def place_generator(seed: int, place: bytes) -> torch.Generator:
    """A CPU generator for one thing about an image, which other draws do not move."""
    return torch.Generator().manual_seed(zlib.crc32(seed.to_bytes(8, "little") + place))


class BrownianPath:
    """A Brownian motion over sigma that its seed alone fixes: a virtual tree of bridges.

    A value does not depend on which others were asked for, so runs of one seed have like noise for any number
    of steps (Li et al. 2020, https://arxiv.org/abs/2001.01328).
    """

    DEPTH = 16  # levels of halving time

    def __init__(self, seed: int, shape: Sequence[int]):
        self.seed = seed
        self.shape = tuple(shape)
        self._node = lru_cache(maxsize=3 * self.DEPTH)(self._node)  # neighbours share most of their ancestors

    def increment(self, sigma: float, sigma_next: float) -> Tensor:
        """Standard normal: what the path does between two sigmas, over the root of the time that takes."""
        u, u_next = self.time(sigma), self.time(sigma_next)
        return (self._at(u) - self._at(u_next)) / math.sqrt(u - u_next)

    @staticmethod
    def time(sigma: float) -> float:
        """0 … 1 for sigmas up to 1e10, about even in log sigma: levels 0.1 % apart are leaves apart."""
        return math.log1p(1000 * sigma) / 32

    def _at(self, u: float) -> Tensor:
        index, part = divmod(u * 2**self.DEPTH, 1)
        left = self._node(self.DEPTH, int(index))
        if part == 0:
            return left
        bridge = self._normal(struct.pack("<d", u)) * math.sqrt(part * (1 - part) / 2**self.DEPTH)
        return torch.lerp(left, self._node(self.DEPTH, int(index) + 1), part) + bridge

    def _node(self, level: int, index: int) -> Tensor:
        """The value at u = index / 2^level."""
        if index == 0:
            return torch.zeros(self.shape)
        if index % 2 == 0:
            return self._node(level - 1, index // 2)
        step = self._normal(struct.pack("<HI", level, index)) * 2 ** (-(level + 1) / 2)
        if level == 0:
            return step * math.sqrt(2)  # u = 1: the whole path, variance 1
        return torch.lerp(self._node(level, index - 1), self._node(level, index + 1), 0.5) + step

    def _normal(self, place: bytes) -> Tensor:
        return torch.randn(self.shape, generator=place_generator(self.seed, place))


class ImageNoise:
    """Each image's own stream, on the CPU in float32: equal on any device and in any batch.

    With `brownian` the steps' noise are the increments of a path of the image's seed. `start_seeds` are other
    images' to start from (--fixed_code); all else stays the image's own.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Sequence[int],
        device: torch.device,
        start_seeds: Sequence[int] | None = None,
        brownian: bool = False,
    ):
        self.seeds = list(seeds)
        self.generators = [image_generator(seed) for seed in seeds]
        self.starts = [image_generator(seed) for seed in start_seeds] if start_seeds else self.generators
        self.shape = tuple(shape)  # of one image: c, h, w
        self.device = device
        self.paths = [BrownianPath(seed, shape) for seed in seeds] if brownian else None

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Standard normal [b, c, h, w]."""
        return self._stack([torch.randn(self.shape, generator=g) for g in generators])

    def _stack(self, rows: list[Tensor]) -> Tensor:
        batch = torch.stack(rows)
        if self.device.type == "cuda":  # from pinned memory the copy does not wait for the device
            return batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device)

    def start(self) -> Tensor:
        own = self.draw(self.generators)  # drawn in any case: the steps must not see this noise again
        return own if self.starts is self.generators else self.draw(self.starts)

    def posterior(self) -> Tensor:
        """For the latents of an init image; text and image to image start from equal noise."""
        return self.draw([place_generator(seed, b"posterior") for seed in self.seeds])

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        if self.paths is None:
            return self.draw(self.generators)
        return self._stack([path.increment(sigma, sigma_next) for path in self.paths])

    def finish(self, unused: int) -> None:
        """A stream of one's own has nobody to keep in step with."""


class VariedNoise:
    """The way from one batch's noise to another's: 0 is the first exactly, 1 is the second exactly.

    Every draw goes along the sphere, so that it stays as long as noise is.
    """

    def __init__(self, first: ImageNoise, second: ImageNoise, strength: float):
        self.first, self.second, self.strength = first, second, strength

    def start(self) -> Tensor:
        return slerp(self.first.start(), self.second.start(), self.strength)

    def posterior(self) -> Tensor:
        return slerp(self.first.posterior(), self.second.posterior(), self.strength)

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        return slerp(self.first(sigma, sigma_next), self.second(sigma, sigma_next), self.strength)

    def finish(self, unused: int) -> None:
        pass


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Between a and b, [b, c, h, w], along the great circle of each image; exactly a at 0 and b at 1.

    Shoemake 1985, https://doi.org/10.1145/325165.325242.
    """
    if t in (0.0, 1.0):
        return b if t else a
    cosine = torch.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1, 1)[:, None, None, None]
    angle = torch.acos(cosine)
    along = (a * torch.sin((1 - t) * angle) + b * torch.sin(t * angle)) / torch.sin(angle)
    return torch.where(cosine > 0.9995, torch.lerp(a, b, t), along)  # equal ones have no circle


class CompvisNoise:
    """The original's one generator for the whole run, on the run's device; also the draws it threw away."""

    def __init__(
        self,
        generator: torch.Generator,
        shape: Sequence[int],
        start_code: Tensor | None = None,
        posterior: Tensor | None = None,
    ):
        self.generator = generator
        self.shape = tuple(shape)  # of the batch: b, c, h, w
        self.start_code = start_code  # --fixed_code: drawn once for all batches
        self.posterior_code = posterior  # image to image: drawn once for all batches

    def draw(self) -> Tensor:
        return torch.randn(self.shape, generator=self.generator, device=self.generator.device)

    def start(self) -> Tensor:
        return self.draw() if self.start_code is None else self.start_code

    def posterior(self) -> Tensor:
        return self.posterior_code

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        return self.draw()

    def finish(self, unused: int) -> None:
        """Draw what the original's sampler draws and multiplies by zero."""
        for _ in range(unused):
            self.draw()


Noise = ImageNoise | VariedNoise | CompvisNoise


def noise_source(
    rng: str,
    seed: int,
    shape: Sequence[int],
    fixed_code: bool,
    device: torch.device,
    n_samples: int,
    *,
    init_image: bool = False,
    brownian: bool = False,
    variation: tuple[int, float] | None = None,
    start_seed: int | None = None,
) -> Callable[[Batch], Noise]:
    """The noise of each batch of a run: `rng` is "image" or "compvis", `shape` is one image's [c, h, w].

    Image k has the seed that its batch gives it, or `seed + k`, modulo 2^63, and is varied towards
    `variation`'s (seed + k, strength). `fixed_code` starts every batch from equal noise, that of `start_seed`
    (by default `seed`), in the original's stream drawn for `n_samples` images. Only per-image noise is
    `brownian` or varied.
    """
    if rng == "compvis":
        generator = torch.Generator(device).manual_seed(seed)
        host = generator if device.type == "cpu" else torch.Generator().manual_seed(seed)
        posterior = torch.randn(n_samples, *shape, generator=host).to(device) if init_image else None
        code = torch.randn(n_samples, *shape, generator=generator, device=device) if fixed_code else None

        def rows(draw: Tensor | None, batch: Batch) -> Tensor | None:
            return None if draw is None else draw[batch.position : batch.position + len(batch)]

        return lambda batch: CompvisNoise(
            generator, (len(batch), *shape), rows(code, batch), rows(posterior, batch)
        )

    def own(seed: int, batch: Batch, first: int | None, given: Sequence[int | None] | None) -> ImageNoise:
        given = given or [None] * len(batch)
        seeds = [image_seed(seed, k) if g is None else g for g, k in zip(given, batch.numbers, strict=True)]
        starts = None if first is None else start_seeds(first, batch)
        return ImageNoise(seeds, shape, device, starts, brownian)

    def image_noise(batch: Batch) -> ImageNoise | VariedNoise:
        first = (seed if start_seed is None else start_seed) if fixed_code else None
        noise = own(seed, batch, first, batch.seeds)
        if variation is None:
            return noise
        return VariedNoise(noise, own(variation[0], batch, None, None), variation[1])

    return image_noise


def start_seeds(first: int, batch: Batch) -> list[int]:
    """With --fixed_code: the seeds from whose noise the images of a batch start."""
    return [image_seed(first, batch.position + i) for i in range(len(batch))]


def image_seed(seed: int, k: int) -> int:
    """The seed of image k of a run."""
    return (seed + k) % (MAX_SEED + 1)
