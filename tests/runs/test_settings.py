"""What is recorded of a run, and compared when it is taken up again."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from commands import Result
from run_helpers import data

from ldm.pipeline.request import ImageRequest
from ldm.runs.settings import PROMPTS, content_hash, grid_settings
from ldm.weights.loading import read_config

Command = Callable[..., Result]


@pytest.fixture
def txt2img(command: Command, model: tuple[Path, Path]) -> Command:
    """Run the command: two steps, a batch of four images of 16x16 pixels."""
    base = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 2, "--n_samples", 4, "--n_iter", 1]
    base += ["--prompt", "a cat", "--watermark", "none"]
    return lambda *argv, folder="out": command("txt2img", *base, *argv, folder=folder)


def test_lines_are_compared_when_a_run_is_taken_up(txt2img: Command, tmp_path: Path) -> None:
    """Only the first line's settings were: the run went on with the others' changed."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "scale": 5}\n{"prompt": "b"}\n')
    argv = ["--from-file", path]
    first = txt2img(*argv)
    before = data(first.folder)
    first.paths[1].unlink()
    result = txt2img(*argv, "--scale", 3, "--resume")
    assert (result.code, len(result.err)) == (2, 1)
    assert "its last one had line 2: scale 7.5, now 3" in result.err[0]
    assert len(result.paths) == 1
    again = txt2img(*argv, "--resume")
    assert (again.code, data(again.folder)) == (0, before)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"prompt": "a", "seed": 42}, {"prompt": "b"}], "line 1: seed null, now 42"),
        ([{"prompt": "a"}, {"prompt": "c"}], 'line 2: prompt "b", now "c"'),
        ([{"prompt": "a"}, {"prompt": "b", "steps": 3}], "line 2: steps 2, now 3"),
        ([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}], "lines 2, now 3"),
        ([{"prompt": "a"}], "lines 2, now 1"),
    ],
)
def test_what_differs_is_named_with_its_line(
    txt2img: Command, tmp_path: Path, lines: list, words: str
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    txt2img("--from-file", path)
    path.write_text("\n".join(map(json.dumps, lines)))
    result = txt2img("--from-file", path, "--resume")
    assert (result.code, len(result.err)) == (2, 1)
    assert f"its last one had {words}" in result.err[0]


def test_another_config_of_the_same_name_is_another_run(model: tuple[Path, Path], tmp_path: Path) -> None:
    """Configs were compared by their names: an edited YAML passed --resume."""
    plain = content_hash(read_config(model[0]))
    assert plain == content_hash(read_config(model[0]))
    edited = tiny.write_config(tmp_path / model[0].name, {"scale_factor": 0.5})
    assert content_hash(read_config(edited)) != plain


def test_the_prompts_of_a_grid_are_cut_off() -> None:
    """Those of 10,000 lines went into each of 157 grids, 600 kB twice."""
    requests = [ImageRequest(prompt=prompt, watermark="none") for prompt in ("a", "b", "a", "c" * PROMPTS)]
    pipeline = SimpleNamespace(facts={})
    assert grid_settings(pipeline, requests[:3], {}, 7)["prompt"] == "a\nb"
    prompts = grid_settings(pipeline, requests, {}, 7)["prompt"]
    assert (len(prompts), prompts[:5], prompts[-2:]) == (PROMPTS, "a\nb\nc", "c…")
