"""Which image of a run has which request, and which are sampled together."""

from dataclasses import replace

import pytest

from ldm.pipeline.request import MAX_SEED, ImageRequest
from ldm.runs.plan import Plan, file_names, plan_run


def requests(*prompts: str, **own: object) -> list[ImageRequest]:
    return [ImageRequest(prompt, scale=7.5, **own) for prompt in prompts]


def prompts(plan: Plan) -> list[tuple[str, ...]]:
    return [tuple(one.prompt for one in plan.batch(batch)) for batch in plan.batches]


def seeds(plan: Plan) -> list[int]:
    return [request.seed for request in plan.requests]


def test_the_last_batch_may_be_smaller() -> None:
    """The original paired it with a full batch of empty prompts and crashed, losing the grid."""
    plan = plan_run(requests("a", "b", "c"), 42, n_iter=2, n_samples=2, batch_size=None)
    assert plan.batches == [(0, 1), (2,), (3, 4), (5,)]
    assert prompts(plan) == [("a", "b"), ("c",), ("a", "b"), ("c",)]
    assert seeds(plan) == [42, 43, 44, 45, 46, 47]
    assert plan_run(requests("a"), 42, 1, 3, None).batches == [(0,)]


def test_rounds_are_no_bounds_for_a_batch_size() -> None:
    plan = plan_run(requests("a", "b", "c"), 42, n_iter=2, n_samples=2, batch_size=4)
    assert plan.batches == [(0, 1, 2, 3), (4, 5)]
    assert prompts(plan) == [("a", "b", "c", "a"), ("b", "c")]
    assert seeds(plan) == [42, 43, 44, 45, 46, 47]


def test_what_cannot_share_a_batch_stays_apart() -> None:
    """And a seed of a request's own rises by one with each round."""
    lines = [*requests("a"), *requests("b", steps=20, seed=7), *requests("c")]
    plan = plan_run(lines, 42, n_iter=2, n_samples=3, batch_size=8)
    assert plan.batches == [(0, 2, 3, 5), (1, 4)]
    assert seeds(plan) == [42, 7, 44, 45, 8, 47]
    assert plan_run(lines, 42, n_iter=2, n_samples=3, batch_size=None).batches == [(0, 2), (1,), (3, 5), (4,)]


def test_prompts_seeds_and_scales_may_differ_in_a_batch() -> None:
    lines = [ImageRequest("a", scale=3), ImageRequest("b", seed=7, scale=5), ImageRequest("c", scale=1)]
    assert plan_run(lines, 42, 1, 3, None).batches == [(0, 1), (2,)]


def test_seeds_wrap_around() -> None:
    assert seeds(plan_run(requests("a", "b"), MAX_SEED, 2, 2, None)) == [MAX_SEED, 0, 1, 2]
    assert seeds(plan_run(requests("a", seed=MAX_SEED), 42, 2, 1, None)) == [MAX_SEED, 0]


def test_variation_seeds_follow_the_images() -> None:
    lines = requests("a", "b", variation_seed=100, variation_strength=0.5)
    plan = plan_run(lines, 42, n_iter=2, n_samples=2, batch_size=None)
    assert [request.variation_seed for request in plan.requests] == [100, 101, 102, 103]
    assert seeds(plan) == [42, 43, 44, 45]


def test_fixed_code_starts_every_batch_from_the_same_noise() -> None:
    plan = plan_run(requests("a", "b", "c", fixed_code=True), 42, n_iter=2, n_samples=2, batch_size=None)
    assert [request.start_seed for request in plan.requests] == [42, 43, 42, 42, 43, 42]
    assert seeds(plan) == [42, 43, 44, 45, 46, 47]
    given = plan_run(requests("a", "b", fixed_code=True, start_seed=9), 42, 2, 2, None)
    assert [request.start_seed for request in given.requests] == [9, 10, 9, 10]


def test_the_one_stream_has_one_seed_and_is_drawn_from_its_beginning() -> None:
    plan = plan_run(requests("a", "b", rng="compvis"), 42, n_iter=3, n_samples=2, batch_size=None)
    assert seeds(plan) == [42] * 6
    assert plan.remaining([3]) == [(0, 1), (2, 3)]
    assert plan.remaining([]) == []


def test_what_remains_are_the_batches_with_missing_images() -> None:
    plan = plan_run(requests("a", "b"), 42, n_iter=3, n_samples=2, batch_size=None)
    assert plan.remaining([0, 5]) == [(0, 1), (4, 5)]
    assert plan.remaining(range(6)) == plan.batches


def test_file_names() -> None:
    plan = plan_run(requests("a cat"), 42, n_iter=3, n_samples=1, batch_size=None)
    model = {"checkpoint": "/models/sd-v1-4.ckpt", "model_hash": "fe4efff1e1"}
    assert file_names("{number:05}", plan, 7, model) == ["00007", "00008", "00009"]
    assert file_names("{model}/{model_hash}-{seed}", plan, 0, model)[1] == "sd-v1-4/fe4efff1e1-43"
    assert file_names("{prompt}", plan, 0, model) == ["a-cat", "a-cat-2", "a-cat-3"]


@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_request_is_otherwise_the_one_that_was_given(batch_size: int | None) -> None:
    lines = requests("a", "b", negative_prompt="c", sampler="euler", steps=9)
    plan = plan_run(lines, 42, 2, 2, batch_size)
    assert [replace(request, seed=None) for request in plan.requests] == lines * 2


def test_a_variation_does_not_depend_on_the_lines_number() -> None:
    """Beside a seed of its own, a request's variation seed moved on from line to line."""
    request = ImageRequest("a", seed=7, variation_seed=9, variation_strength=0.5)
    plan = plan_run([request] * 3, 42, 2, 3, None)
    assert [(one.seed, one.variation_seed) for one in plan.requests] == [(7, 9)] * 3 + [(8, 10)] * 3
