"""Whether two images are the same but for rounding, and where they are not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK, SQUARE = 8, 2  # pixels, of the watermark: it moves one square, or two, of each block
MOVED = 1 / 8  # of the blocks: another watermark moves a third, and 1 % of rounded pixels a fiftieth
LOSSY = 6.0  # levels that the average of a block may differ by in a JPEG or WebP file
SHADE, BEYOND = 0.35, (255, 40, 40)  # of what is equal in a difference's image, and the colour of what is not


@dataclass(frozen=True)
class Difference:
    """How an image differs from another one of its size."""

    largest: int  # levels of 255
    at: tuple[int, int]  # x and y of a pixel with the largest
    share: float  # of the pixels that differ at all
    marks: int  # blocks in which only the watermark lies elsewhere
    beyond: np.ndarray  # bool [H, W]: differs by more than rounding

    @property
    def identical(self) -> bool:
        return self.largest == 0

    @property
    def altered(self) -> bool:
        return bool(self.beyond.any())

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, width and height of all that is altered."""
        rows, columns = (np.flatnonzero(self.beyond.any(axis=axis)) for axis in (1, 0))
        return columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1


def difference(
    found: np.ndarray, expected: np.ndarray, tolerance: int, *, marked: bool = False, lossy: bool = False
) -> Difference:
    """How `found` differs from `expected`, both uint8 [H, W, 3].

    Rounding is what differs by at most `tolerance` levels. In a `marked` image one level may also move the
    invisible watermark: it lies in other squares of 2 x 2 pixels then, at most two in a block of 8 x 8, and
    in few blocks. In a `lossy` file the averages of blocks are compared.
    """
    gap = np.abs(found.astype(np.int16) - expected.astype(np.int16)).max(axis=-1)  # [H, W]
    y, x = np.unravel_index(gap.argmax(), gap.shape)
    marks = 0
    if lossy:
        beyond = _enlarged(_block_gaps(found, expected) > LOSSY + tolerance, gap.shape)
    else:
        beyond = gap > tolerance
        if marked and beyond.any():
            moved = _moved_marks(beyond)
            if moved.mean() <= MOVED:
                marks, beyond = int(moved.sum()), beyond & ~_enlarged(moved, gap.shape)
    return Difference(int(gap[y, x]), (int(x), int(y)), float((gap > 0).mean()), marks, beyond)


def difference_image(found: np.ndarray, gaps: Difference) -> np.ndarray:
    """The image in dark grey, and what is altered in red, uint8 [H, W, 3]."""
    grey = (found.mean(axis=-1, keepdims=True) * SHADE).astype(np.uint8)
    return np.where(gaps.beyond[..., None], np.uint8(BEYOND), grey)


def _blocks(x: np.ndarray, side: int) -> np.ndarray:
    """x [H, W, …] in squares, [rows, columns, side, side, …], the last ones with their edges repeated."""
    edges = [(0, -x.shape[axis] % side) for axis in (0, 1)] + [(0, 0)] * (x.ndim - 2)
    x = np.pad(x, edges, mode="edge")
    rows, columns = x.shape[0] // side, x.shape[1] // side
    return x.reshape(rows, side, columns, side, *x.shape[2:]).swapaxes(1, 2)


def _enlarged(blocks: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """One value a block as one a pixel, [H, W]."""
    return blocks.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)[: shape[0], : shape[1]]


def _block_gaps(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The largest difference of the three averages of each block, [rows, columns]."""
    averages = [_blocks(image.astype(np.float32), BLOCK).mean(axis=(2, 3)) for image in (found, expected)]
    return np.abs(averages[0] - averages[1]).max(axis=-1)


def _moved_marks(beyond: np.ndarray) -> np.ndarray:
    """Blocks, bool [rows, columns], that are beyond rounding in one or two squares alone."""
    squares = _blocks(_blocks(beyond, SQUARE).any(axis=(2, 3)), BLOCK // SQUARE).sum(axis=(2, 3))
    return (squares > 0) & (squares <= 2)
