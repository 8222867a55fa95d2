"""Textual inversions in every layout that people have, and files that are none."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.errors import InputError
from ldm.weights.embedding import check_width, read_embedding

VECTORS = torch.arange(12.0).reshape(3, 4)


def a1111(param: object) -> dict:
    """As the web UI's training writes it."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": param,
        "name": "training-name",
        "step": 500,
        "sd_checkpoint": "81761151",
        "sd_checkpoint_name": None,
    }


CONTENT = {
    "a1111": a1111({"*": VECTORS}),
    "a1111, a parameter": a1111({"*": nn.Parameter(VECTORS.clone())}),
    "original": {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": nn.ParameterDict({"*": VECTORS}),
    },
    "diffusers": {"<toy>": VECTORS},
    "diffusers, one vector": {"<toy>": VECTORS[0]},
    "tensor": VECTORS,
    "half": {"emb_params": VECTORS.half()},
}


@pytest.mark.parametrize("layout", CONTENT)
@pytest.mark.parametrize("new", [True, False])
def test_pickles(tmp_path: Path, layout: str, new: bool) -> None:
    path = tmp_path / "my toy.pt"
    torch.save(CONTENT[layout], path, _use_new_zipfile_serialization=new)
    found = read_embedding(path)
    expected = VECTORS[:1] if layout.endswith("one vector") else VECTORS
    assert torch.equal(found.vectors.float(), expected)
    assert found.names == (("my toy", "<toy>") if layout.startswith("diffusers") else ("my toy",))
    assert read_embedding(path, "x").names == ("x",)
    path.unlink()  # nothing of it is mapped any more
    assert found.vectors.sum() == expected.sum()


@pytest.mark.parametrize("name", ["emb_params", "<toy>"])
def test_safetensors(tmp_path: Path, name: str) -> None:
    path = tmp_path / "toy.safetensors"
    save_file({name: VECTORS}, path)
    found = read_embedding(path)
    assert torch.equal(found.vectors, VECTORS)
    assert found.names == (("toy",) if name == "emb_params" else ("toy", "<toy>"))


@pytest.mark.parametrize("token", ["", " ", ",", "(", "<", "<>"])
def test_tokens_that_are_no_words(tmp_path: Path, token: str) -> None:
    """The vectors stood for each space or comma of a prompt; an empty token was an IndexError."""
    torch.save({token: VECTORS}, tmp_path / "toy.pt")
    assert read_embedding(tmp_path / "toy.pt").names == ("toy",)


def test_a_token_of_signs_in_brackets(tmp_path: Path) -> None:
    torch.save({"<*>": VECTORS}, tmp_path / "toy.pt")
    assert read_embedding(tmp_path / "toy.pt").names == ("toy", "<*>")


@pytest.mark.parametrize("shape", [(10**13,), (75, 10**12), (2, 2)])
def test_vectors_that_are_not_stored(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A stride of 0 made vectors of any width of four bytes, and the memory was full when they were read."""
    torch.save({"toy": torch.ones(1).expand(shape)}, tmp_path / "toy.pt")
    with pytest.raises(InputError, match=r"toy\.pt is damaged: its 'toy' has more values than are stored"):
        read_embedding(tmp_path / "toy.pt")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"a": VECTORS, "b": VECTORS}, "to hold one tensor, and holds 'a', 'b'"),
        ({}, "no tensor"),
        ({"step": 3}, "no tensor"),
        ({"clip_l": VECTORS, "clip_g": VECTORS}, "Stable Diffusion XL"),
        ({"a": torch.zeros(2, 3, 4)}, r"its tensor is \[2, 3, 4\]"),
        ({"a": torch.zeros(76, 4)}, r"its tensor is \[76, 4\]"),
        ({"a": torch.zeros(0, 4)}, r"its tensor is \[0, 4\]"),
        ({"a": torch.zeros(2, 4, dtype=torch.int64)}, "no finite numbers"),
        ({"a": torch.full((2, 4), torch.nan)}, "no finite numbers"),
        ([VECTORS], "no state dict"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: object, why: str) -> None:
    path = tmp_path / "toy.pt"
    torch.save(content, path)
    with pytest.raises(InputError, match=f"toy.pt .*{why}"):
        read_embedding(path)


def test_a_file_with_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return os.system, ("touch ran",)

    torch.save(a1111({"*": Payload()}), tmp_path / "toy.pt", pickle_module=pickle)
    with pytest.raises(InputError, match="carries code"):
        read_embedding(tmp_path / "toy.pt")
    assert not (tmp_path / "ran").exists()


def test_missing_and_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    for name, why in (
        ("none.pt", "no textual inversion at"),
        (".", "no textual inversion"),
        ("empty.pt", "empty"),
    ):
        with pytest.raises(InputError, match=why):
            read_embedding(tmp_path / name)


def test_both_widths_are_named(tmp_path: Path) -> None:
    save_file({"emb_params": torch.zeros(2, 1024)}, tmp_path / "toy.safetensors")
    embedding = read_embedding(tmp_path / "toy.safetensors")
    check_width(embedding, 1024)
    with pytest.raises(InputError, match=r"1024 numbers \(Stable Diffusion v2\), .* 768 numbers .*v1"):
        check_width(embedding, 768)
