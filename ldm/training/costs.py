"""The energy and the CO2 of a training, in a file beside its checkpoints."""

import json
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from ldm.errors import InputError
from ldm.runs.costs import Meter, device_name, rounded
from ldm.training.config import TrainingConfig
from ldm.training.files import whole

FILE = "costs.json"


class TrainingCosts:
    """Keeps costs.json: what each session of a training took, from its start or resume on, and all of them.

    It is written with every checkpoint, so that a session that is killed has all but what it lost anyway.
    """

    def __init__(self, folder: Path, config: TrainingConfig, fabric: Fabric, first_step: int):
        self.path = folder / FILE
        self.meter = Meter(
            fabric.device,
            fabric.world_size,
            power=config.power,
            region=config.region,
            energy=config.energy,
            nodes=getattr(fabric.strategy, "num_nodes", 1),
        )
        self.earlier = sessions(self.path) if first_step else []
        self.facts = {
            "first_step": first_step,
            "device": device_name(fabric.device),
            "devices": fabric.world_size,
        }

    def save(self, step: int, last: bool = False) -> None:
        """Write what was spent until a step. With the last one the energy is measured, where it can be."""
        costs = self.meter.stop() if last else self.meter.costs()
        found = [*self.earlier, self.facts | {"last_step": step} | costs.record()]
        total = {name: rounded(sum(one[name] for one in found)) for name in ("hours", "kwh", "co2_kg")}
        with whole(self.path) as unfinished:
            unfinished.write_text(json.dumps({"sessions": found, "total": total}, indent=1) + "\n")


def sessions(path: Path) -> list[dict[str, Any]]:
    """The sessions in a costs.json; none where it is not there. InputError if it is damaged."""
    try:
        found = json.loads(path.read_text())["sessions"]
        for one in found:
            one["hours"] + one["kwh"] + one["co2_kg"]
        return found
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); move it away, and the costs begin anew") from error
