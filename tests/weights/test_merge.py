"""Merging: against the formulas, in float64 on numbers that are exact in every precision."""

import pytest
import torch

from ldm.errors import InputError
from ldm.weights.merge import merge

UNET = "model.diffusion_model"
INPUT = f"{UNET}.input_blocks.0.0.weight"
PATHS = ("a.ckpt", "b.ckpt", "c.ckpt")


def model(seed: int, channels: int = 4, context: int = 768, dtype: torch.dtype = torch.float32) -> dict:
    """The weights by which v1 (context 768) and v2 (1024), plain or inpainting, are recognised, and a few."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        INPUT: (8, channels, 3, 3),
        f"{UNET}.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, context),
        "first_stage_model.quant_conv.bias": (8,),
    }
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return state | {"betas": torch.rand(5, generator=generator), "steps": torch.tensor(seed)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0, 1.5])
def test_weighted_sum(dtype: torch.dtype, ratio: float) -> None:
    a, b = model(1, dtype=dtype), model(2)
    before = {name: t.clone() for name, t in a.items()}
    merged = merge(a, b, ratio, paths=PATHS[:2])
    assert merged.keys() == a.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == a[name].dtype
        assert torch.equal(a[name], before[name])  # a itself is as it was
        if name in ("betas", "steps"):  # of a schedule and a counter there is no mean
            assert torch.equal(tensor, a[name])
        else:
            expected = a[name].double() * (1 - ratio) + b[name].double() * ratio
            torch.testing.assert_close(tensor.double(), expected.to(dtype).double(), rtol=0.01, atol=1e-5)
    if ratio == 0.0:
        assert all(torch.equal(merged[name], a[name]) for name in a)
    if ratio == 1.0:
        assert torch.equal(merged[INPUT], b[INPUT].to(dtype))


def test_the_sum_is_made_in_float32() -> None:
    """In half precision 2048 + 1 is 2048 already, before the mean is taken."""
    a, b = model(1, dtype=torch.float16), model(2, dtype=torch.float16)
    a[INPUT][:], b[INPUT][:] = 2048.0, 2050.0
    c = {name: t.clone() for name, t in b.items()}
    c[INPUT][:] = 1.0
    merged = merge(a, b, 0.5, c, paths=PATHS)
    assert merged[INPUT].unique().tolist() == [3072.0]  # 2048 + (2050 - 1) / 2 = 3072.5


def test_add_difference() -> None:
    a, b, c = model(1), model(2), model(3)
    merged = merge(a, b, 0.75, c, paths=PATHS)
    for name in a.keys() - {"betas", "steps"}:
        expected = a[name].double() + 0.75 * (b[name].double() - c[name].double())
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-6)


def test_a_style_goes_into_an_inpainting_model() -> None:
    """The channels for mask and masked image stay as they are."""
    a, b, c = model(1, channels=9), model(2), model(3)
    merged = merge(a, b, 1.0, c, paths=PATHS)
    assert merged[INPUT].shape == (8, 9, 3, 3)
    assert torch.equal(merged[INPUT][:, 4:], a[INPUT][:, 4:])
    expected = a[INPUT][:, :4] + (b[INPUT] - c[INPUT])
    torch.testing.assert_close(merged[INPUT][:, :4], expected, rtol=0, atol=1e-6)


def test_weights_that_one_side_lacks(caplog: pytest.LogCaptureFixture) -> None:
    a, b = model(1), model(2)
    a |= {"own.weight": torch.ones(2), "position_ids": torch.arange(3)}
    b |= {"other.weight": torch.ones(2), "sqrt_alphas_cumprod": torch.ones(2)}
    merged = merge(a, b, 0.5, paths=PATHS[:2])
    assert merged.keys() == a.keys()
    assert torch.equal(merged["own.weight"], a["own.weight"])
    assert caplog.messages == [
        "1 of 7 weights are in a.ckpt alone and stay as they are (first own.weight)",
        "1 weights are in b.ckpt alone and are left out (first other.weight)",
    ]


def test_averages_that_are_not_merged_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """They stayed as they were: a UNet of before beside the one that was merged."""
    a, b = model(1), model(2)
    averages = {"model_ema.diffusion_modelx": torch.ones(2), "model_ema.decay": torch.tensor(0.9)}
    assert merge(a | averages, b, 0.5, paths=PATHS[:2]).keys() == a.keys()
    assert caplog.messages == ["a.ckpt: its averaged weights are left out, as not all of the files have such"]
    both = merge(a | averages, b | averages, 0.5, paths=PATHS[:2])
    assert both.keys() == a.keys() | averages.keys()


def test_averages_that_are_all_of_a_unet_stay() -> None:
    only = {name: t for name, t in model(1).items() if not name.startswith("model.")}
    only |= {"model_ema.diffusion_modelinput_blocks00weight": torch.ones(8, 4, 3, 3)}
    assert merge(only, only, 0.5, paths=PATHS[:2]).keys() == only.keys()


@pytest.mark.parametrize(
    ("a", "b", "base"),
    [
        (model(1), model(2, context=1024), None),
        (model(1, channels=9), model(2), None),  # only a difference has an answer for the other channels
        (model(1), model(2, channels=9), model(3, channels=9)),
        (model(1, channels=9), model(2), model(3, channels=9)),
        (model(1), model(2), model(3, context=1024)),
    ],
)
def test_other_families_are_refused(a: dict, b: dict, base: dict | None) -> None:
    paths = PATHS[: 2 if base is None else 3]
    with pytest.raises(InputError, match="models of one family can be merged") as caught:
        merge(a, b, 0.5, base, paths=paths)
    assert "a.ckpt is Stable Diffusion v1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_weight_of_another_shape() -> None:
    a, b = model(1), model(2)
    b["first_stage_model.quant_conv.bias"] = torch.zeros(32)
    with pytest.raises(InputError, match=r"cannot be merged: first_stage.* is \[8\] and \[32\]"):
        merge(a, b, 0.5, paths=PATHS[:2])
