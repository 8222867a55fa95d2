"""One process's share of a run: formats, names, what is reported and where."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import Result, refused
from image_files import noise
from PIL import Image
from run_helpers import data, manifest

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipeline import ImageRequest, Pipeline
from ldm.pipeline.infotext import read_metadata
from ldm.runs.processes import Team
from ldm.runs.worker import BackgroundWriter, Interrupt, Job, ReportOptions, make_images

Command = Callable[..., Result]
ONE_FAILED = "1 of 4 images failed: manifest.jsonl says which"


@pytest.fixture
def txt2img(command: Command, model: tuple[Path, Path]) -> Command:
    """Run the command: two steps, a batch of four images of 16x16 pixels."""
    base = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 2, "--n_samples", 4, "--n_iter", 1]
    base += ["--prompt", "a cat", "--watermark", "none"]
    return lambda *argv, folder="out": command("txt2img", *base, *argv, folder=folder)


@pytest.mark.parametrize(("name", "format"), [("jpg", "JPEG"), ("webp", "WEBP")])
def test_formats(txt2img: Command, name: str, format: str) -> None:
    plain, result = txt2img(folder="plain"), txt2img("--format", name, "--quality", 100)
    assert result.files == [f"grid-0000.{name}", *(f"samples/0000{k}.{name}" for k in range(4))]
    for k in range(4):
        path = result.folder / f"samples/0000{k}.{name}"
        image = Image.open(path)
        assert image.format == format
        assert abs(np.asarray(image).astype(int) - plain.images[k]).mean() < (
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


def test_json_lines_on_stdout(txt2img: Command) -> None:
    result = txt2img("--json")
    lines = [json.loads(line) for line in result.out]
    assert [line.pop("outdir") for line in lines] == [str(result.folder)] * 4
    assert lines == manifest(result.folder)


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


class StubRun:
    """Stands for a pipeline, a team and a writer; `events` is what they were asked, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.events: list[str] = []
        monkeypatch.setattr("ldm.runs.worker.save", self.save)

    def deal(self, batches: list[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
        for batch in batches:
            self.events.append(f"take {batch[0]}")
            time.sleep(0.05)  # long enough for the thread to begin with what it has been given
            yield batch

    def read_images(self, request: str) -> None:
        """They start from no files."""

    def batches(
        self, batches: Iterable[Any], on_step: Callable[[int], None], on_x0: Any = None
    ) -> Iterator[list[Any]]:
        for batch in batches:
            if batch == ["fail"]:
                raise ValueError("out of memory")
            yield batch

    def save(self, writer: object, k: int, *_: object) -> dict[str, Any]:
        self.events.append(f"save {k}")
        return {}

    def make(self, requests: list[str], interrupt: Interrupt | None = None) -> Team:
        plan = SimpleNamespace(batch=lambda numbers: [requests[k] for k in numbers])
        record = SimpleNamespace(done={}, lost=False)
        job = Job(plan, [(k,) for k in range(len(requests))], requests, record, {})
        team = Team()
        team.deal = self.deal
        make_images(self, job, None, team, interrupt or Interrupt(), ReportOptions(bar=False))
        return team


def test_a_batch_is_taken_before_the_last_one_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question for it waited until the thread that saves let go of the interpreter: 0.7 ms a batch."""
    run = StubRun(monkeypatch)
    run.make(["a", "b", "c"])
    assert run.events == ["take 0", "take 1", "save 0", "take 2", "save 1", "save 2"]


def test_the_others_learn_that_the_user_has_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal to a process that is not rank 0 ended the run as if something had failed."""
    run, interrupt = StubRun(monkeypatch), Interrupt()
    assert not run.make(["a"], interrupt).asked
    interrupt.asked = True
    assert run.make(["a"], interrupt).asked


def test_what_was_made_before_a_failure_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    run = StubRun(monkeypatch)
    with pytest.raises(ValueError, match="out of memory"):
        run.make(["a", "b", "fail"])
    assert [event for event in run.events if event.startswith("save")] == ["save 0", "save 1"]


def test_work_that_fails_in_the_thread_fails_at_the_next(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def fail() -> None:
        raise OSError("disk")

    with ThreadPoolExecutor(1) as thread:
        writer, done = BackgroundWriter(thread), []
        writer.submit(done.append, 1)
        writer.submit(fail)
        with pytest.raises(OSError, match="disk"):
            writer.submit(done.append, 2)
        assert done == [1]


@pytest.fixture
def img2img(command: Command, model: tuple[Path, Path], tmp_path: Path, monkeypatch) -> Command:
    """Run the command on four images in a folder, of which no more than two are kept."""
    monkeypatch.setattr("ldm.pipeline.init_images.KEPT_BYTES", 2 * noise(16, 16).nbytes)
    (tmp_path / "photos").mkdir()
    for k in range(4):
        Image.fromarray(noise(16, 16, seed=k)).save(tmp_path / f"photos/{k}.png")
    base = ["--config", model[0], "--ckpt", model[1], "--steps", 2, "--watermark", "none", "--skip_grid"]
    base += ["--init-img", tmp_path / "photos", "--H", 16, "--W", 16, "--n_samples", 1]
    return lambda *argv, folder="out": command("img2img", *base, *argv, folder=folder)


def test_a_file_that_vanishes_costs_its_own_images_alone(
    img2img: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ended with 2, and nothing after it was made; with --resume nothing said what to do."""
    argv = ["--batch_size", 2]
    whole = img2img(*argv, folder="whole")
    photo, decode = tmp_path / "photos/2.png", LatentDiffusion.decode_first_stage
    content = photo.read_bytes()

    def vanish(self: LatentDiffusion, latents: torch.Tensor) -> torch.Tensor:
        photo.unlink(missing_ok=True)
        return decode(self, latents)

    with monkeypatch.context() as patch:
        patch.setattr(LatentDiffusion, "decode_first_stage", vanish)
        result = img2img(*argv)
    words = f"cannot read the image {photo}: No such file or directory"
    assert (result.code, result.err[-2:]) == (1, [f"image 2: {words}", ONE_FAILED])
    lines = {line["image"]: line for line in manifest(result.folder)}
    assert [lines[k]["file"] for k in range(4)] == ["samples/0.png", "samples/1.png", None, "samples/3.png"]
    assert (lines[2]["error"], lines[2]["seed"], lines[2]["init_img"]) == (words, 44, "2.png")
    assert abs(result.images[2] - whole.images[3]).max() <= 1
    again = img2img(*argv, "--resume")
    assert again.code == 2
    assert again.err[-1].endswith("; it also had 2.png: put back what is gone, or leave out --resume")
    photo.write_bytes(content)
    assert img2img(*argv, "--resume").code == 0
    assert data(result.folder).keys() == data(whole.folder).keys()


def test_one_stream_of_noise_has_no_gaps(txt2img: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one of its images all that follow would have other noise: such a run still ends."""
    read = []

    def read_images(self: Pipeline, request: ImageRequest) -> None:
        read.append(request)
        if len(read) == 6:
            raise InputError("cannot read the image")

    monkeypatch.setattr(Pipeline, "read_images", read_images)
    result = txt2img("--rng", "compvis", "--n_iter", 3)
    assert (result.code, [line["image"] for line in manifest(result.folder)]) == (2, [0, 1, 2, 3])
