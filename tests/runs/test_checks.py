"""What a run checks and reports before anything slow begins."""

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Result, refused

from ldm.errors import InputError
from ldm.pipeline import ImageRequest, Pipeline, RuntimeOptions
from ldm.runs.options import RunOptions
from ldm.runs.run import run

Command = Callable[..., Result]


@pytest.fixture
def txt2img(command: Command, model: tuple[Path, Path]) -> Command:
    """Run the command: two steps, a batch of four images of 16x16 pixels."""
    base = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 2, "--n_samples", 4, "--n_iter", 1]
    base += ["--prompt", "a cat", "--watermark", "none"]
    return lambda *argv, folder="out": command("txt2img", *base, *argv, folder=folder)


def test_prompts_that_are_cut_off_are_said_once(txt2img: Command) -> None:
    result = txt2img("--prompt", "cat " * 100)
    assert len([line for line in result.err if "is longer than 75 tokens; cut off: " in line]) == 1


@pytest.mark.parametrize("syntax", ["plain", "a1111"])
def test_75_tokens_are_read(txt2img: Command, syntax: str) -> None:
    """Of 76 the notice said that they are more than 77, among which it counted start and end."""
    argv = ("--prompt_syntax", syntax, "--prompt")
    assert txt2img(*argv, "cat " * 75, folder="all").err == []
    (line,) = txt2img(*argv, "cat " * 76).err
    assert line.endswith("is longer than 75 tokens; cut off: 'cat'")


def test_a_watermark_that_does_not_fit_is_said_once(txt2img: Command) -> None:
    result = txt2img("--watermark", "SDV2")
    assert (result.code, result.err) == (
        0,
        ["No watermark: it needs 256x256 pixels and these images have 16x16"],
    )


@pytest.mark.parametrize(("height", "width", "said"), [(16, 16, 0), (8, 16, 1), (16, 8, 1), (32, 16, 0)])
def test_half_of_the_models_size_is_too_small(txt2img: Command, height: int, width: int, said: int) -> None:
    """img2img.py with a small image drew rubbish in its size, and said nothing."""
    result = txt2img("--H", height, "--W", width)
    assert result.code == 0
    words = f"{width}x{height} pixels: the model was made for 16x16, and draws little sense in half of that"
    assert result.err == [f"{words}; --H 16 --W 16 fits"] * said


def test_a_run_of_nothing(model: tuple[Path, Path], tmp_path: Path) -> None:
    pipeline = Pipeline.open(str(model[1]), str(model[0]), RuntimeOptions(device="cpu"), safety="off")
    with pytest.raises(InputError, match="at least one request"):
        run(pipeline, [], RunOptions(outdir=str(tmp_path / "out")))


def test_one_stream_is_for_equal_settings(model: tuple[Path, Path], tmp_path: Path) -> None:
    pipeline = Pipeline.open(str(model[1]), str(model[0]), RuntimeOptions(device="cpu"), safety="off")
    requests = [ImageRequest(steps=steps, rng="compvis") for steps in (1, 2)]
    with pytest.raises(InputError, match="rng compvis is one stream"):
        run(pipeline, requests, RunOptions(outdir=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--rng compvis", "2 processes (--devices, --num_nodes): --rng compvis is one stream for all images"),
        ("--skip_save", "--skip_save leaves nothing that grids could be made from"),
        ("--device cuda:0", "--device cuda:0 is one device; name its kind, such as cuda"),
        ("--device mps", "there is one mps device"),
    ],
)
def test_what_several_processes_cannot_do(txt2img: Command, argv: str, words: str) -> None:
    refused(txt2img("--devices", 2, *argv.split()), words)
