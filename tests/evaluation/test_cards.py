"""The cards of the bundled models: their figures are those of the evaluations' files."""

import json
import re
import shlex
from pathlib import Path

import pytest
from commands import script

from ldm.cli import entry
from ldm.cli.arguments import parse
from ldm.cli.tables import COMMANDS
from ldm.errors import InputError
from ldm.evaluation import cards
from ldm.runs.costs import factor_of, power_of
from ldm.scenes.captions import caption
from ldm.scenes.detector import outline
from ldm.scenes.scene import Scene, Solid
from ldm.scenes.scores import evaluation_scenes

ROOT = Path(__file__).parents[2]
SECTIONS = [  # of the card of Stable Diffusion v1
    "## Model Details",
    "## Uses",
    "### Direct Use",
    "### Misuse, Malicious Use, and Out-of-Scope Use",
    "## Limitations and Bias",
    "### Limitations",
    "### Bias",
    "## Training",
    "### Training Data",
    "### Training Procedure",
    "## Evaluation Results",
    "## Environmental Impact",
    "## Citation",
]
CARDS = [path for path in cards.cards() if (path.parent / cards.EVALUATION).exists()]
LORAS = ROOT / "models/loras/README.md"


def test_every_bundled_model_has_a_card() -> None:
    models = {path.parent.name for path in (ROOT / "models").glob("scenes-*/*.safetensors")}
    assert models <= {path.parent.name for path in CARDS}
    for path in (ROOT / "models/loras").glob("*.safetensors"):
        assert path.name in LORAS.read_text()
    assert {"scenes-64", "scenes-64-v", "scenes-128", "scenes-128-inpainting", "scenes-128-canny"} <= models


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_a_card_is_what_its_files_say(path: Path) -> None:
    text = path.read_text()
    assert text == cards.filled(path), "python scripts/cards.py brings it up to date"
    assert re.findall("^##+ .+$", text, re.M) == SECTIONS
    assert text.count("<!-- generated: ") == text.count("<!-- end -->") >= 3
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (path.parent / target).exists(), target


def test_a_figure_that_is_not_finite(tmp_path: Path) -> None:
    """The median distance where most solids are not seen was infinite."""
    scores = {"PSNR": None, "better by": 1.5, "better than bicubic": 0.25}
    settings = {"seed": 42, "prompts": 3}
    found = [{"evaluation": "upscaling", "settings": settings, "scores": scores}]
    (tmp_path / cards.EVALUATION).write_text(json.dumps(found))
    assert "| PSNR | not finite |\n| better by | 1.50 dB |" in cards.evaluation(tmp_path)


