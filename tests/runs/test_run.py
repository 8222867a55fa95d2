"""A run as a whole: batch sizes, what --resume takes up and what it refuses, exit codes."""

import errno
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Result
from run_helpers import data, manifest

from ldm.errors import InputError
from ldm.images.outputs import AGAIN, OutputFolder, cannot_write
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipeline import memory
from ldm.pipeline.infotext import read_metadata
from ldm.runs import run as runs
from ldm.runs.manifest import RUNS, read_lines
from ldm.runs.processes import Team

Command = Callable[..., Result]


@pytest.fixture
def txt2img(command: Command, model: tuple[Path, Path]) -> Command:
    """Run the command: two steps, a batch of four images of 16x16 pixels."""
    base = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 2, "--n_samples", 4, "--n_iter", 1]
    base += ["--prompt", "a cat", "--watermark", "none"]
    return lambda *argv, folder="out": command("txt2img", *base, *argv, folder=folder)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the decoder is for."""
    found, plain = [], LatentDiffusion.decode_first_stage

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        found.append(len(latents))
        return plain(self, latents)

    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", decode)
    return found


@pytest.fixture
def nan_images(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The places in each batch whose image comes out as NaN; to be changed."""
    places: set[int] = set()
    plain = LatentDiffusion.decode_first_stage

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = plain(self, latents).clone()
        images[sorted(places)] = float("nan")
        return images

    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", decode)
    return places


ROUNDS = ["--n_samples", 2, "--n_iter", 3]


def test_images_are_those_of_n_samples(txt2img: Command, sizes: list[int]) -> None:
    usual = txt2img(*ROUNDS, folder="usual")
    assert sizes == [2, 2, 2]
    sizes.clear()
    result = txt2img(*ROUNDS, "--batch_size", 4)
    assert sizes == [4, 2]
    assert result.code == 0
    for image, other in zip(result.images, usual.images, strict=True):
        assert np.abs(image - other).max() <= 1
    assert result.settings[0]["batch_size"] == 4
    assert "batch_size" not in usual.settings[0]


