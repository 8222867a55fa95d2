"""One process's share of a run: out of memory, the safety checker, what is told and where, formats, names."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Result, refused
from PIL import Image
from test_manifest import manifest
from test_safety import reference, write  # noqa: F401

from ldm.images.metadata import read_metadata
from ldm.images.watermark import read_watermark
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipeline.generate import is_out_of_memory
from ldm.pipeline.safety import SafetyChecker
from ldm.runs import render
from ldm.runs.worker import Handing, Safety
from ldm.weights import loading

Command = Callable[..., Result]


@pytest.fixture
def txt2img(command: Command, model: tuple[Path, Path]) -> Command:
    """Run the command: two steps, a batch of four images of 16x16 pixels."""
    base = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 2, "--n_samples", 4, "--n_iter", 1]
    base += ["--prompt", "a cat", "--watermark", "none"]
    return lambda *argv, folder="out": command("txt2img", *base, *argv, folder=folder)


# --- out of memory


@pytest.fixture
def too_large(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Makes decoding more than so many images fail; returns the sizes that were tried."""

    def limit(images: int, error: Exception) -> list[int]:
        decode, tried = LatentDiffusion.decode_first_stage, []

        def limited(self, latents):
            tried.append(len(latents))
            if len(latents) > images:
                raise error
            return decode(self, latents)

        monkeypatch.setattr(LatentDiffusion, "decode_first_stage", limited)
        return tried

    return limit


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "mps"])
def test_a_batch_that_does_not_fit_is_halved(txt2img: Command, too_large, error) -> None:
    """And those after it are made in halves at once; the pictures are the same."""
    argv = ["--n_iter", 2, "--ddim_eta", 0.5]
    whole = txt2img(*argv, folder="whole")
    tried = too_large(1, error)
    result = txt2img(*argv)
    assert tried == [4, 2, *[1] * 8]
    assert result.code == 0
    assert result.err == [
        "out of memory with 4 images of 16x16 at once: going on with 2",
        "out of memory with 2 images of 16x16 at once: going on with 1",
    ]
    for image, other in zip(result.images, whole.images, strict=True):
        assert abs(image - other).max() <= 1
    assert [s["seed"] for s in result.settings] == list(range(42, 50))


def test_steps_that_were_for_nothing_are_taken_back(too_large, monkeypatch, txt2img) -> None:
    too_large(2, OUT_OF_MEMORY[0])
    counted = []
    step = render.Team.count

    def count(self, name: str, value: int) -> int:
        counted.append(value if name == "steps" else 0)
        return step(self, name, value)

    monkeypatch.setattr(render.Team, "count", count)
    assert txt2img().code == 0
    assert sum(counted) == 8


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--H 24", "out of memory with one image of 16x24; take a smaller --H and --W"),
        ("--rng compvis", "out of memory with 4 images of 16x16; the original's stream (--rng compvis)"),
    ],
)
def test_what_cannot_be_halved_is_told(txt2img: Command, too_large, argv: str, words: str) -> None:
    too_large(0, OUT_OF_MEMORY[1])
    result = txt2img(*argv.split())
    assert result.code == 2
    assert result.err[-1].startswith(f"txt2img.py: error: {words}")


def test_other_errors_are_no_lack_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shape '[2]' is invalid for input of size 3"))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


# --- the safety checker


@pytest.fixture
def linked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write) -> Path:  # noqa: F811
    """A linked safety checker that finds everything: all pictures are nearer than -2 to all concepts."""
    (tmp_path / "root/models").mkdir(parents=True)
    folder = write(concept_embeds_weights=torch.full((17,), -2.0))
    (tmp_path / "root/models/safety-checker").symlink_to(folder)
    monkeypatch.setattr(loading, "ROOT", tmp_path / "root")
    return folder


@pytest.fixture
def checker(monkeypatch: pytest.MonkeyPatch, linked: Path) -> Path:
    """One that finds the second and third of every four pictures."""
    monkeypatch.setattr(
        SafetyChecker, "__call__", lambda self, images: [False, True, True, False][: len(images)]
    )
    return linked


