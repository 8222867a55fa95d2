from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import script
from PIL import Image

from ldm.cli import entry
from ldm.errors import InputError
from ldm.pipeline import Pipeline, RuntimeOptions
from ldm.scenes.detector import Detector, load_detector, outline
from ldm.scenes.places import background_of
from ldm.scenes.renderer import render
from ldm.scenes.scene import BACKGROUNDS, Scene, Solid, Stripes
from ldm.scenes.subject import (
    SUBJECT,
    alone_scenes,
    cylinder_seen,
    new_scenes,
    other_scenes,
    rest_seen,
    stripes_seen,
    subject_caption,
    subject_scenes,
)
from ldm.weights.loading import choose_model, find


@pytest.fixture(scope="module")
def detector() -> Detector:
    return load_detector(find("models/scenes-64/detector.safetensors"))


def rendered(scenes: list[Scene], **looks: object) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [render(replace(scene, first=replace(scene.first, **looks)), rng) for scene in scenes]


def test_stripes_change_the_solids_pixels_alone() -> None:
    plain, striped = (
        render(Scene(Solid("cylinder", "red", stripes=each), background="grey"), np.random.default_rng(4))
        for each in (None, Stripes("white", 3))
    )
    changed = (plain != striped).any(axis=2)
    y = np.flatnonzero(changed.any(axis=1))
    assert 4 < len(y) < 20  # the middle one of three bands
    assert (striped[changed].min(axis=1) > 60).mean() > 0.7  # but for soft edges
    assert (plain[changed][:, 1] < 80).mean() > 0.7


def test_two_bands_have_the_stripes_colour_on_top() -> None:
    (image,) = rendered([Scene(SUBJECT, background="navy")])
    yellow = (image[..., 0] > 150) & (image[..., 1] > 120) & (image[..., 2] < 90)
    green = (image[..., 1] > 80) & (image[..., 0] < 80) & (image[..., 2] < 80)
    assert yellow.sum() > 30
    assert np.argwhere(yellow)[:, 0].max() <= np.argwhere(green)[:, 0].min() + 6


@pytest.mark.parametrize("scenes", [subject_scenes(20), new_scenes(24, 0)], ids=["alone", "new"])
def test_true_renders_with_and_without_the_pattern_are_told_apart(scenes: list[Scene]) -> None:
    def share(**looks: object) -> float:
        return np.mean([stripes_seen(*pair) for pair in zip(rendered(scenes, **looks), scenes, strict=True)])

    assert share() >= 0.95
    assert share(stripes=None) <= 0.05
    assert share(stripes=None, colour="yellow") <= 0.05
    assert share(colour="yellow", stripes=Stripes("green")) <= 0.05  # upside down


def test_the_rest_is_read_by_the_detector(detector: Detector) -> None:
    scenes = new_scenes(18, 1)
    images = rendered(scenes)
    assert np.mean(rest_seen(detector, images, scenes)) >= 0.9
    others = [replace(scene, second=Solid("pyramid", "yellow")) for scene in scenes]
    assert np.mean(rest_seen(detector, images, others)) <= 0.1
    assert np.mean(rest_seen(detector, images, [Scene(scene.first) for scene in scenes])) <= 0.1


def test_the_cylinder_is_told_from_two_on_top_of_each_other() -> None:
    scenes = alone_scenes(20, tuple(BACKGROUNDS))
    images = rendered(scenes)
    assert all(cylinder_seen(*pair) for pair in zip(images, scenes, strict=True))
    assert [background_of(image) for image in images] == [scene.background for scene in scenes]
    stack = Scene(Solid("cylinder", "yellow"), "on top of", Solid("cylinder", "green"))
    stacks = rendered([replace(stack, background=scene.background) for scene in scenes])
    assert np.mean([stripes_seen(*pair) for pair in zip(stacks, scenes, strict=True)]) >= 0.9
    assert not any(cylinder_seen(*pair) for pair in zip(stacks, scenes, strict=True))
    for looks in ({"stripes": None}, {"colour": "yellow", "stripes": Stripes("green")}):
        wrong = rendered(scenes, **looks)
        assert not any(cylinder_seen(*pair) for pair in zip(wrong, scenes, strict=True))


def test_captions_name_the_word_in_place_of_the_colours() -> None:
    scene = Scene(SUBJECT, "on top of", Solid("cube", "red"), "beige")
    assert subject_caption(scene) == "a zqx pyramid on top of a red cube on a beige background"


