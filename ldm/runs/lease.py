"""Whether a run lives: the lease that its process holds in the output folder, as two hidden files.

`.run-<id>.lock` is locked by the process, and the system unlocks it when the process ends, however that
happens. `.run-<id>.<n>.beat` is a heartbeat, rewritten every few seconds. On the machine of the run the lock
decides at once: a killed run is free, a stopped one is held. Anywhere else, and where the file system has no
locks, the heartbeat decides: one that does not change for LEASE seconds is a dead run's. Process numbers and
host names decide nothing, because another program may have the number by now and a container another name.

A run is taken up by creating the heartbeat n + 1, which succeeds for one process only, on any machine. The
heartbeats before it are then removed. A process that was suspended so long that it lost its run notices this
by the missing file.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ldm.errors import InputError
from ldm.log import notice

try:
    import fcntl
except ImportError:  # Windows: heartbeats decide
    fcntl = None

BEAT = 5.0  # seconds between two heartbeats
LEASE = 45.0  # seconds without a heartbeat after which a run is dead
STALE = 60.0  # seconds for which a network drive may list a file that has gone (man 5 nfs, acdirmax)
CLOCK_ERROR = 600.0  # seconds by which the clocks that date a file may differ

State = Literal["free", "held", "unknown"]


class LeaseHeld(InputError):
    """The run is alive, in another process."""


@dataclass(frozen=True)
class Beat:
    """A heartbeat as it was read."""

    generation: int  # how often the run has been taken up
    text: bytes
    modified: float  # by the file system's clock, seconds

    @property
    def facts(self) -> dict[str, Any]:
        """What its process wrote; empty while that is being written, or where the disk was full."""
        try:
            facts = json.loads(self.text)
        except ValueError:
            return {}
        return facts if isinstance(facts, dict) else {}

    @property
    def holder(self) -> str:
        """The process in words, for messages only."""
        return f"process {self.facts.get('pid', '?')} on {self.facts.get('host', 'an unknown machine')}"


class Lease:
    """One process's lease on a run. `lost` is set once another process has taken the run up.

    The folder has to exist. Usable as a context manager. `machine` replaces `machine_identity` in tests.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        *,
        beat: float = BEAT,
        lease: float = LEASE,
        machine: str | None = None,
    ):
        self.folder, self.run, self.beat, self.lease = Path(folder), run, beat, lease
        self.machine = machine or machine_identity(self.folder)
        self.token = uuid.uuid4().hex
        self.lost = threading.Event()
        self._lock = Lock(lock_path(self.folder, run))
        self._path: Path | None = None  # of the heartbeat, while the lease is held
        self._beats = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, wait: bool = True) -> None:
        """Take the run up. LeaseHeld if it is alive; InputError if the folder cannot be written.

        Where only its heartbeat can decide, this watches it for up to `lease` seconds, or raises LeaseHeld
        at once without `wait`.
        """
        try:
            last = self._wait_until_free(wait)
            self._create(last)
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError):
                raise InputError(f"{self.folder}: {error.strerror}") from error
            raise
        self._stop.clear()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """End the lease and remove its files. Safe to call twice, and after the run was lost."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self.beat)  # a network drive that hangs must not hold up the end
            self._thread = None
        if self._path is None:
            return
        if not self.lost.is_set():
            # The lock's file goes last, and still locked: who opened it before sees that it has gone.
            with suppress(OSError):  # files that stay behind are those of a dead run
                self._path.unlink(missing_ok=True)
                self._lock.path.unlink(missing_ok=True)
        self._lock.release()
        self._path = None

    def __enter__(self) -> Lease:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _wait_until_free(self, wait: bool) -> Beat | None:
        """The last heartbeat of the run, which is dead."""
        first: Beat | None = None
        end = None
        # For a moment the lock may be held by a process that only asks for the state, or is just ending.
        locked = self._lock.take(patience=0.5)
        while True:
            last = newest_beat(self.folder, self.run)
            state = judge(last, self.machine, locked, self._lock.path, self.lease)
            if state == "free":
                return last
            if state == "held" or not wait:
                holder = last.holder if last else "another process"
                raise LeaseHeld(f"that run is still going on, as {holder}")
            if end is None:
                first, end = last, time.monotonic() + self.lease
                where = f", as {last.holder}" if last else ""
                notice(f"watching for up to {self.lease:.0f} s whether the run is still going on{where}")
            elif last != first and last is not None:
                raise LeaseHeld(f"that run is still going on, as {last.holder}")
            elif time.monotonic() > end:
                return last
            time.sleep(min(self.beat, 1.0) / 4)
            locked = self._lock.take()

    def _create(self, last: Beat | None) -> None:
        """Create the heartbeat that follows the last one. LeaseHeld if another process was faster."""
        generation = last.generation + 1 if last else 0
        path = beat_path(self.folder, self.run, generation)
        try:
            path.touch(exist_ok=False)
        except FileExistsError as error:
            raise LeaseHeld("that run has just been taken up by another process") from error
        # A listing may miss a heartbeat that was created while another was removed. If it is there now, this
        # process has begun from a wrong one.
        if any(number > generation for number, _ in beat_paths(self.folder, self.run)):
            path.unlink(missing_ok=True)
            raise LeaseHeld("that run has just been taken up by another process")
        self._path = path
        self._write()
        with suppress(OSError):
            for number, old in beat_paths(self.folder, self.run):
                if number < generation:
                    old.unlink()

    def _renew(self) -> None:
        while not self._stop.wait(self.beat):
            if not self._write():
                self.lost.set()
                return

    def _write(self) -> bool:
        """Renew the heartbeat; False if it is not this process's any more.

        What cannot be written, because the disk is full or the network is down, is written the next time.
        """
        self._beats += 1
        facts = {
            "token": self.token,
            "beats": self._beats,
            "machine": self.machine,
            "locked": self._lock.held,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        try:
            # Opened anew each time: network drives compare with the server when a file is opened.
            with open(self._path, "r+b", buffering=0) as file:
                text = file.read()
                if text and Beat(0, text, 0).facts.get("token", self.token) != self.token:
                    return False
                file.seek(0)
                file.write(json.dumps(facts).encode())  # never shorter than before
        except FileNotFoundError:
            return False
        except OSError:
            with suppress(OSError):
                os.utime(self._path)  # needs no space
        return True


def state(folder: Path, run: str, *, machine: str | None = None, lease: float = LEASE) -> State:
    """Whether a run lives: "free" if it does not, "held" if it does.

    "unknown" if only a later look at its heartbeat can decide, as `Lease.acquire` takes it.
    """
    path = lock_path(folder, run)
    try:
        last = newest_beat(folder, run)
    except PermissionError:  # another user's
        return "unknown"
    return judge(last, machine or machine_identity(folder), Lock.probe(path) if last else True, path, lease)


def judge(last: Beat | None, machine: str, lock_free: bool | None, clock: Path, lease: float) -> State:
    """The state of a run by its last heartbeat and its lock, which is free or not, or None without locks.

    `clock` is a file whose date is set, to read the file system's clock.
    """
    if last is None:
        return "unknown" if lock_free is False else "free"
    if lock_free is not None and last.facts.get("machine") == machine and last.facts.get("locked"):
        return "free" if lock_free else "held"
    try:
        os.utime(clock)
        age = clock.stat().st_mtime - last.modified
    except OSError:
        return "unknown"
    return "free" if age > lease + CLOCK_ERROR else "unknown"


def machine_identity(folder: Path) -> str:
    """What two processes have in common between which a lock in the folder works.

    That is the running system, and the mount: two containers of one machine may reach the same network
    folder by mounts that do not know of each other's locks.
    """
    try:
        system = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        system = f"{socket.gethostname()}-{uuid.getnode():x}"
    return f"{system}-{os.stat(folder).st_dev:x}"


def lock_path(folder: Path, run: str) -> Path:
    return Path(folder) / f".run-{run}.lock"


def beat_path(folder: Path, run: str, generation: int) -> Path:
    return Path(folder) / f".run-{run}.{generation}.beat"


def beat_paths(folder: Path, run: str) -> list[tuple[int, Path]]:
    """All heartbeats of a run by generation, the newest first; usually one at most."""
    pattern = re.compile(rf"\.run-{re.escape(run)}\.(\d+)\.beat")
    found = ((pattern.fullmatch(name), name) for name in os.listdir(folder))
    return sorted(((int(match[1]), Path(folder) / name) for match, name in found if match), reverse=True)


def newest_beat(folder: Path, run: str) -> Beat | None:
    """The heartbeat that counts; None if the run has ended properly or never started."""
    end = time.monotonic() + STALE
    while (found := beat_paths(folder, run)) and time.monotonic() < end:
        for generation, path in found:
            with suppress(FileNotFoundError), open(path, "rb") as file:
                text = file.read()
                return Beat(generation, text, os.fstat(file.fileno()).st_mtime)
        time.sleep(0.01)  # all were removed since they were listed, as by a process that has created another
    return None


class Lock:
    """An exclusive lock on a file, which ends with the process."""

    def __init__(self, path: Path):
        self.path = path
        self._file: int | None = None

    @property
    def held(self) -> bool:
        return self._file is not None

    def take(self, patience: float = 0.0) -> bool | None:
        """Whether this process has it now; None if the file system has no locks.

        Tries again for `patience` seconds while another process has it.
        """
        end = time.monotonic() + patience
        while not self.held:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            free = flock(file, exclusive=True)
            if free and self._is_current(file):
                self._file = file
                break
            os.close(file)
            if free is None:
                return None
            if not free:
                if time.monotonic() >= end:
                    return False
                time.sleep(0.05)
        return True

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _is_current(self, file: int) -> bool:
        """Whether the locked file still has its name: the holder before may have removed it."""
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    @staticmethod
    def probe(path: Path) -> bool | None:
        """Whether nobody has the lock; None if the file system has no locks."""
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            return flock(file, exclusive=False)
        finally:
            os.close(file)


def flock(file: int, exclusive: bool) -> bool | None:
    """Lock an open file if it is free. False if it is not, None if the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES) else None
    return True
