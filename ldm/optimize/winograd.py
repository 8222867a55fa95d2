"""3x3 convolutions on a CPU with fewer multiplications: Winograd's minimal filtering, for float32.

After Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (https://arxiv.org/abs/1509.09308):
tiles of 2x2 or 4x4 pixels are computed from the 4x4 or 6x6 pixels around each, F(2x2, 3x3) and F(4x4, 3x3).
Along either axis a tile's pixels are one polynomial's coefficients and the taps another's. Both are evaluated
at some points and multiplied there, and the pixels of the result are read off the products. The products at a
point of both axes are a sum over the channels: all of them together are one grouped 1x1 convolution.

Of the multiplications 4/9 or 1/4 remain, and the weights take 16/9 or 4 times their memory. In float32 the
small tiles are more exact than oneDNN's own convolution, as they add up fewer numbers one after the other;
the large ones have up to three times its error. In 16 bits both would have several times its error.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.optimize.packed import pack_conv
from ldm.optimize.replaced import Made

TILES = 64  # of one image, for oneDNN: with any other number it might reorder the weights at every call
FEWEST_CHANNELS = 64  # of a layer
# Channels in times channels out of a layer in large tiles, and in tiles of any size. With these bounds v1
# takes 0.4 GB more than without tiles; with all its fine maps in large tiles 1.5 GB, for twice the gain.
MOST_IN_LARGE_TILES, MOST = 320 * 640, 640 * 1920
# Tiles that are computed at once: so many, or more where these have fewer values at the points (12 MB).
# Fewer tiles would read the weights more often, and more values would not stay in a processor's cache.
AT_ONCE, VALUES = 4 * TILES, 3_000_000


class Winograd:
    """Convolutions in tiles of `side` pixels: by way of the points 0, ±p for each p of `pairs`, and infinity.

    The points decide how far the result is from the exact one.
    """

    def __init__(self, *pairs: float):
        self.pairs = pairs
        self.side = 2 * len(pairs)
        self.points = self.side + 2
        self.geometry = ([0, 0], [1, 1], [1, 1], self.points**2)  # padding, stride, dilation, groups

    @cached_property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """Three taps to the points [points, 3], and products there to pixels [side, points], in float64.

        In the paper's terms G and A^T. For each point the first is scaled by it, the second by its inverse.
        """
        finite = torch.tensor([0, *(sign * p for p in self.pairs for sign in (1, -1))], dtype=torch.float64)
        scale = finite.abs() + (finite == 0)
        distances = finite[:, None] - finite
        distances.fill_diagonal_(1)
        taps, pixels = finite.new_zeros(self.points, 3), finite.new_zeros(self.side, self.points)
        taps[:-1] = finite[:, None] ** torch.arange(3) * (scale / distances.prod(1))[:, None]
        pixels[:, :-1] = finite ** torch.arange(self.side)[:, None] / scale
        taps[-1, -1] = pixels[-1, -1] = 1  # at infinity the highest power alone counts
        return taps, pixels

    @cached_property
    def kernel_matrix(self) -> Tensor:
        """What takes a 3x3 kernel to the points of both axes: [points^2, 9], those of one column together."""
        taps, _ = self.matrices
        return torch.einsum("xs,yr->xyrs", taps, taps).reshape(-1, 9)

    @cached_property
    def bias_values(self) -> Tensor:
        """Products, [points^2, 1], that are 1 in every pixel: where a bias is added."""
        _, pixels = self.matrices
        values = torch.linalg.pinv(pixels).sum(1)
        return torch.outer(values, values).reshape(-1, 1)

    def at_points(self, d: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """A tile's pixels along an axis, with one on either side, to the points: B^T d, into `out`."""
        every = even_polynomial(self.pairs)
        weighted_sum([(1, d[-2]), *zip(every, d[-4::-2], strict=True)], out[0])
        weighted_sum([(1, d[-1]), *zip(every, d[-3::-2], strict=True)], out[-1])
        for i, point in enumerate(self.pairs):
            others = even_polynomial(self.pairs[:i] + self.pairs[i + 1 :])
            even = weighted_sum([(1, d[-2]), *zip(others, d[-4:1:-2], strict=True)])
            odd = weighted_sum([(1, d[-3]), *zip(others, d[-5:0:-2], strict=True)])
            torch.add(even, odd, alpha=point, out=out[2 * i + 1])
            torch.sub(even, odd, alpha=point, out=out[2 * i + 2])

    def from_points(self, m: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Products at the points to a tile's pixels along an axis: A^T m, into `out`."""
        signs = range(1, self.points - 1, 2)
        sums = [m[i] + m[i + 1] for i in signs], [m[i] - m[i + 1] for i in signs]
        for i, pixel in enumerate(out):
            terms = [(p ** (i - 1), value) for p, value in zip(self.pairs, sums[i % 2], strict=True)]
            if i == 0:
                terms.insert(0, (1, m[0]))
            if i == self.side - 1:
                terms.insert(0, (1, m[-1]))
            weighted_sum(terms, pixel)

    def pack(self, weight: Tensor) -> Tensor:
        """A weight [o, i, 3, 3] at the points, in oneDNN's order for the grouped convolution."""
        o, i = weight.shape[:2]
        values = self.kernel_matrix.to(weight.dtype) @ weight.reshape(o * i, 9).t()
        example = [1, self.points**2 * i, TILES, 1]  # the order depends on the size of the input
        return pack_conv(values.view(-1, i, 1, 1), self.geometry, example)

    def dense(self, packed: Tensor) -> Tensor:
        """What `pack` was given, as a matrix [o, 9 i], to float32's rounding."""
        values = packed.to_dense()
        i = values.shape[-3]
        kernels = torch.linalg.pinv(self.kernel_matrix) @ values.reshape(self.points**2, -1).double()
        return kernels.t().reshape(-1, 9 * i).to(packed.dtype)

    def convolve(self, conv: nn.Conv2d, made: Made, x: Tensor) -> Tensor:
        """What `conv` makes of x [b, c, h, w]; `made` has its packed weight."""
        bias = None if conv.bias is None else (self.bias_values.to(x.dtype) * conv.bias).flatten()
        x = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        b, height, width, _ = x.shape
        side, rows, columns = self.side, -(-height // self.side), -(-width // self.side)
        out = x.new_empty(b, rows, side, columns, side, conv.out_channels)
        tiles = max(AT_ONCE, VALUES // (self.points**2 * conv.in_channels))
        for images, band in bands(b, rows, columns, tiles):
            top, bottom = side * band.start - 1, side * band.stop + 1
            margins = (1, side * columns + 1 - width, max(0, -top), max(0, bottom - height))
            part = F.pad(x[images, max(0, top) : bottom], (0, 0, *margins))
            self.to_pixels(self.products(part, made.value, bias), out[images, band])
        out = out.view(b, side * rows, side * columns, -1)[:, :height, :width]
        return out.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def products(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Padded images [b, side h + 2, side w + 2, c] to products [b, h, w, points, points, o]."""
        b, height, width, c = x.shape
        side, points = self.side, self.points
        h, w = (height - 2) // side, (width - 2) // side
        half = x.new_empty(b, h, width, points, c)
        self.at_points([x[:, i : i + side * (h - 1) + 1 : side] for i in range(points)], half.unbind(3))
        tiles = b * h * w
        values = x.new_empty(-(-tiles // TILES) * TILES, points**2 * c)
        values[tiles:] = 0
        self.at_points(
            [half[:, :, i : i + side * (w - 1) + 1 : side] for i in range(points)],
            values[:tiles].view(b, h, w, points, points, c).unbind(3),
        )
        values = values.view(-1, TILES, 1, points**2 * c).permute(0, 3, 1, 2)
        found = torch.ops.mkldnn._convolution_pointwise(values, weight, bias, *self.geometry, "none", [], "")
        return found.permute(0, 2, 3, 1).flatten(0, 2)[:tiles].view(b, h, w, points, points, -1)

    def to_pixels(self, m: Tensor, out: Tensor) -> None:
        """Products [b, h, w, points, points, o] to pixels, into `out` [b, h, side, w, side, o]."""
        b, h, w, *_, o = m.shape
        half = m.new_empty(b, h, w, self.side, self.points, o)
        self.from_points(m.unbind(3), half.unbind(3))
        self.from_points(half.unbind(4), out.unbind(2))


SMALL_TILES, LARGE_TILES = Winograd(1), Winograd(0.625, 1.5)  # with ±1 and ±2 the error is twice as large


def even_polynomial(pairs: Sequence[float]) -> list[float]:
    """Coefficients of the product of x^2 - p^2 over the pairs, without the first one, which is 1."""
    found = [1.0]
    for p in pairs:
        found = [same - p**2 * lower for same, lower in zip([*found, 0], [0, *found], strict=True)]
    return found[1:]


def weighted_sum(terms: Sequence[tuple[float, Tensor]], out: Tensor | None = None) -> Tensor:
    """The sum of factor times tensor, into `out`; a single one with factor 1 may be returned as it is."""
    (factor, total), *others = terms
    if factor != 1 or (not others and out is not None):
        total = torch.mul(total, factor, out=out)
    for factor, term in others:
        total = torch.add(total, term, alpha=factor, out=out)
    return total


def bands(b: int, rows: int, columns: int, tiles: int) -> Iterator[tuple[slice, slice]]:
    """Parts of b images of rows x columns tiles to compute one after the other: images, and rows of each.

    Several images, or a part of one, with about as many tiles at once as are asked for.
    """
    images = max(1, tiles // (rows * columns))
    parts = -(-rows // max(1, tiles // columns))
    height = -(-rows // parts)
    for image in range(0, b, images):
        for row in range(0, rows, height):
            yield slice(image, image + images), slice(row, min(rows, row + height))


def takes_winograd(conv: nn.Conv2d, most: int = MOST) -> bool:
    """Whether `winograd_conv` computes what this layer does, and is worth its memory for it."""
    plain = (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
    fits = min(conv.in_channels, conv.out_channels) >= FEWEST_CHANNELS and weights(conv) <= most
    return plain and fits and conv.groups == 1 and conv.weight.dtype == torch.float32


def winograd_conv(conv: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    """The convolution [b, c_in, h, w] -> [b, c_out, h, w] of a layer with a float32 kernel of 3x3.

    In large tiles where few weights stand against many pixels, as on the finest maps of a UNet. It gains on
    maps of 256 pixels or more, over all images of a call; on fewer it takes longer than a plain one.
    """
    tiles = LARGE_TILES if weights(conv) <= MOST_IN_LARGE_TILES else SMALL_TILES
    return partial(tiles.convolve, conv, Made(conv, tiles.pack, tiles.dense))


def weights(conv: nn.Conv2d) -> int:
    return conv.in_channels * conv.out_channels
