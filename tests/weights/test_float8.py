"""Weights in float8 with scales beside them: what is multiplied, what is refused, and what it costs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.weights.checkpoint import load_weights, read_state_dict
from ldm.weights.convert import Conversion, convert
from ldm.weights.float8 import split_scales, without_scales
from ldm.weights.header import read_header
from tests.weights.test_convert import no_progress

FLOAT8 = torch.float8_e4m3fn


def quantised(scale: Tensor, spelling: str = "weight_scale") -> dict[str, Tensor]:
    """A convolution of 3 output channels, its weights in float8, as a file has them."""
    weight = torch.randn(3, 4, 1, 1).to(FLOAT8)
    return {"a.weight": weight, f"a.{spelling}": scale, "a.bias": torch.ones(3)}


def convolution() -> nn.Module:
    with torch.device("meta"):
        return nn.ModuleDict({"a": nn.Conv2d(4, 3, 1)})


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("scale", [0.25, [[0.75]], [0.5, 2, 3], [[0.1], [0.2], [0.3]]], ids=str)
def test_weights_are_multiplied_by_their_scales(
    tmp_path: Path, spelling: str, scale: float | list, caplog: pytest.LogCaptureFixture
) -> None:
    """The scales were left out as unknown weights, so that the model had weights of another size."""
    scale = torch.tensor(scale)
    state = quantised(scale, spelling) | {"a.input_scale": torch.ones(()), "scaled_fp8": torch.zeros(2)}
    expected = state["a.weight"].float() * (scale.reshape(-1, 1, 1, 1) if scale.numel() > 1 else scale)
    save_file(state, path := tmp_path / "w.safetensors")
    for dtype in (torch.float32, torch.bfloat16, None):
        model = convolution()
        load_weights(model, read_state_dict(path), path=path, dtype=dtype)
        assert model["a"].weight.dtype == (dtype or torch.float32)
        assert torch.equal(model["a"].weight, expected.to(dtype or torch.float32))
    assert not caplog.records


def test_the_file_is_mapped_and_not_copied(tmp_path: Path) -> None:
    """To read a header of a file, or one of its parts, took the memory of all its weights in float32."""
    save_file(state := quantised(torch.tensor(2.0)), path := tmp_path / "w.safetensors")
    found = read_state_dict(path)
    assert found.keys() == state.keys()
    assert found["a.weight"].dtype == FLOAT8


@pytest.mark.parametrize("shape", [(3, 2), (1, 3), (4,), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_other_shapes_are_refused(tmp_path: Path, shape: tuple, dtype: torch.dtype) -> None:
    """Those of blocks were left out, too; a [1, 3] was taken for one number for each output channel."""
    save_file(quantised(torch.ones(shape, dtype=dtype)), path := tmp_path / "w.safetensors")
    words = rf"w\.safetensors: the scale 'a\.weight_scale' has shape .* and dtype {dtype}".replace(
        "torch.", ""
    )
    for tensors in (read_state_dict(path), read_header(path).tensors):  # with the values and without them
        with pytest.raises(InputError, match=words) as caught:
            split_scales(tensors, path)
        assert "for a weight of shape [3, 4, 1, 1]; one number, or one for" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_so_are_those_of_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of a complex one the imaginary part was dropped."""
    with pytest.raises(InputError, match=r"has shape \[\] and dtype (int32|complex64), for a weight of"):
        split_scales(quantised(torch.ones((), dtype=dtype)), tmp_path)


def test_scales_of_other_weights_stay(tmp_path: Path) -> None:
    state = {
        "a.weight": torch.ones(2).char(),
        "a.weight_scale": torch.tensor(2.0),
        "b.scale_weight": torch.ones(1),
    }
    assert split_scales(state, tmp_path) == (state, {})


def test_a_name_in_a_refusal_is_printable(tmp_path: Path) -> None:
    name = "a\n\x1b[2J" * 100
    state = {f"{name}.weight": torch.zeros(4, 4).to(FLOAT8), f"{name}.weight_scale": torch.ones(2, 2)}
    with pytest.raises(InputError) as caught:
        split_scales(state, tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < len(str(tmp_path)) + 500


@pytest.mark.parametrize("trick", [lambda t: t.expand(2**20, 2**20), lambda t: t.expand(2, 2**40)])
def test_weights_that_are_not_stored_take_no_memory(
    tmp_path: Path, trick: Callable[[Tensor], Tensor]
) -> None:
    """A stride of 0 made terabytes of one byte when it was multiplied."""
    state = {"a.weight": trick(torch.zeros(1).to(FLOAT8)), "a.weight_scale": torch.tensor(2.0)}
    torch.save(state, path := tmp_path / "w.ckpt")
    with pytest.raises(InputError, match=r"w\.ckpt is damaged: its weights in float8 have more values than"):
        without_scales(read_state_dict(path), path)
    with pytest.raises(InputError, match=r"w\.ckpt looks like .* have another shape"):
        load_weights(convolution(), read_state_dict(path), path=path)


def test_neither_do_names_that_share_their_values(tmp_path: Path) -> None:
    """Each of them was given memory of its own, so that a small file took all there is."""
    values = torch.zeros(2**20).to(FLOAT8)
    state = {f"{i}.weight": values for i in range(100)} | {
        f"{i}.weight_scale": torch.ones(1) for i in range(100)
    }
    torch.save(state, path := tmp_path / "w.ckpt")
    with pytest.raises(InputError, match="more values than are stored"):
        without_scales(read_state_dict(path), path)


def test_a_scale_that_is_not_stored_is_refused_by_its_shape(tmp_path: Path) -> None:
    """It was made float32 before its shape was looked at."""
    state = {"a.weight": torch.zeros(4, 4).to(FLOAT8), "a.weight_scale": torch.ones(1).expand(2**20, 2**20)}
    torch.save(state, path := tmp_path / "w.ckpt")
    with pytest.raises(InputError, match=r"the scale 'a\.weight_scale' has shape \[1048576, 1048576\]"):
        without_scales(read_state_dict(path), path)


def test_a_conversion_multiplies_and_drops_the_scales(tmp_path: Path) -> None:
    state, metadata = quantised(torch.tensor(0.5)), {"_quantization_metadata": "{}", "author": "A"}
    save_file(state, source := tmp_path / "in.safetensors", metadata)
    convert(Conversion(source, tmp_path / "out.safetensors", "safetensors"), no_progress)
    found = read_state_dict(tmp_path / "out.safetensors")
    assert found.keys() == {"a.weight", "a.bias"}
    assert torch.equal(found["a.weight"], state["a.weight"].float() / 2)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata().keys() == {"format", "author"}


def test_what_metadata_say_of_other_quantised_weights_stays(tmp_path: Path) -> None:
    """The new file kept its weights in int8 and their scales, and lost what says how they are stored."""
    state = {"a.weight": torch.ones(2, 2).char(), "a.weight_scale": torch.ones(2)}
    save_file(state, source := tmp_path / "in.safetensors", {"_quantization_metadata": "{}"})
    convert(Conversion(source, tmp_path / "out.safetensors", "safetensors"), no_progress)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["_quantization_metadata"] == "{}"
