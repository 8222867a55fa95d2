"""Timesteps, weights of the loss and the learning rate, against what the papers and recipes say."""

from typing import Any

import pytest
import torch
from tiny_training import TRAINING

from ldm.training.config import TrainingConfig, training_config
from ldm.training.objective import draw_timesteps, learning_rate, min_snr_weights
from ldm.training.random import uniform


def config(**changes: Any) -> TrainingConfig:
    return training_config(TRAINING | changes)


def test_each_example_has_its_part_of_the_timesteps() -> None:
    t = draw_timesteps(config(batch_size=10), 3, torch.arange(10))
    assert (t // 100).tolist() == list(range(10))
    assert t.dtype == torch.int64
    u = uniform(0, 3, range(10), "timestep")
    assert torch.equal(t, ((torch.arange(10) + u) * 100).long())


def test_no_timestep_is_beyond_the_schedule() -> None:
    """In float32 63 + rand rounded up to 64, so t became 1000: about 2 % of runs of 10,000 steps crashed."""
    last = torch.full((2000,), 63)
    steps = [draw_timesteps(config(batch_size=64), step, last[:1]) for step in range(300)]
    assert max(t.item() for t in steps) == 999


def test_the_first_rows_are_drilled() -> None:
    drill = config(batch_size=8, drill_share=0.75, drill_timesteps=[400, 500])
    t = draw_timesteps(drill, 0, torch.arange(8))
    assert ((t[:6] >= 400) & (t[:6] < 500)).all()
    assert t[:6].sort().values.equal(t[:6])
    assert t[6] < 500 <= t[7]
    everything = config(batch_size=8, drill_share=1.0, drill_timesteps=[400, 500])
    assert ((draw_timesteps(everything, 0, torch.arange(8)) // 100) == 4).all()


def test_a_model_of_other_timesteps() -> None:
    assert draw_timesteps(config(batch_size=4), 0, torch.arange(4), 40).tolist()[3] in range(30, 40)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_min_snr_weights_in_closed_form(parameterization: str) -> None:
    """SNR = a / (1 - a). The weight is min(SNR, 5) / SNR for eps and min(SNR, 5) / (SNR + 1) for v."""
    alphas = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)  # SNR 9, 1, 1/9
    expected = {"eps": [5 / 9, 1.0, 1.0], "v": [5 / 10, 1 / 2, 1 / 10]}[parameterization]
    weights = min_snr_weights(alphas, torch.arange(3), parameterization, 5.0)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [(0, [1, 0.75, 0.25]), (1, [1, 0.75, 0.25]), (2, [0.5, 0.75, 0.25]), (4, [0.25, 0.5, 0.25])],
)
def test_the_learning_rate_rises_then_falls_along_a_cosine(warmup: int, expected: list[float]) -> None:
    """A warmup of 0 divided by zero."""
    falling = config(warmup=warmup, steps=3, learning_rate=0.1)
    assert [learning_rate(falling, k) for k in range(3)] == pytest.approx([0.1 * f for f in expected])


def test_the_learning_rate_of_the_model_cards() -> None:
    """1e-4 after 10,000 steps, then constant."""
    card = config(warmup=10_000, steps=500_000, learning_rate=1e-4, schedule="constant")
    rates = [learning_rate(card, step) for step in (0, 4_999, 9_999, 10_000, 499_999)]
    assert rates == pytest.approx([1e-8, 5e-5, 1e-4, 1e-4, 1e-4])
