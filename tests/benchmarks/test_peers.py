"""The contenders of the comparison with diffusers, on a miniature; no timing is asserted."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
peers = importlib.import_module("peers")


@pytest.fixture
def files(model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setattr(peers, "SIDE", 8)
    return dict(zip(("config", "weights"), model, strict=True))


@torch.no_grad()
def test_the_toolkit_takes_part_as_its_commands_set_it_up(files, tmp_path):
    ours = peers.Ours(files, "full", "cpu", ("--eager",))
    assert ours.text().shape == (2, 77, 32)
    assert ours.step(2).shape == (2, 4, 8, 8)
    assert ours.decode().shape == (1, 3, 64, 64)
    ours.image(2, tmp_path / "image.png")
    assert Image.open(tmp_path / "image.png").size == (64, 64)


@torch.no_grad()
def test_no_idea_changes_a_step_beyond_rounding(files):
    ideas = tuple(dict.fromkeys(one for some in peers.combinations("full", "cpu") for one in some))
    assert {"memory kept", "upsampling folded", "prefix shared"} == set(ideas)
    plain, fast = peers.Ideas(files, "full", "cpu", ()), peers.Ideas(files, "full", "cpu", ideas)
    for method in ("step", "decode"):
        torch.testing.assert_close(getattr(fast, method)(), getattr(plain, method)(), rtol=1e-4, atol=1e-4)
