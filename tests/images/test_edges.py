"""Canny's edges: one pixel wide, where the brightness changes enough."""

import numpy as np

from ldm.images.edges import canny


def test_edges_of_a_square() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[8:24, 8:24] = 200
    edges = canny(pixels)
    assert (edges.shape, edges.dtype) == (pixels.shape, np.uint8)
    assert set(np.unique(edges)) == {0, 255}
    assert (edges[..., 0] == edges[..., 1]).all()
    rows, columns = np.nonzero(edges[..., 0])
    assert {rows.min(), columns.min()} <= {7, 8}
    assert {rows.max(), columns.max()} <= {23, 24}
    assert not edges[10:22, 10:22].any()


def test_the_thresholds() -> None:
    """A step of brightness that only lower thresholds find."""
    pixels = np.full((32, 32, 3), 100, np.uint8)
    pixels[:, 16:] = 115
    assert not canny(pixels).any()
    assert canny(pixels, 20, 40).any()
