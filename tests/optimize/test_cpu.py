"""Speed on a CPU: real small models, against the same models left plain."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_sampling import relative_difference, tiny_model
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize import cpu
from ldm.optimize.cpu import (
    can_prepack,
    fold_upsampling,
    keep_memory,
    prepack,
    quarter_kernels,
    return_memory,
    upsampled_conv,
)


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if not can_prepack(request.param):
        pytest.skip(f"this torch and processor cannot prepack {request.param}")
    return request.param


@torch.inference_mode()
def test_a_layer_gives_the_plain_result_to_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64, 9, 6).to(dtype)
    cases = (
        (nn.Conv2d(64, 32, 3, padding=1), x),
        (nn.Conv2d(64, 64, 3, stride=2), x),
        (nn.Conv2d(64, 48, 1, bias=False), x.to(memory_format=torch.channels_last)),
    )
    for layer, given in cases:
        layer.to(dtype)
        plain = layer(given)
        prepack(layer)
        packed = layer(given)
        assert packed.dtype == dtype
        assert relative_difference(packed, plain) <= 4e-3


@torch.inference_mode()
def test_unet_and_decoder_are_as_exact_as_plain_ones(dtype: torch.dtype) -> None:
    exact, plain, packed = tiny_model().double(), tiny_model().to(dtype), tiny_model().to(dtype)
    prepack(packed)
    torch.manual_seed(0)
    for size in ((8, 8), (6, 10)):  # the layout does not depend on the size of the image
        x, context = torch.randn(2, 4, *size).to(dtype), torch.randn(2, 5, 32).to(dtype)

        def outputs(model: LatentDiffusion, *given: Tensor) -> list[Tensor]:
            x, context = given
            return [
                model.apply_model(x, torch.tensor([500.0, 3.0]), context),
                model.decode_first_stage(x),
            ]

        expected = outputs(exact, x.double(), context.double())
        # the two sum in another order: over all layers each is about 1e-2 from float64 (float16: 1e-3)
        for a, b, true in zip(outputs(plain, x, context), outputs(packed, x, context), expected, strict=True):
            assert relative_difference(b, true) <= 1.6 * relative_difference(a, true)


def test_no_weight_is_held_beside_its_packed_copy(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    prepack(model)
    convolutions = [module for module in model.modules() if type(module) is nn.Conv2d]
    assert convolutions
    assert all(module.weight is None for module in convolutions)


def test_packing_twice_is_packing_once(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU()).to(dtype)
    x = torch.randn(1, 3, 6, 6).to(dtype)
    with torch.inference_mode():
        prepack(model)
        packed = model(x)
        prepack(model)
        assert torch.equal(model(x), packed)


def test_layers_that_cannot_be_packed_stay_plain() -> None:
    class Doubling(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding="same"),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"),
        Doubling(3, 3, 1),
    ).bfloat16()
    x = torch.randn(1, 3, 4, 4).bfloat16()
    with torch.inference_mode():
        plain = model(x)
        prepack(model)
        assert torch.equal(model(x), plain)
    assert all(layer.weight is not None for layer in model)


def test_single_precision_stays_plain() -> None:
    """It is in oneDNN's layout already, but for the smallest feature maps: packing gains nothing."""
    model = nn.Conv2d(3, 8, 3)
    prepack(model)
    assert model.weight is not None


