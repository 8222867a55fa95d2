"""Random numbers belong to one example of one step, whoever draws them."""

import itertools

import torch

from ldm.training.random import normal, row_generator, uniform


def test_each_row_step_seed_and_purpose_has_its_own_numbers() -> None:
    places = [*itertools.product((0, 1), (0, 1, 7), (0, 1, 7), ("data", "noise"))]
    drawn = [torch.rand((), generator=row_generator(*place)).item() for place in places]
    assert len(set(drawn)) == len(places)
    assert drawn == [torch.rand((), generator=row_generator(*place)).item() for place in places]


def test_parts_of_a_batch_draw_what_the_whole_draws() -> None:
    whole = normal(3, 5, range(6), (4, 2, 2), "noise")
    parts = [normal(3, 5, rows, (4, 2, 2), "noise") for rows in ([0, 1, 2], [3], [4, 5])]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(uniform(3, 5, range(6), "t")[4:], uniform(3, 5, [4, 5], "t"))


def test_the_numbers_are_standard_normal_and_uniform() -> None:
    numbers = normal(0, 0, range(100), (10, 10), "noise")
    assert abs(numbers.mean()) < 0.05
    assert abs(numbers.std() - 1) < 0.05
    u = uniform(0, 0, range(400), "t")
    assert 0 <= u.min() < 0.05
    assert 0.95 < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.05
