"""Runs of several processes, real ones: their images, kills, interrupts, launchers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from commands import SCRIPTS, Result, refused
from run_helpers import data, manifest, start, wait_for

from ldm.errors import InputError
from ldm.runs.processes import (
    NO_MORE,
    OTHERS_SIGNS,
    Counters,
    Place,
    Team,
    find_place,
    has_own_device,
    is_follower,
)

LAUNCHER = ("TORCHELASTIC_RUN_ID", "LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
LAUNCHER += ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
ROOT = Path(__file__).parents[2]
LIMIT = 300  # seconds after which a run counts as hanging: on a busy machine it takes one or two minutes


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what a launcher sets, and nothing else."""
    for name in [*LAUNCHER, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, str(value)) for name, value in values.items()]


# --- who is who


def test_a_process_without_launcher_is_alone(environment) -> None:
    assert find_place(None, None) == Place()
    assert find_place(1, 1).size == 1
    environment(LOCAL_RANK=1)  # left over from something else
    assert find_place(None, None) == Place()


def test_places_on_several_machines(environment) -> None:
    assert find_place(4, 2) == Place(0, 4, 2)
    environment(NODE_RANK=1, LOCAL_RANK=2)
    assert find_place(4, 2) == Place(6, 4, 2)


def test_torchrun_is_honoured(environment) -> None:
    environment(TORCHELASTIC_RUN_ID="x", RANK=5, WORLD_SIZE=8, LOCAL_WORLD_SIZE=4, LOCAL_RANK=1)
    assert find_place(None, None) == Place(5, 4, 2, started=True)
    assert find_place(4, 2) == Place(5, 4, 2, started=True)
    with pytest.raises(InputError, match="--devices 8, but the launcher has started 4"):
        find_place(8, None)
    with pytest.raises(InputError, match="--num_nodes 3, but the launcher has started 2"):
        find_place(4, 3)


def test_slurm_is_honoured_within_srun_only(environment) -> None:
    environment(SLURM_NTASKS=8, SLURM_NNODES=2, SLURM_PROCID=0)  # sbatch: one process
    assert find_place(None, None) == Place()
    environment(SLURM_STEP_NUM_TASKS=8, SLURM_STEP_NUM_NODES=2, SLURM_PROCID=3)
    assert find_place(None, None) == Place(3, 4, 2, started=True)


@pytest.mark.parametrize(
    ("seen", "tasks", "variables", "own"),
    [
        (1, 4, {}, True),
        (2, 4, {"SLURM_GPUS_PER_TASK": 2}, True),
        (4, 4, {"SLURM_GPUS_PER_TASK": 1}, False),  # a Slurm that shows each task all of them
        (2, 4, {}, False),  # too few: Fabric says so
    ],
)
def test_a_task_may_see_its_own_gpu_alone(monkeypatch, environment, seen, tasks, variables, own) -> None:
    environment(**variables)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    assert has_own_device("cuda", tasks) is own
    assert not has_own_device("cpu", tasks)


