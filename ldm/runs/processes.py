"""The processes of a run: one, or several that Lightning Fabric starts or a launcher (torchrun, srun) did.

They share nothing but a key-value store at the launcher's address and port. It holds rank 0's job and a few
counters, from which each process takes the number of the next batch to make: a slow device takes fewer.
Nobody waits for anybody until the end, so a process that dies takes nothing along but its current batch.
The one store answers all processes, some 50,000 questions a second. So a batch costs one, and what only says
how far the run is, such as the count of steps, is sent now and then.
"""

from __future__ import annotations

import atexit
import logging
import os
import pickle
import threading
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
    """The process with rank 0 has ended."""


T = TypeVar("T")
MEETING = 600.0  # seconds within which all processes have to come together
SILENCE = 600.0  # seconds without a step of any process, after which unfinished ones count as lost
SIGN_INTERVAL = 5.0  # seconds between two signs of life of a process
NO_SIGN = 60.0  # seconds without one, after which rank 0 counts as ended, or all the others do
LOOKS = 60  # looks for such a sign within that time
TALLY = 0.5  # seconds between two messages about how far a process is
POLLS = 5000.0  # questions a second that all processes together ask while they wait
PART = 4 * 2**20  # bytes of a value in the store, which refuses more than 8 MiB
TAKING = 30.0  # seconds that rank 0 gives the others to take a shared value
OTHERS_SIGNS = "others' signs of life"  # the counter that all but rank 0 share
NO_MORE = 2**40  # added to the number of batches that were dealt


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
    if in_torchrun():
        local, size, rank = (int(env[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK"))
        place = Place(rank, local, size // local, started=True)
    elif in_srun():
        machines = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", 1)))
        size, rank = int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_PROCID"])
        place = Place(rank, size // machines, machines, started=True)
    else:
        here, machines = devices or 1, nodes or 1
        rank = int(env.get("NODE_RANK", 0)) * here + int(env.get("LOCAL_RANK", 0))
        return Place(rank, here, machines) if here * machines > 1 else Place()
    if place.size != size:
        raise InputError(
            f"{size} processes on {place.nodes} machines: each has to have as many as the others"
        )
    for flag, given, there in (("devices", devices, place.devices), ("num_nodes", nodes, place.nodes)):
        if given not in (None, there):
            raise InputError(f"--{flag} {given}, but the launcher has started {there}; leave the flag out")
    return place


def in_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def in_srun() -> bool:
    """Whether this is one of several tasks of a step; sbatch alone, or one task, starts one process."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def is_follower() -> bool:
    """Whether the environment alone says that this process has not rank 0.

    Rank 0 finds the same mistakes in the arguments, so that a follower need not report them.
    """
    env = os.environ
    if in_torchrun():
        ranks = [env["RANK"]]
    elif in_srun():
        ranks = [env["SLURM_PROCID"]]
    elif int(env.get("WORLD_SIZE", 1)) > 1:  # Fabric sets it for its children
        ranks = [env.get("NODE_RANK", 0), env.get("LOCAL_RANK", 0)]
    else:
        return False
    return any(int(rank) > 0 for rank in ranks)


class Counters(dict):
    """The store of a process that is alone, with the one method of a TCPStore that it uses."""

    def add(self, name: str, value: int) -> int:
        self[name] = self.get(name, 0) + value
        return self[name]


@dataclass
class Tally:
    """A counter of the store as it was when last heard of, and what this process has not yet sent to it."""

    known: int = 0
    pending: int = 0
    sent: float = float("-inf")  # when, by the monotonic clock


class Team:
    """All processes of a run, as one of them sees them."""

    def __init__(self, place: Place = ALONE):
        self.place = place
        self.leads = place.rank == 0
        self.device: torch.device | None = None  # of this process, if it is not alone
        self.processes: list[subprocess.Popen] = []  # that were started from here
        self.store: Any = Counters()
        self._shared = 0
        self._signs, self._last_sign = -1, 0.0  # rank 0's signs of life, and when the last one was seen
        self._looked = float("-inf")  # when they were last asked for
        self._tallies: dict[str, Tally] = {}

    def join(self, device_type: str) -> None:
        """Start the others, or meet those that a launcher started. InputError if that cannot be done."""
        if self.place.size == 1:
            return
        try:
            from lightning_fabric import Fabric
            from lightning_fabric.plugins.environments import LightningEnvironment
            from lightning_fabric.strategies import DDPStrategy
        except ImportError as error:
            raise InputError(
                f"--devices needs Lightning Fabric ({error}): pip install pytorch-lightning"
            ) from error
        for name in ("lightning_fabric", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            devices = self.place.devices
            if in_srun() and not in_torchrun():
                set_srun_variables()
                if has_own_device(device_type, devices):
                    devices, os.environ["LOCAL_RANK"] = 1, "0"
            # The environment is given, not detected: Lightning overlooks an srun step within salloc, and
            # takes a single task for one of several. This one starts children unless LOCAL_RANK is set.
            fabric = Fabric(
                accelerator=device_type,
                strategy=DDPStrategy(),
                devices=devices,
                num_nodes=self.place.nodes,
                plugins=LightningEnvironment(),
            )
            self.device = fabric.device
            # Not fabric.launch(): that also connects all processes by gloo, on ports of its own.
            fabric.strategy.launcher.launch(self._meet, fabric.strategy)
        except LeaderEnded:
            raise
        except Exception as error:  # an environment that does not fit, a port, a peer that ended
            raise InputError(f"the {self.place.size} processes did not come together: {error}") from error

    def _meet(self, strategy: Any) -> None:
        """Connect to the store, and wait until all have done so."""
        from torch.distributed import PrefixStore, TCPStore

        self.processes = list(strategy.launcher.procs)
        strategy.launcher.procs.clear()  # Fabric would kill all with the first process that dies
        strategy.accelerator.setup_device(self.device)
        address, port = strategy.cluster_environment.main_address, strategy.cluster_environment.main_port
        # Whether torchrun itself has opened the store.
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = TCPStore(
            address,
            port,
            is_master=self.leads and not agent,
            wait_for_workers=False,
            timeout=timedelta(seconds=MEETING),
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        self.store = PrefixStore(f"ldm-run-{attempt}", store)
        self.store.add("met", 1)
        self._give_signs_of_life("signs of life" if self.leads else OTHERS_SIGNS)
        if not self._all("met", self.place.size, MEETING):
            raise TimeoutError("some have ended, or are not there yet")

    def _all(self, name: str, size: int, limit: float) -> bool:
        """Wait for a counter to reach `size`. False after `limit` seconds, or once a child has ended."""
        end = time.monotonic() + limit
        try:
            while self.store.add(name, 0) < size:
                if time.monotonic() > end or any(process.poll() is not None for process in self.processes):
                    return False
                if self._leader_ended():
                    raise LeaderEnded("the process with rank 0 has ended")
                time.sleep(max(0.02, self.place.size / POLLS))
        except RuntimeError as error:
            raise LeaderEnded("the process with rank 0 has ended") from error
        return True

    def _give_signs_of_life(self, name: str) -> None:
        """Count in the background while this process lives: torchrun's store outlives rank 0, and rank 0 has
        no other way to learn of the end of a process that a launcher started."""
        stop = threading.Event()

        def give() -> None:
            try:
                while not stop.wait(SIGN_INTERVAL):
                    self.store.add(name, 1)
            except RuntimeError:  # the store is gone
                return

        thread = threading.Thread(target=give, name="signs of life", daemon=True)
        thread.start()
        atexit.register(lambda: (stop.set(), thread.join()))  # not within torch while Python shuts down

    def _leader_ended(self) -> bool:
        """Whether a follower has seen no sign of rank 0's life for too long."""
        if self.leads:
            return False
        now = time.monotonic()
        if now - self._looked > NO_SIGN / LOOKS:
            self._looked, signs = now, self.store.add("signs of life", 0)
            if signs != self._signs:
                self._signs, self._last_sign = signs, now
        return now - self._last_sign > NO_SIGN

    def share(self, value: T | None) -> T:
        """Rank 0's value, for all processes. LeaderEnded if rank 0 has ended."""
        if self.place.size == 1:
            return value
        self._shared += 1
        key = f"shared {self._shared}"
        if self.leads:
            data = pickle.dumps(value)
            parts = [data[i : i + PART] for i in range(0, len(data), PART)]
            for i, part in enumerate(parts):
                self.store.set(f"{key} part {i}", part)
            self.store.set(key, str(len(parts)))  # last: all parts are there
            # Rank 0 may end next, and its store with it.
            self._all(f"{key} taken", self.place.size - 1, TAKING)
            return value
        try:
            while not self.store.check([key]):
                if self._leader_ended():
                    raise LeaderEnded("the process with rank 0 has ended")
                time.sleep(max(0.05, self.place.size / POLLS))
            parts = [self.store.get(f"{key} part {i}") for i in range(int(self.store.get(key)))]
            self.store.add(f"{key} taken", 1)
            return pickle.loads(b"".join(parts))
        except RuntimeError as error:
            raise LeaderEnded("the process with rank 0 has ended") from error

    def deal(self, items: Sequence[T]) -> Iterator[T]:
        """The items that fall to this process, one at a time: each item goes to one process."""
        while (i := self.count("dealt", 1) - 1) < len(items):
            yield items[i]

    def stop(self, asked: bool = False) -> None:
        """No process gets a further item; `asked` says that the user wants it so."""
        if asked:
            self.count("asked", 1)
        self.count("dealt", NO_MORE)

    @property
    def asked(self) -> bool:
        """Whether the user has asked any process to end: a batch system may signal one that is not rank 0."""
        return self.count("asked", 0) > 0

    def count(self, name: str, value: int) -> int:
        """Add to a counter that all share and return its new value.

        Where rank 0 has ended this returns NO_MORE, so that no work is left.
        """
        try:
            if self._leader_ended():
                return NO_MORE
            return self.store.add(name, value)
        except RuntimeError:
            if self.leads:
                raise
            return NO_MORE

    def tally(self, name: str, value: int) -> int:
        """`count` for what only says how far the run is: what the others did may be seen a second later."""
        tally = self._tallies.setdefault(name, Tally())
        tally.pending += value
        now = time.monotonic()
        if self.place.size == 1 or now - tally.sent > TALLY:
            value, tally.pending, tally.sent = tally.pending, 0, now
            tally.known = self.count(name, value)
        return tally.known + tally.pending

    def send_tallies(self) -> None:
        """Bring all tallies up to date, here and in the store."""
        for name, tally in self._tallies.items():
            tally.sent = float("-inf")
            self.tally(name, 0)

    def finish(self, tick: Callable[[], None]) -> int:
        """Rank 0 waits for the others, calling `tick` meanwhile, and returns how many of them were lost."""
        self.send_tallies()
        if not self.leads:
            self.count("finished", 1)
            return 0
        others, progress, since = self.place.size - 1, -1, time.monotonic()
        signs, last_sign = -1, since
        while (finished := self.count("finished", 0)) < others:
            ended = [process.poll() is not None for process in self.processes]
            if self.place.nodes == 1 and ended and all(ended):
                finished = self.count("finished", 0)
                break
            if (now := self.count("steps", 0)) != progress:
                progress, since = now, time.monotonic()
            elif time.monotonic() - since > SILENCE:
                break
            if (now := self.count(OTHERS_SIGNS, 0)) != signs:
                signs, last_sign = now, time.monotonic()
            elif time.monotonic() - last_sign > NO_SIGN:
                break
            tick()
            time.sleep(0.05)
        if lost := others - finished:
            notice(f"{lost} of {self.place.size} processes ended before they were done")
        return lost


def has_own_device(device_type: str, tasks: int) -> bool:
    """Whether srun shows this task, one of `tasks` on its machine, GPUs of its own alone.

    With `--gpus-per-task=1` each task sees one GPU, which is number 0 for all of them.
    https://slurm.schedmd.com/gres.html
    """
    if device_type != "cuda":
        return False
    import torch

    seen = torch.cuda.device_count()
    return seen < tasks and (seen == 1 or "SLURM_GPUS_PER_TASK" in os.environ)


def set_srun_variables() -> None:
    """Set for Fabric what torchrun would have set, from the variables of this srun step."""
    from lightning_fabric.plugins.environments import SLURMEnvironment

    env = os.environ
    env["LOCAL_RANK"], env["NODE_RANK"] = env["SLURM_LOCALID"], env.get("SLURM_NODEID", "0")
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", "127.0.0.1")
    env.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    # Every task has to find the same port: one for each step of a job.
    job, step = int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_STEP_ID", 0))
    env.setdefault("MASTER_PORT", str(15000 + (10 * job + step) % 10000))
