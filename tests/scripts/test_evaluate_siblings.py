"""scripts/evaluate_siblings.py on the bundled models: report, files, and mistakes on the command line."""

import json
from pathlib import Path

import pytest
from commands import script
from PIL import Image

from ldm.cli import entry


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


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["dept"], "MODEL 'dept' is not one of inpainting, depth, upscaling, edges"),
        (["depth", "--controlnet", "x.pth"], "--controlnet is for edges"),
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
