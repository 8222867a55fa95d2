"""`scripts/verify.py`: images made again from their own settings."""

import json
from collections.abc import Callable
from pathlib import Path

import lora_files
import numpy as np
import pytest
import tiny
import torch
from commands import SCRIPTS, Result, script
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_control import random_controlnet

from ldm.cli import entry

Command = Callable[..., Result]
Verify = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def verify(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: tuple[Path, Path]
) -> Verify:
    """Runs the command on the tests' model; gives exit code, lines of stdout and lines of stderr."""

    def run(*argv: object, ckpt: bool = True) -> tuple[int, list[str], list[str]]:
        words = [*argv, *(["--config", model[0], "--ckpt", model[1]] if ckpt else [])]
        monkeypatch.setattr("sys.argv", [str(SCRIPTS / "verify.py"), *map(str, words)])
        code = entry.run(script("verify").main)
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


@pytest.fixture
def make(command: Command, model: tuple[Path, Path]) -> Command:
    base = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 2, "--n_iter", 1, "--n_samples", 2]
    return lambda *argv, name="txt2img", folder="out": command(
        name, *base, "--prompt", "a cat", *argv, folder=folder
    )


def altered(path: Path, box: tuple[slice, slice]) -> Path:
    """The file with a spot painted over, and its texts."""
    with Image.open(path) as image:
        pixels, chunks = np.array(image), PngInfo()
        for name, text in image.text.items():
            chunks.add_text(name, text)
    pixels[box] = 255 - pixels[box]
    target = path.with_name(f"altered-{path.name}")
    Image.fromarray(pixels).save(target, pnginfo=chunks)
    return target


def test_images_of_a_run(make: Command, verify: Verify) -> None:
    """With all of what decides an image: sampler, seeds, scale, size, negative prompt."""
    options = ["--sampler", "Euler a", "--H", 24, "--W", 16, "--negative_prompt", "a dog", "--scale", 3]
    made = make(*options, "--variation_seed", 5, "--variation_strength", 0.3)
    code, out, err = verify(*made.paths)
    assert (code, err) == (0, [])
    assert all(": identical" in line or ": equal to rounding" in line for line in out)
    assert len(out) == 2


def test_an_altered_image(make: Command, verify: Verify, tmp_path: Path) -> None:
    made = make("--H", 32, "--W", 32)
    path = altered(made.paths[0], (slice(5, 12), slice(10, 14)))
    code, (line,), err = verify(path, "--diff", tmp_path / "diff")
    assert (code, err) == (1, [])
    assert "altered in 4x7 pixels at (10, 5)" in line
    shown = np.asarray(Image.open(tmp_path / "diff" / f"{path.stem}-difference.png"))
    assert (shown == (255, 40, 40)).all(-1).sum() == 28


def test_differences_of_equal_names_are_numbered(make: Command, verify: Verify, tmp_path: Path) -> None:
    """The image of each overwrote that of the one before."""
    paths = [altered(make(folder=name).paths[0], (slice(2), slice(2))) for name in ("one", "two")]
    code, out, _ = verify(*paths, "--diff", tmp_path / "diff")
    names = ["altered-00000-difference.png", "altered-00000-difference-2.png"]
    assert (code, [line.rpartition("/")[2] for line in out]) == (1, names)
    assert sorted(path.name for path in (tmp_path / "diff").iterdir()) == sorted(names)


def test_what_an_alpha_channel_or_a_second_frame_shows(make: Command, verify: Verify) -> None:
    """Only the colours were compared: an image that its alpha channel hides was identical."""
    (path, _) = make().paths
    with Image.open(path) as image:
        chunks = PngInfo()
        chunks.add_text("stable-diffusion", image.text["stable-diffusion"])
        opaque = image.convert("RGBA")
    opaque.save(path, pnginfo=chunks)
    assert verify(path)[0] == 0
    hidden = opaque.copy()
    hidden.putpixel((3, 4), (*hidden.getpixel((3, 4))[:3], 254))
    hidden.save(path, pnginfo=chunks)
    (found,) = verify(path)[1]
    assert found == f"{path}: altered: it has transparent pixels, and its settings make none"
    opaque.save(path, pnginfo=chunks, save_all=True, append_images=[Image.new("RGBA", opaque.size)])
    code, (found,), _ = verify(path, "--json")
    assert code == 1
    assert json.loads(found) == {
        "file": str(path),
        "verdict": "altered",
        "why": "it has 2 frames, and its settings make one",
    }


def test_json_lines(make: Command, verify: Verify) -> None:
    made = make()
    _, out, _ = verify(*made.paths, "--json")
    found = [json.loads(line) for line in out]
    assert [line["file"] for line in found] == [str(path) for path in made.paths]
    assert {line["verdict"] for line in found} <= {"identical", "equal to rounding"}


