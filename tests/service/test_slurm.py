"""deploy/slurm.sh without a SLURM: stand-ins for its commands that do to the tasks what SLURM's own do."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import script
from run_helpers import manifest

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "deploy/slurm.sh"
LIMIT = 300  # seconds after which a job counts as hanging: on a busy machine loading takes a minute
LAUNCHERS = re.compile(r"SLURM_|TORCHELASTIC_|(MASTER_(ADDR|PORT)|(LOCAL_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE)$")

# Starts the tasks, each in a process group of its own. As SLURM's srun does, it has the tasks killed when it
# is sent SIGTERM, and returns the highest exit code.
SRUN = """
import json, os, signal, subprocess, sys
folder = os.environ["STANDINS"]
options = [word for word in sys.argv[1:] if word.startswith("--")]
command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
json.dump([sys.argv[1:], os.getcwd()], open(f"{folder}/srun.json", "w"))
place = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NODEID": "0"}
count = int(os.environ["TASKS"])
tasks = []
for rank in map(str, range(count)):
    place |= {"SLURM_STEP_NUM_TASKS": str(count), "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
    tasks.append(subprocess.Popen(command, env=os.environ | place, start_new_session=True))
def end(*_):
    for task in tasks:
        task.kill()
signal.signal(signal.SIGTERM, end)
open(f"{folder}/tasks", "w").write(" ".join(str(task.pid) for task in tasks))
codes = [task.wait() for task in tasks]
os.remove(f"{folder}/tasks")
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCANCEL = """
import os, signal, sys
assert sys.argv[1:] == ["--signal=TERM", "17"], sys.argv
for pid in open(os.environ["STANDINS"] + "/tasks").read().split():
    os.kill(int(pid), signal.SIGTERM)
"""
SCONTROL = """
import os, sys
open(os.environ["STANDINS"] + "/scontrol", "a").write(" ".join(sys.argv[1:]) + "\\n")
"""
# Ends at once with the exit code that it is told, or says that it is there and waits for SIGTERM.
TASK = """
import os, signal, sys, time
folder, how = os.environ["STANDINS"], os.environ["HOW"]
if how.isdigit():
    sys.exit(int(how))
asked = []
def ask(*_):
    if asked:
        os._exit(99)
    asked.append(True)
if how != "loading":
    signal.signal(signal.SIGTERM, ask)
rank = os.environ["SLURM_PROCID"]
open(f"{folder}/ready {rank}", "w").close()
while not asked:
    time.sleep(0.01)
open(f"{folder}/asked {rank}", "w").close()
while how == "long" and not os.path.exists(f"{folder}/go"):
    time.sleep(0.01)
time.sleep(0.3)
open(f"{folder}/saved {rank}", "w").close()
sys.exit(130 if how != "done" and rank == "0" else 0)
"""


class Job:
    """A job of two tasks, whose folder has spaces in its name."""

    def __init__(self, folder: Path):
        self.folder = folder / "a folder"
        (self.folder / "bin").mkdir(parents=True)
        for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
            self.program(self.folder / "bin" / name, text)
        python = "import os, sys\nos.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        self.program(self.folder / "bin/python", python)
        self.environment = {name: value for name, value in os.environ.items() if not LAUNCHERS.match(name)}
        self.environment |= {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "STANDINS": str(self.folder),
            "TASKS": "2",
            "SLURM_JOB_ID": "17",
            "SLURM_CPUS_PER_TASK": "1",
            "SECONDS": "3600",  # bash counts the age of the job from here on
        }
        self.process: subprocess.Popen | None = None

    @staticmethod
    def program(path: Path, text: str) -> None:
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(0o755)

    def with_stand_in(self, how: str = "0") -> None:
        """A toolkit whose batch_score.py is a stand-in, too."""
        (self.folder / "toolkit/scripts").mkdir(parents=True)
        (self.folder / "toolkit/scripts/batch_score.py").write_text(TASK)
        self.environment["TOOLKIT"] = str(self.folder / "toolkit")
        self.environment["HOW"] = how

    def start(self, *argv: object) -> None:
        """As SLURM does, in the folder that the job was submitted from."""
        command = ["bash", SLURM, *map(str, argv)]
        self.process = subprocess.Popen(
            command, env=self.environment, cwd=self.folder, stderr=subprocess.PIPE, text=True
        )

    def end(self) -> tuple[int, str]:
        """Exit code and stderr."""
        _, err = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, err

    def wait_until(self, name: str, count: int) -> None:
        """Until so many files of the job's folder have names like this."""
        end = time.monotonic() + LIMIT
        while len(list(self.folder.glob(name))) < count:
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < end
            time.sleep(0.01)

    def signal_tasks(self, number: int) -> None:
        for pid in (self.folder / "tasks").read_text().split():
            os.kill(int(pid), number)

    @property
    def srun(self) -> tuple[list[str], str]:
        """The words behind srun, and the folder that it was called in."""
        words, folder = json.loads((self.folder / "srun.json").read_text())
        return words, folder

    @property
    def requeued(self) -> bool:
        path = self.folder / "scontrol"
        if not path.exists():
            return False
        assert path.read_text() == "requeue 17\n"
        return True


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    if (job.folder / "tasks").exists():
        job.signal_tasks(signal.SIGKILL)
    if job.process is not None:
        job.process.kill()
        job.process.communicate()


def test_the_job_is_a_run_that_is_resumed(job: Job) -> None:
    job.with_stand_in()
    job.start("prompts with a space.csv", "out", "--steps", "30")
    assert job.end() == (0, "")
    words, _ = job.srun
    start = next(i for i, word in enumerate(words) if word.endswith("scripts/batch_score.py"))
    scoring = script("batch_score").parse(words[start + 1 :])
    assert scoring.args.input == ["prompts with a space.csv"]
    assert scoring.run.resume
    assert (scoring.run.outdir, scoring.settings) == ("out", {"steps": 30})
    assert not job.requeued


def test_names_are_in_the_folder_submitted_from(job: Job) -> None:
    """With TOOLKIT set, the job went there, and a relative name was looked for in the wrong folder."""
    job.with_stand_in()
    job.start("prompts.csv", "out")
    assert job.end() == (0, "")
    words, folder = job.srun
    assert Path(folder) == job.folder
    assert f"{job.folder}/toolkit/scripts/batch_score.py" in words


def test_a_task_has_its_gpu_and_its_cores(job: Job) -> None:
    """Since SLURM 22.05 srun does not take --cpus-per-task from sbatch: a task had one core."""
    job.with_stand_in()
    job.environment["SLURM_CPUS_PER_TASK"] = "6"
    job.start("prompts.csv", "out")
    assert job.end() == (0, "")
    assert {"--gpus-per-task=1", "--cpus-per-task=6"} <= set(job.srun[0])


def test_tasks_do_not_end_one_another(job: Job) -> None:
    """Where slurm.conf has a WaitTime, the first task that was done had the others killed."""
    job.with_stand_in()
    job.start("prompts.csv", "out")
    assert job.end() == (0, "")
    assert {"--kill-on-bad-exit=0", "--wait=0"} <= set(job.srun[0])


def test_a_job_that_fails_says_so(job: Job) -> None:
    job.with_stand_in("3")
    job.start("prompts.csv", "out")
    assert job.end() == (3, "")
    assert not job.requeued


def test_missing_arguments_are_named(job: Job) -> None:
    """The line had the name of SLURM's copy of the script."""
    job.with_stand_in()
    job.start("prompts.csv")
    code, err = job.end()
    assert code == 2
    assert err.startswith("usage: sbatch deploy/slurm.sh INPUT.csv")
    assert len(err.splitlines()) == 1


def test_a_job_from_another_folder_says_what_to_set(job: Job) -> None:
    """Each task said that there is no such file, in as many lines as there are tasks."""
    job.start("prompts.csv", "out")
    code, err = job.end()
    assert code == 2
    (line,) = err.splitlines()
    assert str(job.folder) in line
    assert "TOOLKIT" in line


def test_before_the_time_limit_the_tasks_finish_what_is_in_hand(job: Job) -> None:
    """srun was sent SIGTERM, upon which it has the tasks killed: the images in hand were lost."""
    job.with_stand_in("missing")
    job.start("prompts.csv", "out")
    job.wait_until("ready *", 2)
    job.process.send_signal(signal.SIGUSR1)
    assert job.end()[0] == 0
    assert len(list(job.folder.glob("saved *"))) == 2
    assert job.requeued


def test_a_time_limit_that_leaves_no_time_ends_the_job(job: Job) -> None:
    """With a limit below three minutes SIGUSR1 comes at once: the job was queued again without end."""
    job.with_stand_in("done")
    job.environment["SECONDS"] = "0"
    job.start("prompts.csv", "out")
    job.wait_until("ready *", 2)
    job.process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)  # in which the tasks would have been sent SIGTERM
    assert not list(job.folder.glob("asked *"))
    job.signal_tasks(signal.SIGTERM)
    code, err = job.end()
    assert code == 0
    assert "give it more than 4 minutes" in err
    assert not job.requeued


