"""Prepacked weights: real small models, against the same model left plain."""

import pytest
import tiny
import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize import cpu
from ldm.optimize.cpu import can_prepack, prepack
from ldm.util import instantiate_from_config


def tiny_model() -> LatentDiffusion:
    with torch.device("meta"):
        model = instantiate_from_config(tiny.MODEL)
    model.load_state_dict(tiny.state_dict(), strict=False, assign=True)
    return model.eval().requires_grad_(False)


def relative_difference(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if not can_prepack(request.param):
        pytest.skip(f"this torch and processor cannot prepack {request.param}")
    return request.param


@torch.inference_mode()
def test_a_layer_gives_the_plain_result_to_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, row = torch.randn(2, 64, 9, 6).to(dtype), torch.randn(2, 7, 64).to(dtype)
    cases = (
        (nn.Conv2d(64, 32, 3, padding=1), x),
        (nn.Conv2d(64, 64, 3, stride=2), x),
        (nn.Conv2d(64, 48, 1, bias=False), x.to(memory_format=torch.channels_last)),
        (nn.Linear(64, 40), row),
        (nn.Linear(64, 40, bias=False), row.transpose(0, 1)),
    )
    for layer, given in cases:
        layer.to(dtype)
        plain = layer(given)
        prepack(layer)
        packed = layer(given)
        assert packed.dtype == dtype
        assert relative_difference(packed, plain) <= (1e-6 if dtype == torch.float32 else 4e-3)


@torch.inference_mode()
def test_unet_and_decoder_are_as_exact_as_plain_ones(dtype: torch.dtype) -> None:
    exact, model = tiny_model().double(), tiny_model().to(dtype)
    torch.manual_seed(0)
    for size in ((8, 8), (6, 10)):  # the layout does not depend on the size of the image
        x, context = torch.randn(2, 4, *size).to(dtype), torch.randn(2, 5, 32).to(dtype)

        def outputs(model: LatentDiffusion, *given: Tensor) -> list[Tensor]:
            x, context = given
            return [
                model.apply_model(x, torch.tensor([500.0, 3.0]), context),
                model.decode_first_stage(x),
            ]

        plain = outputs(model, x, context)
        undo = prepack(model)
        packed = outputs(model, x, context)
        undo()
        again = outputs(model, x, context)
        # the two sum in another order: over all layers each is about 1e-6 from float64 (bfloat16: 1e-2)
        for a, b, c, true in zip(
            plain, packed, again, outputs(exact, x.double(), context.double()), strict=True
        ):
            assert relative_difference(b, true) <= 1.6 * relative_difference(a, true)
            assert torch.equal(a, c)


def test_undo_gives_every_weight_back(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    undo = prepack(model)
    held = [m for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear) and m.weight is not None]
    assert not held  # a weight beside its packed copy would double the memory
    undo()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_packing_twice_is_packing_once(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(4, 4)).to(dtype)
    x = torch.randn(1, 3, 6, 6).to(dtype)
    with torch.inference_mode():
        plain = model(x)
        undo = prepack(model)
        packed = model(x)
        prepack(model)()
        assert torch.equal(model(x), packed)
        undo()
        assert torch.equal(model(x), plain)


def test_layers_that_cannot_be_packed_stay_plain() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding="same"),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"),
        Doubling(4, 4),
    )
    x = torch.randn(1, 3, 4, 4)
    with torch.inference_mode():
        plain = model(x)
        prepack(model)
        assert torch.equal(model(x), plain)
    assert all(layer.weight is not None for layer in model)


def test_a_torch_without_the_operators_leaves_the_model_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(layer: nn.Module) -> None:
        raise AttributeError("module 'torch._C._nn' has no attribute 'mkldnn_reorder_conv2d_weight'")

    monkeypatch.setattr(cpu, "packed_conv", missing)
    model = nn.Conv2d(3, 8, 3)
    assert not can_prepack(torch.float32)
    prepack(model)
    assert model.weight is not None