def test_a_task_with_its_own_gpu_joins_with_it(monkeypatch, environment) -> None:
    """`srun --gpus-per-task=1` failed: local rank 3 asked for the fourth of the one GPU that it sees."""
    environment(**slurm(3, SLURM_STEP_NUM_TASKS=4, SLURM_GPUS_PER_TASK=1, CUDA_VISIBLE_DEVICES=3))
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.setenv(name, "0")  # so that what joining sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    cuda = "lightning_fabric.accelerators.cuda"
    monkeypatch.setattr(f"{cuda}.num_cuda_devices", lambda: 1)
    monkeypatch.setattr(f"{cuda}._get_all_visible_cuda_devices", lambda: [0])
    team = Team(find_place(None, None))
    monkeypatch.setattr(team, "_meet", lambda strategy: None)
    team.join("cuda")
    assert (team.place, team.device) == (Place(3, 4, 1, started=True), torch.device("cuda:0"))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"LOCAL_RANK": 1}, False),  # left over from something else
        ({"WORLD_SIZE": 2, "LOCAL_RANK": 1}, True),
        ({"WORLD_SIZE": 4, "NODE_RANK": 1, "LOCAL_RANK": 0}, True),
        ({"WORLD_SIZE": 4, "NODE_RANK": 0, "LOCAL_RANK": 0}, False),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": 0, "LOCAL_RANK": 0}, False),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": 2, "LOCAL_RANK": 0}, True),
        ({"SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 1}, True),
        ({"SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 0}, False),
        ({"SLURM_STEP_NUM_TASKS": 1, "SLURM_PROCID": 0}, False),
    ],
)
def test_followers_are_known_by_the_environment(environment, variables: dict, expected: bool) -> None:
    environment(**variables)
    assert is_follower() is expected


# --- dealing


def test_alone_everything_falls_to_one() -> None:
    team = Team()
    team.join("cpu")
    assert (team.share("x"), list(team.deal("abc")), team.finish(lambda: None)) == ("x", [*"abc"], 0)


def test_dealing_ends_when_it_is_stopped() -> None:
    team, seen = Team(), []
    for item in team.deal("abc"):
        seen.append(item)
        team.stop()
    assert seen == ["a"]
    assert list(team.deal("abc")) == []


def test_each_item_goes_to_one_of_many() -> None:
    first, second = Team(), Team(Place(1, 2))
    second.store = first.store
    one, two = first.deal(range(5)), second.deal(range(5))
    dealt = [next(one), next(two), next(two), next(one), next(two)]
    assert dealt == [0, 1, 2, 3, 4]
    assert (list(one), list(two)) == ([], [])


def test_without_rank_0_nothing_is_left_to_do() -> None:
    """A store that has gone raises: the others finish what they have in hand, and end."""

    class Gone:
        def add(self, name: str, value: int) -> int:
            raise RuntimeError("Broken pipe")

    team = Team(Place(1, 2))
    team.store = Gone()
    assert team.count("steps", 3) == NO_MORE
    assert list(team.deal("abc")) == []
    assert team.finish(lambda: None) == 0
    leader = Team(Place(0, 2))
    leader.store = Gone()
    with pytest.raises(RuntimeError):
        leader.count("steps", 3)


def test_rank_0_without_a_sign_of_life_has_ended(monkeypatch) -> None:
    """The store of torchrun stays when rank 0 dies, so that its silence has to end the followers."""
    monkeypatch.setattr("ldm.runs.processes.NO_SIGN", 0.1)
    follower = Team(Place(1, 2))
    items = follower.deal(range(1000))
    assert next(items) == 0
    for _ in range(3):
        time.sleep(0.2)
        follower.store.add("signs of life", 1)
        assert next(items) > 0
    time.sleep(0.2)
    assert list(items) == []


def test_the_leader_waits_and_reports_the_lost(monkeypatch, caplog) -> None:
    team, ticks = Team(Place(0, 3)), []

    def tick() -> None:
        ticks.append(team.count("finished", 1) if not ticks else None)

    monkeypatch.setattr("ldm.runs.processes.SILENCE", 0.3)
    assert team.finish(tick) == 1
    assert ticks[0] == 1
    assert caplog.messages == ["1 of 3 processes ended before they were done"]


def test_the_leader_does_not_wait_for_the_dead(monkeypatch) -> None:
    """After the SIGKILL of a task of srun rank 0 waited ten minutes for its steps, also when told to end."""
    team, ticks = Team(Place(0, 3, started=True)), []

    def tick() -> None:
        ticks.append(time.monotonic())
        if ticks[-1] - ticks[0] < 0.6:
            team.count(OTHERS_SIGNS, 1)

    monkeypatch.setattr("ldm.runs.processes.NO_SIGN", 0.3)
    assert team.finish(tick) == 2
    assert ticks[-1] - ticks[0] > 0.6


class CountedStore(Counters):
    """A store that counts what it is asked."""

    def __init__(self):
        self.asked: list[str] = []

    def add(self, name: str, value: int) -> int:
        self.asked.append(name)
        return super().add(name, value)


def test_steps_do_not_wait_for_the_store() -> None:
    """Each step of each process asked it twice: 64 workers of 200 steps a second more than it can answer."""
    leader, follower = Team(Place(0, 2)), Team(Place(1, 2))
    leader.store = follower.store = store = CountedStore()
    for k in range(1, 1001):
        assert follower.tally("steps", 2) == 2 * k
        follower.tally("images", 1)
    assert len(store.asked) < 20
    assert store["steps"] < 2000
    follower.finish(lambda: None)
    assert (store["steps"], store["images"], store["finished"]) == (2000, 1000, 1)
    leader.tally("steps", 3)
    leader.send_tallies()
    assert leader.tally("steps", 0) == 2003


def test_a_batch_costs_one_question() -> None:
    team = Team(Place(1, 2))
    team.store = CountedStore()
    assert len(list(team.deal(range(1000)))) == 1000
    assert team.store.asked.count("dealt") == 1001
    assert len(team.store.asked) < 1020


# --- refusals


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--devices 0", "--devices: 0 is not a whole number in range"),
        ("--devices 2 --rng compvis", "2 processes (--devices, --num_nodes): --rng compvis is one stream"),
        ("--devices 2 --num_nodes 2 --skip_save", "4 processes (--devices, --num_nodes): --skip_save"),
        ("--devices 2 --device cuda:1", "--device cuda:1 is one device; name its kind"),
        ("--devices 2 --device mps", "there is one mps device"),
        ("--devices 2 --device cpu --prompt", "--prompt"),
    ],
)
def test_bad_teams_are_refused(command, model, environment, argv: str, words: str) -> None:
    refused(command("txt2img", "--config", model[0], "--ckpt", model[1], *argv.split()), words)


