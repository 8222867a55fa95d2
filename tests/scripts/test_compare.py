"""`scripts/compare.py`: a labelled sheet over two options."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import Result, refused, script
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from ldm.images.sheets import CELL, contact_sheet
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipeline import pipeline
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


def test_a_third_axis_makes_pages(compare: Command) -> None:
    result = compare("--x", "steps", 1, 2, "--y", "scale", 1, 3, "--z", "prompt", "a cat", "a dog/2")
    assert result.code == 0
    pages = [name for name in result.files if not name.startswith("samples/")]
    assert pages == ["sheet-prompt-a-cat.png", "sheet-prompt-a-dog_2.png"]
    found = [(s["prompt"], s["scale"], s["steps"]) for s in result.settings]
    assert found == [(p, y, x) for p in ("a cat", "a dog/2") for y in (1, 3) for x in (1, 2)]
    sheet = read_metadata(result.folder / pages[1])
    assert (sheet["x"], sheet["z"]) == (["steps", "1", "2"], ["prompt", "a dog/2"])


def test_models_are_loaded_once_each(
    compare: Command, model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cells of each are made together, and stand in their places on one sheet."""
    other = tmp_path / "other.safetensors"
    weights = load_file(model[1])
    save_file({k: v * 1.5 if k.endswith("out.2.weight") else v for k, v in weights.items()}, other)
    loaded: list[str] = []
    load = pipeline.load_model
    monkeypatch.setattr(
        pipeline, "load_model", lambda *args: (loaded.append(Path(args[1]).name), load(*args))[1]
    )
    result = compare("--x", "ckpt", model[1], other, "--y", "steps", 1, 2, "--ddim_eta", 0)
    assert result.code == 0
    assert loaded == [model[1].name, other.name]
    assert result.out == [str(result.folder)]
    assert [name for name in result.files if "grid" in name] == ["grid-0000.png"]
    found = [(s["checkpoint"], s["steps"]) for s in result.settings]
    assert found == [(path.name, n) for path in (model[1], other) for n in (1, 2)]
    assert not np.array_equal(result.images[1], result.images[3])


def test_several_models_say_once_that_images_are_unchecked(
    compare: Command, model: tuple[Path, Path], tmp_path: Path
) -> None:
    """Each checkpoint of an axis said so again; a command of its own still does."""
    other = shutil.copy(model[1], tmp_path / "other.safetensors")
    for folder in ("one", "two"):
        argv = ["--x", "ckpt", model[1], other, "--y", "steps", 1, 2, "--safety", "auto"]
        result = compare(*argv, folder=folder)
        assert result.code == 0
        assert sum("images are unchecked" in line for line in result.err) == 1


def test_weights_that_a_file_lacks(compare: Command) -> None:
    """They were missed after the images of the others had been made."""
    result = compare("--x", "weights", "raw", "ema", "--y", "steps", 1, 2)
    refused(result, "has no EMA weights: use --weights raw")
    assert not result.folder.exists()


def test_a_plan_of_several_models(compare: Command, model: tuple[Path, Path], tmp_path: Path) -> None:
    """Only the last model's cells were listed."""
    other = shutil.copy(model[1], tmp_path / "other.safetensors")
    result = compare("--x", "ckpt", model[1], other, "--y", "steps", 1, 2, "--dry_run")
    assert result.code == 0
    assert sum("a cat" in line for line in result.out) == 4
    assert sum(line.startswith("by ") for line in result.err) == 2


def test_lists_switches_and_weights(tmp_path: Path) -> None:
    """What the values of an axis set."""
    compare = script("compare")
    argv = ["--prompt", "a cat", "--lora", "a.safetensors:0.3", "--lora_folder", str(tmp_path)]
    argv += ["--x", "lora:weight", "0", "0.5", "--y", "clip_skip", "none", "2"]
    table = compare.parse([*argv, "--z", "panorama", "false", "true"])
    found = [(r.lora, r.clip_skip, r.panorama) for _, r in table.cells]
    loras = [("a.safetensors:0",), ("a.safetensors:0.5",)]
    assert found == [(lora, skip, wide) for wide in (False, True) for skip in (None, 2) for lora in loras]
    table = compare.parse(
        ["--prompt", "a cat", "--x", "embedding", "none", "b.pt", "--y", "weights", "raw", "ema"]
    )
    assert [(c.weights, r.embedding) for c, r in table.cells] == [
        (weights, files) for weights in ("raw", "ema") for files in ((), ("b.pt",))
    ]
    table = compare.parse(["--lora", "a.safetensors:0.3:0.1", *argv[4:], "--prompt", "a cat"])
    assert {r.lora for _, r in table.cells} == {("a.safetensors:0:0.1",), ("a.safetensors:0.5:0.1",)}
    control = [
        "--control",
        "c.pth:edges.png:0.7:0-0.5",
        "--x",
        "control:weight",
        "1",
        "--y",
        "tiling",
        "none",
        "x",
    ]
    ((_, first), (_, second)) = compare.parse(["--prompt", "a cat", *control]).cells
    assert [str(one) for one in first.controls] == ["c.pth:edges.png:1:0-0.5"]
    assert (first.tiling, second.tiling) == ("none", "x")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--x", "sampler", "ddim"], "required: --y"),
        (["--x", "sampler", "ddim", "--y", "sampler", "plms"], "both vary sampler"),
        (["--x", "sampler", "--y", "steps", "1"], "--x sampler has no values"),
        (["--x", "lora:weight", "1", "--y", "steps", "1"], "the weight of one file: give it with --lora"),
        (["--x", "weights", "raw", "best", "--y", "steps", "1"], "--weights best: choose from raw, ema"),
        (
            ["--x", "steps", "1", "--y", "scale", "1", "--save_control"],
            "--save_control is not for compare.py",
        ),
        (["--x", "panorama", "maybe", "--y", "steps", "1"], "--panorama maybe: give true or false"),
        (["--x", "scale", "1", "--y", "steps", "1", "--z", "scale", "2"], "--x and --z both vary scale"),
        (["--x", "outdir", "a", "--y", "steps", "1"], "--x outdir: no option to compare; choose from prompt"),
        (["--x", "strength", "0.5", "--y", "steps", "1"], "--x strength: no option to compare"),
        (["--x", "prompt_template", "a", "--y", "steps", "1"], "--x prompt_template: no option to compare"),
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


