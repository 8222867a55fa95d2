"""`scripts/evaluate.py`: points over scales and checkpoints, resumed where they ended, errors in a line."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_evaluation
import torch
from commands import SCRIPTS, Result, refused
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.errors import InputError
from ldm.evaluation import clip_score, fid, measuring, protocol
from ldm.images.outputs import OutputFolder, cannot_write
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.runs.manifest import read_manifest
from ldm.scenes.detector import Detector, save_detector

Command = Callable[..., Result]
pytest.importorskip("torch_fidelity")
pytest.importorskip("matplotlib")
SAMPLED = 2 * 3 * 4  # with and without prompt; PLMS calls the model three times for two steps; four images
CAPTIONS = ["a cat", "a dog", "a bird", "two trees", "a red car", "a house by the sea"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models, a detector, a CLIP, an Inception, captions and real images."""
    folder = tmp_path_factory.mktemp("files")
    tiny.write_config(folder / "tiny.yaml", {"image_size": 8})
    weights = load_file(tiny.write_weights(folder / "one.safetensors"))
    save_file({k: v * 1.2 if "out.2" in k else v for k, v in weights.items()}, folder / "two.safetensors")
    torch.manual_seed(0)
    save_detector(Detector(), folder / "detector.safetensors")
    tiny_evaluation.write_clip(folder / "clip")
    tiny_evaluation.write_inception(folder / "inception.pth")
    notes = [{"image_id": k, "id": k, "caption": text} for k, text in enumerate(CAPTIONS)]
    (folder / "captions.json").write_text(json.dumps({"annotations": notes}))
    (folder / "real").mkdir()
    for k, image in enumerate(tiny_evaluation.pictures(6, 5)):
        Image.fromarray(image[: 40 + k]).save(folder / "real" / f"{k}.png")
    return folder


