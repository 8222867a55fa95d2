"""Which images are sampled together."""

from dataclasses import replace

from ldm.pipeline.batches import plan_batches, with_start_seeds
from ldm.pipeline.request import MAX_SEED, ImageRequest


def test_equal_keys_share_batches_in_the_order_of_their_first_image() -> None:
    assert plan_batches("abaab", 2) == [(0, 2), (3,), (1, 4)]
    assert plan_batches("abaab", 3) == [(0, 2, 3), (1, 4)]
    assert plan_batches([], 3) == []


def test_each_batch_starts_from_the_same_noise() -> None:
    fixed = ImageRequest(fixed_code=True)
    assert [one.start_seed for one in with_start_seeds([fixed] * 3, 7)] == [7, 8, 9]
    given = replace(fixed, start_seed=MAX_SEED)
    assert [one.start_seed for one in with_start_seeds([given] * 2, 7)] == [MAX_SEED, 0]
    plain, compvis = ImageRequest(), ImageRequest(fixed_code=True, rng="compvis")
    assert with_start_seeds([plain, compvis], 7) == [plain, compvis]
