"""costs.json of a training: its sessions, and all of them together."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric
from tiny_training import FIRST_STAGE, run_train, write_yaml

from ldm.errors import InputError
from ldm.training.config import TrainingConfig
from ldm.training.costs import FILE, TrainingCosts, sessions


def config(**values: object) -> TrainingConfig:
    return TrainingConfig(
        **{"steps": 1, "batch_size": 1, "learning_rate": 1e-3, "energy": "estimated", **values}
    )


def test_sessions_add_up(tmp_path: Path) -> None:
    """A session has what it spent until its last checkpoint; a training that begins anew has none before."""
    fabric = Fabric(accelerator="cpu", devices=1)
    first = TrainingCosts(tmp_path, config(power=100, region="0.5"), fabric, 0)
    first.meter._start -= 3600
    first.save(10)
    second = TrainingCosts(tmp_path, config(power=100, region="0.5"), fabric, 10)
    second.meter._start -= 1800
    second.save(15)
    second.save(20, last=True)
    found = json.loads((tmp_path / FILE).read_text())
    assert [(one["first_step"], one["last_step"]) for one in found["sessions"]] == [(0, 10), (10, 20)]
    assert found["total"]["hours"] == pytest.approx(1.5, abs=0.01)
    assert found["total"]["kwh"] == pytest.approx(0.15, abs=0.001)
    assert found["total"]["co2_kg"] == pytest.approx(0.075, abs=0.001)
    assert found["sessions"][0]["devices"] == 1
    TrainingCosts(tmp_path, config(), fabric, 0).save(1)
    assert len(sessions(tmp_path / FILE)) == 1


def test_machines_that_a_launcher_started(tmp_path: Path) -> None:
    """They counted as one, whose energy was taken for that of all."""
    strategy = SimpleNamespace(num_nodes=2)
    fabric = SimpleNamespace(device=torch.device("cpu"), world_size=4, strategy=strategy)
    with pytest.raises(InputError, match="energy"):
        TrainingCosts(tmp_path, config(energy="measured"), fabric, 0)


@pytest.mark.parametrize("text", ["", "[]", '{"sessions": [{"hours": 1}]}', '{"sessions": [1]}'])
def test_a_damaged_file(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(InputError, match=r"costs\.json is damaged"):
        sessions(tmp_path / FILE)


@pytest.mark.parametrize(
    ("value", "words"),
    [({"power": 0}, "power"), ({"region": "moon"}, "'moon' is not known"), ({"energy": "guessed"}, "energy")],
)
def test_bad_settings(value: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        config(**value)


def test_a_training_leaves_its_costs(tmp_path: Path) -> None:
    """And goes on with them when it is taken up."""
    argv = write_yaml(tmp_path / "first.yaml", FIRST_STAGE, power=50.0, region="us-east")
    assert run_train(*argv, "--stop_at", "2") == 0
    assert run_train(*argv) == 0
    found = json.loads((tmp_path / "first" / FILE).read_text())
    assert [(one["first_step"], one["last_step"]) for one in found["sessions"]] == [(0, 2), (2, 6)]
    assert {one["watts"] for one in found["sessions"]} == {50.0} or torch.cuda.is_available()
    assert {one["kg_co2_per_kwh"] for one in found["sessions"]} == {0.3678}
    assert found["total"]["kwh"] == pytest.approx(sum(one["kwh"] for one in found["sessions"]), rel=1e-3)
