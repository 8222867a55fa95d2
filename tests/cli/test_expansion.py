"""--expand, --wildcards and --dry_run: what the commands make of templates."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import SCRIPTS, Result, refused
from PIL import Image
from run_helpers import data, manifest

from ldm.pipeline.pipeline import Pipeline

Command = Callable[..., Result]


@pytest.fixture
def txt2img(command: Command, model: tuple[Path, Path]) -> Command:
    base = ["--config", model[0], "--ckpt", model[1], "--steps", 1, "--watermark", "none", "--skip_grid"]
    return lambda *argv, folder="out": command("txt2img", *base, *argv, folder=folder)


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/colours.txt").write_text("red\nblue\ngreen\nblack\nwhite\n")
    return tmp_path / "lists"


def plans(result: Result) -> list[dict]:
    """The requests that a command with --dry_run --json prints."""
    assert result.code == 0
    assert not result.folder.exists()
    return [json.loads(line) for line in result.out]


def seen(lines: list[dict]) -> list[tuple]:
    names = ("seed", "prompt", "negative_prompt", "prompt_template", "negative_template")
    return [tuple(line.get(name) for name in names) for line in lines]


def test_nothing_is_expanded_without_being_asked(txt2img: Command) -> None:
    prompt = r"a {red|blue} __colours__ \{cat\}"
    (line,) = plans(txt2img("--prompt", prompt, "--n_samples", 1, "--n_iter", 1, "--dry_run", "--json"))
    assert line["prompt"] == prompt
    assert "prompt_template" not in line


def test_each_image_has_its_own_draw(txt2img: Command, lists: Path) -> None:
    argv = ["--prompt", "a __colours__ {cat|dog}", "--negative_prompt", "{old|young} __colours__"]
    argv += ["--wildcards", lists]
    result = txt2img(*argv, "--n_iter", 2, "--n_samples", 3)
    assert (result.code, result.err) == (0, [])
    lines = manifest(result.folder)
    assert [line["seed"] for line in lines] == [42, 43, 44, 45, 46, 47]
    assert len({line["prompt"] for line in lines}) > 2
    assert all("__" not in line["prompt"] + line["negative_prompt"] for line in lines)
    assert {line["prompt_template"] for line in lines} == {argv[1]}
    assert seen(result.settings) == seen(lines)
    text = Image.open(result.paths[0]).text["parameters"]
    assert "Template: a __colours__ {cat|dog}, Negative Template: {old|young} __colours__" in text
    # image 4 alone
    alone = txt2img(*argv, "--n_iter", 1, "--n_samples", 1, "--seed", 46, folder="alone")
    assert seen(alone.settings) == seen(lines[4:5])
    assert np.array_equal(alone.images[0], result.images[4])
    # --like makes the same image; with --expand another one is drawn from its template
    again = txt2img("--like", result.paths[4], folder="again")
    assert seen(again.settings) == seen(lines[4:5])
    assert np.array_equal(again.images[0], result.images[4])
    other = plans(
        txt2img("--like", result.paths[4], *argv[4:], "--seed", 42, "--dry_run", "--json", folder="o")
    )
    assert seen(other) == seen(lines[:1])
    (plain,) = plans(txt2img("--like", result.paths[4], "--prompt", "x", "--dry_run", "--json", folder="o"))
    assert "prompt_template" not in plain
    assert plain["negative_template"] == argv[3]
    # --resume makes the same images; other words in a file are another run
    before = data(result.folder)
    result.paths[3].unlink()
    assert txt2img(*argv, "--n_iter", 2, "--n_samples", 3, "--resume").code == 0
    assert data(result.folder) == before
    (lists / "colours.txt").write_text("pink\n")
    changed = txt2img(*argv, "--n_iter", 2, "--n_samples", 3, "--resume")
    assert changed.code == 2
    assert "pink" in changed.err[0]


def test_a_seed_left_to_chance_draws_the_prompts(txt2img: Command, lists: Path) -> None:
    """It is chosen before the run, once, and --resume finds it."""
    argv = ["--prompt", "a __colours__ cat", "--wildcards", lists, "--n_iter", 2, "--n_samples", 2]
    result = txt2img(*argv, "--seed", -1)
    seed = result.settings[0]["seed"]
    assert result.err == [f"seed {seed}"]
    assert seen(plans(txt2img(*argv, "--seed", seed, "--dry_run", "--json", folder="no"))) == seen(
        result.settings
    )
    before = data(result.folder)
    result.paths[1].unlink()
    assert txt2img(*argv, "--seed", -1, "--resume").err == []
    assert data(result.folder) == before
    # that of the run with these templates and numbers, though others have come after it
    for more in (["--n_samples", 1, "--steps", 3], ["--n_samples", 1, "--prompt", "a __colours__ dog"]):
        assert txt2img(*argv, *more, "--seed", -1).code == 0
    assert txt2img(*argv, "--seed", -1, "--resume").err == ["all 4 images are there"]
    assert txt2img(*argv, "--seed", -1, "--quiet", folder="quiet").err == []


@pytest.mark.slow
def test_several_processes_draw_the_same(txt2img: Command, model: tuple[Path, Path], lists: Path) -> None:
    argv = ["--prompt", "a __colours__ cat", "--wildcards", lists, "--n_iter", 2, "--n_samples", 2]
    one = txt2img(*argv)
    base = ["--config", model[0], "--ckpt", model[1], "--steps", 1, "--watermark", "none", "--skip_grid"]
    more = ["--safety", "off", "--device", "cpu", "--devices", 2, "--outdir", one.folder.parent / "two"]
    words = [sys.executable, SCRIPTS / "txt2img.py", *base, *argv, *more]
    subprocess.run(list(map(str, words)), check=True, capture_output=True, timeout=300)
    two = Result(0, [], [], one.folder.parent / "two")
    assert seen(two.settings) == seen(one.settings)
    assert all(map(np.array_equal, two.images, one.images))


def test_all_combinations_in_order(txt2img: Command) -> None:
    argv = ["--prompt", "{a|b} {c|d}", "--negative_prompt", "{x|y}", "--expand", "all", "--n_samples", 2]
    lines = plans(txt2img(*argv, "--n_iter", 1, "--dry_run", "--json"))
    texts = [(line["prompt"], line["negative_prompt"]) for line in lines]
    expected = [(f"{p} {q}", n) for p in "ab" for q in "cd" for n in "xy" for _ in range(2)]
    assert texts == expected
    assert [line["seed"] for line in lines] == list(range(42, 58))
    assert plans(txt2img(*argv, "--n_iter", 2, "--dry_run", "--json"))[16:18][1]["seed"] == 42 + 17


def test_lines_with_options(txt2img: Command, tmp_path: Path) -> None:
    """A line's own seed draws its prompt, and rises as without --expand."""
    path = tmp_path / "p.jsonl"
    own = {"prompt": "{a|b|c|d} cat", "seed": 7, "variation_seed": 3, "variation_strength": 0.1}
    path.write_text(json.dumps(own) + '\n{"prompt": "plain", "negative_prompt": "{a|b}"}\n')
    argv = ["--from-file", path, "--n_iter", 3, "--n_samples", 2, "--repeat", 2, "--dry_run", "--json"]
    plain, drawn = plans(txt2img(*argv)), plans(txt2img(*argv, "--expand", "random"))
    for name in ("seed", "variation_seed", "image"):
        assert [line.get(name) for line in plain] == [line.get(name) for line in drawn]
    cats = {line["seed"]: line["prompt"] for line in drawn if line["prompt"] != "plain"}
    assert set(cats) == {7, 8, 9, 10}
    assert len(set(cats.values())) > 1
    for line in drawn:
        assert cats.get(line["seed"], "plain") == line["prompt"]  # whatever its place
    assert {line["negative_prompt"] for line in drawn} == {"", "a", "b"}
    every = plans(txt2img(*argv, "--expand", "all"))
    assert [line["seed"] for line in every[:8]] == [7, 8] * 4
    assert [line["prompt"] for line in every[:9]] == [f"{c} cat" for c in "aabbccdd"] + ["plain"]


