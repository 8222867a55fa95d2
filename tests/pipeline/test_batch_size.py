"""--batch_size: which images are sampled together, and how many fit into memory."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from commands import Result, refused

from ldm.pipeline import memory
from ldm.sampling.batches import Batch, plan, regroup

Command = Callable[..., Result]


def test_rounds_are_no_bounds() -> None:
    batches = regroup(plan(["a", "b", "c"], 2, 2), 4)
    assert [(batch.prompts, tuple(batch.numbers)) for batch in batches] == [
        (("a", "b", "c", "a"), (0, 1, 2, 3)),
        (("b", "c"), (4, 5)),
    ]
    assert all(batch.seeds is None for batch in batches)


def test_kinds_and_seeds_stay_apart() -> None:
    batches = regroup(plan(["a", "b", "c"], 2, 3, kinds=[0, 1, 0], seeds=[None, 7, None]), 8)
    assert batches == [
        Batch(("a", "c", "a", "c"), (0, 2, 3, 5), None, 0),
        Batch(("b", "b"), (1, 4), (7, 8), 1),
    ]


@pytest.fixture
def bundled(command: Command) -> Command:
    base = ["--prompt", "a red cube", "--steps", 3, "--n_samples", 2, "--n_iter", 3]
    return lambda *argv, folder="out": command("txt2img", *base, *argv, folder=folder)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the decoder is for."""
    from ldm.models.diffusion.ddpm import LatentDiffusion

    found, plain = [], LatentDiffusion.decode_first_stage

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        found.append(len(latents))
        return plain(self, latents)

    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", decode)
    return found


def test_images_are_those_of_n_samples(bundled: Command, sizes: list[int]) -> None:
    usual = bundled(folder="usual")
    assert sizes == [2, 2, 2]
    sizes.clear()
    result = bundled("--batch_size", 4)
    assert sizes == [4, 2]
    assert result.code == 0
    for image, other in zip(result.images, usual.images, strict=True):
        assert np.abs(image - other).max() <= 1
    assert result.settings[0]["batch_size"] == 4
    assert "batch_size" not in usual.settings[0]


def test_auto_takes_what_fits_and_a_resumed_run_the_same(
    bundled: Command, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size is part of the run: with another one its files would not be the same to the byte."""
    held = iter([1000, 1100])
    monkeypatch.setattr(memory, "taken", lambda device: next(held))
    monkeypatch.setattr(memory, "left", lambda device: 250 / memory.MARGIN)
    first = bundled("--batch_size", "auto")
    assert sizes == [1, 2, 4, 2]  # two trials; 100 bytes an image: two and two more
    assert first.err.count("--batch_size auto: 4 images at once") == 1
    before = {path.name: path.read_bytes() for path in first.paths}
    for path in first.paths[3:5]:
        path.unlink()
    sizes.clear()
    monkeypatch.setattr(memory, "left", lambda device: 0)
    again = bundled("--batch_size", "auto", "--resume")
    assert again.code == 0
    assert sizes == [4, 2]
    lines = [
        json.loads(line) for line in (first.paths[0].parents[1] / "manifest.jsonl").read_text().splitlines()
    ]
    assert [line["image"] for line in lines] == [0, 1, 2, 3, 4, 5, 3, 4]
    assert {path.name: path.read_bytes() for path in again.paths} == before


def test_bad_values(bundled: Command) -> None:
    refused(bundled("--batch_size", 0), "--batch_size: 0 is not a whole number in range: at least 1, or auto")
    refused(bundled("--batch_size", "most"), "most is not a whole number in range: at least 1, or auto")
    refused(
        bundled("--batch_size", 4, "--rng", "compvis"), "--batch_size 4: --rng compvis draws for n_samples"
    )
    refused(bundled("--batch_size", "auto", "--fixed_code"), "--batch_size auto: --fixed_code starts for")
