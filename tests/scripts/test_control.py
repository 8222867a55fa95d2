"""`--control` from the arguments of the commands to their files."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import SCRIPTS, Result, refused
from PIL import Image
from run_helpers import data, manifest
from safetensors.torch import save_file
from tiny_control import random_controlnet

from ldm.images.edges import canny
from ldm.weights.loading import read_config

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_controlnet(tmp_path_factory.mktemp("net") / "net.safetensors", tiny.MODEL)


@pytest.fixture
def drawing(tmp_path: Path) -> Path:
    values = np.zeros((16, 16, 3), np.uint8)
    values[4:12, 4:12] = 230
    Image.fromarray(values).save(tmp_path / "drawing.png")
    return tmp_path / "drawing.png"


@pytest.fixture
def make(command: Command, model: tuple[Path, Path]) -> Command:
    """Run a command: four steps, one image of 16x16 without a watermark."""
    base = ["--config", model[0], "--ckpt", model[1], "--steps", 4, "--prompt", "a cat"]
    base += ["--watermark", "none", "--H", 16, "--W", 16, "--n_samples", 1, "--n_iter", 1, "--skip_grid"]
    return lambda *argv, name="txt2img", folder="out": command(name, *base, *argv, folder=folder)


def test_a_control_image(make: Command, net: Path, drawing: Path) -> None:
    control = f"{net}:{drawing}:0.5:0-0.75"
    argv = ["--control", control, "--control_preprocess", "canny"]
    result = make(*argv, "--save_control", "--n_samples", 2)
    assert (result.code, result.err) == (0, [])
    assert result.files == [
        "control/00000.png", "control/00001.png", "samples/00000.png", "samples/00001.png",
    ]  # fmt: skip
    seen = np.asarray(Image.open(result.folder / "control/00000.png"))
    assert np.array_equal(seen, canny(np.asarray(Image.open(drawing))))
    assert [line["control_files"] for line in manifest(result.folder)] == [
        ["control/00000.png"], ["control/00001.png"],
    ]  # fmt: skip
    assert result.settings[0]["control"] == ["net.safetensors:drawing.png:0.5:0-0.75"]
    assert result.settings[0]["control_preprocess"] == ["canny"]
    plain = make(folder="plain")
    assert np.abs(plain.images[0] - result.images[0]).max() > 4
    # what was saved, given as it is, makes the same image
    saved = f"{net}:{result.folder / 'control/00000.png'}:0.5:0-0.75"
    assert np.array_equal(make("--control", saved, folder="saved").images[0], result.images[0])
    # an image knows the names of its files, not where they are
    like = ["--like", result.paths[0]]
    refused(make(*like, folder="like"), "--control", "net.safetensors:drawing.png:0.5:0-0.75")
    again = make(*like, "--control", control, folder="like")
    assert np.array_equal(again.images[0], result.images[0])


def test_several_and_lines_of_their_own(make: Command, net: Path, drawing: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a cat", "control": [f"{net}:{drawing}", f"{net}:{drawing}:0.5"]},
        {"prompt": "a cat", "control": f"{net}:{drawing}:0.5", "control_preprocess": "invert"},
        {"prompt": "a cat"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    result = make("--from-file", path, "--save_control", "--seed", 3)
    assert result.code == 0
    assert [line.get("control_files") for line in manifest(result.folder)] == [
        ["control/00000.png", "control/00000-1.png"], ["control/00001.png"], None,
    ]  # fmt: skip
    assert "control" not in result.settings[2]


@pytest.mark.parametrize("name", ["img2img", "inpaint"])
def test_commands_with_an_init_image(
    make: Command, net: Path, drawing: Path, tmp_path: Path, name: str
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "init.png")
    argv = ["--init-img", tmp_path / "init.png"]
    argv += ["--mask", drawing] if name == "inpaint" else []
    plain = make(*argv, name=name, folder="plain")
    with_ = make(*argv, "--control", f"{net}:{drawing}", name=name)
    assert with_.code == 0
    assert np.abs(plain.images[0] - with_.images[0]).max() > 4


def test_a_run_is_taken_up(make: Command, net: Path, drawing: Path) -> None:
    argv = ["--control", f"{net}:{drawing}", "--save_control", "--n_iter", 3]
    result = make(*argv)
    before = data(result.folder)
    for name in ("samples/00001.png", "control/00001.png"):
        (result.folder / name).unlink()
    assert make(*argv, "--resume").code == 0
    assert data(result.folder) == before
    Image.fromarray(255 - np.asarray(Image.open(drawing))).save(drawing)
    assert "control image 0" in make(*argv, "--resume").err[0]


def test_what_cannot_be_used(make: Command, net: Path, drawing: Path, tmp_path: Path, model: tuple) -> None:
    """One line and exit code 2, before the model is loaded."""
    other = read_config(model[0])
    other["params"]["unet_config"]["params"]["context_dim"] = 1024
    for_v2 = random_controlnet(tmp_path / "v2.safetensors", other)
    broken = tmp_path / "broken.png"
    broken.write_bytes(drawing.read_bytes()[:60])
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_down.lora_up.weight": torch.zeros(2, 2)}, lora)
    for control, words in (
        (f"{net}:{tmp_path / 'absent.png'}", ["cannot read the image", "absent.png"]),
        (f"{net}:{broken}", ["broken.png"]),
        (f"{tmp_path / 'absent.pth'}:{drawing}", ["no ControlNet at", "absent.pth"]),
        (f"{for_v2}:{drawing}", ["Stable Diffusion v2 (1024 channels of text)", "(32)"]),
        (f"{lora}:{drawing}", ["a LoRA", "no ControlNet"]),
        (f"{net}:{drawing}:x", ["--control", "'x' is no weight"]),
        (f"{net}:{drawing}:1:0.9-0.1", ["'0.9-0.1' is no range of the steps"]),
    ):
        refused(make("--control", control, "--ckpt", model[1], folder="bad"), *words)
    refused(make("--control_preprocess", "canny", folder="bad"), "--control_preprocess without --control")
    argv = ["--control", f"{net}:{drawing}"]
    refused(make(*argv, "--deepcache", 2, folder="bad"), "--control with --deepcache 2")
    refused(make(*argv, "--save_control", "--skip_save", folder="bad"), "--save_control with --skip_save")
    refused(make("--save_control", folder="bad"), "--save_control without --control")  # was in vain


@pytest.mark.slow
def test_a_real_process(model: tuple[Path, Path], net: Path, drawing: Path, tmp_path: Path) -> None:
    argv = ["--config", model[0], "--ckpt", model[1], "--steps", 2, "--prompt", "a cat", "--safety", "off"]
    argv += ["--control", f"{net}:{drawing}", "--outdir", tmp_path / "out", "--n_iter", 1, "--n_samples", 1]
    done = subprocess.run(
        [sys.executable, SCRIPTS / "txt2img.py", *map(str, argv)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/samples/00000.png").exists()
