"""Convolutions and linear layers by other kernels: real small models, against the same models left plain."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_sampling import relative_difference, tiny_model
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules import model as first_stage
from ldm.modules.diffusionmodules import openaimodel
from ldm.optimize import layers
from ldm.optimize.layers import (
    KERNELS,
    Kernels,
    choose_kernels,
    has_onednn,
    measured,
    onednn_linear,
    packed_conv,
    packed_linear,
    use_kernels,
)
from ldm.weights.loading import ROOT

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=ROUNDING, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if not has_onednn(request.param):
        pytest.skip(f"oneDNN does not run {request.param} on this processor")
    return request.param


@torch.inference_mode()
def test_a_convolution_gives_the_plain_result_to_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64, 9, 6).to(dtype)
    cases = (
        (nn.Conv2d(64, 32, 3, padding=1), x),
        (nn.Conv2d(64, 64, 3, stride=2), x),
        (nn.Conv2d(64, 48, 1, bias=False), x.to(memory_format=torch.channels_last)),
    )
    for layer, given in cases:
        layer.to(dtype)
        packed = packed_conv(layer)(given)
        assert packed.dtype == dtype
        assert packed.is_contiguous(memory_format=torch.channels_last)
        assert relative_difference(packed, layer(given)) <= ROUNDING[dtype]


@torch.inference_mode()
@pytest.mark.parametrize("make", [onednn_linear, packed_linear])
def test_a_linear_layer_gives_the_plain_result_to_rounding(make, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for layer in (nn.Linear(64, 48), nn.Linear(64, 32, bias=False)):
        layer.to(dtype)
        forward = make(layer)
        for shape in ((64,), (3, 64), (2, 7, 64)):
            x = torch.randn(shape).to(dtype)
            assert relative_difference(forward(x), layer(x)) <= ROUNDING[dtype]
        view = torch.randn(2, 64, 5).to(dtype).transpose(1, 2)
        assert relative_difference(forward(view), layer(view)) <= ROUNDING[dtype]


@torch.inference_mode()
@pytest.mark.parametrize(
    "kernels",
    [
        *KERNELS.values(),
        Kernels("onednn", "torch", "onednn", "torch"),
        Kernels("torch", "folded", "packed", "torch"),
    ],
)
def test_unet_and_first_stage_are_as_exact_as_plain_ones(kernels: Kernels, dtype: torch.dtype) -> None:
    exact, plain, fast = tiny_model().double(), tiny_model().to(dtype), tiny_model().to(dtype)
    use_kernels(fast, kernels)
    torch.manual_seed(0)
    for size in ((8, 8), (6, 10), (7, 5)):  # what was reordered does not depend on the size of the image
        x, context = torch.randn(2, 4, *size).to(dtype), torch.randn(2, 5, 32).to(dtype)

        def outputs(model: LatentDiffusion, *given: Tensor) -> list[Tensor]:
            x, context = given
            image = model.decode_first_stage(x)
            encoded = model.first_stage_model.encode(image).mode()
            return [model.apply_model(x, torch.tensor([500.0, 3.0]), context), image, encoded]

        expected = outputs(exact, x.double(), context.double())
        found = outputs(fast, x, context)
        assert all(output.is_contiguous() for output in found[:2])
        # each sums in another order: over all layers of 16 bits each is about 1e-2 or 1e-3 from float64
        for a, b, true in zip(outputs(plain, x, context), found, expected, strict=True):
            assert relative_difference(b, true) <= max(1.6 * relative_difference(a, true), 4e-6)


def test_no_weight_is_held_beside_its_packed_copy(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    use_kernels(model, KERNELS["onednn"])
    unet = model.model.diffusion_model
    folded = [m.conv for m in model.modules() if isinstance(m, openaimodel.Upsample | first_stage.Upsample)]
    convolutions = [
        m
        for part in layers.networks(model)
        for m in part.modules()
        if type(m) is nn.Conv2d and not any(m is conv for conv in folded)
    ]
    linears = [m for m in unet.modules() if type(m) is nn.Linear]
    assert convolutions
    assert linears
    assert all(module.weight is None for module in (*convolutions, *linears))
    assert all(conv.weight is not None and "forward" not in vars(conv) for conv in folded)
    assert folded
    assert unet.dtype == dtype


def test_biases_are_not_read_between_packed_weights(tmp_path: Path) -> None:
    """Each page of a mapped file that was read brought up to 2 MB of packed weights back: 0.3 GB of v1."""
    if not has_onednn(torch.float32):
        pytest.skip("oneDNN does not run float32 on this processor")
    path = tmp_path / "model.safetensors"
    save_file(tiny_model().state_dict(), path)
    mapped, model = load_file(path), tiny_model()
    model.load_state_dict(mapped, assign=True)
    model.requires_grad_(False)
    use_kernels(model, KERNELS["onednn"])
    for network in layers.networks(model):
        for name, parameter in network.named_parameters():
            large = name.endswith("conv.weight")  # with upsampling folded in
            assert large or not any(parameter.data_ptr() == given.data_ptr() for given in mapped.values())


def test_using_kernels_twice_is_using_them_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = tiny_model().to(dtype)
    x, context = torch.randn(2, 4, 8, 8).to(dtype), torch.randn(2, 5, 32).to(dtype)
    outputs = []
    for _ in range(2):
        use_kernels(model, KERNELS["onednn"])
        with torch.inference_mode():
            outputs.append(model.apply_model(x, torch.tensor([500.0, 3.0]), context))
    assert torch.equal(*outputs)
    made = [vars(layer)["made_of_weight"] for layer in model.modules() if "made_of_weight" in vars(layer)]
    assert made
    assert all(len(of_layer) == 1 for of_layer in made)


def test_an_encoder_in_float32_is_not_packed(dtype: torch.dtype) -> None:
    """Most commands never call it, and its weights would no longer stay in their file."""
    model = tiny_model().to(dtype)
    use_kernels(model, KERNELS["onednn"])
    convolutions = [m for m in model.first_stage_model.encoder.modules() if type(m) is nn.Conv2d]
    assert convolutions
    assert all((conv.weight is not None) == (dtype == torch.float32) for conv in convolutions)


def test_layers_of_other_kinds_stay_plain(model: LatentDiffusion) -> None:
    class Doubling(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    others = [
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        Doubling(4, 4, 1),
    ]
    model.first_stage_model.decoder.conv_in = nn.Sequential(*others, model.first_stage_model.decoder.conv_in)
    use_kernels(model, KERNELS["onednn"])
    assert all(layer.weight is not None and "forward" not in vars(layer) for layer in others)


@torch.inference_mode()
def test_a_packed_layer_that_is_cast_to_float32(dtype: torch.dtype) -> None:
    """The autoencoder does so once it has yielded NaN."""
    if dtype == torch.float32:
        return
    torch.manual_seed(0)
    conv, x = nn.Conv2d(16, 8, 3, stride=2, padding=1).to(dtype), torch.randn(1, 16, 6, 6)
    expected = copy.deepcopy(conv).float()(x)
    conv.forward, conv.weight = packed_conv(conv), None
    conv.float()
    assert torch.equal(conv(x), expected)


@pytest.mark.parametrize("operator", ["packed_conv", "winograd_conv", "packed_linear", "onednn_linear"])
def test_a_torch_without_the_operators_leaves_the_model_plain(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(layer: nn.Module) -> None:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_convolution_weight'")

    monkeypatch.setattr(layers, operator, missing)
    monkeypatch.setattr(layers, "has_onednn", has_onednn.__wrapped__)
    model = tiny_model()
    assert choose_kernels(model) == layers.FOLDED
    if operator != "winograd_conv":  # which is for float32 alone
        assert not has_onednn.__wrapped__(torch.bfloat16)


def test_kernels_that_the_processor_lacks_are_not_used(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--kernels onednn was a traceback on a processor without 16-bit instructions, and on a Mac."""
    notices: list[str] = []
    monkeypatch.setattr(layers, "notice", notices.append)
    monkeypatch.setattr(layers, "has_onednn", lambda dtype: False)
    use_kernels(model, choose_kernels(model))
    assert notices == []
    use_kernels(model, KERNELS["onednn"])
    assert notices == ["--kernels: oneDNN does not run float32 on this processor; torch's own are used"]
    assert not [m for m in model.modules() if type(m) is nn.Conv2d and m.weight is None]


