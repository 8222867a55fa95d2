"""What a run makes: which image has which request, and which are sampled together. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ldm.images.names import file_name, unique_names
from ldm.pipeline.batches import plan_batches, with_start_seeds
from ldm.pipeline.request import ImageRequest, image_name, image_seed


@dataclass(frozen=True)
class Plan:
    """The images of a run, numbered from 0, and the batches that they are made in."""

    requests: list[ImageRequest]
    batches: list[tuple[int, ...]]

    def batch(self, numbers: Sequence[int]) -> list[ImageRequest]:
        return [self.requests[k] for k in numbers]

    def remaining(self, missing: Sequence[int]) -> list[tuple[int, ...]]:
        """The batches with missing images; of one stream for all also those before, which draw from it."""
        lacking = set(missing)
        wanted = [i for i, batch in enumerate(self.batches) if not lacking.isdisjoint(batch)]
        if self.requests[0].rng == "compvis":
            return self.batches[: wanted[-1] + 1] if wanted else []
        return [self.batches[i] for i in wanted]


def plan_run(
    round_of_requests: Sequence[ImageRequest], seed: int, n_iter: int, n_samples: int, batch_size: int | None
) -> Plan:
    """A run in the original's order: all requests, `n_samples` at a time, `n_iter` times over.

    Image k has the run's seed + k, or its request's own, which rises by one with each round. Requests that
    cannot share a batch go into different ones. With a `batch_size` images of all rounds share batches.
    """
    count = len(round_of_requests)
    requests = [
        _seeded(request, seed, iteration * count + i, iteration)
        for iteration in range(n_iter)
        for i, request in enumerate(round_of_requests)
    ]
    keys = [request.batch_key() for request in round_of_requests]
    if batch_size is None:
        in_round = plan_batches(keys, n_samples)
        batches = [
            tuple(iteration * count + i for i in batch) for iteration in range(n_iter) for batch in in_round
        ]
    else:
        batches = plan_batches(keys * n_iter, batch_size)
    if any(request.fixed_code for request in requests):
        for batch in batches:
            for k, request in zip(batch, with_start_seeds([requests[k] for k in batch], seed), strict=True):
                requests[k] = request
    return Plan(requests, batches)


def _seeded(request: ImageRequest, seed: int, k: int, iteration: int) -> ImageRequest:
    """Image k's own request; in the original's one stream all images have the run's seed."""
    if request.rng == "compvis":
        return request.twin(seed=seed)
    own = image_seed(seed, k) if request.seed is None else image_seed(request.seed, iteration)
    if request.variation_seed is None:
        return request.twin(seed=own)
    # beside a seed of its own, the line's number must not decide either
    shift = k if request.seed is None else iteration
    return request.twin(seed=own, variation_seed=image_seed(request.variation_seed, shift))


def file_names(template: str, plan: Plan, first: int, model: Mapping[str, Any]) -> list[str]:
    """The file of each image of a run, without suffix, as --filename says; `first` is image 0's number.

    `model` are the model's facts that a name may show: checkpoint and model_hash.
    """
    facts = {"model": PurePath(model["checkpoint"]).stem, "model_hash": model.get("model_hash")}

    def own(request: ImageRequest) -> dict[str, Any]:
        source = {} if request.init_img is None else {"init_img": PurePath(image_name(request.init_img)).stem}
        return {**request.settings(), **source, **facts}

    return list(
        unique_names(
            file_name(template, {**own(request), "image": k, "number": first + k})
            for k, request in enumerate(plan.requests)
        )
    )
