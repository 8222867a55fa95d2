"""GroupNorm over channels-last memory in Triton: statistics of tiles, then the normalised image.

torch's kernel has one block of threads for each image and group, 64 of them for a guided v1 step on a GPU
with 132 multiprocessors, and reads a group's pixels with large strides where channels lie together. Here the
pixels are split, too. A program has all channels of some groups, so no group's sum leaves it unfinished.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_TILES = 64  # of which every program of the second pass reads the statistics
TILE = 64  # pixels at least
PROGRAMS = 1024  # to aim at in the second pass: several for each multiprocessor of a large GPU


@triton.jit
def tile_statistics(
    x,
    offset,
    out,  # [b, tiles, 2, c] float32: mean and sum of squared deviations of the channel's group in the tile
    pixels,
    channels,
    offset_stride,
    tile,
    PER_GROUP: tl.constexpr,
    PER_BLOCK: tl.constexpr,  # channels of whole groups
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OFFSET: tl.constexpr,
):
    part, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, BLOCK_C)
    channel = block * PER_BLOCK + lane
    there = (lane < PER_BLOCK) & (channel < channels)
    start = part * tile
    stop = tl.minimum(start + tile, pixels)
    rows = x + image.to(tl.int64) * pixels * channels + channel[None, :]
    # sums of differences to the tile's first pixel: those of the values themselves would cancel
    origin = rows + start.to(tl.int64) * channels
    first = tl.load(origin, there[None, :], 0.0).to(tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for place in range(start, stop, BLOCK_P):
        pixel = place + tl.arange(0, BLOCK_P)
        inside = (pixel < stop)[:, None] & there[None, :]
        value = tl.load(rows + pixel[:, None].to(tl.int64) * channels, inside, 0.0).to(tl.float32)
        value = tl.where(inside, value - first, 0.0)
        total += tl.sum(value, 0)
        squares += tl.sum(value * value, 0)
    count = (stop - start).to(tl.float32)
    mean = tl.sum(first, 0) + total / count
    if OFFSET:
        mean += tl.load(offset + image * offset_stride + channel, there, 0.0).to(tl.float32)
    deviations = tl.maximum(squares - total * total / count, 0.0)
    if PER_BLOCK == PER_GROUP:
        group_mean = tl.sum(tl.where(there, mean, 0.0), 0) / PER_GROUP + tl.zeros([BLOCK_C], tl.float32)
        apart = mean - group_mean
        group_deviations = tl.sum(tl.where(there, deviations + count * apart * apart, 0.0), 0)
        group_deviations += tl.zeros([BLOCK_C], tl.float32)
    else:
        same = (lane[:, None] // PER_GROUP == lane[None, :] // PER_GROUP) & there[None, :]
        group_mean = tl.sum(tl.where(same, mean[None, :], 0.0), 1) / PER_GROUP
        apart = tl.where(same, mean[None, :] - group_mean[:, None], 0.0)
        group_deviations = tl.sum(tl.where(same, deviations[None, :], 0.0) + count * apart * apart, 1)
    place = out + ((image * tl.num_programs(0) + part) * 2).to(tl.int64) * channels + channel
    tl.store(place, group_mean, there)
    tl.store(place + channels, group_deviations, there)


@triton.jit
def normalised(
    x,
    offset,
    statistics,
    weight,
    bias,
    out,
    pixels,
    channels,
    offset_stride,
    tile,
    tiles,
    chunk,
    eps,
    PER_GROUP: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OFFSET: tl.constexpr,
    SILU: tl.constexpr,
):
    part, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, BLOCK_C)
    channel = block * PER_BLOCK + lane
    there = (lane < PER_BLOCK) & (channel < channels)
    # the tiles' statistics in one (Chan, Golub & LeVeque 1983)
    which = tl.arange(0, TILES)
    known = (which < tiles)[:, None] & there[None, :]
    place = statistics + (image * tiles + which[:, None]) * 2 * channels + channel[None, :]
    means, deviations = tl.load(place, known, 0.0), tl.load(place + channels, known, 0.0)
    counts = tl.where(which < tiles, tl.minimum(pixels - which * tile, tile), 0).to(tl.float32)[:, None]
    mean = tl.sum(means * counts, 0) / pixels
    apart = tl.where(known, means - mean[None, :], 0.0)
    var = tl.sum(deviations + counts * PER_GROUP * apart * apart, 0) / (pixels * PER_GROUP)
    scale = tl.load(weight + channel, there, 0.0).to(tl.float32) / tl.sqrt(var + eps)
    # The offset is added before the mean is taken away, as in the statistics: where all of a group are equal
    # the difference is then 0, and not a rounding error over the root of eps.
    shift = tl.zeros([BLOCK_C], tl.float32)
    if OFFSET:
        shift += tl.load(offset + image * offset_stride + channel, there, 0.0).to(tl.float32)
    beta = tl.load(bias + channel, there, 0.0).to(tl.float32)
    start = part * chunk
    stop = tl.minimum(start + chunk, pixels)
    for place in range(start, stop, BLOCK_P):
        pixel = place + tl.arange(0, BLOCK_P)
        inside = (pixel < stop)[:, None] & there[None, :]
        at = (image.to(tl.int64) * pixels + pixel[:, None]) * channels + channel[None, :]
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        value = (value + shift[None, :] - mean[None, :]) * scale[None, :] + beta[None, :]
        if SILU:
            value = value / (1.0 + tl.exp(-value))
        tl.store(out + at, value.to(out.dtype.element_ty), inside)


def group_norm(
    x: Tensor, offset: Tensor | None, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    """GroupNorm of x [b, c, h, w], plus `offset` [b or 1, c], and its SiLU if asked for, with channels last.

    Statistics and arithmetic are float32, whatever the types of the tensors; the result has that of x.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    b, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    per_group = channels // groups
    block_c = max(128, triton.next_power_of_2(per_group))
    per_block = min(groups, block_c // per_group) * per_group
    blocks = triton.cdiv(channels, per_block)
    block_p = max(1, 4096 // block_c)
    tile = max(TILE, triton.cdiv(pixels, MOST_TILES))
    tiles = triton.cdiv(pixels, tile)
    chunk = max(block_p, triton.cdiv(pixels * blocks * b, PROGRAMS))
    statistics = x.new_empty(b, tiles, 2, channels, dtype=torch.float32)
    if offset is None:
        offset, stride, has_offset = x, 0, False  # is not read
    else:
        offset = offset.contiguous()
        stride, has_offset = (0 if len(offset) == 1 else channels), True
    sizes = {"PER_GROUP": per_group, "PER_BLOCK": per_block, "BLOCK_C": block_c, "BLOCK_P": block_p}
    with torch.cuda.device_of(x):  # Triton launches on the current device, whichever its tensors are on
        tile_statistics[(tiles, blocks, b)](
            x, offset, statistics, pixels, channels, stride, tile, **sizes, OFFSET=has_offset
        )
        normalised[(triton.cdiv(pixels, chunk), blocks, b)](
            *(x, offset, statistics, weight, bias, out, pixels, channels, stride, tile, tiles, chunk, eps),
            **sizes,
            TILES=triton.next_power_of_2(tiles),
            OFFSET=has_offset,
            SILU=silu,
        )
    return out