def test_auto_takes_what_fits_and_a_resumed_run_the_same(
    txt2img: Command, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size is part of the run: with another one its files would not be the same to the byte."""
    held = iter([1000, 1100])
    monkeypatch.setattr(memory, "taken", lambda device: next(held))
    monkeypatch.setattr(memory, "left", lambda device: 250 / memory.MARGIN)
    first = txt2img(*ROUNDS, "--batch_size", "auto")
    assert sizes == [1, 2, 4, 2]  # two trials; 100 bytes an image: two and two more
    assert first.err.count("--batch_size auto: 4 images at once") == 1
    before = data(first.folder)
    for path in first.paths[3:5]:
        path.unlink()
    sizes.clear()
    monkeypatch.setattr(memory, "left", lambda device: 0)
    again = txt2img(*ROUNDS, "--batch_size", "auto", "--resume")
    assert again.code == 0
    assert sizes == [4, 2]
    assert [line["image"] for line in manifest(first.folder)] == [0, 1, 2, 3, 4, 5, 3, 4]
    assert data(again.folder) == before


def test_a_nan_image_is_made_again(txt2img: Command, nan_images: set[int]) -> None:
    """`--resume` said that all images were there and ended with 0, although a file was missing."""
    nan_images.add(1)
    first = txt2img()
    problem = "1 of 4 images failed: manifest.jsonl says which"
    assert (first.code, first.err[-1]) == (1, problem)
    again = txt2img("--resume")
    assert (again.code, again.err[-1]) == (1, problem)
    assert len(again.paths) == 3
    nan_images.clear()
    last = txt2img("--resume")
    assert (last.code, last.err) == (0, [])
    assert [path.name for path in last.paths] == [f"0000{k}.png" for k in range(4)]
    assert [(line["image"], line["nan"]) for line in manifest(last.folder)][-2:] == [(1, True), (1, False)]
    assert txt2img("--resume").err == ["all 4 images are there"]


def test_nan_images_in_what_a_lost_worker_left_end_with_1(
    txt2img: Command, nan_images: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ended with 0: only the images made before the loss were asked for."""
    plain, teams = runs.make_images, []

    def lost(pipeline, job, writer, team: Team, *args: object) -> int:
        teams.append(team)
        return 1 if len(teams) == 1 else plain(pipeline, job, writer, team, *args)

    monkeypatch.setattr(runs, "make_images", lost)
    nan_images.add(2)
    result = txt2img()
    assert len(teams) == 2
    assert (result.code, len(result.paths)) == (1, 3)
    assert result.err[-1] == "1 of 4 images failed: manifest.jsonl says which"


def test_a_follower_that_is_asked_to_end_ends_the_run_as_the_leader_does(
    txt2img: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended with 1 and a grid of what was there, and its time was compared with that of all images."""
    txt2img()  # from which the next one is planned
    plain = runs.make_images

    def asked(pipeline, job, writer, team: Team, *args: object) -> int:
        plain(pipeline, replace(job, batches=[job.batches[0]]), writer, team, *args)
        team.stop(asked=True)  # as another process would
        return 0

    monkeypatch.setattr(runs, "make_images", asked)
    result = txt2img("--n_iter", 2, folder="asked")
    assert (result.code, len(result.paths)) == (130, 4)
    assert result.err == [
        "a process of this run was asked to end, and all have ended with it",
        "4 of 8 images are missing; the same command with --resume makes them",
    ]
    assert not any(name.startswith("grid") for name in result.files)
    assert "planned_seconds" not in (result.folder / RUNS).read_text()


def test_a_run_without_files_is_recorded_whole(txt2img: Command) -> None:
    result = txt2img("--skip_save")
    assert (result.code, result.files) == (0, ["grid-0000.png"])
    assert [line["file"] for line in manifest(result.folder)] == [None] * 4


def test_the_seed_that_was_picked_is_said(txt2img: Command) -> None:
    result = txt2img("--seed", -1)
    seed = result.settings[0]["seed"]
    assert result.err == [f"seed {seed}"]
    recorded = json.loads((result.folder / RUNS).read_text().splitlines()[0])
    assert recorded["settings"]["seed"] == seed


def test_a_finished_run_needs_no_other_processes(txt2img: Command) -> None:
    """With --devices it ended with an AttributeError: what there is to do was shared with nobody."""
    first = txt2img()
    again = txt2img("--devices", 2, "--resume")
    assert (again.code, again.err, again.out) == (0, ["all 4 images are there"], first.out)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single Ctrl-C while the first batch is decoded."""
    plain = LatentDiffusion.decode_first_stage

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(LatentDiffusion, "decode_first_stage", plain)
        signal.raise_signal(signal.SIGINT)
        return plain(self, latents)

    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", decode)


@pytest.mark.usefixtures("interrupted")
def test_an_interrupted_run_without_files_leaves_a_grid(txt2img: Command) -> None:
    """Its images were thrown away, recorded as made, and --resume advised, which refuses --skip_save."""
    result = txt2img("--skip_save", "--n_iter", 3, "--n_samples", 2)
    made = len(manifest(result.folder))
    assert (result.code, result.files) == (130, ["grid-0000.png"])
    assert 2 <= made < 6
    assert result.err[-1] == f"{6 - made} of 6 images are missing"


@pytest.mark.usefixtures("interrupted")
def test_an_interrupted_run_says_how_it_goes_on(txt2img: Command) -> None:
    result = txt2img("--n_iter", 3, "--n_samples", 2)
    assert (result.code, [name for name in result.files if "grid" in name]) == (130, [])
    assert result.err[-1].endswith(" of 6 images are missing; the same command with --resume makes them")


@pytest.mark.parametrize("argv", [[], ["--skip_save"]])
def test_a_full_disk_advises_what_the_command_can_do(
    txt2img: Command, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    """It advised --resume, too, where --skip_save refuses that."""

    def full(*_: object) -> None:
        raise cannot_write(Path("a"), OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(OutputFolder, "_encoded", full)
    result = txt2img(*argv)
    advice = "make room" if argv else f"make room, and {AGAIN} makes what is missing"
    assert result.code == 2
    assert result.err[-1].endswith(f"a: No space left on device; {advice}")


def test_a_page_has_its_own_prompts(
    txt2img: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every grid carried those of the whole run: "settings of 89,311 bytes do not fit into a JPEG file"."""
    monkeypatch.setattr(runs, "page_size", lambda sizes, columns: 2)
    (tmp_path / "p.txt").write_text("a cat\na dog\na cow\n")
    argv = ["--from-file", tmp_path / "p.txt", "--n_iter", 2, "--format", "jpg"]
    result = txt2img(*argv)
    assert (result.code, result.err) == (0, [])
    grids = [read_metadata(result.folder / f"grid-000{k}.jpg") for k in range(3)]
    assert [grid["prompt"] for grid in grids] == ["a cat\na dog", "a cow\na cat", "a dog\na cow"]
    assert {grid["seed"] for grid in grids} == {42}


def test_an_image_that_is_deleted_while_the_run_goes_on(
    txt2img: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ended with "cannot read the image", without a grid and without what it took."""
    plain = runs.make_images

    def weeded(*args: object) -> int:
        lost = plain(*args)
        (args[2].folder.path / "samples/00001.png").unlink()
        return lost

    monkeypatch.setattr(runs, "make_images", weeded)
    result = txt2img()
    assert (result.code, result.files[0], len(result.paths)) == (1, "grid-0000.png", 3)
    assert result.err == ["1 of 4 images are missing; the same command with --resume makes them"]
    assert any("costs" in line for line in read_lines(result.folder / RUNS))
    monkeypatch.setattr(runs, "make_images", plain)
    assert (txt2img("--resume").code, len(result.paths)) == (0, 4)


def test_a_grid_that_cannot_be_made_ends_with_1(txt2img: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended the run with 2, before it was recorded what that took."""

    def refuse(*_: object, **options: object) -> None:
        raise InputError("it is raining")

    monkeypatch.setattr(OutputFolder, "save_grid", refuse)
    result = txt2img()
    assert (result.code, len(result.paths)) == (1, 4)
    assert result.err == ["no grid of samples/00000.png to samples/00003.png: it is raining"]
    assert any("costs" in line for line in read_lines(result.folder / RUNS))
