"""A run as a whole: batch sizes, what --resume takes up and what it refuses, exit codes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Result
from run_helpers import data, manifest

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipeline import memory
from ldm.runs import run as runs
from ldm.runs.manifest import RUNS
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
