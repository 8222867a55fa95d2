"""`scripts/compare.py`: a labelled sheet over two options."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import Result, refused
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.images.sheets import CELL, contact_sheet
from ldm.pipeline.infotext import read_metadata

Command = Callable[..., Result]


@pytest.fixture
def compare(command: Command, model: tuple[Path, Path]) -> Command:
    base = ["--config", model[0], "--ckpt", model[1], "--watermark", "none", "--prompt", "a cat"]
    return lambda *argv, folder="out": command("compare", *base, *argv, folder=folder)


def test_samplers_by_steps(compare: Command, command: Command, model: tuple[Path, Path]) -> None:
    result = compare("--x", "sampler", "ddim", "Euler a", "--y", "steps", 1, 2, 3, "--seed", 7)
    assert (result.code, result.err) == (0, [])
    assert result.files == ["grid-0000.png", *(f"samples/{k:05}.png" for k in range(6))]
    found = [(s["sampler"], s["steps"], s["seed"]) for s in result.settings]
    assert found == [(s, n, 7) for n in (1, 2, 3) for s in ("ddim", "euler_ancestral")]
    sheet = read_metadata(result.folder / "grid-0000.png")
    assert (sheet["x"], sheet["y"]) == (["sampler", "ddim", "Euler a"], ["steps", "1", "2", "3"])

    argv = ["--config", model[0], "--ckpt", model[1], "--watermark", "none", "--prompt", "a cat"]
    argv += ["--sampler", "Euler a", "--ddim_steps", 3, "--n_samples", 1, "--n_iter", 1, "--seed", 7]
    alone = command("txt2img", *argv, folder="alone")
    assert np.array_equal(alone.images[0], result.images[5])


def test_scale_by_strength(compare: Command, tmp_path: Path) -> None:
    """With an init image its options are those of img2img; the sheet itself shows how many steps run."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "init.png")
    argv = ["--x", "strength", 0, 0.5, 1, "--y", "scale", 1, 5, "--skip_save", "--ddim_steps", 2]
    result = compare("--init-img", tmp_path / "init.png", "--H", 16, "--W", 16, *argv)
    assert (result.code, result.err, result.files) == (0, [], ["grid-0000.png"])


def test_a_random_seed_is_one_for_all(compare: Command) -> None:
    """The run chose a second seed for itself, and the sheet recorded that one."""
    result = compare("--x", "scale", 1, 2, "--y", "steps", 1, 2, "--seed", -1)
    sheet = read_metadata(result.folder / "grid-0000.png")
    (seed,) = {settings["seed"] for settings in [*result.settings, sheet]}
    assert result.err == [f"seed {seed}"]


def test_only_the_cells_need_to_fit(compare: Command) -> None:
    """Options for the samplers of an axis were refused where the default sampler, in no cell, lacks them."""
    argv = ["--x", "sampler", "euler", "heun", "--y", "steps", 2, "--s_churn", 1, "--skip_save"]
    assert compare(*argv, "--n_samples", 1, "--n_iter", 1).code == 0


def test_an_image_of_another_model(compare: Command, like_image: Path) -> None:
    argv = ["--like", like_image, "--x", "scale", 1, 2, "--y", "steps", 1, "--skip_save"]
    (line,) = compare(*argv).err
    assert "it will differ" in line
    assert compare(*argv, "--quiet", folder="quiet").err == []


@pytest.fixture
def like_image(tmp_path: Path) -> Path:
    """An image by a model whose hash is not that of the tests'."""
    chunks = PngInfo()
    chunks.add_text("stable-diffusion", json.dumps({"prompt": "a cat", "seed": 3, "model_hash": "01234567"}))
    Image.new("RGB", (16, 16)).save(tmp_path / "like.png", pnginfo=chunks)
    return tmp_path / "like.png"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--x", "sampler", "ddim"], "required: --y"),
        (["--x", "sampler", "ddim", "--y", "sampler", "plms"], "both vary sampler"),
        (["--x", "sampler", "--y", "steps", "1"], "--x sampler has no values"),
        (["--x", "outdir", "a", "--y", "steps", "1"], "--x outdir: no option to compare; choose from prompt"),
        (["--x", "strength", "0.5", "--y", "steps", "1"], "--x strength: no option to compare"),
        (["--x", "sampler", "ddim", "eulr", "--y", "steps", "1"], "--sampler eulr is not known"),
        (["--x", "sampler", "ddim", "plms", "--y", "eta", "0.5"], "plms has no such option"),
        (["--x", "scale", "1", "--y", "steps", "1", "--H", "20"], "--H 20 is not a multiple of 8"),
        (["--x", "scale", "1", "--y", "steps", "0"], "0 is not a whole number in range"),
        (["--x", "scale", "1", "--y", "steps", "1", "--n_samples", "2"], "--n_samples is not for compare.py"),
    ],
)
def test_bad_axes(compare: Command, argv: list[str], words: str) -> None:
    """Every cell's options are checked before the model is loaded."""
    refused(compare("--ckpt", "nowhere.ckpt", *argv), words)


def test_the_sheet_holds_every_image() -> None:
    colours = [[(10 * i, 20 * j, 200) for i in range(3)] for j in range(2)]
    rows = [[np.full((8, 16, 3), colour, np.uint8) for colour in row] for row in colours]
    sheet = contact_sheet(rows, ["a", "b", "c"], ["one", "a much longer label that needs wrapping"], "title")
    for row in colours:
        for colour in row:
            assert (sheet == colour).all(-1).sum() == CELL * 2 * CELL
    assert (sheet.sum(-1) < 100).sum() > 200, "the labels are written"


def test_large_images_are_not_magnified() -> None:
    image = np.zeros((CELL + 1, 2 * CELL, 3), np.uint8)
    sheet = contact_sheet([[image]], ["x"], ["y"], "t")
    assert (sheet == 0).all(-1).sum() == image[..., 0].size
