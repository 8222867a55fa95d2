"""Where random numbers come from: a stream for each image, or the original's one stream for the run.

Both are callables `noise(sigma, sigma_next)` for the samplers, with `start()` for the initial latents and
`posterior()` for the draw of an init image's latents.
"""

import math
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def image_generator(seed: int) -> torch.Generator:
    """A CPU generator for one image.

    torch's CPU generator reads only the low 32 bits of a seed; larger ones are folded so that they differ.
    """
    return torch.Generator().manual_seed(seed if seed < 2**32 else zlib.crc32(seed.to_bytes(8, "little")))


def place_seed(seed: int, place: bytes) -> int:
    """The seed, below 2^32, of one thing about an image."""
    return zlib.crc32(seed.to_bytes(8, "little") + place)


def place_generator(seed: int, place: bytes) -> torch.Generator:
    """A CPU generator for one thing about an image, which other draws do not move."""
    return torch.Generator().manual_seed(place_seed(seed, place))


class BrownianPath:
    """A Brownian motion over sigma that its seed alone fixes: a virtual tree of bridges.

    A value does not depend on which others were asked for, so runs of one seed have like noise for any number
    of steps (Li et al. 2020, https://arxiv.org/abs/2001.01328).
    """

    def __init__(self, seed: int, shape: Sequence[int], depth: int = 16):
        self.seed = seed
        self.shape = tuple(shape)
        self.depth = depth  # levels of halving time
        self._nodes: OrderedDict[tuple[int, int], Tensor] = OrderedDict()  # the most recently used

    def increment(self, sigma: float, sigma_next: float) -> Tensor:
        """Standard normal: what the path does between two sigmas, over the root of the time that takes."""
        u, u_next = self.time(sigma), self.time(sigma_next)
        return (self._at(u) - self._at(u_next)) / math.sqrt(u - u_next)

    @staticmethod
    def time(sigma: float) -> float:
        """0 … 1 for sigmas up to 1e10, about even in log sigma; see `tree_depth`."""
        return math.log1p(1000 * sigma) / 32

    def _at(self, u: float) -> Tensor:
        index, part = divmod(u * 2**self.depth, 1)
        left = self._node(self.depth, int(index))
        if part == 0:
            return left
        bridge = self._normal(struct.pack("<d", u)) * math.sqrt(part * (1 - part) / 2**self.depth)
        return torch.lerp(left, self._node(self.depth, int(index) + 1), part) + bridge

    def _node(self, level: int, index: int) -> Tensor:
        """The value at u = index / 2^level; some are kept, as neighbours share most of their ancestors."""
        place = level, index
        if place not in self._nodes:
            self._nodes[place] = self._bridge(level, index)
            while len(self._nodes) > 3 * self.depth:
                self._nodes.popitem(last=False)
        self._nodes.move_to_end(place)
        return self._nodes[place]

    def _bridge(self, level: int, index: int) -> Tensor:
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


def tree_depth(shortest: float) -> int:
    """The depth of a Brownian tree for runs whose smallest relative step is `shortest`.

    Two levels are to be leaves apart, as bridges within one leaf know nothing of each other: leaves of depth
    16 are 0.05 % apart, of depth 20 0.003 %. A deeper tree is the same path, with more detail.
    """
    return 16 if shortest >= 1e-3 else 20


@dataclass(frozen=True)
class ImageSeeds:
    """Where one image's random numbers come from. Seeds are 0 … 2^63 - 1."""

    seed: int
    start_seed: int | None = None  # another image's noise to start from; all else stays the image's own
    variation_seed: int | None = None  # every draw is varied towards that of this seed …
    variation_strength: float = 0.0  # … so far, 0 … 1; see `slerp`


