"""Files are written whole or not at all."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.errors import InputError
from ldm.training.files import DiskFull, move, whole, write_tensors, writing, writing_below


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.safetensors"
    values = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(2)}
    write_tensors(values, path, {"seed": "1"})
    read = load_file(path)
    assert torch.equal(read["a"], values["a"])
    assert torch.equal(read["b"], values["b"])
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"seed": "1"}
    assert [entry.name for entry in path.parent.iterdir()] == ["a.safetensors"]


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    """The library wrote metadata in another order each time: equal runs left files that were not equal."""
    metadata = {name: name.upper() for name in "hgfedcba"} | {"text": '\u00e9 " \n'}
    values = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.float16)}
    for name in "xyz":
        write_tensors(values, tmp_path / name, metadata)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes() == (tmp_path / "z").read_bytes()
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("b"), torch.ones(3))


def test_an_interrupted_write_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed while it wrote the latents' file left a torn one, which the next run read."""
    path = tmp_path / "a.safetensors"
    write_tensors({"a": torch.zeros(100)}, path)
    write_bytes = Path.write_bytes

    def interrupted(self: Path, data: bytes) -> None:
        write_bytes(self, data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_tensors({"a": torch.ones(100)}, path)
    assert torch.equal(load_file(path)["a"], torch.zeros(100))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_refused_by_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/a.safetensors cannot be written: "):
        write_tensors({}, tmp_path / "file/a.safetensors")
    with pytest.raises(DiskFull, match="--logdir x cannot be written: No space left"), writing("--logdir x"):
        raise OSError(28, "No space left on device")


def test_only_errors_of_the_folder_are_the_users(tmp_path):
    """Any OSError during training was reported as a folder that cannot be written."""
    with pytest.raises(InputError, match="cannot be written: No such file"), writing_below(tmp_path):
        (tmp_path / "no" / "folder").touch()
    with pytest.raises(DiskFull, match="No space left"), writing_below(tmp_path):
        raise OSError(28, "No space left on device")
    with pytest.raises(ConnectionError), writing_below(tmp_path):
        raise ConnectionResetError(104, "Connection reset by peer")
    with pytest.raises(FileNotFoundError), writing_below(tmp_path):
        open("/nowhere/else")  # noqa: SIM115


def test_a_file_moves_to_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--output on another disk failed when the whole training was done."""
    made, target = tmp_path / "model.safetensors", tmp_path / "disk" / "out.safetensors"
    made.write_text("weights")
    target.parent.mkdir()
    replace = Path.replace

    def across(self: Path, other: Path) -> Path:
        if self.parent != Path(other).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(self, other)

    monkeypatch.setattr(Path, "replace", across)
    assert move(made, target) == target
    assert target.read_text() == "weights"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["out.safetensors"]


def test_processes_of_the_same_number_do_not_share_a_file(tmp_path: Path) -> None:
    """Two machines, whose processes had the same number, wrote into one unfinished file."""
    with whole(tmp_path / "a") as first, whole(tmp_path / "a") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first"