@pytest.mark.parametrize("name", ["compare", "walk"])
@pytest.mark.parametrize("argv", [(), ("--init-img", "a.png")], ids=["text", "image"])
def test_help_shows_the_commands_own_defaults(
    name: str, argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """It showed those of txt2img.py, another folder and six images."""
    with pytest.raises(SystemExit):
        script(name).main([*argv, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"folder for the results (outputs/{name})" in text
    assert "repeat all of it N times (1)" in text
    assert "sampled together (1)" in text
    assert ("do not save a grid (on)" in text) == (name == "walk")


def test_the_cells_options_go_over_the_commands_and_the_images(compare: Command, tmp_path: Path) -> None:
    """--plms beside an axis of samplers was refused, as was an image's eta where a cell has none."""
    argv = ["--x", "sampler", "ddim", "euler", "--y", "steps", 1]
    plain = compare("--plms", *argv)
    assert (plain.code, [s["sampler"] for s in plain.settings]) == (0, ["ddim", "euler"])
    like = compare("--like", plain.paths[0], *argv, "--skip_save", folder="like")
    assert like.code == 0


def test_a_folder_is_no_image_of_a_cell(compare: Command, tmp_path: Path) -> None:
    """ "cannot read the image: Is a directory", it said, and its help that a folder would do."""
    argv = ["--x", "scale", 1, 2, "--y", "steps", 1, "--init-img", tmp_path]
    refused(compare(*argv), f"--init-img {tmp_path}: a folder is not for compare.py; give one image")


def test_the_help_promises_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    """That of --init-img is img2img's, and said "or a folder of such images"."""
    for name, promised in (("compare", False), ("img2img", True)):
        with pytest.raises(SystemExit):
            script(name).main(["--init-img", "a.png", "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "the image to start from" in text
        assert ("or a folder of such images" in text) == promised


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single Ctrl-C while the first batch is decoded."""
    plain = LatentDiffusion.decode_first_stage

    def decode(self, latents):
        monkeypatch.setattr(LatentDiffusion, "decode_first_stage", plain)
        signal.raise_signal(signal.SIGINT)
        return plain(self, latents)

    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", decode)


@pytest.mark.usefixtures("interrupted")
def test_an_interrupted_sheet_advises_no_resume(compare: Command) -> None:
    """It advised the same command with --resume, which compare.py refuses."""
    result = compare("--x", "steps", 1, 2, 3, "--y", "scale", 1, 2)
    assert result.code == 130
    assert result.err[-1].endswith(" of 6 images are missing, and black on the sheet")


@pytest.mark.usefixtures("interrupted")
def test_an_interrupted_sheet_has_what_was_made(
    compare: Command, model: tuple[Path, Path], tmp_path: Path
) -> None:
    """With --skip_save nothing was left; and of the first of several models not even the folder's name."""
    other = shutil.copy(model[1], tmp_path / "other.safetensors")
    argv = ["--x", "ckpt", model[1], other, "--y", "steps", 1, 2, 3, "--skip_save", "--n_samples", 1]
    result = compare(*argv)
    assert (result.code, result.files, result.out) == (130, ["grid-0000.png"], [str(result.folder)])
    sheet = np.asarray(Image.open(result.folder / "grid-0000.png").convert("RGB"))
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 32  # an image, beside the labels and black cells


def test_a_model_that_is_missing_is_refused_before_the_first_image(
    compare: Command, model: tuple[Path, Path]
) -> None:
    """The images of the models before it were made, and with --skip_save they were lost."""
    result = compare("--x", "ckpt", model[1], "nowhere.ckpt", "--y", "steps", 1, 2)
    refused(result, "no checkpoint at", "nowhere.ckpt")
    refused(compare("--x", "vae", model[1], "nowhere.pt", "--y", "steps", 1, 2), "nowhere.pt")
