"""ControlNets from files of every layout, and files that are none, or for another model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_pipelines import tiny_config
from safetensors.torch import save_file
from tiny_control import original_state, write_controlnet

from ldm.errors import InputError
from ldm.weights.controlnet import check_controlnet, load_controlnet, weights_file

V1 = tiny_config("v1")


def bare(kind: str = "v1") -> dict[str, torch.Tensor]:
    return {name.removeprefix("control_model."): t for name, t in original_state(kind).items()}


@pytest.mark.parametrize("layout", ["net.pth", "net.safetensors", "folder", "bare.safetensors", "whole.pth"])
def test_every_layout(tmp_path: Path, layout: str) -> None:
    """With or without the prefix, and beside the weights of a whole model."""
    path = tmp_path / layout
    if layout == "bare.safetensors":
        save_file(bare(), path)
    elif layout == "whole.pth":
        other = {"model.diffusion_model.out.2.bias": torch.zeros(4)}
        torch.save({"state_dict": original_state("v1") | other}, path)
    else:
        write_controlnet(path)
    check_controlnet(path, V1)
    found = load_controlnet(path, V1, torch.float32).state_dict()
    assert found.keys() == bare().keys()
    assert all(torch.equal(found[name], t) for name, t in bare().items())


def test_the_dtype_is_the_model_s(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_file({name: t.half() for name, t in bare().items()}, path)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        net = load_controlnet(path, V1, dtype)
        assert {t.dtype for t in net.parameters()} == {dtype}
    weight = load_controlnet(path, V1, torch.float32).zero_convs[0][0].weight
    assert torch.equal(weight, bare()["zero_convs.0.0.weight"].half().float())


def test_float8_with_scales(tmp_path: Path) -> None:
    """The scales were left out, so that the ControlNet added hints of another strength."""
    state, name = bare(), "zero_convs.0.0.weight"
    values = torch.randn_like(state[name]).to(torch.float8_e4m3fn)
    path = tmp_path / "net.safetensors"
    save_file(state | {name: values, "zero_convs.0.0.scale_weight": torch.tensor(0.25)}, path)
    check_controlnet(path, V1)
    assert torch.equal(load_controlnet(path, V1, torch.float32).state_dict()[name], values.float() / 4)


def wider(state: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """A ControlNet for a text encoder of another width."""
    narrow = [name for name in state if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    return state | {name: torch.zeros(state[name].shape[0], width) for name in narrow}


def real_config(context: int) -> dict[str, Any]:
    config = tiny_config("v1")
    config["params"]["unet_config"]["params"] |= {"context_dim": context}
    return config


def refused(path: Path, config: dict[str, Any]) -> str:
    with pytest.raises(InputError) as error:
        check_controlnet(path, config)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_family_is_named_beside_the_model_s(tmp_path: Path) -> None:
    path = tmp_path / "v2.safetensors"
    save_file(wider(bare(), 1024), path)
    line = refused(path, real_config(768))
    assert "Stable Diffusion v2 (1024 channels of text)" in line
    assert "the model is Stable Diffusion v1 (768)" in line
    save_file(wider(bare(), 2048), path)
    assert "Stable Diffusion XL (2048" in refused(path, real_config(1024))


def test_files_that_are_no_controlnet(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"lora_unet_down.lora_up.weight": torch.zeros(2, 2)}, path)
    assert "looks like a LoRA, and is no ControlNet" in refused(path, V1)
    save_file(bare() | {"difference": torch.zeros(0)}, path)
    assert "difference" in refused(path, V1)
    whole = bare()
    del whole["zero_convs.1.0.bias"]
    save_file(whole, path)
    assert "(first zero_convs.1.0.bias)" in refused(path, V1)
    path.write_bytes(b"no weights")
    refused(path, V1)
    refused(tmp_path / "absent.pth", V1)


def test_a_name_that_no_file_can_have() -> None:
    """It ended in the system's OSError, without a line that names the file."""
    path = Path("x" * 300)
    assert "cannot be opened: File name too long" in refused(path, V1)
    with pytest.raises(InputError, match="File name too long"):
        weights_file(path)


def test_a_single_file_that_averages_over_the_image(tmp_path: Path) -> None:
    """Only the published name says so: its images were wrong."""
    path = write_controlnet(tmp_path / "folder") / "diffusion_pytorch_model.safetensors"
    for name in ("control_v11e_sd15_shuffle", "control_v11e_sd15_shuffle_fp16"):
        path = path.rename(tmp_path / f"{name}.safetensors")
        assert "by its name, averages what it adds" in refused(path, V1)
    check_controlnet(path.rename(tmp_path / "my_shuffle.safetensors"), V1)


def test_a_controlnet_that_averages_over_the_image(tmp_path: Path) -> None:
    path = write_controlnet(tmp_path / "shuffle")
    config = path / "config.json"
    config.write_text(
        config.read_text().replace('"global_pool_conditions": false', '"global_pool_conditions": true')
    )
    assert "shuffle" in refused(path, V1)
    assert "shuffle" in refused(path / "diffusion_pytorch_model.safetensors", V1)