def test_a_job_that_is_done_at_its_time_limit_is_not_queued_again(job: Job) -> None:
    """It was queued again, though nothing was missing."""
    job.with_stand_in("done")
    job.start("prompts.csv", "out")
    job.wait_until("ready *", 2)
    job.process.send_signal(signal.SIGUSR1)
    assert job.end()[0] == 0
    assert len(list(job.folder.glob("saved *"))) == 2
    assert not job.requeued


@pytest.mark.parametrize("state", ["missing", "loading"])
def test_a_preemption_with_time_to_end_queues_the_job_again(job: Job, state: str) -> None:
    """With a GraceTime SLURM sends SIGTERM to the tasks alone; the job failed, and did not come back."""
    job.with_stand_in(state)
    job.start("prompts.csv", "out")
    job.wait_until("ready *", 2)
    job.signal_tasks(signal.SIGTERM)
    assert job.end()[0] == 0
    assert job.requeued


@pytest.mark.parametrize("expiring", [False, True])
def test_a_cancelled_job_stays_cancelled(job: Job, expiring: bool) -> None:
    """SLURM sends SIGTERM to the script and the tasks; in a preemption without grace it queues by itself."""
    job.with_stand_in("long")
    job.start("prompts.csv", "out")
    job.wait_until("ready *", 2)
    if expiring:
        job.process.send_signal(signal.SIGUSR1)
    else:
        job.signal_tasks(signal.SIGTERM)
    job.wait_until("asked *", 2)
    job.process.send_signal(signal.SIGTERM)
    (job.folder / "go").touch()
    assert job.end()[0] == 130
    assert len(list(job.folder.glob("saved *"))) == 2
    assert not job.requeued