def test_a_dry_run_loads_no_weights(
    txt2img: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(self: Pipeline) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Pipeline, "model", property(loaded))
    argv = ["--prompt", "a\ncat", "--negative_prompt", "dog", "--n_samples", 2, "--n_iter", 1, "--dry_run"]
    result = txt2img(*argv, "--H", 32, "--log_file", tmp_path / "log.txt", "--batch_size", "auto")
    assert (result.code, result.err) == (0, [])
    assert result.out == [
        "0  seed 42  16x32  a cat  negative: dog",
        "1  seed 43  16x32  a cat  negative: dog",
    ]
    assert not result.folder.exists()
    assert not (tmp_path / "log.txt").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            "--prompt {a|b --expand all",
            "{ without its } (\\{ stands for itself): character 1, at the ^: '^{a|b'",
        ),
        ("--prompt a --negative_prompt b} --expand all", "} without its {"),
        (
            "--prompt __colour__ --wildcards lists",
            "no wildcard file colour.txt in lists; the nearest are colours",
        ),
        ("--prompt __a__ --wildcards nowhere", "--wildcards nowhere: the folder is not there"),
        ("--prompt __a__ --expand random", "__a__ is a wildcard, and there are none without --wildcards DIR"),
        ("--prompt __loop__ --wildcards lists", "circular wildcards in lists: loop -> ring -> loop"),
        ("--prompt __empty__ --wildcards lists", "lists/empty.txt has no line to choose from"),
        ("--prompt __latin__ --wildcards lists", "lists/latin.txt is no UTF-8 text: line 1"),
        (
            "--from-file big.txt --expand all",
            "--from-file big.txt, line 2: --expand all: 1,048,577 combinations",
        ),
        (
            "--from-file huge.txt --expand all",
            "at least 10^18 combinations, 100,000 are the most; --expand random",
        ),
        ("--from-file broken.txt --expand random", "--from-file broken.txt, line 2: a { without its }"),
        ("--prompt a --expand some", "choose from"),
    ],
)
def test_what_is_refused(
    txt2img: Command, lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "model", property(lambda self: pytest.fail("the model was loaded")))
    for name, text in {"loop": "__ring__", "ring": "x\n__loop__", "empty": "# x", "latin": "caf\xe9"}.items():
        (lists / f"{name}.txt").write_text(text, encoding="latin-1")
    (tmp_path / "big.txt").write_text("a\n" + "{a|b}" * 20)
    (tmp_path / "huge.txt").write_text("{a|b}" * 200)
    (tmp_path / "broken.txt").write_text("a {b|c}\nd {")
    refused(txt2img(*argv.split()), words)


