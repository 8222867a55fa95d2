"""Runs of several processes, real ones over gloo: their pictures, kills, interrupts, launchers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import SCRIPTS, Result, refused
from test_manifest import data, manifest, start, wait_for

from ldm.errors import InputError
from ldm.runs.processes import NO_MORE, Place, Team, find_place

LAUNCHER = ("TORCHELASTIC_RUN_ID", "LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


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


# --- dealing


def test_alone_everything_falls_to_one() -> None:
    team = Team()
    team.join("cpu")
    assert (team.share("x"), list(team.deal("abc")), team.finish(lambda: None)) == ("x", ["a", "b", "c"], 0)


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


def test_the_leader_waits_and_tells_of_the_lost(monkeypatch, caplog) -> None:
    team, ticks = Team(Place(0, 3)), []

    def tick() -> None:
        ticks.append(team.count("finished", 1) if not ticks else None)

    monkeypatch.setattr("ldm.runs.processes.SILENCE", 0.3)
    assert team.finish(tick) == 1
    assert ticks[0] == 1
    assert caplog.messages == ["1 of 3 processes ended before they were done"]


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


# --- real processes


def team_of(folder: Path, model: tuple[Path, Path], *argv: object) -> subprocess.Popen:
    return start(folder, model, "--device", "cpu", *argv, env=os.environ | {"OMP_NUM_THREADS": "1"})


def workers(run: subprocess.Popen) -> list[int]:
    """The processes that a run has started."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def wait_for_share(folder: Path, pid: int) -> None:
    """Until a process has written a file: it has a batch of the deal."""
    end = time.monotonic() + 90
    while not any(f".{pid}." in name for name in os.listdir(folder / "samples")):
        assert time.monotonic() < end, "the process makes no images"
        time.sleep(0.001)


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
    out, err = run.communicate(timeout=120)
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
    _, err = run.communicate(timeout=120)
    assert run.returncode == 0
    assert "1 of 2 processes ended before they were done" in err
    assert data(tmp_path) == whole
    assert sorted(line["image"] for line in manifest(tmp_path)) == list(range(160))


@pytest.mark.slow
@pytest.mark.parametrize("again", [1, 2])
def test_a_killed_run_is_resumed_by_any_number(model, tmp_path, whole, again: int) -> None:
    run = team_of(tmp_path, model, "--n_iter", 40, "--devices", 2)
    wait_for(tmp_path, 30)
    run.kill()
    run.communicate()  # also waits for the other, which has the same stderr: without rank 0 it ends
    assert len(manifest(tmp_path)) < 160
    resumed = team_of(tmp_path, model, "--n_iter", 40, "--devices", again, "--resume")
    resumed.communicate(timeout=180)
    assert resumed.returncode == 0
    assert data(tmp_path) == whole
    assert sorted(line["image"] for line in manifest(tmp_path)) == list(range(160))


@pytest.mark.slow
def test_sigterm_to_rank_0_ends_all(model, tmp_path) -> None:
    run = team_of(tmp_path, model, "--n_iter", 200, "--devices", 2)
    wait_for(tmp_path, 8)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert err.count("ending after the images in hand") == 1
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


def test_a_mistake_is_told_once_and_starts_nobody(model, tmp_path) -> None:
    run = team_of(tmp_path, model, "--devices", 2, "--ckpt", tmp_path / "nowhere.ckpt")
    _, err = run.communicate(timeout=60)
    assert run.returncode == 2
    assert len(err.splitlines()) == 1
    assert "no checkpoint at" in err


def test_processes_that_do_not_come_together(command: Callable[..., Result], model, monkeypatch) -> None:
    import lightning_fabric

    def broken(self) -> None:
        raise ValueError("no port")

    monkeypatch.setattr(lightning_fabric.Fabric, "launch", broken)
    result = command("txt2img", "--config", model[0], "--ckpt", model[1], "--devices", 2, "--device", "cpu")
    assert result.code == 2
    assert result.err[-1] == "txt2img.py: error: the 2 processes did not come together: no port"
