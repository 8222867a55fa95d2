"""Checkpoints of a few weights, in every form that files have, and the skeleton of a model for them."""

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.errors import InputError
from ldm.weights.checkpoint import read_state_dict


def small_state(dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A few weights of every kind: dense, transposed view, scalar, empty, integer."""
    return {
        "model.diffusion_model.out.0.weight": torch.randn(3, 5).to(dtype),
        "model.diffusion_model.out.0.bias": torch.arange(6.0).reshape(2, 3).T.to(dtype),
        "model.scalar": torch.tensor(0.25).to(dtype),
        "model.empty": torch.empty(0, 4).to(dtype),
        "position_ids": torch.arange(77)[None],
    }


def save(state, path: Path, form: str) -> Path:
    """Write `state` in one of FORMS."""
    if form == "safetensors":
        save_file({name: t.contiguous() for name, t in state.items()}, path)
    else:
        torch.save(
            {"state_dict": state, "global_step": 470000} if "wrapped" in form else state,
            path,
            _use_new_zipfile_serialization="legacy" not in form,
        )
    return path


FORMS = ["safetensors", "zip", "zip wrapped", "legacy", "legacy wrapped"]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def refusal(path) -> str:
    """The message of the InputError for a file: one line that names it."""
    with pytest.raises(InputError) as caught:
        read_state_dict(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def raw_zip(path: Path, program: bytes, **records: bytes) -> Path:
    """A zip of torch.save's layout with this pickle and these records."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return path


UNET_BLOCK = "model.diffusion_model.input_blocks"
UNET_INPUT = f"{UNET_BLOCK}.0.0.weight"


class Tiny(nn.Module):
    """The skeleton of a latent diffusion model: its parts, a schedule buffer, the keys of its family."""

    def __init__(self, channels=4, context=768):
        super().__init__()

        def part(**children):
            module = nn.Module()
            for name, child in children.items():
                module.add_module(name, child)
            return module

        attention = part(attn2=part(to_k=nn.Linear(context, 8, bias=False)))
        spatial = part(transformer_blocks=nn.ModuleList([attention]))
        self.model = part(
            diffusion_model=part(
                input_blocks=nn.ModuleList(
                    [nn.ModuleList([nn.Conv2d(channels, 8, 3)]), nn.ModuleList([nn.Conv2d(8, 8, 3), spatial])]
                )
            )
        )
        self.first_stage_model = part(quant_conv=nn.Conv2d(8, 8, 1))
        self.cond_stage_model = part(transformer=part(text_model=part(final_layer_norm=nn.LayerNorm(16))))
        self.register_buffer("betas", torch.linspace(0, 1, 10, device="cpu"), persistent=False)
        self.requires_grad_(False)


def meta(**options) -> Tiny:
    with torch.device("meta"):
        return Tiny(**options)
