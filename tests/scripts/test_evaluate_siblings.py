"""scripts/evaluate_siblings.py on the bundled models: report, files, and mistakes on the command line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from commands import script
from PIL import Image

from ldm.cli import entry
from ldm.pipeline import Pipeline


def run(*arguments: str) -> int:
    return entry.run(script("evaluate_siblings").main, list(arguments))


def test_scores_and_grids_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompts", "1", "--ddim_steps", "2", "--outdir", str(tmp_path)]
    assert run("inpainting", "depth", "edges", *arguments) == 0
    out = capsys.readouterr().out
    assert "| pixels kept | 100.0 % |" in out
    assert "| places within 8 pixels |" in out
    record = json.loads((tmp_path / "scores.json").read_text())
    assert list(record["scores"]) == ["inpainting", "depth", "edges"]
    assert record["settings"]["prompts"] == 1
    with Image.open(tmp_path / "inpainting.png") as grid:
        assert grid.size == (6 * 130 + 2, 130 + 2), "image, hole and result of two prompts"
    with Image.open(tmp_path / "depth.png") as grid:
        assert grid.size == (4 * 130 + 2, 130 + 2)
    with Image.open(tmp_path / "edges.png") as grid:
        assert grid.size == (8 * 130 + 2, 130 + 2), "render, edges, and images with and without them"


def test_an_image_that_is_not_a_number_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a black image among the others, without a word, and the exit code was 0."""
    plain = Pipeline.generate

    def generate(self, requests, *args):
        for k, image in enumerate(plain(self, requests, *args)):
            yield image if k else replace(image, pixels=None)

    monkeypatch.setattr(Pipeline, "generate", generate)
    assert run("inpainting", "--prompts", "1", "--ddim_steps", "1", "--outdir", str(tmp_path)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("inpainting: 1 images came out as NaN, and count as wrong: 'a ")
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores["inpainting"]["asked solid, of one"] == 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["dept"], "MODEL 'dept' is not one of inpainting, depth, upscaling, edges"),
        (["depth", "--controlnet", "x.pth"], "--controlnet is for edges"),
        (["inpainting", "--noise_level", "500"], "--noise_level is for upscaling"),
        (["--ckpt", "x.ckpt"], "--ckpt: name the one model that it is"),
        (["depth", "--detector", "absent.st"], "no detector at"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = run(*arguments, "--outdir", str(tmp_path))
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert why in capsys.readouterr().err.splitlines()[-1]