def test_settings_that_were_changed(make: Command, verify: Verify) -> None:
    """A prompt that did not make the image."""
    (path, _) = make().paths
    chunks = PngInfo()
    with Image.open(path) as image:
        settings = json.loads(image.text["stable-diffusion"]) | {"prompt": "an elephant", "seed": 9}
        chunks.add_text("stable-diffusion", json.dumps(settings))
        image.save(path, pnginfo=chunks)
    assert verify(path)[0] == 1


def test_a_cropped_image(make: Command, verify: Verify) -> None:
    (path, _) = make("--H", 32, "--W", 32).paths
    with Image.open(path) as image:
        chunks = PngInfo()
        chunks.add_text("stable-diffusion", image.text["stable-diffusion"])
        image.crop((0, 0, 32, 30)).save(path, pnginfo=chunks)
    code, (line,), _ = verify(path)
    assert code == 1
    assert "it is 32x30 pixels, and its settings make 32x32" in line


@pytest.mark.parametrize("format", ["jpg", "webp"])
def test_lossy_files(make: Command, verify: Verify, format: str) -> None:
    made = make("--format", format, "--H", 32, "--W", 32)
    code, out, _ = verify(*sorted((made.folder / "samples").iterdir()))
    assert code == 0, out


def test_the_watermark_is_compared(make: Command, verify: Verify) -> None:
    (path, _) = make("--H", 256, "--W", 256, "--ddim_steps", 1).paths
    assert verify(path)[0] == 0
    with Image.open(path) as image:
        chunks = PngInfo()
        settings = json.loads(image.text["stable-diffusion"]) | {"watermark": "another message"}
        chunks.add_text("stable-diffusion", json.dumps(settings))
        image.save(path, pnginfo=chunks)
    assert verify(path)[0] == 1


def test_an_init_image_is_found(make: Command, verify: Verify, tmp_path: Path) -> None:
    """Beside the image, or in a folder that is named; without it the image cannot be verified."""
    (tmp_path / "elsewhere").mkdir()
    init = tmp_path / "elsewhere" / "init.png"
    Image.new("RGB", (16, 16), "red").save(init)
    made = make("--init-img", init, "--strength", 0.5, name="img2img")
    code, _, (line, *_) = verify(made.paths[0])
    assert code == 2
    assert line.endswith("it was made from init.png, which is not here; give its folder as --folder DIR")
    assert verify(*made.paths, "--folder", init.parent)[0] == 0


def write_files(folder: Path) -> None:
    """A textual inversion, a LoRA, a ControlNet and an image for it."""
    torch.save({"*": torch.randn(2, 32, generator=torch.Generator().manual_seed(0))}, folder / "word.pt")
    lora_files.write(folder / "one.safetensors", lora_files.v1_layers())
    random_controlnet(folder / "net.safetensors", tiny.MODEL)
    Image.new("RGB", (16, 16), "teal").save(folder / "edges.png")


@pytest.mark.parametrize(
    "argv",
    [
        ["--prompt_syntax", "a1111", "--long_prompts", "--prompt", "(a cat:1.3) BREAK [a|b] AND a dog:0.5"],
        ["--embedding", "word.pt", "--prompt", "a word"],
        ["--lora", "one.safetensors:0.7", "--lora", "one.safetensors:-0.2"],
        ["--control", "net.safetensors:edges.png:0.8:0-0.5", "--control_preprocess", "invert"],
        ["--hires", 2, "--hires_upscaler", "lanczos"],
        ["--tiling", "both", "--panorama", "--H", 16, "--W", 40],
        ["--mimic_scale", 4, "--apg_eta", 0.5],
        ["--cfg_pp", "--scale", 0.6],
        ["--sampler", "er_sde", "--schedule", "beta"],
        ["--prompt_to", "a dog", "--prompt_mix", 0.3],
        ["--expand", "random", "--prompt", "a {cat|dog} in {2$$rain|snow|fog}"],
    ],
    ids=lambda argv: argv[0],
)
def test_with_each_of_what_decides_an_image(
    make: Command, verify: Verify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list
) -> None:
    """And the run is taken up: nothing but what is recorded decides an image."""
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    argv = [*argv, "--n_samples", 3, "--batch_size", 2]
    made = make(*argv)
    assert made.code == 0
    before = made.paths[1].read_bytes()
    made.paths[1].unlink()
    assert make(*argv, "--resume").code == 0
    assert made.paths[1].read_bytes() == before
    code, out, err = verify(*made.paths, "--folder", tmp_path)
    assert (code, err, len(out)) == (0, [], 3)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--embedding", "word.pt", "--prompt", "a word"], "with the textual inversion word.pt"),
        (["--control", "net.safetensors:edges.png"], "with the ControlNet net.safetensors"),
        (["--lora", "one.safetensors"], "'one.safetensors', neither as a path nor in"),
    ],
    ids=["embedding", "control", "lora"],
)
def test_files_that_are_nowhere(
    make: Command, verify: Verify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list, words: str
) -> None:
    """It advised --embedding and --control, which it does not have, or named no option at all."""
    (tmp_path / "files").mkdir()
    monkeypatch.chdir(tmp_path / "files")
    write_files(tmp_path / "files")
    made = make(*argv)
    assert made.code == 0
    code, _, err = verify(made.paths[0])  # in the working folder
    assert (code, err) == (0, [])
    monkeypatch.chdir(made.folder)
    code, out, (line,) = verify(made.paths[0])
    assert (code, out) == (2, [])
    assert words in line
    assert "folder as --folder DIR" in line
    assert not {"--embedding", "--control", "--lora "} & set(line.split())
    assert verify(made.paths[0], "--folder", tmp_path / "files")[0] == 0