@pytest.mark.parametrize("mode", ["auto", "on", "flag"])
def test_found_pictures_are_black_or_marked(txt2img: Command, checker, mode: str) -> None:
    plain = txt2img("--safety", "off", folder="plain")
    result = txt2img("--safety", mode)
    assert (result.code, result.err) == (0, [])
    flags = [False, True, True, False]
    assert [s["nsfw_content_detected"] for s in result.settings] == flags
    assert [line["nsfw_content_detected"] for line in manifest(result.folder)] == flags
    for image, other, found in zip(result.images, plain.images, flags, strict=True):
        assert np.array_equal(image, other * (not found or mode == "flag"))
    assert all("nsfw_content_detected" not in s for s in plain.settings)


def test_black_pictures_have_a_watermark(txt2img: Command, checker) -> None:
    """As in the original, which checked before it marked."""
    argv = ["--H", 256, "--W", 256, "--watermark", "StableDiffusionV1", "--ddim_steps", 1]
    result = txt2img(*argv, "--safety", "on")
    assert 0 < result.images[1].max() < 60
    assert read_watermark(result.images[0].astype(np.uint8)) == "StableDiffusionV1"


def test_without_a_checker(txt2img: Command) -> None:
    result = txt2img("--safety", "auto")
    assert result.code == 0
    told = [line for line in result.err if "unchecked" in line]
    assert told == [
        "The pictures are unchecked: there is no models/safety-checker (told unless --safety off)"
    ]
    for mode in ("on", "flag"):
        refused(
            txt2img("--safety", mode, folder="other"), f"--safety {mode}: there is no models/safety-checker"
        )
    refused(txt2img("--safety", "maybe", folder="other"), "invalid choice: 'maybe'")


def test_a_broken_checker_is_refused_before_anything_is_made(txt2img: Command, checker) -> None:
    (checker / "config.json").write_text("{")
    refused(txt2img("--safety", "auto"), "config.json holds no settings")


def test_other_safety_is_another_run(txt2img: Command, checker) -> None:
    txt2img("--safety", "on")
    result = txt2img("--safety", "flag", "--resume")
    assert (result.code, len(result.err)) == (2, 1)
    assert 'safety "on", now "flag"' in result.err[0]


def test_nan_images_are_not_checked() -> None:
    image = np.full((8, 8, 3), 7, np.uint8)
    safety = Safety(lambda images: [True] * len(images))
    (first, told), second = safety([image, None])
    assert (first.max(), told, second) == (0, {"nsfw_content_detected": True}, (None, {}))
    assert safety([None]) == [(None, {})]


@pytest.mark.parametrize("name", ["compare", "img2img"])
def test_the_others_check_as_well(command: Command, model, linked, tmp_path, name: str) -> None:
    argv = ["--config", model[0], "--ckpt", model[1], "--safety", "on"]
    if name == "compare":
        argv += ["--x", "steps", 1, 2, "--y", "scale", 1, 2]
    else:
        Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
        argv += ["--init-img", tmp_path / "red.png", "--steps", 2, "--H", 16]
    checked = command(name, *argv)
    assert checked.code == 0
    assert len(checked.paths) > 1
    for image, settings in zip(checked.images, checked.settings, strict=True):
        assert settings["nsfw_content_detected"] is True
        assert image.max() == 0


# --- formats and names


@pytest.mark.parametrize(("name", "format"), [("jpg", "JPEG"), ("webp", "WEBP")])
def test_formats(txt2img: Command, name: str, format: str) -> None:
    plain, result = txt2img(folder="plain"), txt2img("--format", name, "--quality", 100)
    assert result.files == [f"grid-0000.{name}", *(f"samples/0000{k}.{name}" for k in range(4))]
    for k in range(4):
        path = result.folder / f"samples/0000{k}.{name}"
        picture = Image.open(path)
        assert picture.format == format
        assert abs(np.asarray(picture).astype(int) - plain.images[k]).mean() < (
            12 if name == "jpg" else 30
        )  # WebP halves the colours
        assert read_metadata(path) == plain.settings[k]
    assert txt2img("--format", name, "--quality", 100, "--resume").err == ["all 4 images are there"]
    assert "quality 100, now 50" in txt2img("--format", name, "--quality", 50, "--resume").err[0]
    assert txt2img().files[-1] == "samples/00007.png"  # numbers go on across formats


