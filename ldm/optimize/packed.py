"""Weights in oneDNN's order, and products of matrices that are added to those of linear layers there.

For its products oneDNN keeps a weight [o, i] in blocks of rows, each block transposed: [o / n, i, n]. A
LoRA's up @ down can be made in this order, block by block, which is faster than making the weight dense and
reordering it again. The order is oneDNN's own affair and depends on processor and shape. So it is found out
with a matrix of numbers, and where it is another one there is no such short way.
"""

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

BLOCKS = (64, 48, 32, 24, 16, 8)  # rows that one block may have
EXACT = 2**24  # float32 has all whole numbers below


def pack(weight: Tensor) -> Tensor:
    """A weight [o, i], or that of a 1x1 convolution, in oneDNN's order."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.flatten(1))


def pack_conv(weight: Tensor, geometry: Sequence, input_size: Sequence[int] | None = None) -> Tensor:
    """A weight [o, i / groups, kh, kw] in oneDNN's order.

    `geometry` is padding, stride, dilation and groups; the order is the best for `input_size`, if given.
    """
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, input_size)


dense = Tensor.to_dense  # of a weight in oneDNN's order, exactly


def pack_halves(weight: Tensor) -> list[Tensor]:
    """The first and the second half of a weight's rows, each in oneDNN's order."""
    return [pack(half.contiguous()) for half in weight.chunk(2)]


def dense_halves(halves: Sequence[Tensor]) -> Tensor:
    return torch.cat([dense(half) for half in halves])


def plus_product(packed: Tensor, up: Tensor, down: Tensor) -> Tensor | None:
    """A packed float32 weight [o, i] plus up [o, r] @ down [r, i], packed; None if there is no short way."""
    rows = rows_in_block(*packed.shape) if packed.dtype == torch.float32 else None
    if rows is None:
        return None
    total = packed.clone()
    blocks = _memory(total).view(-1, packed.shape[1], rows)  # [o / n, i, n]
    ups = up.view(len(blocks), rows, -1).transpose(1, 2)  # [o / n, r, n]
    blocks.baddbmm_(down.t().contiguous().expand(len(blocks), -1, -1), ups)
    return total


def halves_plus_product(halves: Sequence[Tensor], up: Tensor, down: Tensor) -> list[Tensor] | None:
    """`plus_product` of the halves of a weight's rows."""
    sums = [plus_product(half, part, down) for half, part in zip(halves, up.chunk(2), strict=True)]
    return None if any(one is None for one in sums) else sums


@cache
def rows_in_block(rows: int, columns: int) -> int | None:
    """The n of the order [o / n, i, n] in which oneDNN keeps float32 weights of this shape, if it does."""
    if rows * columns > EXACT:
        return None
    numbers = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    try:
        packed = pack(numbers).clone()
        values = _memory(packed)
    except (AttributeError, RuntimeError):  # a torch without these operators
        return None
    for n in BLOCKS:
        if rows % n == 0:
            ordered = numbers.view(-1, n, columns).transpose(1, 2)
            if torch.equal(values.view_as(ordered), ordered):
                return n
    return None


def _memory(packed: Tensor) -> Tensor:
    """The values of a packed float32 tensor as they lie in memory, [n], for as long as the tensor is there.

    RuntimeError where they are padded.
    """
    if torch.ops.mkldnn._nbytes(packed) != 4 * packed.numel():
        raise RuntimeError("the packed weight is padded")
    values = (ctypes.c_float * packed.numel()).from_address(torch.ops.mkldnn.data_ptr(packed))
    return torch.frombuffer(values, dtype=torch.float32)
