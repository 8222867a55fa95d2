"""`scripts/walk.py`: frames between prompts and seeds."""

import stat
from collections.abc import Callable
from pathlib import Path

import lora_files
import numpy as np
import pytest
from commands import Result, refused, script

from ldm.runs.processes import Place

Command = Callable[..., Result]


@pytest.fixture
def walk(command: Command, model: tuple[Path, Path]) -> Command:
    base = ["--config", model[0], "--ckpt", model[1], "--watermark", "none", "--ddim_steps", 2]
    base += ["--safety", "off"]
    return lambda *argv, folder="out": command("walk", *base, *argv, folder=folder)


@pytest.fixture
def txt2img(command: Command, model: tuple[Path, Path]) -> Command:
    base = ["--config", model[0], "--ckpt", model[1], "--watermark", "none", "--ddim_steps", 2]
    base += ["--n_iter", 1, "--n_samples", 1]
    return lambda *argv, folder="txt2img": command("txt2img", *base, *argv, folder=folder)


WALK = ("--prompts", "a cat", "a dog", "--seeds", 1, 2, "--frames", 5)


def test_frames_are_images(walk: Command, txt2img: Command) -> None:
    """The ends are the images of the prompts and seeds, and a frame alone is the frame of a batch."""
    made = walk(*WALK, "--n_samples", 3)
    assert made.code == 0
    assert [path.name for path in made.paths] == [f"{k:05}.png" for k in range(5)]
    assert not [name for name in made.files if "grid" in name]
    ends = txt2img("--prompt", "a cat", "--seed", 1), txt2img("--prompt", "a dog", "--seed", 2, folder="end")
    for frame, end in zip((0, 4), ends, strict=True):
        assert np.array_equal(made.images[frame], end.images[0])
    mixed = [
        "--prompt_to",
        "a dog",
        "--prompt_mix",
        0.25,
        "--variation_seed",
        2,
        "--variation_strength",
        0.25,
    ]
    alone = txt2img("--prompt", "a cat", "--seed", 1, *mixed, folder="alone")
    assert np.abs(alone.images[0] - made.images[1]).max() <= 1
    found = [(s.get("prompt_mix"), s.get("variation_strength")) for s in made.settings]
    assert found == [(None, None), (0.25, 0.25), (0.5, 0.5), (0.75, 0.75), (None, None)]
    again = txt2img("--like", made.paths[2], folder="like")
    assert np.abs(again.images[0] - made.images[2]).max() <= 1


def test_resume_keeps_frames(walk: Command) -> None:
    made = walk(*WALK)
    before = made.images
    made.paths[3].unlink()
    kept = made.paths[0].stat().st_mtime_ns
    again = walk(*WALK, "--resume")
    assert again.code == 0
    assert made.paths[0].stat().st_mtime_ns == kept
    assert all(np.array_equal(*pair) for pair in zip(before, again.images, strict=True))


def test_the_way_of_a_loop() -> None:
    frames = script("walk")._frames([("a", 1), ("b", 1), ("a", 1)], 4, True)
    found = [(f["prompt"], f.get("prompt_to"), f.get("prompt_mix")) for f in frames]
    assert found == [("a", None, None), ("a", "b", 0.5), ("b", None, None), ("b", "a", 0.5)]
    assert all("variation_seed" not in frame for frame in frames)