# --- real processes without a model

SCRIPT = """
import json, os, sys, time
from pathlib import Path
from ldm.runs import processes

def listening():
    "Ports on which this process waits for connections."
    own = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}").readlines()[1:]]
    return [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]

folder, devices, items = Path(sys.argv[1]), int(sys.argv[2]) or None, int(sys.argv[3])
processes.SIGN_INTERVAL, processes.NO_SIGN = 0.05, float(sys.argv[4])
team = processes.Team(processes.find_place(devices, None))
team.join("cpu")
facts = {"job": len(team.share(b"x" * 20_000_000 if team.leads else None))}
facts |= {"ports": listening(), "children": len(team.processes), "pid": os.getpid(), "dealt": []}
path = folder / f"{team.place.rank}.json"
for item in team.deal(range(items)):
    facts["dealt"].append(item)
    path.write_text(json.dumps(facts))
    time.sleep(0.02)
facts["lost"] = team.finish(lambda: None)
path.write_text(json.dumps(facts))
"""


class Processes:
    """Starts processes that deal items among themselves, and reads what each wrote down of itself."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.script = folder / "deal.py"
        self.script.write_text(SCRIPT)
        self.started: list[subprocess.Popen] = []

    def start(
        self, *launcher: str, devices: int = 0, items: int = 40, silence: float = 60, **env: object
    ) -> subprocess.Popen:
        words = [*(launcher or [sys.executable]), self.script, self.folder, devices, items, silence]
        variables = {name: str(value) for name, value in env.items()}
        environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
        process = subprocess.Popen(
            [str(word) for word in words], env=environ, stderr=subprocess.PIPE, text=True
        )
        self.started.append(process)
        return process

    def facts(self, rank: int) -> dict:
        """What the process wrote last; empty if it has not yet dealt."""
        try:
            return json.loads((self.folder / f"{rank}.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def end(self) -> list[dict]:
        """Once all have ended well, the facts of both."""
        for process in self.started:
            _, err = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, err
        first, second = self.facts(0), self.facts(1)
        assert sorted(first["dealt"] + second["dealt"]) == list(range(40))
        assert (first["lost"], first["job"], second["job"]) == (0, 20_000_000, 20_000_000)
        return [first, second]


@pytest.fixture
def processes(tmp_path: Path, environment) -> Iterator[Processes]:
    processes = Processes(tmp_path)
    yield processes
    for process in processes.started:
        process.kill()
        process.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def test_children_use_the_launchers_port_only(processes: Processes) -> None:
    """The store opened a port of its own, and gloo one for each process; clusters block these."""
    port = free_port()
    processes.start(devices=2, MASTER_PORT=port)
    leader, follower = processes.end()
    assert (set(leader["ports"]), follower["ports"]) == ({port}, [])
    assert leader["children"] == 1


def test_torchruns_workers_open_no_port(processes: Processes) -> None:
    torchrun = ["-m", "torch.distributed.run", "--master_port", str(free_port()), "--nproc_per_node", "2"]
    processes.start(sys.executable, *torchrun)
    leader, follower = processes.end()
    assert (leader["ports"], follower["ports"]) == ([], [])
    assert leader["children"] == follower["children"] == 0


def slurm(rank: int, **changes: object) -> dict[str, object]:
    """What srun sets for one of two tasks within an allocation that salloc made."""
    return {
        "SLURM_JOB_NAME": "interactive",
        "SLURM_JOB_ID": 4242,
        "SLURM_STEP_ID": os.getpid() % 10,
        "SLURM_NTASKS": 2,
        "SLURM_NNODES": 3,  # of which the step uses one
        "SLURM_NODELIST": "unreachable[1-2],127.0.0.1",
        "SLURM_STEP_NUM_TASKS": 2,
        "SLURM_STEP_NUM_NODES": 1,
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NODEID": 0,
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank,
    } | changes


@pytest.mark.parametrize("job", ["interactive", "bash"])
def test_tasks_of_srun_are_one_run(processes: Processes, job: str) -> None:
    """Within salloc, whose job is named "interactive", every task started children of its own; and
    `srun -n 2` was refused because it is not --ntasks-per-node."""
    for rank in (0, 1):
        processes.start(**slurm(rank, SLURM_JOB_NAME=job))
    leader, follower = processes.end()
    assert (leader["children"], follower["children"]) == (0, 0)
    assert len(set(leader["ports"])) == 1
    assert follower["ports"] == []


def test_one_task_of_srun_starts_its_own(processes: Processes) -> None:
    """A single task was taken for one of several that srun had started, and waited for the others."""
    processes.start(devices=2, **slurm(0, SLURM_STEP_NUM_TASKS=1, SLURM_NTASKS=1, SLURM_JOB_NAME="images"))
    leader, follower = processes.end()
    assert (leader["children"], follower["children"]) == (1, 0)


def test_followers_end_without_rank_0_though_the_store_stays(processes: Processes) -> None:
    """The store at torchrun's address is the agent's, which does not end with rank 0."""
    from torch.distributed import TCPStore

    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    common = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": 2}
    common |= {"LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": agent.port}
    leader, follower = (
        processes.start(items=1_000_000, silence=3, RANK=rank, LOCAL_RANK=rank, **common) for rank in (0, 1)
    )
    end = time.monotonic() + LIMIT
    while not (processes.facts(0) and processes.facts(1)):
        assert time.monotonic() < end
        time.sleep(0.05)
    leader.kill()
    _, err = follower.communicate(timeout=LIMIT)
    assert follower.returncode == 0, err
    assert len(processes.facts(1)["dealt"]) < 1_000_000


def test_a_child_that_fails_at_once_ends_the_meeting(processes: Processes) -> None:
    """Fabric killed the first process, too, without a word."""
    script = processes.script.read_text()
    early = 'import os, sys\nif os.environ.get("LOCAL_RANK") == "1":\n    sys.exit(3)\n'
    processes.script.write_text(early + script)
    run = processes.start(devices=2)
    _, err = run.communicate(timeout=LIMIT)
    assert run.returncode == 1
    assert "InputError: the 2 processes did not come together: some have ended" in err


# --- real runs


def team_of(folder: Path, model: tuple[Path, Path], *argv: object) -> subprocess.Popen:
    return start(folder, model, "--device", "cpu", *argv, env=os.environ | {"OMP_NUM_THREADS": "1"})


def workers(run: subprocess.Popen) -> list[int]:
    """The processes that a run has started."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def wait_for_share(folder: Path, pid: int) -> None:
    """Wait until a process writes a file, and so has a batch in hand."""
    end = time.monotonic() + LIMIT
    while not any(name.startswith(str(folder / "samples")) for name in open_files(pid)):
        assert time.monotonic() < end, "the process makes no images"


