"""Which image of a run has which request, and which are sampled together."""

import pickle
import random
import tracemalloc
from dataclasses import replace

import pytest

from ldm.pipeline.batches import plan_batches
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


@pytest.mark.parametrize("seed", range(8))
def test_batches_that_are_worked_out_are_those_of_a_list(seed: int) -> None:
    """Of rounds in which some requests may share a batch, with and without a batch size."""
    rng = random.Random(seed)
    keys, n_iter, size = (
        [rng.choice("abc") for _ in range(rng.randint(1, 9))],
        rng.randint(1, 5),
        rng.randint(1, 4),
    )
    lines = [ImageRequest("a", scale=7.5, steps=10 + ord(key), fixed_code=True) for key in keys]
    whole = plan_run(lines, 42, n_iter, 1, size)
    assert whole.batches == plan_batches(keys * n_iter, size)
    rounds = plan_run(lines, 42, n_iter, size, None)
    of_round = plan_batches(keys, size)
    shifted = [tuple(i * len(keys) + k for k in batch) for i in range(n_iter) for batch in of_round]
    assert rounds.batches == shifted
    for plan in (whole, rounds):
        assert [plan.batches[i] for i in range(-len(plan.batches), len(plan.batches))] == list(
            plan.batches
        ) * 2
        places = {k: place for batch in plan.batches for place, k in enumerate(batch)}
        assert [request.start_seed - 42 for request in plan.requests] == [
            places[k] for k in range(len(plan.requests))
        ]
        with pytest.raises(IndexError):
            plan.batches[len(plan.batches)]
        with pytest.raises(IndexError):
            plan.requests[len(plan.requests)]


def test_a_million_images_are_planned_in_little_memory() -> None:
    """Each had a request, a batch and a name in memory, 1.4 GB, and each process was sent all of them."""
    lines = requests(*map(str, range(1000)))
    tracemalloc.start()
    plan = plan_run(lines, 42, n_iter=1000, n_samples=4, batch_size=None)
    names = file_names("{number:05}-{seed}-{prompt}", plan, 10, {"checkpoint": "x.ckpt"})
    data = pickle.dumps((plan, plan.batches, names))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6
    assert len(data) < 1e6
    plan, batches, names = pickle.loads(data)
    assert (len(plan.requests), len(batches), len(names)) == (1_000_000, 250_000, 1_000_000)
    assert batches[-1] == (999_996, 999_997, 999_998, 999_999)
    assert (plan.requests[-1].prompt, plan.requests[-1].seed) == ("999", 42 + 999_999)
    assert names[123_456] == "123466-123498-456"


def test_steps_are_counted_by_line() -> None:
    lines = [*requests("a", "b"), *requests("c", steps=9)]
    plan = plan_run(lines, 42, n_iter=5, n_samples=2, batch_size=None)
    assert plan.images_of_lines(plan.batches) == {0: 10, 2: 5}
    assert plan.images_of_lines(plan.remaining([2, 12])) == {2: 1, 0: 2}
