"""`scripts/evaluate_scenes.py` counts what a model got right."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.cli import entry
from ldm.scenes.detector import Detector, load_detector, save_detector

SCRIPT = Path(__file__).parents[2] / "scripts/evaluate_scenes.py"


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
    assert all(len(scenes) == 6 for scenes in first["seen"].values())
    assert [first[key] for key in ("scores", "prompts", "seen")] == [
        second[key] for key in ("scores", "prompts", "seen")
    ]
    assert first["settings"]["seed"] == 42
    for name in ("scale-1.png", "scale-2.5.png"):
        assert Image.open(outdirs[0] / name).size == (6 * 70 + 2, 72)


def test_weights_of_16_bits(script, arguments, tmp_path):
    """Encoding renders raised a RuntimeError before any image was sampled, always where CUDA computes."""
    flags = ["--precision", "bf16", "--scales", "1", "--prompts", "1", "--outdir", str(tmp_path)]
    assert script.main([*arguments, *flags]) == 0
    seen = json.loads((tmp_path / "scores.json").read_text())["seen"]
    assert len(seen["renders, encoded and decoded"]) == 2


def test_an_image_that_is_not_a_number_is_wrong(script, arguments, tmp_path, caplog):
    """And the exit code is 1, with a line that says how many there are: it was 0, without a word."""
    state = tiny.state_dict()
    state["model.diffusion_model.out.2.bias"].fill_(torch.nan)
    save_file(state, tmp_path / "nan.safetensors")
    flags = ["--ckpt", str(tmp_path / "nan.safetensors"), "--outdir", str(tmp_path), "--scales", "1"]
    assert script.main([*arguments, *flags]) == 1
    assert caplog.messages[-1] == "6 of 6 images came out as NaN, and count as wrong"
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


def test_a_report_that_cannot_be_written(script, arguments, tmp_path, capsys):
    """An OSError of the user's folder is the user's to mend, not an internal error: one line, exit code 2."""
    (tmp_path / "scores.json").mkdir()
    assert entry.run(script.main, [*arguments, "--prompts", "1", "--outdir", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--outdir {tmp_path}: Is a directory" in error


def test_the_schedule_that_a_sampler_implies_is_used(script, arguments, tmp_path):
    """It was dropped without a word: "DPM++ 2M Karras" sampled on the schedule of "DPM++ 2M"."""
    grids = []
    for sampler, schedule in (("DPM++ 2M Karras", "karras"), ("DPM++ 2M", None)):
        outdir = tmp_path / str(schedule)
        flags = ["--sampler", sampler, "--scales", "2", "--prompts", "1", "--outdir", str(outdir)]
        assert script.main([*arguments, *flags]) == 0
        settings = json.loads((outdir / "scores.json").read_text())["settings"]
        assert (settings["sampler"], settings["schedule"]) == ("dpmpp_2m", schedule)
        grids.append((outdir / "scale-2.png").read_bytes())
    assert grids[0] != grids[1]


def test_nothing_heavy_is_imported_before_the_arguments_are_read():
    code = f"""import runpy, sys
try:
    sys.argv = ["evaluate_scenes.py", "--prompts", "none"]
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except SystemExit:
    sys.exit("torch" in sys.modules or "numpy" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
