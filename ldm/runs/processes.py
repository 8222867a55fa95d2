"""The processes of a run: one, or several that Lightning Fabric starts or a launcher (torchrun, srun) did.

They share nothing but counters in rank 0's store, from which each takes the number of the next batch to make:
a slow device takes fewer. Nobody waits for anybody until the end, so a process that dies takes nothing along
but the batch in its hands.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ldm.errors import InputError
from ldm.log import notice

if TYPE_CHECKING:
    import subprocess

    import torch


class LeaderEnded(InputError):
    """The process with rank 0 is not there any more."""


T = TypeVar("T")
SILENCE = 600.0  # seconds without a step of anybody's, after which those that have not finished are given up
NO_MORE = 2**60  # added to the number of batches that were dealt


@dataclass(frozen=True)
class Place:
    """Which process of a run this one is."""

    rank: int = 0
    devices: int = 1  # processes on each machine
    nodes: int = 1  # machines
    started: bool = False  # by a launcher of the user's

    @property
    def size(self) -> int:
        return self.devices * self.nodes


ALONE = Place()


def find_place(devices: int | None, nodes: int | None) -> Place:
    """This process's place, by --devices, --num_nodes and what a launcher has set in the environment.

    InputError where the two contradict each other.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:  # torchrun
        local, size, rank = (int(env[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK"))
        place = Place(rank, local, size // local, started=True)
    elif int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # srun; sbatch alone starts one process
        machines = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", 1)))
        size, rank = int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_PROCID"])
        place = Place(rank, size // machines, machines, started=True)
    else:
        here, machines = devices or 1, nodes or 1
        rank = int(env.get("NODE_RANK", 0)) * here + int(env.get("LOCAL_RANK", 0))
        return Place(rank, here, machines) if here * machines > 1 else Place()
    for flag, given, there in (("devices", devices, place.devices), ("num_nodes", nodes, place.nodes)):
        if given not in (None, there):
            raise InputError(f"--{flag} {given}, but the launcher has started {there}; leave the flag out")
    return place


class Counters(dict):
    """Those of a process that is alone, with the one method of a TCPStore that is used."""

    def add(self, name: str, value: int) -> int:
        self[name] = self.get(name, 0) + value
        return self[name]


class Team:
    """All processes of a run, as one of them sees them."""

    def __init__(self, place: Place = ALONE):
        self.place = place
        self.leads = place.rank == 0
        self.device: torch.device | None = None  # of this process, if it is not alone
        self.processes: list[subprocess.Popen] = []  # that were started from here
        self.store: Any = Counters()

    def join(self, device_type: str) -> None:
        """Start the others, or meet those that a launcher started. InputError if that cannot be done."""
        if self.place.size == 1:
            return
        try:
            from lightning_fabric import Fabric
            from lightning_fabric.strategies import DDPStrategy
        except ImportError as error:
            raise InputError(
                f"--devices needs Lightning Fabric ({error}): pip install pytorch-lightning"
            ) from error
        import logging

        for name in ("lightning_fabric", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(minutes=10))
            fabric = Fabric(
                accelerator=device_type,
                strategy=strategy,
                devices=self.place.devices,
                num_nodes=self.place.nodes,
            )
            fabric.launch()
            self.device = fabric.device
            launcher = fabric.strategy.launcher
            self.processes = list(launcher.procs)
            launcher.procs.clear()  # Fabric would kill all with the first process that dies
            self._meet(fabric)
        except Exception as error:  # an environment that does not fit, a port, a peer that ended
            raise InputError(f"the {self.place.size} processes did not come together: {error}") from error

    def _meet(self, fabric: Any) -> None:
        from torch.distributed import TCPStore

        host = fabric.strategy.cluster_environment.main_address
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False) if self.leads else None
        port = fabric.broadcast(store and store.port)
        self.store = store or TCPStore(host, port, is_master=False, wait_for_workers=False)
        self._broadcast = fabric.broadcast

    def share(self, value: T | None) -> T:
        """Rank 0's value, for all of them. LeaderEnded if it has ended."""
        if self.place.size == 1:
            return value
        try:
            return self._broadcast(value)
        except RuntimeError as error:
            raise LeaderEnded("the process with rank 0 has ended") from error

    def deal(self, items: Sequence[T]) -> Iterator[T]:
        """What falls to this process, one item at a time: each item goes to one process."""
        while (i := self.count("dealt", 1) - 1) < len(items):
            yield items[i]

    def stop(self) -> None:
        """No more items for anybody."""
        self.count("dealt", NO_MORE)

    def count(self, name: str, value: int) -> int:
        """Add to a counter of all; returns what it is now, a lot where rank 0 has ended: no work is left."""
        try:
            return self.store.add(name, value)
        except RuntimeError:
            if self.leads:
                raise
            return NO_MORE

    def finish(self, tick: Callable[[], None]) -> int:
        """Rank 0 waits for the others, with ticks, and tells how many of them were lost."""
        if not self.leads:
            self.count("finished", 1)
            return 0
        others, progress, since = self.place.size - 1, -1, time.monotonic()
        while (finished := self.count("finished", 0)) < others:
            ended = [process.poll() is not None for process in self.processes]
            if self.place.nodes == 1 and ended and all(ended):
                finished = self.count("finished", 0)
                break
            if (now := self.count("steps", 0)) != progress:
                progress, since = now, time.monotonic()
            elif time.monotonic() - since > SILENCE:
                break
            tick()
            time.sleep(0.05)
        if lost := others - finished:
            notice(f"{lost} of {self.place.size} processes ended before they were done")
        return lost