def test_the_prompt_language_comes_after_expansion(txt2img: Command, tmp_path: Path) -> None:
    """Bars in square brackets are the language's own, and its mistakes are those of the plain prompt."""
    argv = [
        "--expand",
        "all",
        "--prompt_syntax",
        "a1111",
        "--n_samples",
        1,
        "--n_iter",
        1,
        "--dry_run",
        "--json",
    ]
    lines = plans(txt2img("--prompt", "[a {red|blue} cube|a cone] {({x|y}:1.2)}", *argv))
    expected = [f"[a {c} cube|a cone] ({x}:1.2)" for c in ("red", "blue") for x in "xy"]
    assert [line["prompt"] for line in lines] == expected
    path = tmp_path / "p.txt"
    path.write_text("a\n[a:b:{1|c}]\n")
    refused(
        txt2img("--from-file", path, *argv), f"--from-file {path}, line 2: --prompt: character ", "'[a:b:^c]'"
    )


def test_expanding_nothing_is_said(txt2img: Command) -> None:
    argv = ["--prompt", "a cat", "--n_samples", 1, "--n_iter", 1, "--dry_run"]
    assert txt2img(*argv, "--expand", "random").err == [
        "--expand: no prompt has choices such as {red|blue}, or wildcards such as __name__"
    ]


@pytest.mark.parametrize(
    ("prompt", "argv", "words"),
    [
        ("a AND b", ["--prompt_syntax", "a1111"], "line 2: --prompt_to with AND or a schedule in --prompt"),
        ("[a:b:3]", ["--prompt_syntax", "a1111"], "line 2: --prompt_to with AND or a schedule in --prompt"),
        ("a", ["--expand", "random"], "line 1: --prompt_to 'a {dog|cow}' with --expand: it is not expanded"),
    ],
)
def test_lines_that_do_not_go_with_another_prompt(
    txt2img: Command, tmp_path: Path, prompt: str, argv: list, words: str
) -> None:
    """Lines were not checked beside --prompt_to: AND failed in the middle of a run, braces stayed text."""
    path = tmp_path / "p.txt"
    path.write_text(f"a {{cat|hen}}\n{prompt}\n")
    walk = ["--prompt_to", "a {dog|cow}" if "--expand" in argv else "a dog", "--prompt_mix", 0.5]
    refused(txt2img("--from-file", path, *walk, *argv, "--dry_run"), f"--from-file {path}, {words}")


def test_a_dry_run_shows_no_terminals_orders(txt2img: Command, tmp_path: Path) -> None:
    """Escape sequences of a prompt reached the terminal, and a lone surrogate ended the command."""
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a \x1b[31mcat \udce9", "negative_prompt": "\x07dog"}))
    result = txt2img("--from-file", path, "--n_iter", 1, "--dry_run")
    assert result.out == [r"0  seed 42  16x16  a \x1b[31mcat \udce9  negative: \x07dog"]
