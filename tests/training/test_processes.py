"""The processes that train together."""

import logging
import os
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

from ldm.training.config import TrainingConfig
from ldm.training.processes import Autocast, end_processes, led, start_processes


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


class Connected:
    """One of two processes, as a thread; `log` has what all of them did in turn."""

    world_size = 2

    def __init__(self, rank: int, log: list[str]):
        self.global_rank, self.is_global_zero, self.log = rank, rank == 0, log

    def broadcast(self, value: bool) -> bool:
        self.log.append(f"{self.global_rank} in a collective")
        return value


def test_others_enter_no_collective_before_the_leader_has_done_its_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They waited in one, whose limit of 12 hours was also that for noticing a process that was killed."""
    asked, log = threading.Event(), []

    class Watched(torch.distributed.HashStore):
        def check(self, keys: list[str]) -> bool:
            asked.set()
            return super().check(keys)

    store = Watched()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)

    def follow() -> None:
        for _ in range(2):
            with led(Connected(1, log)):
                pass

    other = threading.Thread(target=follow, daemon=True)
    other.start()
    assert asked.wait(60)  # it asks for the leader, and goes no further
    for turn in ("first", "second"):
        with led(Connected(0, log)):
            log.append(f"the {turn} work")
    other.join()
    assert log.index("1 in a collective") > log.index("the first work")
    assert len(log) - log[::-1].index("1 in a collective") - 1 > log.index("the second work")
    assert log.count("0 in a collective") == log.count("1 in a collective") == 2


def test_where_the_leader_fails_the_others_end_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    store, log = torch.distributed.HashStore(), []
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    with pytest.raises(OSError, match="no room"), led(Connected(0, log)):
        raise OSError("no room")
    monkeypatch.setattr(Connected, "broadcast", lambda self, value: False)  # what the leader has sent
    with pytest.raises(SystemExit), led(Connected(1, log)):
        pass


def test_the_connection_of_several_processes_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that had finished was now and then aborted by a thread of the connection at its end."""
    ended = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append(True))
    end_processes(SimpleNamespace(world_size=1))  # the group is somebody else's
    assert not ended
    end_processes(SimpleNamespace(world_size=2))
    assert ended


def test_a_batch_is_not_rounded() -> None:
    """With several processes its images and latents were, to 16 bits; with one they were not."""
    batch = {"mean": torch.rand(2, 4, 8, 8), "row": torch.arange(2)}
    kept = Autocast("bf16-mixed", "cpu").convert_input(((batch,), {}))[0][0]
    assert kept["mean"].dtype == torch.float32
    assert torch.equal(kept["mean"], batch["mean"])
