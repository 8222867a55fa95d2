"""The `training:` section: the values that it accepts, and the error for every other one."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_training import TRAINING

from ldm.errors import InputError
from ldm.training.config import TrainingConfig, table, training_config

DOCS = Path(__file__).parents[2] / "docs/training.md"


def test_values_and_defaults() -> None:
    config = training_config(
        TRAINING | {"drill": ["left"], "drill_timesteps": [200, 950], "learning_rate": 1}
    )
    assert config.drill == ("left",)
    assert config.drill_timesteps == (200, 950)
    assert isinstance(config.drill_timesteps[0], int)
    assert isinstance(config.learning_rate, float)
    assert (config.seed, config.ema_decay, config.init, config.betas) == (0, 0.999, None, (0.9, 0.99))


def test_a_drill_has_words_or_timesteps_of_its_own() -> None:
    assert not training_config(TRAINING).drills
    assert training_config(TRAINING | {"drill": ["left"]}).drilled == 3
    assert training_config(TRAINING | {"drill_timesteps": [200, 1000], "drill_share": 0.5}).drilled == 2


@pytest.mark.parametrize(
    ("changes", "devices", "nodes", "passes"),
    [
        ({}, 1, 1, 1),
        ({}, 2, 2, 1),
        ({"device_batch": 1}, 1, 1, 4),
        ({"device_batch": 1}, 2, 1, 2),
        ({"batch_size": 2048, "device_batch": 4}, 8, 32, 2),
    ],
)
def test_a_batch_is_devices_nodes_and_accumulation(
    changes: dict, devices: int, nodes: int, passes: int
) -> None:
    assert training_config(TRAINING | changes).accumulation(devices, nodes) == passes


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"devices": 3}, "batch_size 4 is no multiple of 3 = device_batch 1 x devices 3 x nodes 1"),
        ({"device_batch": 8}, "batch_size 4 is no multiple of 8 = device_batch 8 x devices 1 x nodes 1"),
        (
            {"device_batch": 1, "devices": 2, "nodes": 3},
            "multiple of 6 = device_batch 1 x devices 2 x nodes 3",
        ),
    ],
)
def test_a_batch_that_does_not_divide(changes: dict, why: str) -> None:
    with pytest.raises(InputError) as error:
        training_config(TRAINING | changes)
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("steps", 0, "steps: 0 is not a whole number in range: at least 1"),
        ("steps", 2.5, "steps: 2.5 is not a whole number"),
        ("steps", True, "steps: True is not a value for it"),
        ("learning_rate", -1e-4, "learning_rate: -0.0001 is not a number in range: 0 … 10"),
        ("learning_rate", math.nan, "learning_rate: nan is not a number"),
        ("ema_decay", 1.5, "ema_decay: 1.5 is not a number in range: 0 … 1"),
        ("betas", [0.9], "betas: [0.9] are not two numbers"),
        ("betas", [0.9, 1.0], "betas: 1.0 is not a number in range: 0 … 0.999999"),
        ("compile", "yes", "compile: 'yes' is not true or false"),
        ("strategy", "dp", "strategy: invalid choice: 'dp' (choose from ddp, fsdp)"),
        ("schedule", "linear", "schedule: invalid choice: 'linear' (choose from cosine, constant)"),
        ("logs", ["wandb"], "logs: invalid choice: 'wandb' (choose from csv, tensorboard, plot)"),
        ("drill", ["left", " "], "drill: ['left', ' '] has an empty word"),
        ("drill", [3], "drill: (3,) is no list of texts"),
        ("drill_timesteps", [500, 200], "drill_timesteps: [500, 200] is empty"),
        ("drill_timesteps", [0, 10, 20], "drill_timesteps: [0.0, 10.0, 20.0] are not two numbers"),
        ("validation_timesteps", [1.5], "validation_timesteps: [1.5] are not whole numbers"),
        ("validation_timesteps", [], "validation_timesteps: [] has no timestep"),
        ("init", "", "init: '' is no path"),
        ("init", 3, "init: 3 is no text"),
    ],
)
def test_values_that_do_not_fit(name: str, value: Any, why: str) -> None:
    with pytest.raises(InputError) as error:
        training_config(TRAINING | {name: value})
    assert str(error.value).startswith("training: ")
    assert why in str(error.value)


def test_unknown_and_missing_keys() -> None:
    with pytest.raises(InputError, match="no parameter 'warmpu'; did you mean 'warmup'"):
        training_config(TRAINING | {"warmpu": 3})
    with pytest.raises(InputError, match="the training: section lacks steps, learning_rate"):
        training_config({"batch_size": 4})


def test_the_table_of_keys_is_the_codes() -> None:
    lines = list(table(TrainingConfig))
    assert "\n".join(lines) in DOCS.read_text(), "\n".join(lines)


def test_a_drill_of_no_example() -> None:
    """A share of 0.2 of two examples was rounded to none, and the drill did nothing."""
    drill = {"batch_size": 2, "drill": ["left"], "drill_share": 0.2}
    with pytest.raises(InputError, match=r"drill_share: 0\.2 of a batch of 2 is less than half an example"):
        training_config(TRAINING | drill)
    assert training_config(TRAINING | drill | {"drill_share": 0.0}).drilled == 0
    assert training_config(TRAINING | drill | {"drill_share": 0.5}).drilled == 1


def test_the_default_of_the_precision_depends_on_the_device() -> None:
    """It was bf16 everywhere, in which a CPU without instructions for it is slow."""
    plain = training_config({"steps": 1, "batch_size": 2, "learning_rate": 1e-3})
    assert [plain.precision_on(device) for device in ("cuda", "cpu")] == ["bf16", "full"]
    given = dataclasses.replace(plain, precision="fp16")
    assert [given.precision_on(device) for device in ("cuda", "cpu")] == ["fp16", "fp16"]
