"""Bootstrap and Wilson intervals: their coverage on known distributions."""

import numpy as np
import pytest

from ldm.evaluation.fid import FrechetDistance, Statistics
from ldm.evaluation.intervals import bootstrap, share


def test_the_bootstrap_of_a_mean() -> None:
    """An exponential distribution of mean 1: 95 % of the intervals contain it."""
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(300):
        values = rng.exponential(size=200)
        figure = bootstrap(values.mean(), values, seed, resamples=300)
        assert figure.low < figure.value < figure.high
        hits += figure.low < 1 < figure.high
    assert 0.91 <= hits / 300 <= 0.98


def test_the_width_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(3, 2, 2000)
    figure = bootstrap(values.mean(), values, 0)
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * 2 / 2000**0.5, rel=0.1)
    assert bootstrap(values.mean(), values, 0) == figure
    assert bootstrap(values.mean(), values, 1) != figure


def test_the_bootstrap_of_a_distance() -> None:
    """Distances of samples from a normal distribution have a mean; 95 % of the intervals contain it."""
    rng = np.random.default_rng(2)
    mixing = rng.normal(size=(5, 5))
    distance = FrechetDistance(Statistics(rng.normal(size=5), np.eye(5)))
    figures = []
    for seed in range(300):
        value, influences = distance(rng.normal(size=(300, 5)) @ mixing + 1)
        figures.append(bootstrap(value, influences, seed, resamples=300))
    mean = np.mean([figure.value for figure in figures])
    assert 0.91 <= np.mean([figure.low < mean < figure.high for figure in figures]) <= 0.98


def test_shares() -> None:
    """Wilson's interval by hand: 8 of 10 are 49.0 to 94.3 %; all of 10 are not all of all."""
    figure = share(np.array([True] * 8 + [False] * 2))
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    every = share(np.ones(10, bool))
    assert (every.value, every.low, every.high) == pytest.approx((1, 0.7225, 1), abs=1e-4)
    none = share(np.zeros(10, bool))
    assert (none.value, none.low, none.high) == pytest.approx((0, 0, 0.2775), abs=1e-4)


def test_ends_of_shares_are_shares() -> None:
    """None of six was -3e-17 at least."""
    for n in range(1, 60):
        assert share(np.zeros(n, bool)).low == 0
        assert share(np.ones(n, bool)).high == 1