@pytest.fixture
def ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for ffmpeg, which counts the bytes of the frames."""
    (tmp_path / "bin").mkdir()
    ffmpeg = tmp_path / "bin" / "ffmpeg"
    ffmpeg.write_text('#!/bin/sh\nfor last; do :; done\n/usr/bin/wc -c > "$last"\n')
    ffmpeg.chmod(ffmpeg.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return ffmpeg


def test_a_video_where_ffmpeg_is(walk: Command, ffmpeg: Path) -> None:
    made = walk(*WALK, "--fps", 5)
    assert (made.code, [line for line in made.err if "ffmpeg" in line]) == (0, [])
    assert int((made.folder / "walk.mp4").read_text()) == 5 * made.images[0].size
    ffmpeg.write_text("#!/bin/sh\necho no codec >&2\nexit 1\n")
    failed = walk(*WALK, folder="failed")
    assert failed.code == 1
    assert "ffmpeg made no walk.mp4: no codec" in failed.err


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.usefixtures("ffmpeg")
def test_a_frame_that_is_deleted_meanwhile(
    walk: Command, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The walk ended with "error: cannot read the image", with 2, and left a part of a video behind."""
    film = script("walk").film

    def weeded(outdir: Path, *args: object) -> int:
        (outdir / f"samples/{number:05}.png").unlink()
        return film(outdir, *args)

    with monkeypatch.context() as patch:
        patch.setattr(script("walk"), "film", weeded)
        made = walk(*WALK)
    assert (made.code, len(made.paths)) == (1, 4)
    assert made.err[-1].startswith("no walk.mp4: cannot read the image ")
    assert made.err[-1].endswith("; if it is gone, the same command with --resume makes both")
    assert not [name for name in made.files if "walk" in name]
    again = walk(*WALK, "--resume")
    assert (again.code, len(again.paths), "walk.mp4" in again.files) == (0, 5, True)


@pytest.mark.usefixtures("ffmpeg")
def test_a_video_replaces_none_of_another_walk(walk: Command) -> None:
    """A second walk into the same folder replaced the first one's video without a word."""
    first = walk(*WALK)
    frame = first.images[0].size
    second = walk(*WALK[:-1], 6)
    assert (second.code, second.err[-1]) == (
        0,
        f"{second.folder / 'walk.mp4'} was there before: this walk's video is walk-2.mp4",
    )
    (second.folder / "walk-2.mp4").write_text("0")
    assert walk(*WALK[:-1], 6, "--resume").code == 0
    videos = {name: int((first.folder / name).read_text()) for name in first.files if "walk" in name}
    assert videos == {"walk.mp4": 5 * frame, "walk-2.mp4": 6 * frame}