class SeedStream:
    """All draws of one seed, [c, h, w], on the CPU; the steps' are a generator's or a Brownian path's."""

    def __init__(self, seed: int, shape: tuple[int, ...], depth: int | None, start_seed: int | None = None):
        self.seed = seed
        self.shape = shape
        self.generator = image_generator(seed)
        self.path = None if depth is None else BrownianPath(seed, shape, depth)
        self.other_start = None if start_seed is None else image_generator(start_seed)

    def start(self) -> Tensor:
        own = self._draw(self.generator)  # drawn in any case: the steps must not see this noise again
        return own if self.other_start is None else self._draw(self.other_start)

    def posterior(self) -> Tensor:
        return self._draw(place_generator(self.seed, b"posterior"))

    def at(self, place: bytes, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=place_generator(self.seed, place))

    def step(self, sigma: float, sigma_next: float) -> Tensor:
        return self._draw(self.generator) if self.path is None else self.path.increment(sigma, sigma_next)

    def _draw(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.shape, generator=generator)


class ImageNoise:
    """Each image's own noise, drawn and varied on the CPU in float32: equal on any device and in any batch.

    `shape` is one image's [c, h, w]. With `brownian` the steps' noise are the increments of a path of the
    image's seed, in a tree of `depth` levels.
    """

    def __init__(
        self,
        images: Sequence[ImageSeeds],
        shape: Sequence[int],
        device: torch.device,
        brownian: bool = False,
        depth: int = 16,
    ):
        self.device = device
        self.strengths = [image.variation_strength for image in images]
        levels = depth if brownian else None
        self.streams = [SeedStream(i.seed, tuple(shape), levels, i.start_seed) for i in images]
        self.others = [
            None if i.variation_seed is None else SeedStream(i.variation_seed, tuple(shape), levels)
            for i in images
        ]
        self._start: Tensor | None = None

    def start(self) -> Tensor:
        """What the images start from, drawn once."""
        if self._start is None:
            self._start = self._batch(SeedStream.start)
        return self._start

    def posterior(self) -> Tensor:
        """For the latents of an init image; text and image to image start from equal noise."""
        return self._batch(SeedStream.posterior)

    def at(self, place: bytes, shape: tuple[int, ...]) -> Tensor:
        """For something else about each image, [b, *shape], which other draws do not move."""
        return self._batch(lambda stream: stream.at(place, shape))

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        return self._batch(lambda stream: stream.step(sigma, sigma_next))

    def finish(self, unused: int) -> None:
        """A stream of one's own has nobody to keep in step with."""

    def _batch(self, draw: Callable[[SeedStream], Tensor]) -> Tensor:
        """One draw of each image's, [b, c, h, w], on the device."""
        rows = []
        for stream, other, strength in zip(self.streams, self.others, self.strengths, strict=True):
            row = draw(stream)
            rows.append(row if other is None else slerp(row[None], draw(other)[None], strength)[0])
        batch = torch.stack(rows)
        if self.device.type == "cuda":  # from pinned memory the copy does not wait for the device
            return batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device)


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


class CompvisStream:
    """The original's one generator for a whole run, whose batches draw one after the other.

    `shape` is one image's [c, h, w]. What the original draws once for all batches is drawn here, for the
    `first_batch` images of the first one, which is the largest: with `init_image` the posterior's noise, with
    `fixed_code` the noise that every batch starts from.
    """

    def __init__(
        self,
        seed: int,
        shape: Sequence[int],
        device: torch.device,
        first_batch: int,
        *,
        fixed_code: bool = False,
        init_image: bool = False,
    ):
        self.shape = tuple(shape)
        self.generator = torch.Generator(device).manual_seed(seed)
        batch = (first_batch, *self.shape)
        # the original encodes on the host's random numbers, even where it samples on a GPU's
        host = self.generator if device.type == "cpu" else torch.Generator().manual_seed(seed)
        self.posterior = torch.randn(batch, generator=host).to(device) if init_image else None
        self.code = torch.randn(batch, generator=self.generator, device=device) if fixed_code else None

    def batch(self, images: int, position: int = 0) -> CompvisNoise:
        """The noise of the next `images` images, the first of which is at `position` within its batch."""
        rows = slice(position, position + images)
        code = None if self.code is None else self.code[rows]
        posterior = None if self.posterior is None else self.posterior[rows]
        return CompvisNoise(self.generator, (images, *self.shape), code, posterior)


NoiseSource = ImageNoise | CompvisNoise
