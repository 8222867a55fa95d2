"""`scripts/upscale.py` from its arguments to its files: the x4 model, pixel upscalers, folders."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Result, refused
from PIL import Image
from run_helpers import data, manifest
from tiny_siblings import upscaler_section, write_model

from ldm.cli.parser import UPSCALE_PROMPT

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_model(tmp_path_factory.mktemp("x4"), "x4", upscaler_section())


@pytest.fixture
def upscale(command: Command, files: tuple[Path, Path]) -> Command:
    """Run the command with the x4 model: two steps, no watermark."""
    base = ["--config", files[0], "--ckpt", files[1], "--steps", 2, "--watermark", "none"]
    return lambda *argv, folder="out": command("upscale", *base, *argv, folder=folder)


@pytest.fixture(scope="module")
def esrgan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    architectures = pytest.importorskip("spandrel.architectures.ESRGAN")
    torch.manual_seed(0)
    network = architectures.ESRGAN(num_filters=8, num_blocks=1, scale=4)
    path = tmp_path_factory.mktemp("esrgan") / "4x-tiny.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def upscale_pixels(command: Command, esrgan: Path) -> Command:
    base = ["--model", esrgan, "--watermark", "none"]
    return lambda *argv, folder="out": command("upscale", *base, *argv, folder=folder)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with three images, one of which is broken, and a text."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k, name in enumerate(("b.png", "a.jpg")):
        values = np.random.default_rng(k).integers(0, 256, (16, 24, 3), np.uint8)
        Image.fromarray(values).save(folder / name)
    (folder / "c.png").write_bytes((folder / "b.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("two photographs")
    (folder / "inside").mkdir()
    return folder


def test_one_file(upscale: Command, photos: Path) -> None:
    result = upscale("--init-img", photos / "b.png", "--prompt", "a cat", "--noise_level", 40)
    assert (result.code, result.err) == (0, [])
    assert result.files == ["samples/00000.png"]
    assert result.images[0].shape == (64, 96, 3)
    (settings,) = result.settings
    named = {"prompt": "a cat", "noise_level": 40, "tile": 0, "init_img": "b.png", "scale": 9.0}
    assert {name: settings[name] for name in named} == named
    assert "strength" not in settings
    again = upscale("--like", result.paths[0], "--init-img", photos / "b.png", folder="again")
    assert again.err == []
    assert np.array_equal(again.images[0], result.images[0])


def test_a_folder(upscale: Command, photos: Path) -> None:
    """Images by name; what cannot be read is left out, with one notice."""
    result = upscale("--init-img", photos, "--filename", "{init_img}", "--n_samples", 2)
    assert result.code == 0
    assert result.err == [f"{photos}: 2 of 4 files are no readable images (c.png, notes.txt)"]
    assert result.files == ["samples/a-2.png", "samples/a.png", "samples/b-2.png", "samples/b.png"]
    lines = manifest(result.folder)
    assert [line["init_img"] for line in lines] == ["a.jpg", "a.jpg", "b.png", "b.png"]
    assert [line["seed"] for line in lines] == [42, 43, 44, 45]
    assert {line["prompt"] for line in lines} == {UPSCALE_PROMPT}


def test_a_run_is_taken_up(upscale: Command, photos: Path) -> None:
    argv = ["--init-img", photos / "a.jpg", photos / "b.png", "--tile", 16]
    first = upscale(*argv)
    before = data(first.folder)
    first.paths[1].unlink()
    again = upscale(*argv, "--resume")
    assert (again.code, data(again.folder)) == (0, before)
    refused_again = upscale(*argv[:3], "--tile", 0, "--resume")
    assert refused_again.code == 2
    assert "tile 16, now 0" in refused_again.err[0]
    assert upscale("--init-img", photos, "--tile", 16, "--resume", "--quiet").err == []  # the same two images


def test_json_lines(upscale: Command, photos: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "a cat", "init_img": str(photos / "a.jpg"), "noise_level": 5},
        {"prompt": "", "init_img": str(photos / "b.png"), "H": 32, "W": 32},
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    result = upscale("--from-file", path, "--noise_level", 30)
    assert result.code == 0
    assert [settings["noise_level"] for settings in result.settings] == [5, 30]
    assert [image.shape for image in result.images] == [(64, 96, 3), (32, 32, 3)]
    refused(upscale("--from-file", path, "--init-img", photos, folder="refused"), "--from-file with several")
    path.write_text('{"prompt": "a cat"}')
    refused(upscale("--from-file", path, folder="refused"), "give --init-img")


def test_what_is_refused(upscale: Command, photos: Path, tmp_path: Path) -> None:
    refused(upscale(), "give --init-img")
    refused(upscale("--init-img", photos / "c.png"), "c.png")
    refused(upscale("--init-img", photos / "a.jpg", photos / "none.png"), "none.png")
    refused(upscale("--init-img", photos / "inside"), "inside holds no image that can be read")
    refused(upscale("--init-img", photos / "a.jpg", "--max_pixels", 6000), "96x64", "--max_pixels 6,000")
    refused(upscale("--init-img", photos / "a.jpg", "--noise_level", 400), "--noise_level 400", "0 … 350")
    refused(upscale("--init-img", photos / "a.jpg", "--tile", 3), "--tile 3")
    refused(upscale("--init-img", photos / "a.jpg", "--model", tmp_path / "x.pth"), "--model", "--ckpt")


@pytest.mark.parametrize("name", ["txt2img", "img2img"])
def test_like_the_small_image(
    name: str, upscale: Command, command: Command, model: tuple[Path, Path], photos: Path
) -> None:
    """The result had the size of the small image, and that of image to image was refused for its strength."""
    base = ["--config", model[0], "--ckpt", model[1], "--steps", 2, "--n_samples", 1, "--n_iter", 1]
    argv = [] if name == "txt2img" else ["--init-img", photos / "b.png"]
    small = command(name, *base, *argv, "--prompt", "a cat", "--H", 16, "--W", 24, folder="small").paths[0]
    result = upscale("--like", small, "--init-img", small)
    assert result.code == 0
    assert result.images[0].shape == (64, 96, 3)
    assert result.settings[0].items() >= {"prompt": "a cat", "noise_level": 20, "steps": 2}.items()
    assert "strength" not in result.settings[0]


def test_an_empty_name_is_no_folder(upscale: Command, photos: Path, monkeypatch) -> None:
    """An empty shell variable enlarged all images of the working folder."""
    monkeypatch.chdir(photos)
    refused(upscale("--init-img", ""), "--init-img is missing, or has no value")
    refused(upscale("--init-img", photos / "a.jpg", ""), "--init-img is missing, or has no value")


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1)])
def test_results_without_a_size_that_can_be(upscale: Command, tmp_path: Path, size: tuple[int, int]) -> None:
    """The error was about --H or --W, which nobody had given."""
    Image.new("RGB", size).save(tmp_path / "strip.png")
    result = upscale("--init-img", tmp_path / "strip.png")
    refused(result, f"strip.png would become {4 * size[0]}x{4 * size[1]}: sides of 8 … 65,536 pixels")
    assert "--" not in result.err[0]


def test_another_model_is_named(command: Command, model: tuple[Path, Path], photos: Path) -> None:
    argv = ["--config", model[0], "--ckpt", model[1], "--init-img", photos / "a.jpg"]
    refused(command("upscale", *argv), "txt2img.py or img2img.py")


def test_a_pixel_upscaler(upscale_pixels: Command, photos: Path, esrgan: Path) -> None:
    result = upscale_pixels("--init-img", photos, "--filename", "{init_img}-{model}", "--json", "--tile", 16)
    assert result.code == 0
    assert len(result.err) == 1
    assert result.files == ["samples/a-4x-tiny.png", "samples/b-4x-tiny.png"]
    assert [json.loads(line)["file"] for line in result.out] == result.files
    for settings in result.settings:
        assert settings["upscaler"] == "ESRGAN"
        assert settings["checkpoint"] == esrgan.name
        assert settings["tile"] == 16
        assert not {"sampler", "noise_level", "seed"} & settings.keys()
    before = data(result.folder)
    result.paths[0].unlink()
    again = upscale_pixels(
        "--init-img", photos, "--filename", "{init_img}-{model}", "--tile", 16, "--resume", "--quiet"
    )
    assert (again.code, again.err, data(again.folder)) == (0, [], before)


def test_like_a_pixel_upscalers_image(upscale_pixels: Command, command: Command, photos: Path) -> None:
    argv = ["--init-img", photos / "a.jpg"]
    first = upscale_pixels(*argv, "--H", 32, "--W", 32, "--resize", "crop")
    again = upscale_pixels(*argv, "--like", first.paths[0], folder="again")
    assert again.code == 0
    assert np.array_equal(again.images[0], first.images[0])
    other = command("img2img", *argv, "--like", first.paths[0], folder="other")
    assert other.code == 2
    assert "use upscale.py" in other.err[0]


def test_json_lines_of_a_pixel_upscaler(upscale_pixels: Command, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = [
        {"prompt": "", "init_img": str(photos / name), "H": side}
        for name, side in (("a.jpg", 32), ("b.png", 48))
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    result = upscale_pixels("--from-file", path)
    assert (result.code, result.err) == (0, [])
    assert [image.shape for image in result.images] == [(32, 48, 3), (48, 72, 3)]


def test_a_pixel_upscaler_reads_no_prompt(upscale_pixels: Command, photos: Path) -> None:
    result = upscale_pixels("--init-img", photos / "a.jpg", "--prompt", "a cat", "--steps", 3)
    assert result.code == 0
    assert result.err == ["--prompt, --ddim_steps: a pixel upscaler (--model) has no prompt and no sampling"]


def test_a_pixel_upscaler_has_no_parts(upscale_pixels: Command, photos: Path) -> None:
    """--vae and --weights were without effect, and nothing said so."""
    result = upscale_pixels("--init-img", photos / "a.jpg", "--vae", "nowhere.ckpt", "--weights", "ema")
    assert result.code == 0
    assert len(result.err) == 1
    assert result.err[0].startswith("--vae, --weights: a pixel upscaler")


def test_files_that_are_no_pixel_upscaler(command: Command, model: tuple[Path, Path], photos: Path) -> None:
    argv = ["--init-img", photos / "a.jpg", "--model"]
    refused(command("upscale", *argv, model[1]), "looks like a latent diffusion model")
    refused(command("upscale", *argv, photos / "a.jpg"), "not a checkpoint")
    refused(command("upscale", *argv, photos / "none.pth"), "--model", "none.pth: there is no such file")