def open_files(pid: int) -> list[str]:
    """The files that a process has open, as Linux lists them."""
    names = []
    with suppress(OSError):
        for link in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):  # closed meanwhile
                names.append(os.readlink(link))
    return names


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one process."""
    folder = tmp_path_factory.mktemp("whole")
    run = team_of(folder, model, "--n_iter", 40)
    run.communicate()
    assert run.returncode == 0
    return data(folder)


def test_two_processes_make_what_one_makes(model, tmp_path, whole) -> None:
    run = team_of(tmp_path, model, "--n_iter", 40, "--devices", 2)
    out, err = run.communicate(timeout=LIMIT)
    assert (run.returncode, out) == (0, f"{tmp_path}\n")
    assert data(tmp_path) == whole
    lines = manifest(tmp_path)
    assert sorted(line["image"] for line in lines) == list(range(160))
    assert len({line["run"] for line in lines}) == 1
    assert "160 images: 100%" in err


@pytest.mark.slow
def test_the_run_goes_on_without_a_killed_process(model, tmp_path, whole) -> None:
    """Its batch is made by rank 0: nothing is missing, and nothing is there twice."""
    run = team_of(tmp_path, model, "--n_iter", 40, "--devices", 2)
    wait_for(tmp_path, 4)
    (pid,) = workers(run)
    wait_for_share(tmp_path, pid)
    os.kill(pid, signal.SIGKILL)
    _, err = run.communicate(timeout=LIMIT)
    assert run.returncode == 0
    assert "1 of 2 processes ended before they were done" in err
    assert data(tmp_path) == whole
    assert sorted(line["image"] for line in manifest(tmp_path)) == list(range(160))


@pytest.mark.slow
def test_a_killed_run_is_resumed_by_any_number(model, tmp_path, whole) -> None:
    for more in (30, 20):
        done = len(manifest(tmp_path))
        run = team_of(tmp_path, model, "--n_iter", 40, "--devices", 2, "--resume")
        wait_for(tmp_path, done + more)
        run.kill()
        run.communicate()  # also waits for the other, which has the same stderr: without rank 0 it ends
        assert done < len(manifest(tmp_path)) < 160
    resumed = team_of(tmp_path, model, "--n_iter", 40, "--devices", 1, "--resume")
    resumed.communicate(timeout=LIMIT)
    assert resumed.returncode == 0
    assert data(tmp_path) == whole
    assert sorted(line["image"] for line in manifest(tmp_path)) == list(range(160))


@pytest.mark.slow
@pytest.mark.parametrize("leader", [True, False])
def test_sigterm_to_one_process_ends_all(model, tmp_path, leader: bool) -> None:
    """A follower's ended the run with 1 and a grid, as if images had failed."""
    run = team_of(tmp_path, model, "--n_iter", 200, "--devices", 2)
    wait_for(tmp_path, 8)
    (follower,) = workers(run)
    if not leader:
        wait_for_share(tmp_path, follower)
    os.kill(run.pid if leader else follower, signal.SIGTERM)
    _, err = run.communicate(timeout=LIMIT)
    assert run.returncode == 130
    assert err.count("ending after the images in hand") == leader
    assert err.count("a process of this run was asked to end") == (not leader)
    assert "are missing; the same command with --resume makes them" in err
    lines = manifest(tmp_path)
    assert 0 < len(lines) < 800
    assert sorted(line["file"] for line in lines) == sorted(data(tmp_path))


