"""`scripts/inpaint.py` from its arguments to its files."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_inpainting
from commands import SCRIPTS, Result, refused
from image_files import noise
from PIL import Image
from run_helpers import data, manifest

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Config and weights of a model for inpainting."""
    return tiny_inpainting.write_model(tmp_path_factory.mktemp("inpainting"))


@pytest.fixture
def init(tmp_path: Path) -> Path:
    Image.fromarray(noise(30, 44)).save(tmp_path / "init.png")
    return tmp_path / "init.png"


def write_mask(path: Path, rows: slice, columns: slice) -> Path:
    mask = np.zeros((30, 44), np.uint8)
    mask[rows, columns] = 255
    Image.fromarray(mask).save(path)
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    return write_mask(tmp_path / "mask.png", slice(4, 20), slice(8, 30))


def base(model: tuple[Path, Path], init: Path) -> list[object]:
    """Two steps and no watermark."""
    argv = ["--config", model[0], "--ckpt", model[1], "--steps", 2, "--prompt", "a cat"]
    return [*argv, "--watermark", "none", "--init-img", init]


@pytest.fixture(params=["plain", "inpainting"])
def inpaint(
    command: Command,
    request: pytest.FixtureRequest,
    model: tuple[Path, Path],
    files: tuple[Path, Path],
    init: Path,
) -> Command:
    """Run the command with a plain checkpoint, and with one for inpainting."""
    argv = base(model if request.param == "plain" else files, init)
    return lambda *more, folder="out": command("inpaint", *argv, *more, folder=folder)


@pytest.fixture
def plain(command: Command, model: tuple[Path, Path], init: Path) -> Command:
    argv = base(model, init)
    return lambda *more, folder="out": command("inpaint", *argv, *more, folder=folder)


def test_files_and_their_settings(inpaint: Command, init: Path, mask: Path) -> None:
    result = inpaint("--mask", mask, "--mask_blur", 1, "--n_samples", 2)
    assert (result.code, result.err) == (0, [])
    assert result.files == ["grid-0000.png", "samples/00000.png", "samples/00001.png"]
    first, second = result.images
    known = np.asarray(Image.open(mask)) == 0
    known[:26, 4:34] = False  # as far as the blur goes
    assert (first[known] == noise(30, 44)[known]).all()
    assert (first != second).any()
    expected = {"mask": "mask.png", "init_img": "init.png", "mask_blur": 1.0, "strength": 1.0}
    found = result.settings[0]
    assert found.items() >= (expected | {"height": 32, "width": 48, "invert_mask": False}).items()
    text = Image.open(result.paths[0]).text["parameters"]
    assert "Mask blur: 1" in text
    assert manifest(result.folder)[0]["mask"] == "mask.png"


def test_strength_is_the_share_of_the_steps(plain: Command, mask: Path) -> None:
    result = plain("--mask", mask, "--strength", 0.5)
    assert (result.code, result.err) == (0, ["inpainting runs 1 of 2 steps"])


def test_outpainting(inpaint: Command) -> None:
    result = inpaint("--outpaint", "8,0,10,4", "--mask_blur", 0)
    assert (result.code, result.err) == (0, [])
    (image,) = result.images
    assert image.shape == (34, 62, 3)
    assert (image[:30, 8:52] == noise(30, 44)).all()
    assert result.settings[0]["outpaint"] == [8, 0, 10, 4]


