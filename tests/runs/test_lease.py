"""Leases on runs: real processes, killed, stopped and raced, on one machine and on pretended others."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ldm.runs.lease as lease_module
from ldm.runs.lease import (
    CLOCK_ERROR,
    LEASE,
    Lease,
    LeaseHeld,
    Lock,
    beat_path,
    beat_paths,
    machine_identity,
    state,
)

SHORT = {"beat": 0.05, "lease": 1.0}
ROOT = Path(__file__).parents[2]

HOLDER = """
import os, sys, time
import ldm.runs.lease as module
folder, machine, locks, go, seconds = sys.argv[1:]
if locks == "no":
    module.fcntl = None
if go:
    print("ready", flush=True)
while go and not os.path.exists(go):
    time.sleep(0.001)
lease = module.Lease(folder, "x", beat=0.05, lease=float(seconds), machine=machine or None)
try:
    lease.acquire()
except module.LeaseHeld:
    print("held", flush=True)
    sys.exit()
print("acquired", flush=True)
sys.stdin.readline()
if machine:
    print("lost" if lease.lost.wait(30) else "kept", flush=True)
lease.release()
"""

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process that acquires the lease of run x, and by default waits until it has it."""
    processes = []

    def start(
        machine: str = "", locks: bool = True, go: Path | str = "", lease: float = SHORT["lease"]
    ) -> subprocess.Popen:
        argv = [sys.executable, "-c", HOLDER, tmp_path, machine, "yes" if locks else "no", go, lease]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        processes.append(subprocess.Popen(list(map(str, argv)), text=True, cwd=ROOT, **pipes))
        if not go:
            assert processes[-1].stdout.readline() == "acquired\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def beat(folder: Path) -> dict:
    ((_, path),) = beat_paths(folder, "x")
    return json.loads(path.read_bytes())


# --- one machine


def test_a_lease_leaves_nothing_behind(tmp_path: Path) -> None:
    assert state(tmp_path, "x") == "free"
    with Lease(tmp_path, "x") as lease:
        assert state(tmp_path, "x") == "held"
        assert state(tmp_path, "y") == "free"
        assert sorted(os.listdir(tmp_path)) == [".run-x.0.beat", ".run-x.lock"]
        with pytest.raises(LeaseHeld, match=f"still going on, as process {os.getpid()} on "):
            Lease(tmp_path, "x").acquire()
        assert state(tmp_path, "x") == "held"
    assert not lease.lost.is_set()
    assert os.listdir(tmp_path) == []
    lease.release()
    lease.acquire()
    lease.release()


