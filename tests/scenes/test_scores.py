"""What counts as right in an image, and the scenes, grids and tables of an evaluation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.images.pixels import to_float, to_uint8
from ldm.models.autoencoder import AutoencoderKL
from ldm.pipeline import Pipeline, RuntimeOptions
from ldm.scenes.scene import Scene, Solid, held_out, held_out_scenes
from ldm.scenes.scores import (
    HELD_OUT,
    RIGHT,
    WRONG,
    check,
    evaluation_scenes,
    markdown_table,
    marked_grid,
    round_trip,
    score,
)

RED_CUBE, BLUE_CONE = Solid("cube", "red"), Solid("cone", "blue")
PAIR = Scene(RED_CUBE, "left of", BLUE_CONE)


@pytest.mark.parametrize(
    ("seen", "right"),
    [
        (PAIR, "all relation solids shapes colours"),
        (PAIR.mirrored(), "all relation solids shapes colours"),
        (
            Scene(Solid("cube", "red", "small"), "left of", BLUE_CONE, "pink"),
            "all relation solids shapes colours",
        ),
        (Scene(BLUE_CONE, "left of", RED_CUBE), "relation solids shapes colours"),
        (Scene(RED_CUBE, "in front of", BLUE_CONE), "solids shapes colours"),
        (Scene(Solid("cube", "blue"), "left of", Solid("cone", "red")), "relation shapes colours"),
        (Scene(Solid("torus", "red"), "left of", BLUE_CONE), "relation colours"),
        (Scene(Solid("cube", "white"), "left of", BLUE_CONE), "relation shapes"),
        (Scene(RED_CUBE), ""),
        (None, ""),
    ],
)
def test_what_is_right_about_a_pair(seen, right):
    assert [name for name, passed in check(PAIR, seen).items() if passed] == right.split()


def test_what_is_right_about_a_single():
    asked = Scene(Solid("cube", "red", "large"), background="grey")
    assert all(check(asked, Scene(RED_CUBE)).values())
    assert not any(check(asked, PAIR).values())
    assert score([asked, asked], [Scene(RED_CUBE), Scene(BLUE_CONE)]) == {
        "all": 0.5,
        "relation": 1.0,
        "solids": 0.5,
        "shapes": 0.5,
        "colours": 0.5,
    }


@pytest.mark.parametrize("pairs", [False, True])
def test_the_scenes_are_held_out_and_return_only_when_all_were_there(pairs):
    with pytest.raises(ValueError, match=f"only {HELD_OUT[pairs]} combinations"):
        held_out_scenes(np.random.default_rng(0), HELD_OUT[pairs] + 1, pairs)
    scenes = evaluation_scenes(0, HELD_OUT[pairs] + 20, pairs)
    assert all(held_out(scene) and bool(scene.second) == pairs for scene in scenes)
    first = {scene.canonical() for scene in scenes[: HELD_OUT[pairs]]}
    assert len(first) == HELD_OUT[pairs]
    assert len({scene.canonical() for scene in scenes[HELD_OUT[pairs] :]}) == 20
    assert evaluation_scenes(0, len(scenes), pairs) == scenes


def images(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 16, 24, 3), np.uint8))


def test_the_round_trip_is_that_of_the_first_stage(model: tuple[Path, Path]) -> None:
    pipeline = Pipeline.load(str(model[1]), str(model[0]), RuntimeOptions(device="cpu", eager=True))
    stage = pipeline.model.first_stage_model
    with torch.no_grad():
        wanted = to_uint8(stage.decode(stage.encode(to_float(images(5))).mode())).astype(int)
    found = np.stack(round_trip(pipeline, images(5), batch_size=2)).astype(int)
    assert np.abs(found - wanted).max() <= 1


def test_the_round_trip_falls_back_to_float32(
    model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went past the pipeline's first stage: an encoder that overflows in 16 bits made NaN into colours."""
    plain = AutoencoderKL.encode

    def encode(self, x, *args):
        return plain(self, x if x.dtype == torch.float32 else x * torch.nan, *args)

    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    options = RuntimeOptions(device="cpu", eager=True, precision="bf16")
    pipeline = Pipeline.load(str(model[1]), str(model[0]), options)
    found = round_trip(pipeline, images(2))
    assert pipeline.first_stage.in_float32
    assert all(image.std() > 0 for image in found)


def test_frames_of_the_grid():
    image = np.full((6, 8, 3), 100, np.uint8)
    grid = marked_grid([image, image], [True, False], columns=2)
    assert grid.shape == (2 + 10 + 2, 2 + 12 + 2 + 12 + 2, 3)
    assert tuple(grid[2, 2]) == RIGHT
    assert tuple(grid[2, 16]) == WRONG
    assert (grid[4:10, 4:12] == 100).all()


def test_table():
    table = markdown_table(
        "pairs", {"scale 1": {"all": 0.5, "shapes": 1.0}, "scale 2": {"all": 0, "shapes": 0.125}}
    )
    assert table.splitlines() == [
        "| pairs | all | shapes |",
        "|---|---:|---:|",
        "| scale 1 | 50.0 | 100.0 |",
        "| scale 2 | 0.0 | 12.5 |",
    ]
