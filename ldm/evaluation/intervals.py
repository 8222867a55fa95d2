"""Confidence intervals of what is measured on a sample of images. Imports no numpy by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.95
RESAMPLES = 1000
_NORMAL_QUANTILE = 1.959963985  # of LEVEL: 97.5 % of a standard normal variable lie below it


@dataclass(frozen=True)
class Figure:
    """A measured value with the ends of its interval of LEVEL."""

    value: float
    low: float
    high: float


def bootstrap(value: float, influences: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Figure:
    """A statistic with the percentile interval of its bootstrap over images, to first order.

    `influences` [n] says how much each image moves the statistic: in a resample of n images with replacement
    it is `value` plus the mean of their influences, less the mean of all. This is exact for a mean, where an
    image's influence is its distance from the mean. For other statistics it is the bootstrap of their linear
    part (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 21). The same `seed` gives the
    same interval.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    centred = np.asarray(influences, np.float64) - np.mean(influences)
    means = [centred[rng.integers(len(centred), size=len(centred))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Figure(float(value), float(value + low), float(value + high))


def share(passed: np.ndarray) -> Figure:
    """The share of images that passed, bool [n], with Wilson's score interval.

    Near 0 and 1 a bootstrap interval shrinks to nothing; this one does not. Wilson, 1927.
    """
    import numpy as np

    n, p, z = len(passed), float(np.mean(passed)), _NORMAL_QUANTILE
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # rounding puts an end that is 0 or 1 a little beyond it
    return Figure(p, float(max(0.0, min(p, centre - half))), float(min(1.0, max(p, centre + half))))