def test_scenes_to_measure_on_are_new() -> None:
    learned = {subject_caption(scene) for scene in subject_scenes(20)}
    assert learned.isdisjoint(map(subject_caption, new_scenes(64, 0)))
    assert new_scenes(64, 0) == new_scenes(64, 0) != new_scenes(64, 1)
    others = other_scenes(64, 0)
    assert {scene.first.shape for scene in others} == {"pyramid"}
    assert not {scene.first.colour for scene in others} & {"green", "yellow"}
    assert [scene.second is None for scene in others] == [True, False] * 32


def test_pyramids_of_other_colours_are_read_by_the_detector(detector: Detector) -> None:
    scenes = other_scenes(20, 1)
    seen = detector.read(rendered(scenes))
    assert np.mean([outline(a) == b for a, b in zip(scenes, seen, strict=True)]) >= 0.9


def test_the_command_measures_and_says_how_sure_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundled model paints other pyramids and has never seen the subject."""
    argv = ["--measure", str(tmp_path / "grid.png"), "--images", "4"]
    assert entry.run(script("subject").main, argv) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "two colours: 0% (0% to 49%) of 4"
    assert [line.partition(":")[0] for line in out[1:]] == ["the rest", "both", "others of the class"]
    assert Image.open(tmp_path / "grid.png").height > 64
    assert entry.run(script("subject").main, [*argv, "--alone"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [f"{which}: 0% (0% to 66%) of 2" for which in ("unseen backgrounds", "learned ones")]


def test_too_few_images_for_two_kinds_of_backgrounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a ZeroDivisionError, after the image was sampled."""
    argv = ["--measure", str(tmp_path / "grid.png"), "--alone", "--images", "1"]
    assert entry.run(script("subject").main, argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--images 1: --alone takes 2 at least" in line


@pytest.mark.parametrize("alone", [False, True])
def test_an_image_that_is_not_a_number_is_named_and_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: tuple[Path, Path],
    alone: bool,
) -> None:
    """It ended the command with a TypeError after all images were sampled."""
    load = Pipeline.load

    def broken(*_: object, **choices: object) -> Pipeline:
        pipeline = load(str(model[1]), str(model[0]), RuntimeOptions(device="cpu", eager=True), **choices)
        pipeline.model.model.diffusion_model.out[-1].bias.fill_(torch.nan)
        return pipeline

    monkeypatch.setattr(Pipeline, "load", broken)
    argv = ["--measure", str(tmp_path / "grid.png"), "--images", "2", *(["--alone"] if alone else [])]
    assert entry.run(script("subject").main, argv) == 1
    out, err = capsys.readouterr()
    assert all(": 0% (0% to " in line for line in out.splitlines())
    count = 2 if alone else 4
    assert f"{count} of {count} images came out as NaN, and count as wrong: 'a zqx " in err.splitlines()[-1]
    assert (tmp_path / "grid.png").exists()


def test_a_checkpoint_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Any --ckpt was built by the config of scenes-64, a v-model and one of 128x128 pixels, too."""
    asked: list[tuple] = []

    def load(ckpt: str, config: str | None, *_: object, **choices: object) -> Pipeline:
        asked.append((ckpt, choose_model(config, ckpt, None).config.name))
        raise InputError("enough")

    monkeypatch.setattr(Pipeline, "load", load)
    measure = ["--measure", str(tmp_path / "grid.png")]
    for name in ("scenes-64", "scenes-64-v", "scenes-128"):
        ckpt = str(find(f"models/{name}/model.safetensors"))
        assert entry.run(script("subject").main, [*measure, "--ckpt", ckpt]) == 2
        assert asked[-1] == (ckpt, f"{name}.yaml")
    assert entry.run(script("subject").main, measure) == 2
    assert asked[-1] == (str(find("models/scenes-64/model.safetensors")), "scenes-64.yaml")


def test_the_command_writes_the_same_images_each_time(tmp_path: Path) -> None:
    main = script("subject").main
    assert entry.run(main, ["--outdir", str(tmp_path / "a")]) == 0
    assert entry.run(main, ["--outdir", str(tmp_path / "b"), "--captions"]) == 0
    assert entry.run(main, []) == 2
    images = sorted((tmp_path / "a").iterdir())
    assert [path.name for path in images] == [f"{k:02}.png" for k in range(10)]
    for path in images:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert Image.open(path).size == (64, 64)
    assert (tmp_path / "b" / "00.txt").read_text() == "a zqx pyramid on a grey background\n"
    assert entry.run(main, ["--outdir", str(tmp_path / "c"), "--captions", "--alone"]) == 0
    alone = {path.read_text() for path in (tmp_path / "c").glob("*.txt")}
    assert alone == {f"a zqx cylinder on a {name} background\n" for name in ("grey", "black", "beige")}
