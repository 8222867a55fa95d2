"""Aspect buckets: images of different shapes, in batches of one size each.

After NovelAI's improvements on Stable Diffusion (2022): an image goes to the size whose aspect ratio is
nearest to its own, so that little of it is cut away.
"""

import math

import numpy as np


def bucket_sizes(size: int, step: int = 64) -> list[tuple[int, int]]:
    """Widths and heights in multiples of `step`, of at most size² pixels, with sides of size/2 … 2 size."""
    sides = range(math.ceil(size / 2 / step) * step, 2 * size + 1, step)
    largest = {side: min(size * size // side // step * step, sides[-1]) for side in sides}
    lying = [(width, height) for width, height in largest.items() if height >= sides[0]]
    found = {*lying, *((height, width) for width, height in lying), (size // step * step,) * 2}
    return sorted(found)


def nearest_bucket(sizes: np.ndarray, buckets: list[tuple[int, int]]) -> np.ndarray:
    """Of images' widths and heights [n, 2] the numbers of the buckets of the nearest aspect ratio [n]."""
    ratios = np.log(sizes[:, 0] / sizes[:, 1])
    own = np.log([width / height for width, height in buckets])
    # Of two buckets with one ratio the larger is meant.
    order = sorted(range(len(buckets)), key=lambda k: -buckets[k][0] * buckets[k][1])
    return np.array(order)[np.abs(ratios[:, None] - own[order]).argmin(axis=1)]