@pytest.mark.parametrize("path", [*CARDS, LORAS], ids=lambda path: path.parent.name)
def test_the_commands_of_a_card_are_taken(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (line,) = re.findall("^python scripts/(.+)$", path.read_text(), re.M)
    program, *argv = shlex.split(line)
    parse(COMMANDS[program.removesuffix(".py")](), argv).request  # noqa: B018


def test_the_footprint_is_the_formula() -> None:
    folder = ROOT / "models/scenes-64"
    found = json.loads((folder / "training.json").read_text())
    kwh = [power_of(one["device"], one["cores"]) * one["minutes"] / 60 / 1000 for one in found["parts"]]
    grams = 1000 * sum(kwh) * factor_of(found["region"])
    (total,) = re.findall(r"\*\*all of it\*\*.*\*\*([\d.]+) g\*\*", (folder / "README.md").read_text())
    assert float(total) == pytest.approx(grams, rel=0.05)


def test_what_a_prompt_asks_for() -> None:
    scene = Scene(Solid("cube", "red", "small"), "below", Solid("cone", "blue"), "grey")
    assert cards.contents(scene) == {
        ("colour", "red"), ("colour", "blue"), ("shape", "cube"), ("shape", "cone"), ("size", "small"),
        ("relation", "on top of"), ("background", "grey"),
    }  # fmt: skip
    assert cards.contents(Scene(Solid("cube", "red"))) == {("colour", "red"), ("shape", "cube")}


def scores(**settings: object) -> dict:
    """What evaluate_scenes.py writes, of four prompts: the image of the second one is wrong."""
    asked = [scene for pairs in (False, True) for scene in evaluation_scenes(1, 2, pairs=pairs)]
    seen = [caption(outline(scene)) for scene in asked]
    seen[1] = None
    shares = {title: {"scale 2": dict.fromkeys(cards.SHARES, 0.5)} for title in ("one solid", "two solids")}
    settings = {"seed": 1, "prompts": 2, "sampler": "ddim", "ddim_steps": 3, "outdir": "/home", **settings}
    return {"settings": settings, "scores": shares, "seen": {"scale 2": seen}}


def test_scores_become_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "MODELS", tmp_path)
    folder = tmp_path / "scenes-64"
    folder.mkdir()
    cards.add("scenes-64", scores(), 2)
    (found,) = json.loads((folder / "evaluation.json").read_text())
    assert "outdir" not in found["settings"]
    asked = [scene for pairs in (False, True) for scene in evaluation_scenes(1, 2, pairs=pairs)]
    colour = asked[1].first.colour
    of = sum(("colour", colour) in cards.contents(scene) for scene in asked)
    assert found["by"]["colour"][colour] == [of - 1, of]
    card = folder / "README.md"
    blocks = "".join(f"<!-- generated: {name} -->\nold\n<!-- end -->\n" for name in cards.BLOCKS)
    card.write_text(f"by hand\n{blocks}")
    text = cards.filled(card)
    assert "old" not in text
    assert text.startswith(
        "by hand\n<!-- generated: evaluation -->\n2 held-out prompts of one solid and 2 of two"
    )
    assert "| scale 2 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 |" in text
    assert f"{colour} {of - 1}/{of}" in text
    assert "It is not known." in text
    cards.add("scenes-64", scores(), 2)  # the same one again
    cards.add("scenes-64", scores(sampler="euler"), 2)
    assert len(json.loads((folder / "evaluation.json").read_text())) == 2


def test_scores_of_siblings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "MODELS", tmp_path)
    folder = tmp_path / "scenes-x4"
    folder.mkdir()
    found = {"upscaling": {"PSNR": 38.061, "better than bicubic": 0.9875, "what was asked for": 1.0}}
    given = {"settings": {"prompts": 40, "seed": 42, "noise_level": 0}, "scores": found | {"depth": {}}}
    cards.add("scenes-x4", given)
    text = cards.evaluation(folder)
    assert "40 scenes of one solid, 40 of two, by ddim, schedule trailing, 1 step, noise level 0" in text
    assert "| PSNR | 38.06 dB |\n| better than bicubic | 98.8 % |" in text
    assert cards.biases(folder).startswith("It has not been measured")


@pytest.mark.parametrize("given", [{}, {"settings": {}}, {"settings": {}, "scores": {"depth": {}}}, [1]])
def test_scores_of_something_else(given: object) -> None:
    with pytest.raises(InputError, match="these are no scores of an evaluation of scenes-x4"):
        cards.add("scenes-x4", given)


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], *words: str) -> None:
    assert entry.run(script("cards").main, argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(cards, "MODELS", tmp_path)
    folder = tmp_path / "scenes-64"
    folder.mkdir()
    (tmp_path / "scores.json").write_text(json.dumps(scores()))
    card = folder / "README.md"
    card.write_text("<!-- generated: evaluation -->\n<!-- end -->\n")
    main = script("cards").main
    assert main(["--check"]) == 1
    assert card.read_text() == "<!-- generated: evaluation -->\n<!-- end -->\n"
    assert main(["--add", "scenes-64", str(tmp_path / "scores.json"), "--scale", "2"]) == 0
    assert "50.0" in card.read_text()
    assert main(["--check"]) == 0
    capsys.readouterr()
    refused(capsys, ["--add", "scenes-65", str(tmp_path / "scores.json")], "'scenes-65'", "scenes-64")
    refused(capsys, ["--add", "scenes-64", "absent.json"], "absent.json: there is no such file")
    (tmp_path / "torn.json").write_text("{")
    refused(capsys, ["--add", "scenes-64", str(tmp_path / "torn.json")], "torn.json cannot be read")
    card.write_text("<!-- generated: weather -->\n<!-- end -->\n")
    refused(capsys, [], "nothing 'weather' to generate; there are evaluation, biases, footprint, files")