def test_a_killed_run_is_free_at_once(tmp_path: Path, start: Start) -> None:
    process = start()
    assert state(tmp_path, "x") == "held"
    kill(process)
    assert state(tmp_path, "x") == "free"
    with Lease(tmp_path, "x") as lease:
        assert lease.beat == lease_module.BEAT  # whose LEASE no test waits for
        assert beat(tmp_path)["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_a_stopped_run_is_held(tmp_path: Path, start: Start) -> None:
    process = start()
    process.send_signal(signal.SIGSTOP)
    before = beat(tmp_path)["beats"]
    until(lambda: time.time() - beat_paths(tmp_path, "x")[0][1].stat().st_mtime > 2 * SHORT["lease"])
    assert beat(tmp_path)["beats"] <= before + 1
    assert state(tmp_path, "x", lease=SHORT["lease"]) == "held"
    with pytest.raises(LeaseHeld):
        Lease(tmp_path, "x", **SHORT).acquire()


def test_the_number_of_another_program_does_not_block(tmp_path: Path, start: Start) -> None:
    """A process number that another program has by now made a dead run look alive."""
    process = start()
    kill(process)
    ((_, path),) = beat_paths(tmp_path, "x")
    path.write_text(json.dumps(beat(tmp_path) | {"pid": os.getpid()}))
    assert state(tmp_path, "x") == "free"


def test_another_host_name_does_not_block(tmp_path: Path, start: Start) -> None:
    """A restarted container has another host name: its killed run counted as going on for ever."""
    process = start()
    kill(process)
    ((_, path),) = beat_paths(tmp_path, "x")
    path.write_text(json.dumps(beat(tmp_path) | {"host": "another"}))
    assert state(tmp_path, "x") == "free"


def test_two_mounts_are_two_machines(tmp_path: Path) -> None:
    """Locks of one mount of a network drive may be unknown to another on the same machine."""
    assert machine_identity(tmp_path) == machine_identity(tmp_path)
    assert machine_identity(tmp_path) != machine_identity(Path("/proc"))


def test_a_lock_on_a_removed_file_does_not_count(tmp_path: Path, monkeypatch) -> None:
    """The holder removes the file between a rival's opening it and locking it."""
    real, path = lease_module.flock, tmp_path / "lock"
    removals = [path]

    def slow(file: int, exclusive: bool) -> bool | None:
        for removed in removals:
            removed.unlink()
        removals.clear()
        return real(file, exclusive)

    monkeypatch.setattr(lease_module, "flock", slow)
    lock, rival = Lock(path), Lock(path)
    assert lock.take()
    assert path.exists()
    assert rival.take() is False


# --- several machines


def test_a_living_run_elsewhere_is_held(tmp_path: Path, start: Start, caplog) -> None:
    start("there")
    lease = Lease(tmp_path, "x", machine="here", beat=0.05, lease=30)
    assert state(tmp_path, "x", machine="here", lease=30) == "unknown"
    with pytest.raises(LeaseHeld):
        lease.acquire(wait=False)
    assert caplog.messages == []
    with pytest.raises(LeaseHeld, match="that run is still going on, as process"):
        lease.acquire()
    (message,) = caplog.messages
    assert message.startswith("watching for up to 30 s whether the run is still going on, as process")


@pytest.mark.parametrize("locks", [True, False])
def test_a_dead_run_elsewhere_is_taken_up(tmp_path: Path, start: Start, locks: bool) -> None:
    """A run that was killed on another machine counted as going on for ever."""
    kill(start("there", locks))
    assert state(tmp_path, "x", machine="here", lease=1.0) == "unknown"
    with Lease(tmp_path, "x", machine="here", **SHORT) as lease:
        assert beat(tmp_path)["token"] == lease.token
        assert [generation for generation, _ in beat_paths(tmp_path, "x")] == [1]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("age", "expected"), [(CLOCK_ERROR / 2, "unknown"), (CLOCK_ERROR * 2, "free")])
def test_only_an_age_beyond_the_errors_of_clocks_decides(tmp_path, start, age, expected) -> None:
    kill(start("there"))
    ((_, path),) = beat_paths(tmp_path, "x")
    os.utime(path, times=(time.time() - LEASE - age,) * 2)
    assert state(tmp_path, "x", machine="here") == expected


def test_a_run_that_was_suspended_notices_its_successor(tmp_path: Path, start: Start) -> None:
    process = start("there")
    process.stdin.write("\n")
    process.stdin.flush()
    process.send_signal(signal.SIGSTOP)
    with Lease(tmp_path, "x", machine="here", **SHORT) as lease:
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "lost\n"
        assert process.wait(30) == 0
        before = beat(tmp_path)
        assert before["token"] == lease.token  # the loser has removed no file of the winner's
        until(lambda: beat(tmp_path)["beats"] > before["beats"] + 2)
        assert not lease.lost.is_set()


def test_a_run_whose_successor_has_finished_notices_that(tmp_path: Path, start: Start) -> None:
    process = start("there")
    process.stdin.write("\n")
    process.stdin.flush()
    process.send_signal(signal.SIGSTOP)
    Lease(tmp_path, "x", machine="here", **SHORT).__enter__().release()
    with Lease(tmp_path, "x", machine="here", **SHORT) as again:
        assert beat_paths(tmp_path, "x")[0][0] == 0  # the name of the first heartbeat once more
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "lost\n"
        assert process.wait(30) == 0
        assert beat(tmp_path)["token"] == again.token


# --- file systems


def test_without_locks_heartbeats_decide(tmp_path: Path, start: Start, monkeypatch) -> None:
    process = start(locks=False)
    monkeypatch.setattr(lease_module, "fcntl", None)
    assert state(tmp_path, "x", lease=1.0) == "unknown"
    with pytest.raises(LeaseHeld):
        Lease(tmp_path, "x", beat=0.05, lease=30).acquire()
    kill(process)
    with Lease(tmp_path, "x", **SHORT):
        assert beat(tmp_path)["locked"] is False
    assert os.listdir(tmp_path) == []


