"""From decoded tensors to pixels, and from many images to one grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

GRID_PADDING = 2  # black pixels around every image of a grid


def finite_images(x: Tensor) -> list[bool]:
    """Whether each image of [b, ...] is free of NaN and infinity, of which `to_uint8` would make colours."""
    return x.isfinite().flatten(1).all(dim=1).tolist()


def to_float(images: Sequence[np.ndarray] | Tensor) -> Tensor:
    """Images uint8 [H, W, 3], or all in one tensor -> float32 [b, 3, H, W] in [-1, 1]."""
    import torch

    x = images if isinstance(images, torch.Tensor) else torch.from_numpy(np.stack(images))
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_uint8(x: Tensor) -> np.ndarray:
    """Decoded images [b, 3, H, W] in [-1, 1], any float dtype and device -> uint8 [b, H, W, 3], rounded.

    Values beyond the range are clamped; check `finite_images` first.
    """
    x = (x.float() + 1) / 2  # half precision has too few bits for 255 levels
    return (255 * x.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def of_one_size(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Images uint8 [H, W, 3] of any sizes, the smaller ones with black below and to the right."""
    if len({image.shape for image in images}) == 1:
        return list(images)
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    edges = [((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)) for image in images]
    return [np.pad(image, edge) for image, edge in zip(images, edges, strict=True)]


def make_grid(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Images uint8 [H, W, 3] of one size, row by row, `columns` to a row -> one image uint8 [H', W', 3].

    The layout of `torchvision.utils.make_grid(nrow=columns)`: no more columns than images, two black pixels
    around each image, and a single image is returned without them.
    """
    if len({image.shape for image in images}) != 1:
        raise ValueError(f"a grid takes images of one size, not {[image.shape for image in images]}")
    if len(images) == 1:
        return images[0]

    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    height, width, channels = images[0].shape
    cell_height, cell_width = height + GRID_PADDING, width + GRID_PADDING
    grid = np.zeros(
        (rows * cell_height + GRID_PADDING, columns * cell_width + GRID_PADDING, channels), np.uint8
    )
    for index, image in enumerate(images):
        top = index // columns * cell_height + GRID_PADDING
        left = index % columns * cell_width + GRID_PADDING
        grid[top : top + height, left : left + width] = image
    return grid
