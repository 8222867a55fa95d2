"""The `training:` section: the values that it accepts, and the error for every other one."""

import math
from pathlib import Path
from typing import Any

import pytest
from tiny_training import TRAINING

from ldm.errors import InputError
from ldm.training.config import TrainingConfig, training_config
from ldm.weights.loading import read_section

CONFIGS = Path(__file__).parents[2] / "configs/scenes"


def test_values_and_defaults() -> None:
    config = training_config(
        TRAINING | {"drill": ["left"], "drill_timesteps": [200, 950], "learning_rate": 1}
    )
    assert config == TrainingConfig(
        **TRAINING | {"learning_rate": 1}, drill=("left",), drill_timesteps=(200, 950)
    )
    assert (config.seed, config.ema_decay, config.init) == (0, 0.999, None)


def test_a_drill_has_words_or_timesteps_of_its_own() -> None:
    assert not training_config(TRAINING).drills
    assert training_config(TRAINING | {"drill": ["left"]}).drills
    assert training_config(TRAINING | {"drill_timesteps": [200, 1000]}).drills


@pytest.mark.parametrize(
    "names",
    [
        ["autoencoder.yaml"],
        ["scenes-64.yaml"],
        ["scenes-64.yaml", "drill.yaml"],
        ["scenes-64-v.yaml"],
        ["scenes-64-inpainting.yaml", "inpainting-drill.yaml"],
        ["depth-estimator.yaml"],
        ["scenes-64-depth.yaml", "depth-drill.yaml"],
        ["autoencoder-x4.yaml", "decoder-x4.yaml"],
        ["scenes-x4.yaml", "x4-drill.yaml"],
    ],
    ids="-".join,
)
def test_the_sections_of_this_repository(names: list[str]) -> None:
    values: dict[str, Any] = {}
    for name in names:
        values |= read_section(CONFIGS / name, "training")
    training_config(values)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("steps", "abc", "a whole number of at least 1"),
        ("steps", 1.5, "a whole number of at least 1"),
        ("steps", None, "a whole number of at least 1"),
        ("steps", True, "a whole number of at least 1"),
        ("batch_size", 0, "a whole number of at least 1"),
        ("images", [3], "a whole number of at least 1"),
        ("image_size", 4, "a whole number of at least 8"),
        ("learning_rate", -1e-3, "a number of at least 0"),
        ("learning_rate", math.nan, "a number of at least 0"),
        ("learning_rate", math.inf, "a number of at least 0"),
        ("prompt_dropout", 1.5, "a number from 0 to 1"),
        ("warmup", -1, "a whole number of at least 0"),
        ("seed", -1, "a whole number from 0 to 4294967295"),
        ("drill", "left", "a list of words"),
        ("drill", ["left", ""], "a list of words"),
        ("drill_timesteps", [5], "two whole numbers [low, high] with 0 <= low < high"),
        ("drill_timesteps", [500, 400], "two whole numbers [low, high] with 0 <= low < high"),
        ("drill_timesteps", [0.5, 400], "two whole numbers [low, high] with 0 <= low < high"),
        ("init", 5, "the path of a file"),
        ("first_stage", "", "the path of a file"),
        ("text_encoder", True, "the path of a file"),
        ("depth_model", "", "the path of a file"),
        ("soften", 1.5, "a number from 0 to 1"),
        ("crop", -8, "a whole number of at least 0"),
        ("latent_noise", -0.1, "a number of at least 0"),
        ("linear_start", 1, "true or false"),
        ("decoder_only", "yes", "true or false"),
    ],
)
def test_wrong_values_are_named(name: str, value: Any, wanted: str) -> None:
    """Such values were errors of whatever code met them first, or trained on in silence (a negative rate)."""
    with pytest.raises(InputError) as error:
        training_config(TRAINING | {name: value})
    assert str(error.value) == f"training: {name} must be {wanted}, not {value!r}"


def test_missing_and_unknown_keys_are_named() -> None:
    with pytest.raises(InputError, match=r"the training: section lacks batch_size, image_size"):
        training_config({"steps": 1, "learning_rate": 1, "images": 1})
    with pytest.raises(InputError, match=r"no parameter 'learning_rat'; did you mean 'learning_rate'\?"):
        training_config(TRAINING | {"learning_rat": 1})
