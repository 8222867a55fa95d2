"""The contenders of the comparison with peers, on a miniature; no timing is asserted."""

import importlib
import sys
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
peers = importlib.import_module("peers")
against_peers = importlib.import_module("parts.against_peers")


@pytest.fixture
def files(model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Path]:
    monkeypatch.setattr(peers, "SIDE", 8)
    return dict(zip(("config", "weights"), model, strict=True)) | {"openvino": tmp_path / "openvino"}


@torch.no_grad()
def test_the_toolkit_takes_part_as_its_commands_set_it_up(files, tmp_path):
    ours = peers.Ours(files, "full", "cpu", ("--eager",))
    assert ours.text().shape == (2, 77, 32)
    assert ours.step(2).shape == (2, 4, 8, 8)
    assert ours.decode().shape == (1, 3, 64, 64)
    ours.image(2, tmp_path / "image.png")
    assert Image.open(tmp_path / "image.png").size == (64, 64)


def test_from_its_start_the_toolkit_is_its_command(files, tmp_path):
    """A process that only called the library lacked what a command does for a quick start and end."""
    make = partial(peers.Ours, files, "full", "cpu", ("--eager",))
    readings = peers.from_start({"this": make}, files, 1, tmp_path / "image.png", 2)
    assert len(readings["this"]) == 2
    images = list((tmp_path / "samples").glob("*.png"))
    assert [Image.open(path).size for path in images] == [(64, 64)] * 2


def test_a_contender_that_ends_is_named(files, tmp_path):
    """OpenVINO's NaN on a Zen 5 was reported as `EOFError`, of nobody."""
    missing = files | {"weights": tmp_path / "missing.ckpt"}
    with pytest.raises(RuntimeError, match="this ended in 'start'"):
        peers.Contender("this", peers.Ours, missing, "full", "cpu")


@torch.no_grad()
def test_no_idea_changes_a_step_beyond_rounding(files):
    ideas = tuple(dict.fromkeys(one for some in peers.combinations("full", "cpu") for one in some))
    convolutions = {"oneDNN convolutions", "Winograd's convolutions"}
    kernels = {"upsampling folded", "oneDNN linear layers", "attention in rows", *convolutions}
    assert {"memory kept", "prefix shared", *kernels} == set(ideas)
    plain = peers.Ideas(files, "full", "cpu", ())
    for other in convolutions:  # a layer takes one of both
        fast = peers.Ideas(files, "full", "cpu", tuple(idea for idea in ideas if idea != other))
        for method in ("step", "decode"):
            expected = getattr(plain, method)()
            torch.testing.assert_close(getattr(fast, method)(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_openvino_takes_part_with_the_same_weights(files, tmp_path):
    if find_spec("openvino") is None:
        pytest.skip("needs openvino")
    peers.write_for_openvino(files)
    plain, other = peers.Ours(files, "full", "cpu", ("--eager",)), peers.OpenVino(files, "full")
    for method, given in (("step", 1), ("step", 2), ("decode", 1)):
        expected = getattr(plain, method)(given)
        torch.testing.assert_close(getattr(other, method)(given), expected, rtol=1e-4, atol=1e-4)
    other.image(2, tmp_path / "image.png")
    assert Image.open(tmp_path / "image.png").size == (64, 64)


def test_contenders_are_those_that_are_installed(files, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert list(peers.makers(files, "full", "cpu")) == ["this", "this --eager"]
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    assert tuple(peers.makers(files, "full", "cpu", compiled=True)) == peers.CONTENDERS
    names = set(peers.makers(files, "half", "cuda", compiled=True))
    assert names == set(peers.CONTENDERS) - {"openvino", "stable-diffusion.cpp"}


class Stub:
    """A contender whose every call takes the same time."""

    def __init__(self, seconds: float, has_parts: bool):
        self.seconds, self.has_parts, self.load_seconds = seconds, has_parts, seconds

    def call(self, method: str, *given: object, wanted: bool = False) -> object:
        if method == "peak":
            return 1e9
        assert self.has_parts or method == "image"
        return self.seconds, np.full(4, self.seconds) if wanted else None


def test_a_contender_without_parts_is_measured_as_far_as_it_can_be(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    running = {"this": Stub(1.0, True), "openvino": Stub(2.0, True), "stable-diffusion.cpp": Stub(3.0, False)}
    monkeypatch.setattr(peers, "contenders", lambda makes: nullcontext(running))
    found = peers.race({}, 5, [1, 2], 1, tmp_path)
    assert "step 1" not in found["stable-diffusion.cpp"]
    assert found["openvino"]["difference"] == 1.0  # of the first contender's, as there is no eager one
    rows = {row.what: row for row in against_peers.peer_rows("float32", found, 5, cpu=True)}
    image = rows["float32: one image, 5 DPM-Solver++ steps, with its PNG"].measured
    assert image == "1.00 s; openvino 2.00 s (0.50x); stable-diffusion.cpp 3.00 s (0.33x)"
    assert rows["float32: decoder"].measured == "1.00 s; openvino 2.00 s (0.50x)"
    assert "float32: largest difference to `this`, of the largest output" in rows
    alone = {"stable-diffusion.cpp": found["stable-diffusion.cpp"]}  # which was a KeyError, after its minutes
    named = {row.what for row in against_peers.peer_rows("float32", alone, 5, cpu=False)}
    assert "float32: one image, 5 DPM-Solver++ steps, with its PNG" in named
    assert "float32: decoder" not in named
    peers.plot({"float32": found}, 5, "title", tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width > 100


def test_a_peer_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(against_peers, "v1_weights", lambda options: tmp_path / "weights.safetensors")
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    options = SimpleNamespace(
        device="cpu", steps=1, batches=[1], precisions=["full"], compiled=False, peers=["openvino"], repeats=1
    )
    with pytest.raises(InputError, match="--peers openvino: can be had here: this, this --eager"):
        against_peers.measure_peers(options)
