"""The processes that train together."""

import logging
import os
import warnings
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from ldm.training.config import TrainingConfig
from ldm.training.processes import end_processes, start_processes, strategy_of


def test_lightning_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """It wrote that it uses automatic mixed precision before the line of an error."""
    import pytorch_lightning  # noqa: F401  (whose logger its messages go to from then on)

    names = ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.rank_zero")
    for name in ("pytorch_lightning", "lightning_fabric"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.INFO)
        logging.getLogger(name)._cache.clear()
    start_processes(TrainingConfig(steps=1, batch_size=2, learning_rate=1e-3, precision="bf16"))
    assert not any(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in names)


def test_a_machine_with_srun_is_not_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is such a command, as on the node one logs in to, Lightning said that it was not used."""
    monkeypatch.setattr("shutil.which", lambda name, **_: f"/usr/bin/{name}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start_processes(TrainingConfig(steps=1, batch_size=2, learning_rate=1e-3))


def test_mixed_precision_keeps_no_casts() -> None:
    """Autocast kept a copy in 16 bits of every weight until the loss was there: 1.7 GB for v1's UNet."""
    fabric = start_processes(TrainingConfig(steps=1, batch_size=2, learning_rate=1e-3, precision="bf16"))
    with fabric.autocast():
        assert torch.is_autocast_enabled(fabric.device.type)
        assert torch.get_autocast_dtype(fabric.device.type) == torch.bfloat16
        assert not torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_others_wait_as_long_as_the_first_one_needs(name: str) -> None:
    """A thousand class images took one GPU longer than torch lets the others wait for it."""
    assert strategy_of(name)._timeout >= timedelta(hours=2)


def test_the_connection_of_several_processes_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that had finished was now and then aborted by a thread of the connection at its end."""
    ended = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append(True))
    end_processes(SimpleNamespace(world_size=1))  # the group is somebody else's
    assert not ended
    end_processes(SimpleNamespace(world_size=2))
    assert ended