@torch.inference_mode()
def test_a_packed_layer_that_is_cast_to_float32(dtype: torch.dtype) -> None:
    """The autoencoder does so once it has yielded NaN."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(16, 8, 3, stride=2, padding=1).to(dtype), torch.randn(1, 16, 6, 6)
    expected = copy.deepcopy(conv).float()(x)
    prepack(conv)
    conv.float()
    assert torch.equal(conv(x), expected)


def test_a_torch_without_the_operators_leaves_the_model_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(layer: nn.Module) -> None:
        raise AttributeError("module 'torch._C._nn' has no attribute 'mkldnn_reorder_conv2d_weight'")

    monkeypatch.setattr(cpu, "packed_conv", missing)
    model = nn.Conv2d(3, 8, 3).bfloat16()
    assert not can_prepack(torch.bfloat16)
    prepack(model)
    assert model.weight is not None


@torch.inference_mode()
def test_upsampling_in_the_convolution_is_upsampling_before_it() -> None:
    torch.manual_seed(0)
    for size in ((1, 1), (5, 4)):
        conv, x = nn.Conv2d(8, 6, 3, padding=1), torch.randn(2, 8, *size)
        large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        folded = upsampled_conv(quarter_kernels(conv.weight), conv.bias, x)
        assert relative_difference(folded, conv(large)) < 1e-6


@torch.inference_mode()
def test_unet_and_decoder_with_folded_upsampling(model: LatentDiffusion) -> None:
    """Odd sizes too, where the UNet cuts off a row or column of its upsampled features."""
    torch.manual_seed(0)
    cases = [(torch.randn(2, 4, *size), torch.randn(2, 5, 32)) for size in ((8, 8), (7, 9), (6, 5))]

    def outputs() -> list[Tensor]:
        return [model.apply_model(x, torch.tensor([500.0, 3.0]), context) for x, context in cases] + [
            model.decode_first_stage(x) for x, _ in cases
        ]

    plain = outputs()
    fold_upsampling(model)
    folded = outputs()
    assert not torch.equal(folded[0], plain[0])  # another order of sums
    assert not torch.equal(folded[-1], plain[-1])
    assert max(relative_difference(a, b) for a, b in zip(folded, plain, strict=True)) < 2e-6


def test_kernels_of_16_bits_are_not_folded() -> None:
    model = tiny_model().bfloat16()
    fold_upsampling(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_memory_of_freed_tensors_is_kept_for_the_next() -> None:
    """Counted in page faults of a process of its own: tensors of 64 MiB soon take no new pages.

    A small block behind the first ones can make their places too short for the next one's alignment.
    """
    code = """
import resource, torch
from ldm.optimize.cpu import keep_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def taken():
    before = faults()
    torch.ones(2**24)
    return faults() - before
taken(); plain = taken()
if keep_memory():
    print(plain, min(taken() for _ in range(20)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if not run.stdout:
        pytest.skip("another C library than glibc")
    plain, kept = map(int, run.stdout.split())
    assert kept < 0.1 * plain


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_a_large_decode_gives_back_what_it_took() -> None:
    """Free memory between tensors in use could not serve larger ones: a process grew to 7.5 GB, not 6.3."""
    code = """
import torch
from tiny_sampling import tiny_model
from ldm.optimize.cpu import keep_memory, return_memory
from ldm.pipeline.memory import taken
plain, model = tiny_model(), tiny_model()
cpu = torch.device("cpu")
def grown(model, side):
    before = taken(cpu)
    with torch.inference_mode():
        model.decode_first_stage(torch.ones(1, 4, side, side))
    return (taken(cpu) - before) / 2**20
grown(plain, 4)
if keep_memory():
    return_memory(model)
    given_back = max(grown(model, 64) for _ in range(2))
    print(given_back, grown(plain, 64))
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    if not run.stdout:
        pytest.skip("another C library than glibc")
    given_back, kept = map(float, run.stdout.split())
    assert given_back < 40 < 64 < kept  # MiB; a tensor of the last level has 32


def test_memory_is_given_back_around_large_decodes_and_before_large_layers(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Library:
        def malloc_trim(self, pad: int) -> int:
            calls.append(pad)
            return 1

    monkeypatch.setattr(cpu, "glibc", Library)
    return_memory(model)
    with torch.inference_mode():
        model.decode_first_stage(torch.ones(1, 4, 8, 8))
        assert calls == []  # too small to be worth it
        with pytest.raises(RuntimeError):
            model.first_stage_model.decoder(torch.ones(1, 5, 64, 64))
        assert calls == [0, 0]  # before a decode and after it, though it failed
        monkeypatch.setattr(cpu, "LARGE_TENSOR", 4 * 32 * 64 * 64)
        model.decode_first_stage(torch.ones(1, 4, 8, 8))
        assert calls == [0] * 4  # the last level's two blocks


def test_without_glibc_memory_is_left_alone(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "glibc", lambda: None)
    assert not keep_memory()
    return_memory(model)
    assert not model.first_stage_model.decoder._forward_hooks
