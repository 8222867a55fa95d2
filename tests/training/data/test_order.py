"""Every example exactly once an epoch, whatever the batch and the buckets."""

from collections import Counter

import numpy as np
import pytest

from ldm.training.data.order import Order


def order(lengths: list[int], batch_size: int, seed: int = 0) -> Order:
    """Groups of consecutive numbers."""
    ends = np.cumsum(lengths)
    return Order([np.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)], batch_size, seed)


@pytest.mark.parametrize("lengths", [[10], [3], [7, 5], [20, 1, 9, 2], [100, 30]], ids=str)
@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_every_example_comes_once_an_epoch(lengths: list[int], batch_size: int) -> None:
    """The pieces of a group, put together again, are permutations of it, one after the other."""
    one = order(lengths, batch_size)
    epochs = 3 * batch_size  # after so many all batches are full, whatever the lengths
    streams: dict[int, list[int]] = {}
    for step in range(one.steps_before(epochs)):
        group, batch = one.batch(step)
        assert len(batch) == batch_size
        streams.setdefault(group, []).extend(batch.tolist())
    assert set(Counter(number for stream in streams.values() for number in stream).values()) == {epochs}
    for group, stream in streams.items():
        length = lengths[group]
        pieces = [stream[start : start + length] for start in range(0, len(stream), length)]
        assert all(sorted(piece) == one.groups[group].tolist() for piece in pieces)
        if length > 5:
            assert pieces[0] != pieces[1] != pieces[2], "each epoch has an order of its own"


def test_an_epoch_of_one_bucket_is_a_whole_permutation() -> None:
    one = order([12], 4)
    first = np.concatenate([one.batch(step)[1] for step in range(3)])
    assert sorted(first.tolist()) == list(range(12))
    assert first.tolist() != list(range(12))


def test_a_step_needs_none_before_it() -> None:
    """A run that is resumed in the middle of an epoch goes on with the same batches."""
    lengths = [20, 1, 9, 2]
    every = [order(lengths, 6, seed=5).batch(step) for step in range(40)]
    for step in (39, 0, 17, 18, 3):
        group, batch = order(lengths, 6, seed=5).batch(step)
        assert (group, batch.tolist()) == (every[step][0], every[step][1].tolist())


def test_another_seed_is_another_order() -> None:
    batches = [np.concatenate([order([50], 5, seed).batch(step)[1] for step in range(10)]) for seed in (0, 1)]
    assert batches[0].tolist() != batches[1].tolist()


def test_buckets_are_mixed() -> None:
    one = order([40, 40], 4)
    groups = [one.batch(step)[0] for step in range(20)]
    assert sorted(groups) == [0] * 10 + [1] * 10
    assert groups != sorted(groups)


def test_a_group_that_is_smaller_than_a_batch_fills_it_over_epochs() -> None:
    one = order([3], 8)
    assert [one.epoch(step) for step in range(3)] == [2, 5, 7]
    assert sorted(Counter(one.batch(0)[1].tolist()).values()) == [2, 3, 3]