def test_the_next_job_makes_what_is_missing(job: Job, model: tuple[Path, Path]) -> None:
    """Two real tasks, interrupted near the time limit: no image is lost, and none made twice."""
    count = 40
    job.environment["TOOLKIT"] = str(ROOT)
    prompts = job.folder / "the prompts.csv"
    prompts.write_text("prompt\n" + "".join(f"a cat {k}\n" for k in range(count)))
    argv = [prompts.name, "the images", "--config", model[0], "--ckpt", model[1], "--device", "cpu"]
    argv += ["--steps", 2, "--batch_size", 2, "--seed", 5, "--safety", "off", "--watermark", "none"]
    job.start(*argv)
    job.wait_until("the images/samples/*.png", 2)
    job.process.send_signal(signal.SIGUSR1)
    code, err = job.end()
    out = job.folder / "the images"
    first = {line["file"]: (out / line["file"]).stat().st_mtime_ns for line in manifest(out)}
    assert code == 0, err
    assert job.requeued
    assert len(first) < count, "it was over before it was interrupted"
    assert {f"samples/{path.name}" for path in out.glob("samples/*.png")} == set(first)
    assert not (out / "answers").exists()

    job.environment["SLURM_RESTART_COUNT"] = "1"
    job.start(*argv)
    code, err = job.end()
    assert code == 0, err
    lines = manifest(out)
    assert sorted(line["seed"] for line in lines) == [*range(5, 5 + count)]
    assert {line["file"] for line in lines} == {f"samples/{k:05}.png" for k in range(count)}
    assert {name: (out / name).stat().st_mtime_ns for name in first} == first
    answers = json.loads((out / "answers/the prompts.csv.json").read_text())
    assert [answer["generated_image"] for answer in answers] == [f"samples/{k:05}.png" for k in range(count)]


def test_the_job_asks_for_a_gpu_a_task_and_to_be_queued_again() -> None:
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SLURM.read_text(), re.M))
    assert asked["gpus-per-task"] == "1"
    assert "requeue" in asked
    assert asked["open-mode"] == "append"
    assert asked["signal"].startswith("B:USR1@")