@pytest.fixture
def evaluate(command: Command, files: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command on the first tiny model; few renders are its reference."""
    monkeypatch.setattr(measuring, "RENDERS", 40)
    base = ["--config", files / "tiny.yaml", "--detector", files / "detector.safetensors", "--device", "cpu"]
    base += ["--images", 4, "--ddim_steps", 2, "--eager"]
    one = ["--ckpt", files / "one.safetensors"]
    return lambda *argv, folder="out": command(
        "evaluate", *base, *([] if "--ckpt" in argv else one), *argv, folder=folder
    )


@pytest.fixture
def cards(evaluate: Command, files: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The same by FID and CLIP score, of a layer of Inception that has 64 features."""
    plain = fid.Inception.__init__
    monkeypatch.setattr(fid.Inception, "__init__", lambda self, path, device: plain(self, path, device, "64"))
    given = {"captions": "captions.json", "inception": "inception.pth", "reference": "real", "clip": "clip"}

    def call(*argv, folder="out", **other: object) -> Result:
        paths = {name: files / name_ for name, name_ in given.items()} | other
        words = [word for name, path in paths.items() if path is not None for word in (f"--{name}", path)]
        return evaluate(*words, *argv, folder=folder)

    return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch of each call of the UNet."""
    found, plain = [], UNetModel.forward

    def forward(self, x, *args, **kwargs):
        found.append(len(x))
        return plain(self, x, *args, **kwargs)

    monkeypatch.setattr(UNetModel, "forward", forward)
    return found


def rows(result: Result) -> list[dict]:
    return list(csv.DictReader((result.folder / "results.csv").open()))


def test_the_cards_protocol(cards: Command, files: Path) -> None:
    result = cards("--ckpt", files / "one.safetensors", files / "two.safetensors", "--scales", 3, 1.5, 3)
    assert result.code == 0, result.err
    found = [(row["checkpoint"], float(row["scale"]), row["sampler"], row["missing"]) for row in rows(result)]
    assert found == [(name, scale, "plms", "0") for name in ("one", "two") for scale in (1.5, 3.0)]
    for row in rows(result):
        assert float(row["fid_low"]) <= float(row["fid"]) <= float(row["fid_high"])
        assert float(row["clip_score_low"]) <= float(row["clip_score"]) <= float(row["clip_score_high"])
        samples = sorted((result.folder / row["folder"] / "samples").iterdir())
        assert [path.name for path in samples] == [f"{k:05}.png" for k in range(4)]
    assert (result.folder / "pareto.png").stat().st_size > 10_000
    assert result.out[-1] == str(result.folder)
    assert result.out[2].startswith("| one | 1.5 | ")

    # the figures are those of the files, measured by themselves
    settings = json.loads((result.folder / "results.json").read_text())["settings"]
    assert (settings["reference"].split(" of ")[0], settings["height"]) == ("6 images", 64)
    lines = {line["image"]: line for line in read_manifest(result.folder / "two/scale-3")}
    images = [
        np.asarray(Image.open(result.folder / "two/scale-3" / lines[k]["file"]).convert("RGB"))
        for k in range(4)
    ]
    prompts = [lines[k]["prompt"] for k in range(4)]
    assert len(set(prompts) & set(CAPTIONS)) == 4
    score = clip_score.ClipScore(files / "clip", torch.device("cpu"))(images, prompts)
    assert float(rows(result)[3]["clip_score"]) == pytest.approx(score.mean(), rel=1e-5)
    features = fid.Inception(files / "inception.pth", torch.device("cpu"))(images)
    reference = fid.load_statistics(result.folder / "reference.npz", 64)
    wanted = fid.frechet_distance(reference, fid.Statistics.of(features))
    assert float(rows(result)[3]["fid"]) == pytest.approx(wanted, rel=1e-4)


def test_nothing_is_sampled_twice(evaluate: Command, calls: list[int]) -> None:
    """A point that is measured, images of one that is not, and the reference are there already."""
    first = evaluate("--scales", 2)
    assert first.code == 0, first.err
    assert sum(calls) == SAMPLED
    calls.clear()
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*.png") if "samples" in str(path)}
    again = evaluate("--scales", 2)
    assert (again.code, calls) == (0, [])
    assert again.out == first.out

    # the images of the second point are cut short: one is missing, and its figures
    evaluate("--scales", 2, 4)
    calls.clear()
    whole = (first.folder / "results.json").read_text()
    content = json.loads(whole)
    content["points"] = [point for point in content["points"] if point["scale"] != 4]
    (first.folder / "results.json").write_text(json.dumps(content))
    (first.folder / "one/scale-4/samples/00002.png").unlink()
    result = evaluate("--scales", 2, 4)
    assert (result.code, sum(calls)) == (0, SAMPLED)  # the batch of the missing image, and no other
    assert (first.folder / "results.json").read_text() == whole
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in before.items())


def test_another_file_of_the_same_name(evaluate: Command, files: Path, tmp_path: Path) -> None:
    """The figures and the images of the earlier file were taken for those of the new one."""
    ckpt = Path(shutil.copy(files / "one.safetensors", tmp_path / "model.safetensors"))
    first = evaluate("--scales", 2, "--ckpt", ckpt)
    assert first.code == 0, first.err
    shutil.copy(files / "two.safetensors", ckpt)
    again = evaluate("--scales", 2, "--ckpt", ckpt)
    assert again.code == 2
    assert len(again.err) == 1
    assert "has images and figures of another " in again.err[0]


def test_another_autoencoder_of_the_same_name(files: Path, tmp_path: Path) -> None:
    """Settings had its path alone."""
    vae = tmp_path / "vae.safetensors"
    settings = []
    for name in ("one", "detector"):
        shutil.copy(files / f"{name}.safetensors", vae)
        detector = str(files / "detector.safetensors")
        settings.append(protocol.Protocol(4, 64, 64, detector=detector, vae=str(vae)).settings("full"))
    assert {name for name in settings[0] if settings[0][name] != settings[1][name]} == {"vae"}


def test_the_same_checkpoint_with_another_config(evaluate: Command, files: Path, tmp_path: Path) -> None:
    """The figures of the earlier config were reported as those of the one that was given."""
    first = evaluate("--scales", 2)
    assert first.code == 0, first.err
    other = tiny.write_config(tmp_path / "other.yaml", {"image_size": 8, "linear_end": 0.02})
    again = evaluate("--scales", 2, "--config", other)
    assert again.code == 2
    assert len(again.err) == 1
    assert "has images and figures of another one (config " in again.err[0]


def test_the_precision_in_use_is_recorded(evaluate: Command) -> None:
    """Results had "the device's": figures of a GPU and of a CPU were taken for those of one precision."""
    result = evaluate("--scales", 2)
    assert json.loads((result.folder / "results.json").read_text())["settings"]["precision"] == "full"
    again = evaluate("--scales", 2, "--precision", "full")
    assert again.out == result.out
    other = evaluate("--scales", 2, "--precision", "bf16")
    assert other.code == 2
    assert 'other settings: precision "full", now "bf16"' in other.err[0]


def test_weights_of_16_bits(evaluate: Command) -> None:
    """Encoding renders raised a RuntimeError after all points were sampled, always where CUDA computes."""
    result = evaluate("--scales", 2, "--precision", "bf16")
    assert result.code == 0, result.err
    assert [row["checkpoint"] for row in rows(result)] == ["one", "renders, encoded and decoded", "renders"]


@pytest.fixture(scope="module")
def statistics(files: Path) -> Path:
    """A reference for the detector's features, which takes no renders."""
    fid.save_statistics(files / "statistics.npz", fid.Statistics(np.zeros(128), np.eye(128)))
    return files / "statistics.npz"


def test_images_of_another_machine(evaluate: Command, statistics: Path, calls: list[int]) -> None:
    """Points that were sampled into another folder are measured where they were moved to."""
    argv = ["--scales", 2, "--reference", statistics]
    first = evaluate(*argv)
    shutil.copytree(first.folder / "one", first.folder.parent / "other/one")
    calls.clear()
    other = evaluate(*argv, folder="other")
    assert (other.code, calls) == (0, [])
    assert rows(other) == rows(first)


@pytest.mark.slow
def test_a_killed_command_goes_on(files: Path, statistics: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a point: the images that were there stay as they are."""
    words = ["--config", files / "tiny.yaml", "--ckpt", files / "one.safetensors", "--device", "cpu"]
    words += ["--detector", files / "detector.safetensors", "--images", 60, "--batch_size", 2, "--eager"]
    words += ["--ddim_steps", 5, "--scales", 2, "--outdir", tmp_path / "out", "--reference", statistics]
    argv = [sys.executable, str(SCRIPTS / "evaluate.py"), *map(str, words)]
    samples = tmp_path / "out/one/scale-2/samples"
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 240
    while not (samples.is_dir() and len(list(samples.glob("*.png"))) >= 6):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    recorded = [line["file"] for line in read_manifest(samples.parent)]
    before = {name: (samples.parent / name).stat().st_mtime_ns for name in recorded}
    assert 5 <= len(before) < 60  # a line comes after its file
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(samples.glob("*.png"))) >= 60
    assert all((samples.parent / name).stat().st_mtime_ns == time_ for name, time_ in before.items())
    assert len(list(read_manifest(samples.parent))) == 60


@pytest.mark.slow
def test_two_devices(evaluate: Command, statistics: Path) -> None:
    """Each point's images come from a process of its own, and those that it starts."""
    argv = ["--scales", 2, "--batch_size", 1, "--reference", statistics]
    one = evaluate(*argv)
    two = evaluate(*argv, "--devices", 2, folder="two")
    assert two.code == 0, two.err
    assert two.out[:-1] == one.out[:-1]


def test_scenes(evaluate: Command) -> None:
    result = evaluate("--scales", 2)
    assert [row["checkpoint"] for row in rows(result)] == ["one", "renders, encoded and decoded", "renders"]
    assert [float(row["accuracy"]) <= 1 for row in rows(result)] == [True] * 3
    assert any(
        "4 images for 128 features: the distance comes out far too large" in line for line in result.err
    )


def test_statistics_as_reference(cards: Command, evaluate: Command) -> None:
    """The file that one evaluation keeps is the reference of another."""
    first = cards("--scales", 2)
    other = cards("--scales", 2, reference=first.folder / "reference.npz", folder="other")
    assert other.code == 0, other.err
    assert rows(other)[0]["fid"] == rows(first)[0]["fid"]
    assert not (other.folder / "reference.npz").exists()


def test_a_reference_of_other_settings_is_not_taken(
    files: Path,
    statistics: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A reference.npz that was left in the folder replaced --reference, and renders of another seed."""
    monkeypatch.setattr(measuring, "RENDERS", 10)
    kept, plain = tmp_path / "reference.npz", fid.save_statistics

    def means(**settings: object) -> np.ndarray:
        detector = str(files / "detector.safetensors")
        asked = protocol.Protocol(4, 64, 64, features="detector", detector=detector, **settings)
        measures = asked.measures(torch.device("cpu"), kept)
        return measures.distance.reference.mean

    first = means()
    assert not np.array_equal(means(seed=7), first)
    line = f"{kept} is not known to be of this evaluation's reference: it is made anew"
    assert caplog.messages.count(line) == 1
    assert np.array_equal(means(), first)
    monkeypatch.setattr(fid, "save_statistics", lambda *_: pytest.fail("it is there"))
    assert np.array_equal(means(), first)
    assert np.array_equal(means(reference=str(statistics)), np.zeros(128))
    monkeypatch.setattr(fid, "save_statistics", plain)
    assert not np.array_equal(means(reference=str(files / "real")), first)
    for content in (b"", b"text", statistics.read_bytes()):  # also of an earlier version, without a digest
        kept.write_bytes(content)
        assert np.array_equal(means(), first)


def test_nan_images_are_counted(evaluate: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.models.diffusion.ddpm import LatentDiffusion

    plain = LatentDiffusion.decode_first_stage

    def decode(self, latents):
        images = plain(self, latents).clone()
        images[0] = float("nan")
        return images

    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", decode)
    result = evaluate("--scales", 2)
    assert result.code == 1
    assert rows(result)[0]["missing"] == "1"
    assert "1 images came out as NaN" in result.err[-1]


def test_a_full_disk_advises_what_the_command_can_do(
    evaluate: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It advised --resume, which evaluate.py has not: the same command goes on by itself."""

    def full(*_: object) -> None:
        raise cannot_write(Path("a"), OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(OutputFolder, "_encoded", full)
    result = evaluate("--scales", 2)
    assert result.code == 2
    assert result.err[-1].endswith("make room, and the same command makes what is missing")


def test_samplers_of_the_cards(files: Path, tmp_path: Path) -> None:
    """PLMS for eps, DDIM for v; another one for all if it is given."""
    assert [model.sampler for model in protocol.choose_models(None, None, None, 50)] == ["plms", "ddim"]
    model = protocol.choose_models(None, None, "DPM++ 2M Karras", 50)[0]
    request = protocol.Protocol(4, 64, 64).request(model, 3.0)
    assert (request.sampler, request.schedule) == ("dpmpp_2m", "karras")
    assert (request.scale, request.steps, request.watermark) == (3.0, 50, "none")
    names = [model.name for model in protocol.choose_models(None, None, None, 50)]
    assert names == ["scenes-64", "scenes-64-v"]
    (tmp_path / "other").mkdir()
    twin = shutil.copy(files / "one.safetensors", tmp_path / "other/one.safetensors")
    paths, config = [str(files / "one.safetensors"), twin], str(files / "tiny.yaml")
    models = protocol.choose_models(paths, config, None, 50)
    assert [model.name for model in models] == [f"{files.name}-one", "other-one"]
    with pytest.raises(InputError, match="two have the same name"):
        protocol.choose_models([twin, twin], config, None, 50)


def test_models_of_different_sizes() -> None:
    models = protocol.choose_models(None, None, None, 50)
    assert protocol.common_size(models) == 64
    larger = replace(models[0], name="large", config={"params": {"image_size": 96}})
    with pytest.raises(InputError, match=r"\(scenes-64-v 64, large 768 pixels\): give H and W"):
        protocol.common_size([models[1], larger])


def test_other_settings_in_the_folder(evaluate: Command) -> None:
    result = evaluate("--scales", 2)
    again = evaluate("--scales", 2, "--images", 5)
    assert again.code == 2
    assert len(again.err) == 1
    assert "other settings: images 4, now 5" in again.err[0]
    assert [path.name for path in again.paths] == [path.name for path in result.paths]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--scales", "nan"], "--scales"),
        (["--scales", 101], "--scales: 101 is not a number in range: 0 … 100"),
        (["--scales", -1], "--scales: -1 is not a number in range: 0 … 100"),
        (["--images", 1], "--images"),
        (["--H", 70, "--W", 64], "--H 70"),
        (["--H", 64, "--W", 128], "--H 64 and --W 128: the renders that images are compared with are square"),
        (["--sampler", "no"], "no"),
        (["--captions", "a.txt", "--scenes"], "--captions and --scenes"),
        (["--features", "inception"], "--inception is missing: give weights-inception"),
        (["--reference", "absent"], "--reference absent is not there"),
        (["--detector", "absent.safetensors"], "--detector absent.safetensors is not there"),
        (["--clip", "absent"], "--clip absent is not there"),
        (["--ckpt", "absent.safetensors"], "absent.safetensors"),
    ],
)
def test_argument_errors(evaluate: Command, argv: list, words: str) -> None:
    refused(evaluate(*argv), words)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"captions": "absent.json"}, "absent.json cannot be opened"),
        ({"inception": None}, "--inception is missing"),
        ({"inception": "absent.pth"}, "--inception absent.pth is not there: give weights-inception"),
        ({"clip": None}, "--clip is missing: give a folder in transformers' layout"),
        ({"reference": None}, "--reference is missing: give a folder of real images"),
    ],
)
def test_files_that_are_missing(cards: Command, other: dict, words: str) -> None:
    refused(cards(**other), words)