def test_what_is_measured_are_the_models_own_shapes(bundled: LatentDiffusion) -> None:
    unet = bundled.model.diffusion_model
    found = measured(unet, bundled.image_size)
    widths = {side: channels for channels, _, side in found}
    assert widths[bundled.image_size] == unet.input_blocks[1][0].out_layers[-1].out_channels
    assert min(widths) < bundled.image_size
    assert max(height * side for _, height, side in measured(unet, 128)) <= layers.MOST_PIXELS


def test_kernels_are_chosen_by_what_they_take(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel that may be chosen runs, and the names are those that `use_kernels` knows."""
    if not has_onednn(torch.float32):
        pytest.skip("oneDNN does not run float32 on this processor")
    for last in (False, True):

        def choose(work: str, names: tuple[str, ...], kernels: Callable, last: bool = last) -> str:
            calls = kernels()
            assert tuple(calls) == names
            for call in calls.values():
                call()
            return names[-1 if last and not work.startswith("whole") else 0]

        monkeypatch.setattr(layers, "choose", choose)
        before = torch.get_rng_state()
        found = choose_kernels(model)
        assert torch.equal(torch.get_rng_state(), before)
        wanted = Kernels("winograd", "folded", "packed", "torch") if last else KERNELS["torch"]
        assert found == wanted  # the miniature has too few pixels for attention in rows


def test_a_small_unet_is_measured_as_a_whole(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the kernels that were the fastest by themselves the bundled model made 30 steps a second, and 62 on
    torch's own.
    """
    if not has_onednn(torch.float32):
        pytest.skip("oneDNN does not run float32 on this processor")
    seen: list[str] = []

    def choose(work: str, names: tuple[str, ...], kernels: Callable) -> str:
        seen.append(work)
        return names[-1]

    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    monkeypatch.setattr(layers, "choose", choose)
    assert choose_kernels(model) == KERNELS["torch"]
    assert sum(work.startswith("whole") for work in seen) == 1
    after = model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    seen.clear()
    monkeypatch.setattr(layers, "SMALL_WORK", 0)
    assert choose_kernels(model).linears == "packed"
    assert not [work for work in seen if work.startswith("whole")]


def test_choosing_kernels_imports_no_compiler() -> None:
    """torch's symbolic shapes came with the layers that are tried: a third of a second at every start."""
    code = """
import sys, torch
from ldm.optimize.layers import has_onednn
assert "sympy" not in sys.modules
has_onednn(torch.float32)
assert "sympy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
