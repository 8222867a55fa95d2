"""Convolutions with fewer multiplications: in tiles of both sizes, against torch's in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny_sampling import normal, relative_difference, tiny_model
from torch import Tensor, nn

from ldm.optimize import layers, winograd
from ldm.optimize.layers import KERNELS, has_onednn, use_kernels
from ldm.optimize.replaced import Replaceable
from ldm.optimize.winograd import LARGE_TILES, SMALL_TILES, Winograd, bands, takes_winograd, winograd_conv

BOTH = pytest.mark.parametrize("tiles", [SMALL_TILES, LARGE_TILES], ids=["small tiles", "large tiles"])
needs_onednn = pytest.mark.skipif(
    not has_onednn(torch.float32), reason="this processor or torch has no oneDNN for float32"
)


def conv_of(*channels: int, **options: bool) -> nn.Conv2d:
    """A 3x3 convolution with weights from a generator of its own."""
    conv = nn.Conv2d(*channels, 3, padding=1, **options).requires_grad_(False)
    for i, parameter in enumerate(conv.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=i) / (9 * channels[0]) ** 0.5)
    return conv


def in_tiles(conv: nn.Conv2d, tiles: Winograd, monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], Tensor]:
    monkeypatch.setattr(winograd, "MOST_IN_LARGE_TILES", 10**9 if tiles is LARGE_TILES else 0)
    return winograd_conv(conv)


@BOTH
def test_products_at_the_points_are_a_filter(tiles: Winograd) -> None:
    """Y = A^T [(G g) (B^T d)], equation 5 of Lavin and Gray, is d filtered with g; in float64."""
    d, g = normal(tiles.points, 7).double(), normal(3, seed=1).double()
    taps, pixels = tiles.matrices
    values, result = torch.zeros(tiles.points, 7).double(), torch.zeros(tiles.side, 7).double()
    tiles.at_points(d.unbind(), values.unbind())
    products = (taps @ g)[:, None] * values
    tiles.from_points(products.unbind(), result.unbind())
    expected = torch.stack([g @ d[i : i + 3] for i in range(tiles.side)])
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(pixels @ products, expected, rtol=1e-12, atol=1e-12)


@needs_onednn
@BOTH
@torch.inference_mode()
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 7), (8, 6), (33, 18)])
def test_the_result_is_the_plain_one_to_rounding(
    tiles: Winograd, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for conv in (conv_of(64, 48), conv_of(16, 32, bias=False)):
        forward = in_tiles(conv, tiles, monkeypatch)
        for x in (normal(3, conv.in_channels, *size), normal(2, *size, conv.in_channels).permute(0, 3, 1, 2)):
            found = forward(x)
            assert found.is_contiguous(memory_format=torch.channels_last)
            bias = None if conv.bias is None else conv.bias.double()
            expected = F.conv2d(x.double(), conv.weight.double(), bias, padding=1)
            assert relative_difference(found, expected) < 2e-6


@needs_onednn
@BOTH
@torch.inference_mode()
def test_parts_give_the_whole(tiles: Winograd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of an image sees the pixels next to it, and each image its own."""
    conv, x = conv_of(24, 40), normal(3, 24, 22, 17)
    forward = in_tiles(conv, tiles, monkeypatch)
    whole = forward(x)
    monkeypatch.setattr(winograd, "VALUES", 0)
    for at_once in (1, 10, 30):
        monkeypatch.setattr(winograd, "AT_ONCE", at_once)
        assert relative_difference(forward(x), whole) < 1e-6


@pytest.mark.parametrize("tiles", [1, 7, 64, 10**6])
def test_parts_cover_all_once(tiles: int) -> None:
    for b, rows, columns in ((1, 1, 1), (3, 5, 4), (2, 16, 16), (5, 3, 2)):
        seen = torch.zeros(b, rows)
        for images, band in bands(b, rows, columns, tiles):
            seen[images, band] += 1
            count = seen[images, band].numel() * columns
            assert count <= max(tiles, columns)
        assert (seen == 1).all()
        if tiles == 10**6:
            assert len(list(bands(b, rows, columns, tiles))) == 1


@needs_onednn
@BOTH
def test_a_packed_weight_is_given_back_to_rounding(tiles: Winograd) -> None:
    conv = conv_of(48, 32)
    found = tiles.dense(tiles.pack(conv.weight)).view_as(conv.weight)
    assert ((found - conv.weight).abs() <= 1e-6 * conv.weight.abs().max()).all()


@needs_onednn
@BOTH
@torch.inference_mode()
def test_a_weight_that_is_replaced_is_put_back_bit_for_bit(
    tiles: Winograd, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv, x = conv_of(32, 32), normal(1, 32, 9, 9)
    shape, other = tuple(conv.weight.shape), conv_of(32, 32).weight.flip(0)
    conv.forward = in_tiles(conv, tiles, monkeypatch)
    conv.weight = None
    before = conv(x)
    weight = Replaceable(conv, "weight", shape, in_place=False)
    weight.replace(weight.plain + other)
    expected = F.conv2d(x, weight.plain + other, conv.bias, padding=1)
    assert relative_difference(conv(x), expected) < 3e-6
    weight.restore()
    assert torch.equal(conv(x), before)


def test_layers_that_are_left_to_other_kernels() -> None:
    assert takes_winograd(conv_of(64, 96))
    assert not takes_winograd(conv_of(64, 96), most=64 * 64)
    others = [
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.Conv2d(64, 64, 1),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(4, 64, 3, padding=1),
        nn.Conv2d(64, 64, 3, padding=1).bfloat16(),
    ]
    assert not any(takes_winograd(conv) for conv in others)


@needs_onednn
@torch.inference_mode()
def test_unet_and_decoder_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of odd sizes too, whose upsampled maps are cut; the UNet's layers are in tiles of both sizes."""
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 32)  # the miniature's are few
    monkeypatch.setattr(winograd, "MOST_IN_LARGE_TILES", 32 * 64)
    used: set[int] = set()
    convolve = Winograd.convolve

    def counted(tiles: Winograd, *args: object) -> Tensor:
        used.add(tiles.side)
        return convolve(tiles, *args)

    monkeypatch.setattr(Winograd, "convolve", counted)
    exact, fast = tiny_model().double(), tiny_model()
    use_kernels(fast, KERNELS["winograd"])
    for size in ((8, 8), (7, 5)):
        x, context = normal(2, 4, *size), normal(2, 5, 32, seed=1)
        t = torch.tensor([500.0, 3.0])
        expected = exact.apply_model(x.double(), t, context.double())
        assert relative_difference(fast.apply_model(x, t, context), expected) < 4e-6
        assert used == {2, 4}
        used.clear()
        image = fast.decode_first_stage(x)
        assert relative_difference(image, exact.decode_first_stage(x.double())) < 4e-6
        assert used == {4}


@needs_onednn
def test_a_decoder_has_large_tiles_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It works once for an image: of layers in small tiles it would gain less than their memory is worth."""
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 32)
    for module in (winograd, layers):
        monkeypatch.setattr(module, "MOST_IN_LARGE_TILES", 32 * 32 - 1)
    model = tiny_model()
    use_kernels(model, KERNELS["winograd"])

    def in_tiles(network: nn.Module) -> list[nn.Module]:
        forwards = ((layer, vars(layer).get("forward")) for layer in network.modules())
        return [
            layer for layer, forward in forwards if getattr(forward, "func", None) == SMALL_TILES.convolve
        ]

    assert in_tiles(model.model.diffusion_model)
    assert not in_tiles(model.first_stage_model)