def test_files_of_another_kind(cards: Command, files: Path, tmp_path: Path) -> None:
    refused(cards(inception=files / "one.safetensors"), "is not the Inception-v3 that FID is defined by")
    refused(cards(clip=files / "real"), "--clip", "has no config.json")
    refused(cards("--images", 7), "--images 7: --captions has 6 different prompts")
    result = cards(reference=files / "captions.json")
    assert result.code == 2
    assert "captions.json is no .npz of numbers: give a folder of images" in result.err[-1]
    (tmp_path / "empty").mkdir()
    result = cards(reference=tmp_path / "empty", folder="other")
    assert result.code == 2
    assert "has no images" in result.err[-1]


def test_an_output_folder_that_cannot_be(evaluate: Command, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    result = evaluate("--scales", 2)
    assert result.code == 2
    assert f"--outdir {tmp_path / 'out'}" in result.err[-1]


def test_a_launcher(evaluate: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    refused(evaluate("--scales", 2), "--devices N starts the processes")


def test_nothing_heavy_is_imported_before_the_arguments_are_read() -> None:
    code = f"""import runpy, sys
try:
    sys.argv = ["evaluate.py", "--images", "none"]
    runpy.run_path({str(SCRIPTS / "evaluate.py")!r}, run_name="__main__")
except SystemExit:
    sys.exit("torch" in sys.modules or "numpy" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
