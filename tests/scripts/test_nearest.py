"""scripts/nearest.py on folders of images."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import Result, script
from PIL import Image

from ldm.images import init_image


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Samples, of which one is a training image, and 30 training images without captions."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    samples, training = tmp_path / "samples", tmp_path / "training"
    rng = np.random.default_rng(7)
    for folder, count in ((training, 30), (samples, 3)):
        folder.mkdir()
        for k in range(count):
            small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            small.resize((48, 32), Image.Resampling.BICUBIC).save(folder / f"{k:02}.png")
    (training / "17.png").replace(training / "x.png")
    (samples / "copy.png").write_bytes((training / "x.png").read_bytes())
    return samples, training


def refused(result: Result, *words: str) -> None:
    assert result.code == 2
    assert len(result.err) == 1, result.err
    assert all(word in result.err[0] for word in words), result.err
    assert not (result.folder / "nearest.csv").exists()


def test_a_copy_is_flagged(command: Callable[..., Result], folders: tuple[Path, Path]) -> None:
    samples, training = folders
    result = command("nearest", samples, "--training", training, "--count", 2, "--false_positives", 0)
    assert result.code == 0, result.err
    assert result.files == ["nearest.csv", "nearest.json", "nearest.png"]
    assert "1 of 4 samples" in result.out[1]
    with (result.folder / "nearest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2
    (copy,) = (row for row in rows if row["flagged"] == "True")
    assert (Path(copy["sample"]).name, copy["rank"], copy["training image"]) == ("copy.png", "1", "x.png")
    assert float(copy["similarity"]) > 0.999
    record = json.loads((result.folder / "nearest.json").read_text())
    assert [Path(name).name for name in record["flagged"]] == ["copy.png"]
    assert record["calibration"]["images"] == 30
    assert record["threshold"] == record["calibration"]["threshold"] < 0.999
    assert Image.open(result.folder / "nearest.png").width > 3 * 128


def test_the_index_is_kept(command, folders, tmp_path: Path) -> None:
    samples, training = folders
    argv = (samples, "--training", training)
    first, second = command("nearest", *argv), command("nearest", *argv)
    assert any("features" in line for line in first.err)
    assert not any("features" in line for line in second.err)
    assert len(list((tmp_path / "cache").rglob("*-pixels-8.safetensors"))) == 1
    (training / "y.png").write_bytes((training / "x.png").read_bytes())
    third = command("nearest", *argv, "--threshold", 0.999)
    assert any("features" in line for line in third.err)
    assert third.out[0] == "1 of 4 samples are as near to a training image as a copy"


def test_planted_copies(command, folders) -> None:
    samples, training = folders
    result = command("nearest", samples, "--training", training, "--planted", 5, "--threshold", 0.99)
    found = json.loads((result.folder / "nearest.json").read_text())["planted"]
    assert found["recall"]["exact"] == 1
    assert found["images"] == 25
    assert found["samples flagged"] == 1
    assert f"precision {100 * found['precision']:.1f} % among 4 samples" in result.out[-2]


def test_damaged_training_images(command, folders) -> None:
    """One of them ended --planted; where all are damaged, a line says so."""
    samples, training = folders
    (training / "03.png").write_bytes(b"no image")
    result = command("nearest", samples, "--training", training, "--planted", 30, "--threshold", 0.99)
    assert result.code == 0, result.err
    assert any("1 training images cannot be read and are left out: 03.png" in line for line in result.err)
    assert json.loads((result.folder / "nearest.json").read_text())["planted"]["images"] == 5 * 29
    for path in training.iterdir():
        path.write_bytes(b"no image")
    result = command("nearest", samples, "--training", training, folder="other")
    assert result.code == 2
    assert result.err[-1].endswith("no training image could be compared: none of 30 can be read")


def test_rendered_scenes_of_a_training_file(command, folders, tmp_path: Path) -> None:
    samples, _ = folders
    scenes = {"target": "ldm.scenes.source.Scenes", "params": {"seed": 0, "images": 20, "image_size": 32}}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"data": {"train": scenes, "size": 32}}))
    result = command("nearest", samples, "--training", tmp_path / "t.yaml", "--features", "detector")
    assert result.code == 0, result.err
    lines = json.loads((result.folder / "nearest.json").read_text())["nearest"]
    assert lines[0]["training image"].startswith("scene ")


def test_held_out_images_calibrate(command, folders, tmp_path: Path) -> None:
    samples, training = folders
    result = command("nearest", samples, "--training", training, "--held_out", samples)
    assert "held-out images" in result.out[0]
    record = json.loads((result.folder / "nearest.json").read_text())
    assert record["calibration"]["images"] == 4


def test_an_exact_copy_is_one_at_the_highest_threshold(command, folders) -> None:
    """Half of them were not found, because the index keeps features in 16 bits."""
    _, training = folders
    result = command("nearest", training, "--training", training, "--threshold", 1)
    assert result.out[0] == "30 of 30 samples are as near to a training image as a copy"


def test_the_sheet_reads_its_own_samples_again(command, folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples stayed in memory in their full size for the few that it shows."""
    samples, training = folders
    monkeypatch.setattr(script("nearest"), "SHOWN", 1)
    plain, read = init_image.open_init_image, []

    def opened(source, *args):
        read.append(Path(source).name)
        return plain(source, *args)

    monkeypatch.setattr(init_image, "open_init_image", opened)
    assert command("nearest", samples, "--training", training).code == 0
    assert read[-5:] == ["00.png", "01.png", "02.png", "copy.png", "copy.png"]


