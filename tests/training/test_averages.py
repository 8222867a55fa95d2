"""Averages of weights: the original's schedule, and the way there and back."""

import contextlib

import pytest
import torch
from torch import nn

from ldm.modules.ema import LitEma
from ldm.training.averages import Averages


def test_the_decay_follows_the_originals_schedule() -> None:
    """After n updates it is min(decay, (1 + n) / (10 + n))."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    averages = Averages({"w": weight}, 0.4)
    expected = 0.0
    for n, value in enumerate([1.0, -2.0, 3.0, 0.5, 4.0, 1.5, 2.0], start=1):
        weight.data.fill_(value)
        averages.update()
        decay = min(0.4, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        assert averages.averages[0].item() == pytest.approx(expected)
    assert (1 + 5) / (10 + 5) == 0.4, "the schedule has reached the decay after 5 of the 7"


def test_they_equal_those_of_the_models_own_class() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 4)
    ours, theirs = Averages(dict(module.named_parameters()), 0.999), LitEma(module, 0.999)
    for _ in range(5):
        for weight in module.parameters():
            weight.data += torch.randn_like(weight)
        ours.update()
        theirs(module)
    for average, (other, _) in zip(ours.averages, theirs.pairs(module), strict=True):
        torch.testing.assert_close(average, other)


def test_they_are_applied_for_a_while() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    averages = Averages({"w": weight}, 0.9)
    weight.data.fill_(5.0)
    with contextlib.suppress(KeyboardInterrupt), averages.applied():
        assert weight.item() == 1.0
        raise KeyboardInterrupt
    assert weight.item() == 5.0
    assert averages.averages[0].item() == 1.0


def test_they_continue_from_those_of_a_checkpoint() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    averages = Averages({"w": weight}, 0.5)
    weight.data.fill_(3.0)
    averages.take(1000)
    weight.data.fill_(4.0)
    averages.update()
    assert averages.averages[0].item() == 3.5
    assert averages.updates == 1001