def test_a_grid_too_large_for_its_format_is_png(txt2img: Command) -> None:
    result = txt2img(
        "--format", "webp", "--W", 8200, "--H", 8, "--ddim_steps", 1, "--scale", 1, "--n_samples", 2
    )
    assert [name for name in result.files if name.startswith("grid")] == ["grid-0000.png"]


def test_names_from_a_template(txt2img: Command) -> None:
    result = txt2img("--filename", "{prompt}/{seed}-{sampler}-{steps:03}")
    assert [name for name in result.files if name.startswith("samples")] == [
        f"samples/a-cat/{seed}-ddim-002.png" for seed in range(42, 46)
    ]
    assert [line["file"] for line in manifest(result.folder)] == result.files[1:]
    result.folder.joinpath("samples/a-cat/43-ddim-002.png").unlink()
    again = txt2img("--filename", "{prompt}/{seed}-{sampler}-{steps:03}", "--resume")
    assert (again.code, again.files) == (0, result.files)


def test_equal_names_are_numbered(txt2img: Command) -> None:
    assert txt2img("--filename", "{prompt}").files[1:] == [
        *("samples/a-cat-2.png", "samples/a-cat-3.png", "samples/a-cat-4.png", "samples/a-cat.png"),
    ]
    assert len(txt2img("--filename", "{prompt}").paths) == 8


def test_a_hostile_prompt_does_not_leave_the_folder(txt2img: Command) -> None:
    result = txt2img("--filename", "{prompt}", "--prompt", "../../../x\\y:\x07", "--n_samples", 1)
    (name,) = (name for name in result.files if name.startswith("samples/"))
    assert ".." not in name
    assert "\\" not in name


def test_bad_templates_are_refused(txt2img: Command) -> None:
    refused(txt2img("--filename", "../{seed}"), "--filename '../{seed}'")
    refused(txt2img("--filename", "{sead}"), "'{sead}' is no field; there are {number}")


# --- what is told, and where


def test_json_lines_on_stdout(txt2img: Command) -> None:
    result = txt2img("--json")
    told = [json.loads(line) for line in result.out]
    assert [line.pop("outdir") for line in told] == [str(result.folder)] * 4
    assert told == manifest(result.folder)


def test_quiet(command: Command, model, monkeypatch) -> None:
    argv = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 1, "--n_iter", 1, "--quiet"]
    result = command("txt2img", *argv, "--prompt", "x " * 200, "--safety", "auto")
    assert (result.code, result.out, result.err) == (0, [str(result.folder)], [])
    result = command("txt2img", *argv, "--sampler", "eulr")
    assert len(result.err) == 1
    decode = LatentDiffusion.decode_first_stage
    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", lambda self, z: decode(self, z) * float("nan"))
    result = command("txt2img", *argv, folder="nan")
    assert (result.code, result.err) == (1, ["3 of 3 images failed: manifest.jsonl says which"])


def test_log_file(txt2img: Command, tmp_path: Path) -> None:
    log = tmp_path / "night.log"
    txt2img("--log_file", log, "--quiet")
    result = txt2img("--log_file", log, "--resume", "--scale", 3)
    assert result.code == 2
    lines = [line.split(" ", 2)[2] for line in log.read_text().splitlines()]
    assert lines[0] == f"4 of 4 images to make in {result.folder}"
    assert [line.split(",")[0] for line in lines[1:5]] == [
        f"image {k}: samples/0000{k}.png" for k in range(4)
    ]
    assert lines[-1].startswith("txt2img.py: error: --resume")
    refused(txt2img("--log_file", tmp_path / "no/such/folder.log", folder="x"), "--log_file", "No such file")


def test_work_that_fails_in_the_thread_fails_at_the_next(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def fail() -> None:
        raise OSError("disk")

    with ThreadPoolExecutor(1) as thread:
        handing, done = Handing(thread), []
        handing.over(done.append, 1)
        handing.over(fail)
        with pytest.raises(OSError, match="disk"):
            handing.over(done.append, 2)
        assert done == [1]