def test_lines_with_masks_of_their_own(plain: Command, mask: Path, tmp_path: Path) -> None:
    """They share a batch where their sizes are equal; each is the image that the line makes alone."""
    other = write_mask(tmp_path / "other.png", slice(20, 30), slice(0, 44))
    lines = [
        {"prompt": "a dog", "mask": str(mask)},
        {"prompt": "a bird", "mask": str(other), "soft": True, "seed": 7},
        {"prompt": "a fish", "outpaint": [0, 0, 0, 8], "crop_to_mask": 2, "H": 32, "W": 48},
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = plain("--from-file", tmp_path / "lines.jsonl", "--n_samples", 3, "--mask_blur", 0, folder="run")
    assert (run.code, run.err) == (0, [])
    assert [settings.get("mask") for settings in run.settings] == ["mask.png", "other.png", None]
    assert [image.shape[0] for image in run.images] == [30, 30, 38]
    alone = plain(
        *("--prompt", "a bird", "--mask", other, "--soft", "--seed", 7, "--mask_blur", 0), folder="alone"
    )
    assert np.abs(alone.images[0] - run.images[1]).max() <= 1
    assert (run.images[1][:20] == noise(30, 44)[:20]).all()


def test_the_watermark_is_where_it_was_painted(plain: Command, tmp_path: Path) -> None:
    """It was written over the whole image: by default no pixel of a photograph came back as it was."""
    before = noise(256, 264)
    Image.fromarray(before).save(tmp_path / "photo.png")
    mask = np.zeros((256, 264), np.uint8)
    mask[20:100, 30:120] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    argv = ["--init-img", tmp_path / "photo.png", "--mask", tmp_path / "mask.png", "--mask_blur", 0]
    argv += ["--steps", 1, "--skip_grid"]
    (marked,) = plain(*argv, "--watermark", "StableDiffusionV1").images
    (unmarked,) = plain(*argv, folder="unmarked").images
    assert (marked[mask == 0] == before[mask == 0]).all()
    assert (marked[mask > 0] != unmarked[mask > 0]).any()
    Image.new("L", (264, 256)).save(tmp_path / "black.png")
    (same,) = plain(*argv, "--mask", tmp_path / "black.png", "--watermark", "mine", folder="black").images
    assert (same == before).all()


def test_lines_bring_their_own_images(
    command: Command, model: tuple[Path, Path], init: Path, mask: Path, tmp_path: Path
) -> None:
    """The command asked for an --init-img, although each line named one."""
    argv = [*base(model, init)[:-2], "--skip_grid", "--mask_blur", 1, "--invert_mask", "--strength", 0.5]
    lines = [{"prompt": "a dog", "init_img": str(init), "mask": str(mask)}] * 2
    lines[1] = lines[1] | {"invert_mask": False, "strength": 1.0}
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    result = command("inpaint", *argv, "--from-file", path)
    assert result.code == 0
    found = [[s[name] for name in ("init_img", "invert_mask", "strength")] for s in result.settings]
    assert found == [["init.png", True, 0.5], ["init.png", False, 1.0]]
    path.write_text(path.read_text() + "\n" + json.dumps({"prompt": "a cat", "mask": str(mask)}))
    refused(command("inpaint", *argv, "--from-file", path, folder="no"), "line 3: --init-img is missing")


def test_resume_with_a_changed_mask_is_refused(plain: Command, mask: Path) -> None:
    argv = ["--mask", mask, "--n_samples", 2, "--skip_grid"]
    before = plain(*argv)
    path = before.paths[1]
    content = path.read_bytes()
    path.unlink()
    assert plain(*argv, "--resume").code == 0
    assert path.read_bytes() == content
    path.unlink()
    write_mask(mask, slice(0, 9), slice(0, 9))
    result = plain(*argv, "--resume")
    assert result.code == 2
    assert "mask image" in result.err[0]
    assert not path.exists()


def test_like_asks_for_the_mask(plain: Command, command: Command, mask: Path, init: Path, model) -> None:
    options = ["--mask", mask, "--crop_to_mask", 3, "--mask_blur", 1, "--soft", "--H", 24, "--W", 40]
    made = plain(*options, "--seed", 5)
    files = ["--config", model[0], "--ckpt", model[1], "--like", made.paths[0]]
    refused(command("inpaint", *files, "--init-img", init, folder="without"), "mask.png", "--mask")
    refused(command("img2img", *files, "--init-img", init, folder="other"), "inpaint.py")
    again = command("inpaint", *files, "--init-img", init, "--mask", mask, folder="again")
    assert again.code == 0
    assert np.array_equal(again.images, made.images)
    assert made.settings[0].items() >= {"crop_to_mask": 3, "soft": True, "seed": 5}.items()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), ["give --mask or --outpaint"]),
        (("--crop_to_mask", 4), ["--crop_to_mask", "without --mask"]),
        (("--outpaint", "1,2,3"), ["--outpaint 1,2,3", "LEFT,TOP,RIGHT,BOTTOM"]),
        (("--outpaint", "0,0,0,0"), ["--outpaint 0,0,0,0"]),
        (("--outpaint", "1,-2,3,4"), ["--outpaint", "-2"]),
        (("--outpaint", "0,20,0,20", "--H", 40), ["--outpaint adds 40 of --H 40"]),
        (("--outpaint", "8000,8000,8000,8000"), ["would become 16044x16030", "--max_pixels"]),
        (("--outpaint", "8,0,0,0", "--invert_mask"), ["--invert_mask without --mask"]),
        (("--mask", "nowhere.png"), ["nowhere.png"]),
        (("--mask", __file__), ["test_inpaint.py", "not an image"]),
        (("--outpaint", "8,0,0,0", "--rng", "compvis"), ["--outpaint", "--rng image"]),
    ],
    ids=str,
)
def test_what_is_refused(plain: Command, argv: tuple, words: list[str]) -> None:
    refused(plain(*argv), *words)


def test_an_init_image_is_needed(command: Command, mask: Path) -> None:
    refused(command("inpaint", "--mask", mask), "--init-img")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"seed": 3}, ["line 2", "give --mask or --outpaint"]),
        ({"mask": "nowhere.png"}, ["line 2", "nowhere.png"]),
        ({"outpaint": [1, 2]}, ["line 2", "--outpaint 1,2"]),
        ({"outpaint": "left"}, ["line 2", "left"]),
        ({"outpaint": [8, 0, 0, 0], "depth": "map.png"}, ["line 2", "no option 'depth'"]),
    ],
    ids=str,
)
def test_a_line_that_cannot_be_painted_is_named(
    plain: Command, mask: Path, tmp_path: Path, line: dict, words: list[str]
) -> None:
    lines = [{"prompt": "a dog", "mask": str(mask)}, {"prompt": "a cat"} | line]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    refused(plain("--from-file", tmp_path / "lines.jsonl"), *words)


@pytest.mark.slow
def test_several_processes(model: tuple[Path, Path], init: Path, mask: Path, tmp_path: Path) -> None:
    """Which process makes an image is chance, and its bytes are the same."""
    argv = [SCRIPTS / "inpaint.py", *base(model, init), "--mask", mask, "--n_iter", 4, "--skip_grid"]
    for folder, devices in (("alone", 1), ("together", 2)):
        words = [*argv, "--outdir", tmp_path / folder, "--device", "cpu", "--devices", devices]
        subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True)
    together = data(tmp_path / "together")
    assert len(together) == 4
    assert together == data(tmp_path / "alone")