def test_only_the_leading_process_makes_the_video(walk: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process of --devices wrote it, to one temporary file, and the second found that gone."""
    filmed = []
    monkeypatch.setattr(script("walk"), "film", lambda *args: filmed.append(args) or 0)
    monkeypatch.setattr("ldm.runs.run.run", lambda *args: 0)
    for rank in (1, 0):
        monkeypatch.setattr("ldm.runs.processes.find_place", lambda *args, rank=rank: Place(rank, 2))
        walk(*WALK)
    assert len(filmed) == 1


def test_without_ffmpeg_there_is_a_notice(walk: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    (line,) = walk("--prompts", "a cat", "--seeds", 1, 2, "--frames", 2).err
    assert line.startswith("there is no ffmpeg: the frames are in ")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompts", "a cat"], "name one place: give at least two prompts or two seeds"),
        (["--prompts", "a", "b", "--seeds", "1", "2", "3"], "--prompts: 2 for 3 places"),
        (["--prompts", "a", "b", "--frames", "1"], "1 is not a whole number in range: 2 … 100,000"),
        (["--prompts", "a", "b", "c", "--frames", "2"], "--frames 2: give at least one for each of 3 places"),
        (["--prompts", "a", "b", "--seeds", "-1"], "-1 is not a whole number in range"),
        (["--prompts", "a", "b", "--prompt", "c"], "--prompt is not for walk.py"),
        (["--prompts", "a", "b", "--rng", "compvis"], "--rng compvis is not for walk.py"),
        (["--prompts", "a", "b", "--H", "20"], "--H 20 is not a multiple of 8"),
        (["--seeds", "1", "2"], "required: --prompts"),
        (["--prompts", "a", ""], "--prompts: one of them is empty"),  # named --prompt_mix, which nobody gave
    ],
)
def test_bad_arguments(walk: Command, argv: list[str], words: str) -> None:
    refused(walk("--ckpt", "nowhere.ckpt", *argv), words)


@pytest.mark.parametrize("frames", [2, 3])
@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("<lora:one:0.5> b", "--prompts: '<lora:one:0.5> b' has a tag of the LoRA 'one'"),
        ("a AND b", "--prompts: 'a AND b' has AND or a schedule"),
        ("[a|b]", "--prompts: '[a|b]' has AND or a schedule"),
        ("a (dog:x)", "--prompts: character 8, at the ^: 'a (dog:^x)'"),
    ],
)
def test_prompts_that_cannot_be_mixed(walk: Command, prompt: str, words: str, frames: int) -> None:
    """They were refused as --prompt_to, which nobody gave, and two frames had the LoRA in one of them."""
    for prompts in (("a cone", prompt), (prompt, "a cone")):
        result = walk("--prompts", *prompts, "--prompt_syntax", "a1111", "--frames", frames)
        refused(result, words)


def test_a_single_prompt_is_not_mixed(walk: Command, tmp_path: Path) -> None:
    lora_files.write(tmp_path / "one.safetensors", lora_files.v1_layers())
    prompts = ["--prompts", "<lora:one:0.5> a AND b", "--seeds", 1, 2, "--frames", 3]
    assert walk(*prompts, "--prompt_syntax", "a1111", "--lora_folder", tmp_path).code == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt_to", "a dog"], "--prompt_to a dog without --prompt_mix"),
        (["--prompt_mix", "0.5"], "--prompt_mix 0.5 without --prompt_to"),
        (
            ["--prompt_to", "a AND b", "--prompt_mix", "0.5", "--prompt_syntax", "a1111"],
            "--prompt_to with AND or a schedule in --prompt_to",
        ),
        (
            ["--prompt_to", "a (dog:x)", "--prompt_mix", "0.5", "--prompt_syntax", "a1111"],
            "--prompt_to: character 8, at the ^: 'a (dog:^x)'",  # the option had no name
        ),
    ],
)
def test_bad_mixtures(txt2img: Command, argv: list[str], words: str) -> None:
    refused(txt2img("--ckpt", "nowhere.ckpt", "--prompt", "a cat", *argv), words)


def test_a_plan_makes_no_video(walk: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--plan` went on to a video of the folder's last run, or to an error where there was none."""
    monkeypatch.setattr(script("walk"), "film", lambda *_: pytest.fail("a video is made"))
    planned = walk(*WALK, "--plan")
    assert planned.code == 0
    assert planned.files == []


def test_the_seed_of_the_image_of_like(walk: Command, txt2img: Command) -> None:
    """Every other setting came from the image, and the noise was that of seed 42."""
    made = txt2img("--prompt", "a cat", "--seed", 7)
    argv = ["--like", made.paths[0], "--prompts", "a cat", "a dog", "--frames", 2]
    walked = walk(*argv)
    assert [settings["seed"] for settings in walked.settings] == [7, 7]
    assert np.array_equal(walked.images[0], made.images[0])
    assert [s["seed"] for s in walk(*argv, "--seeds", 1, 2, folder="given").settings] == [1, 2]
    refused(walk(*argv[:2], "--prompts", "a cat", folder="one"), "name one place")


def test_a_frame_as_the_model_of_a_walk(walk: Command) -> None:
    """The frame's own way between prompts and seeds was in every frame of the new walk, or refused it."""
    first = walk(*WALK)
    argv = ["--like", first.paths[1], "--prompts", "a cow", "--seeds", 5, 6, "--frames", 2]
    again = walk(*argv, folder="again")
    assert again.code == 0
    ways = ("prompt_to", "prompt_mix", "variation_seed", "variation_strength")
    assert [s["seed"] for s in again.settings] == [5, 6]
    assert not any(name in settings for settings in again.settings for name in ways)