@pytest.mark.slow
def test_torchrun(model, tmp_path, whole) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    base = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 2, "--n_samples", 4, "--n_iter", 40]
    base += ["--prompt", "a cat", "--watermark", "none", "--safety", "off", "--device", "cpu"]
    run = subprocess.run(
        [*words, str(SCRIPTS / "txt2img.py"), *map(str, [*base, "--outdir", tmp_path])],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (0, f"{tmp_path}\n")
    assert data(tmp_path) == whole


def test_a_mistake_is_reported_once_and_starts_nobody(model, tmp_path) -> None:
    run = team_of(tmp_path, model, "--devices", 2, "--ckpt", tmp_path / "nowhere.ckpt")
    _, err = run.communicate(timeout=LIMIT)
    assert run.returncode == 2
    assert len(err.splitlines()) == 1
    assert "no checkpoint at" in err


def test_processes_that_do_not_come_together(command: Callable[..., Result], model, monkeypatch) -> None:
    import lightning_fabric

    def broken(*_: object, **__: object) -> None:
        raise ValueError("no port")

    monkeypatch.setattr(lightning_fabric, "Fabric", broken)
    result = command("txt2img", "--config", model[0], "--ckpt", model[1], "--devices", 2, "--device", "cpu")
    assert result.code == 2
    assert result.err[-1] == "txt2img.py: error: the 2 processes did not come together: no port"
