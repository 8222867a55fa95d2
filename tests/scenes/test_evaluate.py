"""The detector reads scenes from pictures, and `scripts/evaluate_scenes.py` counts what a model got right."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.cli import entry
from ldm.errors import InputError
from ldm.images.pixels import to_uint8
from ldm.scenes.detector import (
    DETECTOR_WEIGHTS,
    Detector,
    load_detector,
    outline,
    save_detector,
    to_float,
    train_detector,
)
from ldm.scenes.scenes import Scene, Solid, held_out, held_out_scenes, random_scene, render
from ldm.scenes.scores import (
    HELD_OUT,
    RIGHT,
    WRONG,
    check,
    evaluation_scenes,
    markdown_table,
    marked_grid,
    score,
)

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/evaluate_scenes.py"
RED_CUBE, BLUE_CONE = Solid("cube", "red"), Solid("cone", "blue")
PAIR = Scene(RED_CUBE, "left of", BLUE_CONE)


def fresh_renders(count: int) -> tuple[list[Scene], list[np.ndarray]]:
    rng = np.random.default_rng(20_000)
    scenes = [random_scene(rng) for _ in range(count)]
    return scenes, [render(scene, rng) for scene in scenes]


# --- the detector


def test_the_bundled_detector_reads_renders():
    scenes, pictures = fresh_renders(100)
    seen = load_detector(ROOT / DETECTOR_WEIGHTS).read(pictures)
    assert score(scenes, seen)["all"] > 0.95


def test_the_bundled_detector_reads_soft_and_noisy_renders():
    scenes, pictures = fresh_renders(100)
    x = to_float(pictures)
    small = torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
    soft = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    noisy = soft + 0.05 * torch.randn(soft.shape, generator=torch.Generator().manual_seed(0))
    seen = load_detector(ROOT / DETECTOR_WEIGHTS).read(list(to_uint8(noisy)))
    assert score(scenes, seen)["all"] > 0.9


def test_the_bundled_detector_is_small():
    assert (ROOT / DETECTOR_WEIGHTS).stat().st_size < 0.8 * 2**20


def test_pictures_of_other_sizes_are_scaled_and_batches_do_not_matter():
    torch.manual_seed(0)
    detector = Detector().eval()
    pictures = fresh_renders(5)[1]
    doubled = [picture.repeat(2, axis=0).repeat(2, axis=1) for picture in pictures]
    seen = detector.read(pictures)
    assert detector.read(doubled) == seen
    assert detector.read(pictures, batch_size=2) == seen
    assert all(scene == outline(scene) for scene in seen)


def test_training_is_reproducible_and_makes_a_detector(tmp_path):
    (*_, (loss, detector)), (*_, (again, _)) = (train_detector(2, batch_size=4, seed=1) for _ in range(2))
    assert loss == again
    assert np.isfinite(loss)
    path = tmp_path / "models/detector.safetensors"
    save_detector(detector, path)
    loaded = load_detector(path).state_dict()
    for name, tensor in detector.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-3, atol=1e-4)


def test_no_detector(tmp_path):
    with pytest.raises(InputError, match=r"absent\.safetensors; --train_detector makes one"):
        load_detector(tmp_path / "absent.safetensors")


# --- the scores


@pytest.mark.parametrize(
    ("seen", "right"),
    [
        (PAIR, "all relation solids shapes colours"),
        (PAIR.mirrored(), "all relation solids shapes colours"),
        (
            Scene(Solid("cube", "red", "small"), "left of", BLUE_CONE, "pink"),
            "all relation solids shapes colours",
        ),
        (Scene(BLUE_CONE, "left of", RED_CUBE), "relation solids shapes colours"),
        (Scene(RED_CUBE, "in front of", BLUE_CONE), "solids shapes colours"),
        (Scene(Solid("cube", "blue"), "left of", Solid("cone", "red")), "relation shapes colours"),
        (Scene(Solid("torus", "red"), "left of", BLUE_CONE), "relation colours"),
        (Scene(Solid("cube", "white"), "left of", BLUE_CONE), "relation shapes"),
        (Scene(RED_CUBE), ""),
        (None, ""),
    ],
)
def test_what_is_right_about_a_pair(seen, right):
    assert [name for name, passed in check(PAIR, seen).items() if passed] == right.split()


def test_what_is_right_about_a_single():
    asked = Scene(Solid("cube", "red", "large"), background="grey")
    assert all(check(asked, Scene(RED_CUBE)).values())
    assert not any(check(asked, PAIR).values())
    assert score([asked, asked], [Scene(RED_CUBE), Scene(BLUE_CONE)]) == {
        "all": 0.5,
        "relation": 1.0,
        "solids": 0.5,
        "shapes": 0.5,
        "colours": 0.5,
    }


@pytest.mark.parametrize("pairs", [False, True])
def test_the_scenes_are_held_out_and_return_only_when_all_were_there(pairs):
    with pytest.raises(ValueError, match=f"only {HELD_OUT[pairs]} combinations"):
        held_out_scenes(np.random.default_rng(0), HELD_OUT[pairs] + 1, pairs)
    scenes = evaluation_scenes(0, HELD_OUT[pairs] + 20, pairs)
    assert all(held_out(scene) and bool(scene.second) == pairs for scene in scenes)
    first = {scene.canonical() for scene in scenes[: HELD_OUT[pairs]]}
    assert len(first) == HELD_OUT[pairs]
    assert len({scene.canonical() for scene in scenes[HELD_OUT[pairs] :]}) == 20
    assert evaluation_scenes(0, len(scenes), pairs) == scenes


def test_frames_of_the_grid():
    picture = np.full((6, 8, 3), 100, np.uint8)
    grid = marked_grid([picture, picture], [True, False], columns=2)
    assert grid.shape == (2 + 10 + 2, 2 + 12 + 2 + 12 + 2, 3)
    assert tuple(grid[2, 2]) == RIGHT
    assert tuple(grid[2, 16]) == WRONG
    assert (grid[4:10, 4:12] == 100).all()


def test_table():
    table = markdown_table(
        "pairs", {"scale 1": {"all": 0.5, "shapes": 1.0}, "scale 2": {"all": 0, "shapes": 0.125}}
    )
    assert table.splitlines() == [
        "| pairs | all | shapes |",
        "|---|---:|---:|",
        "| scale 1 | 50.0 | 100.0 |",
        "| scale 2 | 0.0 | 12.5 |",
    ]


# --- the script


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("evaluate_scenes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """A tiny model and an untrained detector."""
    folder = tmp_path_factory.mktemp("model")
    config = tiny.write_config(folder / "tiny.yaml", {"image_size": 8})
    weights = tiny.write_weights(folder / "tiny.safetensors")
    torch.manual_seed(0)
    save_detector(Detector(), folder / "detector.safetensors")
    sampling = "--prompts 3 --batch_size 4 --ddim_steps 2 --scales 1 2.5"
    files = f"--config {config} --ckpt {weights} --detector {folder}/detector.safetensors"
    return f"{sampling} {files} --device cpu".split()


def test_evaluation(script, arguments, tmp_path, capsys):
    outdirs = [tmp_path / "first", tmp_path / "second"]
    for outdir in outdirs:
        assert script.main([*arguments, "--outdir", str(outdir)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(outdirs[1])
    assert (outdirs[1] / "report.md").read_text() in out

    first, second = (json.loads((outdir / "scores.json").read_text()) for outdir in outdirs)
    rows = ["renders", "renders, encoded and decoded", "scale 1", "scale 2.5"]
    assert list(first["seen"]) == rows
    assert [list(scores) for scores in first["scores"].values()] == [rows, rows]
    assert len(first["prompts"]) == 6
    assert all(len(told) == 6 for told in first["seen"].values())
    assert [first[key] for key in ("scores", "prompts", "seen")] == [
        second[key] for key in ("scores", "prompts", "seen")
    ]
    assert first["settings"]["seed"] == 42
    for name in ("scale-1.png", "scale-2.5.png"):
        assert Image.open(outdirs[0] / name).size == (6 * 70 + 2, 72)


def test_a_picture_that_is_not_a_number_is_wrong(script, arguments, tmp_path):
    state = tiny.state_dict()
    state["model.diffusion_model.out.2.bias"].fill_(torch.nan)
    save_file(state, tmp_path / "nan.safetensors")
    flags = ["--ckpt", str(tmp_path / "nan.safetensors"), "--outdir", str(tmp_path), "--scales", "1"]
    assert script.main([*arguments, *flags]) == 0
    data = json.loads((tmp_path / "scores.json").read_text())
    assert data["seen"]["scale 1"] == [None] * 6
    assert set(data["scores"]["two solids"]["scale 1"].values()) == {0.0}
    assert None not in data["seen"]["renders"]


def test_training_the_detector(script, tmp_path, capsys):
    path = tmp_path / "detector.safetensors"
    assert script.main(["--train_detector", "--detector_steps", "1", "--detector", str(path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "2,000 fresh renders" in out[2]
    assert out[-1] == str(path)
    load_detector(path)


@pytest.mark.parametrize(
    "flags", ["--prompts 0", "--scales", "--scales nan", "--seed -1", "--ddim_steps 0", "--sampler no"]
)
def test_argument_errors(script, flags, capsys):
    try:
        code = entry.run(script.main, flags.split())
    except SystemExit as error:  # argparse
        code = error.code
    assert code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_output_folder_that_cannot_be(script, arguments, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert entry.run(script.main, [*arguments, "--outdir", str(tmp_path / "file")]) == 2
    assert f"--outdir {tmp_path / 'file'}" in capsys.readouterr().err


def test_nothing_heavy_is_imported_before_the_arguments_are_read():
    code = f"""import runpy, sys
try:
    sys.argv = ["evaluate_scenes.py", "--prompts", "none"]
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except SystemExit:
    sys.exit("torch" in sys.modules or "numpy" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
