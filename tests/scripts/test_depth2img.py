"""`scripts/depth2img.py` from its arguments to its files."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import SCRIPTS, Result, refused
from PIL import Image
from run_helpers import data, manifest
from tiny_siblings import depth_section, write_model

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_model(tmp_path_factory.mktemp("depth"), "depth", depth_section())


@pytest.fixture
def depth2img(command: Command, files: tuple[Path, Path]) -> Command:
    """Run the command: four steps, one image without a watermark."""
    base = [
        "--config",
        files[0],
        "--ckpt",
        files[1],
        "--steps",
        4,
        "--prompt",
        "a cat",
        "--watermark",
        "none",
    ]
    return lambda *argv, folder="out": command("depth2img", *base, *argv, folder=folder)


@pytest.fixture
def init(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(values).save(tmp_path / "init.png")
    return tmp_path / "init.png"


@pytest.fixture
def depth(tmp_path: Path) -> Path:
    values = np.linspace(0, 65535, 64).round().astype(np.uint16)
    Image.fromarray(np.tile(values, (64, 1))).save(tmp_path / "near.png")
    return tmp_path / "near.png"


def test_an_estimated_depth(depth2img: Command, init: Path) -> None:
    result = depth2img("--init-img", init, "--save_depth", "--n_samples", 2)
    assert result.code == 0
    assert result.err == ["img2img runs 3 of 4 steps"]
    assert result.files == [
        "depth/00000.png", "depth/00001.png", "grid-0000.png", "samples/00000.png", "samples/00001.png",
    ]  # fmt: skip
    maps = [Image.open(result.folder / f"depth/0000{k}.png") for k in range(2)]
    assert [(image.mode, image.size) for image in maps] == [("I;16", (64, 64))] * 2
    assert np.array_equal(*maps)
    assert np.asarray(maps[0]).max() == 65535
    assert [line["depth_file"] for line in manifest(result.folder)] == ["depth/00000.png", "depth/00001.png"]
    assert result.settings[0]["init_img"] == "init.png"
    assert result.settings[0]["strength"] == 0.9
    assert "depth" not in result.settings[0]
    # the map that was saved, given, makes the same image
    again = depth2img("--init-img", init, "--depth", result.folder / "depth/00000.png", folder="again")
    assert np.abs(again.images[0] - result.images[0]).max() <= 1
    assert again.settings[0]["depth"] == "00000.png"


def test_a_depth_map_alone(depth2img: Command, depth: Path) -> None:
    """All steps run, from noise; the default strength is that of init images."""
    result = depth2img("--depth", depth)
    assert (result.code, result.err) == (0, [])
    assert result.images[0].shape == (64, 64, 3)
    assert "strength" not in result.settings[0]
    again = depth2img("--like", result.paths[0], "--depth", depth, folder="again")
    assert again.err == []
    assert np.array_equal(again.images[0], result.images[0])


def test_json_lines(depth2img: Command, init: Path, depth: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "a cat", "init_img": str(init)},
        {"prompt": "a dog", "depth": str(depth)},
        {"prompt": "a cow", "init_img": str(init), "depth": str(depth), "strength": 0.5},
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    result = depth2img("--from-file", path, "--save_depth")
    assert result.code == 0
    assert [settings.get("strength") for settings in result.settings] == [0.9, None, 0.5]
    assert [settings.get("depth") for settings in result.settings] == [None, "near.png", "near.png"]
    assert len(list((result.folder / "depth").iterdir())) == 3
    path.write_text('{"prompt": "a cat"}')
    refused(depth2img("--from-file", path, folder="refused"), "--init-img or --depth")


def test_a_run_is_taken_up(depth2img: Command, init: Path, depth: Path) -> None:
    argv = ["--init-img", init, "--depth", depth, "--save_depth", "--n_samples", 3, "--filename", "a/{image}"]
    first = depth2img(*argv)
    assert (first.folder / "depth/a/2.png").exists()
    before = data(first.folder)
    (first.folder / "samples/a/1.png").unlink()
    (first.folder / "depth/a/1.png").unlink()
    again = depth2img(*argv, "--resume")
    assert again.code == 0
    assert data(again.folder) == before
    Image.fromarray(np.eye(64) * 255).convert("L").save(depth)  # the same name, another content
    changed = depth2img(*argv, "--resume")
    assert changed.code == 2
    assert "depth map" in changed.err[0]
    assert "save_depth true, now null" in depth2img(*argv[:4], *argv[5:], "--resume").err[0]


def test_what_is_refused(depth2img: Command, init: Path, depth: Path, tmp_path: Path) -> None:
    refused(depth2img(), "give --init-img or --depth")
    refused(depth2img("--depth", tmp_path / "nowhere.png"), "nowhere.png")
    refused(depth2img("--init-img", init, "--save_depth", "--skip_save"), "--save_depth with --skip_save")
    refused(depth2img("--depth", depth, "--max_pixels", 100), "--max_pixels 100")


def test_another_model_is_named(command: Command, model: tuple[Path, Path], init: Path) -> None:
    argv = ["--config", model[0], "--ckpt", model[1], "--init-img", init]
    refused(command("depth2img", *argv), "txt2img.py or img2img.py")


@pytest.mark.slow
def test_several_processes(files: tuple[Path, Path], init: Path, tmp_path: Path) -> None:
    """Which process makes an image is chance: the maps and the images are the same."""
    argv = [SCRIPTS / "depth2img.py", "--config", files[0], "--ckpt", files[1], "--steps", 4]
    argv += ["--init-img", init, "--save_depth", "--n_iter", 6, "--skip_grid", "--device", "cpu"]
    for folder, devices in (("alone", 1), ("together", 2)):
        words = [*argv, "--outdir", tmp_path / folder, "--devices", devices]
        subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True)
    together = data(tmp_path / "together")
    assert len(together) == 12
    assert together == data(tmp_path / "alone")