def test_a_file_system_that_refuses_locks(tmp_path: Path, monkeypatch) -> None:
    import fcntl

    def refuse(file: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Lease(tmp_path, "x", **SHORT):
        assert state(tmp_path, "x") == "unknown"
        with pytest.raises(LeaseHeld):
            Lease(tmp_path, "x", beat=0.05, lease=30).acquire()


def test_a_full_disk_does_not_end_the_lease(tmp_path: Path, monkeypatch) -> None:
    """Where heartbeats cannot be written, their date at least is renewed."""
    failures = []

    def full(*_: object, **__: object) -> None:
        failures.append(1)
        raise OSError(28, "No space left on device")

    with Lease(tmp_path, "x", **SHORT) as lease:
        ((_, path),) = beat_paths(tmp_path, "x")
        with monkeypatch.context() as patch:
            patch.setattr(lease_module, "open", full, raising=False)
            before = path.stat().st_mtime_ns
            until(lambda: len(failures) > 3)
            assert path.stat().st_mtime_ns > before
        written = beat(tmp_path)["beats"]
        until(lambda: beat(tmp_path)["beats"] > written)
        assert not lease.lost.is_set()


# --- races


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize(("machines", "locks"), [(1, True), (1, False), (5, True), (5, False)])
def test_one_of_many_wins(tmp_path: Path, start: Start, machines: int, locks: bool, dead: bool) -> None:
    """Five processes at once, of one machine or of five, take up a new run or a dead one."""
    if dead:
        kill(start("there", locks))
    go = tmp_path / "go"
    names = [f"machine {k}" if machines > 1 else "" for k in range(5)]
    # long enough for a winner whose heartbeats wait for a busy disk
    rivals = [start(name, locks, go, lease=2.0) for name in names]
    assert [rival.stdout.readline() for rival in rivals] == ["ready\n"] * 5
    go.touch()
    assert sorted(rival.stdout.readline() for rival in rivals) == ["acquired\n"] + ["held\n"] * 4
    assert len(beat_paths(tmp_path, "x")) == 1


def test_a_heartbeat_that_goes_while_it_is_looked_for_ends_no_run(tmp_path: Path, monkeypatch) -> None:
    """The run seemed to have ended, so that a second process took it up beside the one that just had."""
    plain, listed = beat_paths, []

    def late(folder: Path, run: str) -> list[tuple[int, Path]]:
        found = plain(folder, run)
        if not listed:
            listed.append(found)
            beat_path(folder, run, 2).touch()
            beat_path(folder, run, 1).unlink()
        return found

    beat_path(tmp_path, "x", 1).touch()
    monkeypatch.setattr(lease_module, "beat_paths", late)
    assert lease_module.newest_beat(tmp_path, "x").generation == 2


def test_who_began_from_a_wrong_heartbeat_gives_way(tmp_path: Path) -> None:
    """A listing may miss a new heartbeat and the old one: two processes had the run then."""
    beat_path(tmp_path, "x", 2).touch()
    lease = Lease(tmp_path, "x", **SHORT)
    with pytest.raises(LeaseHeld, match="just been taken up"):
        lease._create(None)
    assert [number for number, _ in beat_paths(tmp_path, "x")] == [2]


INSIDE = """
import os, sys
from ldm.runs.lease import Lease, LeaseHeld
entered = 0
while entered < 40:
    try:
        with Lease(sys.argv[1], "x"):
            os.mkdir(sys.argv[2])
            os.rmdir(sys.argv[2])
            entered += 1
    except LeaseHeld:
        pass
"""


def test_never_two_at_once(tmp_path: Path) -> None:
    """Leases that come and go quickly, removing their files: nobody else is ever inside."""
    (tmp_path / "out").mkdir()
    argv = [sys.executable, "-c", INSIDE, str(tmp_path / "out"), str(tmp_path / "inside")]
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(subprocess.Popen(argv, cwd=ROOT)) for _ in range(3)]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert os.listdir(tmp_path / "out") == []