def test_no_folder_for_the_index(command, folders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a home folder it was a RuntimeError."""
    samples, training = folders

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    argv = (samples, "--training", training)
    refused(command("nearest", *argv), "Could not determine home directory", "--index", "XDG_CACHE_HOME")
    assert command("nearest", *argv, "--index", tmp_path / "index").code == 0


@pytest.mark.parametrize("name", ["empty", "absent", "file.txt"])
def test_a_training_set_that_is_none(command, folders, tmp_path: Path, name: str) -> None:
    samples, _ = folders
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    refused(command("nearest", samples, "--training", tmp_path / name), "--training", name)


def test_no_images(command, folders, tmp_path: Path) -> None:
    _, training = folders
    (tmp_path / "empty").mkdir()
    refused(command("nearest", tmp_path / "empty", "--training", training), "holds no image")
    refused(command("nearest", tmp_path / "no.png", "--training", training), "no.png", "no such file")


def test_an_index_of_another_kind(command, folders, tmp_path: Path) -> None:
    samples, training = folders
    index = tmp_path / "index"
    index.write_text("a text")
    argv = (samples, "--training", training, "--index", index)
    refused(command("nearest", *argv), "--index", "is not an index of features")
    index.unlink()
    assert command("nearest", *argv).code == 0
    refused(command("nearest", *argv, "--features", "detector", folder="b"), "another kind", "pixels-8")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--features", "clip"], "--clip DIR"),
        (["--clip", "x"], "--clip DIR"),
        (["--features", "clip", "--clip", "absent"], "--clip absent is not there"),
        (["--features", "colours"], "invalid choice"),
        (["--count", "0"], "--count"),
        (["--threshold", "2"], "--threshold"),
        (["--threshold", "0.9", "--held_out", "x"], "nothing to calibrate: leave out --held_out"),
        (["--threshold", "0.9", "--false_positives", "0"], "leave out --false_positives"),
        (
            ["--threshold", "0.9", "--false_positives", "0.3", "--calibrate_on", "5"],
            "leave out --false_positives, --calibrate_on",
        ),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_options(command, folders, more: list[str], words: str) -> None:
    samples, training = folders
    refused(command("nearest", samples, "--training", training, *more), words)
