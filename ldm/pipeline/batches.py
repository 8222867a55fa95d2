"""Which images are sampled together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from ldm.errors import FieldError
from ldm.pipeline.request import ImageRequest, image_seed


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