@pytest.mark.parametrize("place", ["beside", "above", "working", "--folder", "--lora_folder"])
@pytest.mark.parametrize(
    "argv",
    [
        ["--lora", "ONE:0.7"],
        ["--prompt_syntax", "a1111", "--prompt", "a cat <lora:one:0.7>"],
    ],
    ids=["name", "tag"],
)
def test_loras_without_suffix_are_found(
    make: Command, verify: Verify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list, place: str
) -> None:
    """Only files of the very name were looked for, and what the prompt's tags name was not."""
    (tmp_path / "files").mkdir()
    path = lora_files.write(tmp_path / "files" / "one.safetensors", lora_files.v1_layers())
    made = make(*argv, "--lora_folder", path.parent)
    assert made.code == 0
    own = made.paths[0].parent
    (own / "one").mkdir()  # of the name, and no LoRA
    there = {"beside": own, "above": own.parent, "working": tmp_path / "cwd"}.get(place, tmp_path / "other")
    for folder in (there, tmp_path / "cwd"):
        folder.mkdir(exist_ok=True)
    path.rename(there / path.name)
    monkeypatch.chdir(tmp_path / "cwd")
    code, out, err = verify(made.paths[0], *([place, there] if place.startswith("--") else []))
    assert (code, err) == (0, [])
    assert "altered" not in out[0]
    if place == "beside":  # the folders of one image are not those of the next
        copy = tmp_path / "copy.png"
        copy.write_bytes(made.paths[0].read_bytes())
        code, (line,), (why,) = verify(made.paths[0], copy)
        assert code == 2
        assert line.startswith(f"{made.paths[0]}: ")
        assert why.startswith(f"{copy}: cannot be verified: there is no LoRA ")


def test_what_cannot_be_verified(make: Command, verify: Verify, tmp_path: Path) -> None:
    plain = tmp_path / "plain.png"
    Image.new("RGB", (16, 16)).save(plain)
    made = make("--rng", "compvis")
    files = [plain, made.paths[1], made.folder / "grid-0000.png", tmp_path / "nowhere.png"]
    code, out, err = verify(*files)
    assert (code, out) == (2, [])
    reasons = ["no settings of this project", "--rng compvis", "--rng compvis", "cannot read the image"]
    assert len(err) == len(reasons)
    for line, reason, file in zip(err, reasons, files, strict=True):
        assert line.startswith(f"{file}: cannot be verified: ")
        assert reason in line
    code, _, err = verify(make(folder="grid").folder / "grid-0000.png")
    assert code == 2
    assert "a grid or a sheet" in err[0]


def test_an_unknown_model(make: Command, verify: Verify, tmp_path: Path) -> None:
    (path, _) = make().paths
    code, _, (line,) = verify(path, ckpt=False)
    assert code == 2
    assert "made it; give that as --ckpt" in line
    other = ["--ckpt", "models/scenes-64/model.safetensors"]
    code, _, (line,) = verify(path, *other, ckpt=False)
    assert code == 2
    assert "made it, and not model.safetensors" in line


def test_a_bundled_model_is_found_by_its_hash(command: Command, verify: Verify) -> None:
    argv = ["--dpm_solver", "--ddim_steps", 2, "--n_iter", 1, "--n_samples", 1, "--prompt", "a red cube"]
    made = command("txt2img", "--ckpt", "models/scenes-64-v/model.safetensors", *argv)
    code, (line,), err = verify(*made.paths, ckpt=False)
    assert (code, err) == (0, [])
    assert "altered" not in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: IMAGE"),
        (["x.png", "--tolerance", "300"], "300 is not a whole number in range: 0 … 255"),
        (["x.png", "--diff", "pyproject.toml/x"], "--diff pyproject.toml/x"),
    ],
)
def test_bad_arguments(verify: Verify, argv: list[str], words: str) -> None:
    code, out, err = verify(*argv)
    assert (code, out, len(err)) == (2, [], 1)
    assert words in err[0]
