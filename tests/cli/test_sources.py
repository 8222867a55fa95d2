"""Folders of init images, masks and depth maps."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_siblings
from commands import Result, refused
from image_files import noise
from PIL import Image
from run_helpers import data, manifest

from ldm.cli.prompts import read_prompts
from ldm.cli.sources import image_files, paired_files
from ldm.errors import InputError

Command = Callable[..., Result]


def write(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(noise(16, 24, seed)).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images 2 and 10, and a text."""
    for number in (10, 2):
        write(tmp_path / f"photos/image{number}.png", number)
    (tmp_path / "photos/notes.txt").write_text("two photographs")
    return tmp_path / "photos"


@pytest.fixture
def make(command: Command, model: tuple[Path, Path]) -> Command:
    base = ["--config", model[0], "--ckpt", model[1], "--steps", 2, "--watermark", "none", "--skip_grid"]
    base += ["--prompt", "a cat", "--H", 16, "--W", 24]
    return lambda name, *argv, folder="out": command(name, *base, *argv, folder=folder)


def test_natural_order(photos: Path) -> None:
    files, notices = image_files([str(photos)], 10_000)
    assert [Path(file).name for file in files] == ["image2.png", "image10.png"]
    assert notices == [f"{photos}: 1 of 3 files are no readable images (notes.txt)"]


def test_pairs_by_name(tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    for name in ("a.png", "b.jpg", "c.png", "c.jpg"):
        write(masks / name)
    assert paired_files(["x/a.jpg", "y/b.png", "c.jpg"], str(masks), "mask") == [
        str(masks / name) for name in ("a.png", "b.jpg", "c.jpg")
    ]
    with pytest.raises(
        InputError, match=r"masks: c\.webp has 2 of them: c\.(png, c\.jpg|jpg, c\.png); leave"
    ):
        paired_files(["c.webp"], str(masks), "mask")
    with pytest.raises(InputError, match=r"no file for 4 of 5 images: d\.png, e\.png, f\.png, …; it has"):
        paired_files(["a.png", "d.png", "e.png", "f.png", "g.png"], str(masks), "mask")


def test_a_folder_of_init_images(make: Command, photos: Path) -> None:
    argv = ["--init-img", photos, "--n_samples", 2, "--quiet"]
    result = make("img2img", *argv)
    assert (result.code, result.err) == (0, [])
    names = ["image10-2.png", "image10.png", "image2-2.png", "image2.png"]
    assert result.files == [f"samples/{name}" for name in names]
    lines = manifest(result.folder)
    assert [line["init_img"] for line in lines] == ["image2.png"] * 2 + ["image10.png"] * 2
    assert [line["seed"] for line in lines] == [42, 43, 44, 45]
    before = data(result.folder)
    (result.folder / "samples/image10.png").unlink()
    assert make("img2img", *argv, "--resume").code == 0
    assert data(result.folder) == before
    numbered = make("img2img", *argv, "--filename", "{number:05}", folder="numbered")
    assert numbered.files[0] == "samples/00000.png"


def test_masks_of_a_folder(make: Command, photos: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    write(masks / "image2.jpg")
    argv = ["--init-img", photos, "--mask", masks]
    refused(
        make("inpaint", *argv), f"--mask {masks}: no file for 1 of 2 images: image10.png; it has the image's"
    )
    write(masks / "image10.png")
    result = make("inpaint", *argv)
    assert result.code == 0
    pairs = {(settings["init_img"], settings["mask"]) for settings in result.settings}
    assert pairs == {("image2.png", "image2.jpg"), ("image10.png", "image10.png")}
    one = make("inpaint", "--init-img", photos / "image2.png", "--mask", masks, folder="one")
    assert [settings["mask"] for settings in one.settings] == ["image2.jpg"]
    assert one.files == ["samples/00000.png"]
    same = make("inpaint", "--init-img", photos, "--mask", masks / "image2.jpg", folder="same")
    assert [settings["mask"] for settings in same.settings] == ["image2.jpg"] * 2


def test_depth_maps_of_a_folder(command: Command, photos: Path, tmp_path: Path) -> None:
    config, weights = tiny_siblings.write_model(tmp_path, "depth", tiny_siblings.depth_section())
    base = ["--config", config, "--ckpt", weights, "--steps", 2, "--watermark", "none", "--skip_grid"]
    (photos / "notes.txt").unlink()
    result = command("depth2img", *base, "--depth", photos, "--H", 16, "--W", 24)
    assert (result.code, result.err) == (0, [])
    assert [line["depth"] for line in manifest(result.folder)] == ["image2.png", "image10.png"]
    both = command(
        "depth2img", *base, "--init-img", photos, "--depth", photos, "--H", 16, "--W", 24, folder="both"
    )
    lines = manifest(both.folder)
    assert [(line["init_img"], line["depth"]) for line in lines] == [(f"image{n}.png",) * 2 for n in (2, 10)]
    assert both.files == ["samples/image10.png", "samples/image2.png"]


def test_paths_of_json_lines(make: Command, photos: Path, tmp_path: Path, monkeypatch) -> None:
    """They are beside the file, or else in the working folder; an error says where it was looked."""
    path = photos.parent / "lines.jsonl"
    (tmp_path / "here").mkdir()
    write(tmp_path / "here/only.png", 3)
    monkeypatch.chdir(tmp_path / "here")
    lines = [{"prompt": "a", "init_img": "photos/image2.png"}, {"prompt": "b", "init_img": "only.png"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = [dict(line.options)["init_img"] for line in read_prompts(str(path))]
    assert found == [str(photos / "image2.png"), "only.png"]
    assert make("img2img", "--from-file", path, "--n_samples", 1).code == 0
    path.write_text('{"prompt": "a", "init_img": "none.png"}')
    where = (
        f"line 1: init_img none.png is not there; it was looked for in {tmp_path}, beside the prompts, or in"
    )
    refused(make("img2img", "--from-file", path, folder="no"), where)
    monkeypatch.chdir(tmp_path)
    path.write_text('{"prompt": "a", "mask": "none.png"}')
    refused(
        make("inpaint", "--from-file", "lines.jsonl", "--init-img", photos / "image2.png", folder="no"),
        "mask none.png is not there; it was looked for in the working folder",
    )
    path.write_text('{"prompt": "a", "init_img": "photos/image2.png", "mask": "photos"}')
    assert make("inpaint", "--from-file", "lines.jsonl", folder="paired").settings[0]["mask"] == "image2.png"
    refused(
        make("img2img", "--init-img", photos, "--from-file", path, folder="no"), "--from-file with several"
    )
