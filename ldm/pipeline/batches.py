"""Which images are sampled together, in how large parts, and how many steps they took. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ldm.errors import FieldError
from ldm.fields import settings_of
from ldm.log import notice
from ldm.pipeline.request import DEPTH, INIT, MASK, UPSCALE, ImageRequest, image_seed
from ldm.pipeline.settings.control import CONTROL
from ldm.pipeline.settings.text import TextSettings

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.sampling.steps import Callback

# Groups of settings that decide what the UNet is given, and how large it is.
INPUTS = (INIT, MASK, DEPTH, UPSCALE, CONTROL, "size")


def plan_batches(keys: Sequence[Hashable], size: int) -> list[tuple[int, ...]]:
    """The numbers of images with equal keys, at most `size` together, by the first image of each key."""
    members: dict[Hashable, list[int]] = {}
    for k, key in enumerate(keys):
        members.setdefault(key, []).append(k)
    return [
        tuple(numbers[start : start + size])
        for numbers in members.values()
        for start in range(0, len(numbers), size)
    ]


def check_one_stream(requests: Sequence[ImageRequest]) -> None:
    """FieldError if the original's one stream is asked for, and requests differ in what a batch shares."""
    streamed = any(request.rng == "compvis" for request in requests)
    if streamed and len({request.batch_key() for request in requests}) > 1:
        raise FieldError("{rng} compvis is one stream for images of equal settings")


def with_start_seeds(batch: Sequence[ImageRequest], seed: int) -> list[ImageRequest]:
    """The requests of a batch; with `fixed_code` each starts from the noise of `start_seed`, by default the
    run's `seed`, plus its place in the batch. In the original's one stream there are no seeds to set.
    """
    return [
        request.twin(start_seed=image_seed(seed if request.start_seed is None else request.start_seed, i))
        if request.fixed_code and request.rng == "image"
        else request
        for i, request in enumerate(batch)
    ]


class Steps:
    """Counts the steps of one batch, so that they can be taken back if they were for nothing."""

    def __init__(self, on_step: Callable[[int], None] | None, on_x0: Callback):
        self.on_step, self.on_x0, self.taken = on_step, on_x0, 0

    def count(self, step: int, x0: Tensor) -> None:
        self.taken += len(x0)
        if self.on_step:
            self.on_step(len(x0))
        if self.on_x0:
            self.on_x0(step, x0)

    def take_back(self) -> None:
        if self.on_step:
            self.on_step(-self.taken)


def probe(request: ImageRequest) -> ImageRequest:
    """One step of a request: the same size, guidance and inputs of the UNet."""
    names = [name for name, each in settings_of(ImageRequest).items() if each.group in INPUTS]
    names += ["prompt", "negative_prompt", *settings_of(TextSettings)]  # long or composed ones are more work
    inputs = {name: getattr(request, name) for name in names}
    if request.strength is not None:
        inputs["strength"] = 1.0
    if request.hires is not None:
        inputs |= {"hires_strength": 1.0, "hires_steps": 1}
    inputs["control"] = tuple(replace(one, start=0.0, end=1.0) for one in request.controls)  # at any step
    return ImageRequest(scale=request.scale, cfg_pp=request.cfg_pp, steps=1, seed=0, **inputs)


def parts_of(batch: Sequence[ImageRequest], size: int) -> list[Sequence[ImageRequest]]:
    """The same requests, at most `size` at a time."""
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def half_of(batch: Sequence[ImageRequest], height: int, width: int) -> int:
    """The size of batch to try after this one, of images of this size, did not fit. InputError if none is."""
    images, size = len(batch), f"{width}x{height}"
    if images == 1:
        raise FieldError(
            "out of memory with one image of {size}; take a smaller {height} and {width}", size=size
        )
    if batch[0].rng == "compvis":
        raise FieldError(
            "out of memory with {images} images of {size}; the original's stream ({rng} compvis) is drawn "
            "for whole batches, so take a smaller {n_samples}",
            images=images,
            size=size,
        )
    notice(f"out of memory with {images} images of {size} at once: going on with {images // 2}")
    return images // 2
