"""Exit codes, and who reports what."""

import gc
import io
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Result

from ldm.cli import entry
from ldm.errors import FieldError, InputError
from ldm.images.outputs import OutputFolder
from ldm.log import LOG, notice

ROOT = Path(__file__).parents[2]
Command = Callable[..., Result]
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
FABRIC = {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "NODE_RANK": "0"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """The exit code of a main function that raises this, and the lines on stderr."""
    monkeypatch.setattr(sys, "argv", ["txt2img.py"])

    def call(error: BaseException, *argv: str) -> tuple[int, list[str]]:
        def main(words: list[str] | None) -> int:
            raise error

        code = entry.run(main, list(argv))
        return code, capsys.readouterr().err.splitlines()

    return call


def test_debug_shows_errors_that_end_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Where a service's batch or hook had failed was logged, and shown to nobody."""

    def main(words: list[str] | None) -> int:
        try:
            raise ValueError("of one request")
        except ValueError:
            LOG.debug("a batch failed", exc_info=True)
        return 0

    level = LOG.level
    assert entry.run(main, []) == 0
    assert capsys.readouterr().err == ""
    assert entry.run(main, ["--debug"]) == 0
    assert "ValueError: of one request" in capsys.readouterr().err
    assert LOG.level == level


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("it is\nwrong"), 2, "error: it is wrong"),
        (FieldError("{height} {n} is odd", n=3), 2, "error: --H 3 is odd"),
        (OSError(5, "Input/output error"), 1, "OSError: [Errno 5] Input/output error (--debug shows where)"),
        (RuntimeError("a\nb"), 1, "RuntimeError: a b (--debug shows where)"),
        (KeyboardInterrupt(), 130, "interrupted; the images that were finished are saved"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_codes(run: Callable, error: BaseException, code: int, line: str) -> None:
    """Any OSError counted as the user's mistake, our own ones among them."""
    assert run(error) == (code, [f"txt2img.py: {line}"])
    if not isinstance(error, KeyboardInterrupt):
        with pytest.raises(type(error)):
            run(error, "--debug")


def test_an_os_error_from_inside(command: Command, model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(OutputFolder, "clear", fail)
    result = command("txt2img", "--config", model[0], "--ckpt", model[1], "--steps", 1, "--watermark", "none")
    line = "txt2img.py: OSError: [Errno 5] Input/output error (--debug shows where)"
    assert (result.code, result.err, result.out) == (1, [line], [])


def test_the_log_is_as_before_afterwards(run: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    before = LOG.handlers, LOG.propagate
    seen = []

    def main(words: list[str] | None) -> int:
        seen.append([type(handler) for handler in LOG.handlers])
        notice("a\nline")
        return 7

    assert entry.run(main, []) == 7
    assert seen == [[logging.StreamHandler]]
    assert (LOG.handlers, LOG.propagate) == before
    assert capsys.readouterr().err == "a line\n"


@pytest.mark.parametrize("env", [TORCHRUN, SRUN, FABRIC], ids=["torchrun", "srun", "Fabric"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("argv", [["--steps", "0"], ["--H", "510"], ["--config", "nowhere.yaml"]])
def test_followers_leave_mistakes_to_the_leader(
    command: Command, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], rank: int, argv: list[str]
) -> None:
    """Each process of a run reported the same mistake in the arguments."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(rank))
    result = command("txt2img", *argv)
    assert (result.code, len(result.err), result.files) == (2, 1 - rank, [])


def test_followers_do_not_read_the_prompts(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Standard input is the leader's: a follower waited for it, or found it empty."""
    from ldm.cli.arguments import parse
    from ldm.cli.parser import txt2img_parser

    for name, value in (TORCHRUN | {"RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    assert "lines" not in vars(parse(txt2img_parser(), ["--from-file", str(tmp_path / "nowhere.txt")]))


def test_start_and_end_search_little_for_garbage() -> None:
    """Of a command of 3.6 s Python spent 0.8 s searching torch's objects for garbage."""
    seen = []

    def main(words: list[str] | None) -> int:
        seen.append(gc.get_threshold()[0])
        return 0

    before = gc.get_threshold()
    assert entry.run(main, []) == 0
    assert seen == [entry.OBJECTS] != [before[0]]
    assert gc.get_threshold() == before


def test_objects_are_frozen_when_python_ends() -> None:
    """The search at the end was half of the above; a function registered earlier is called later."""
    code = (
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0))\n"
        "from ldm.cli import entry\n"
        "entry.run(lambda words: print(gc.get_freeze_count()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["0", "True"]


def test_triton_is_not_told_of_leaks() -> None:
    """Objects that were frozen were reported as leaked, line by line, where training had imported triton."""
    pytest.importorskip("triton")
    code = "import triton; from ldm.cli import entry; entry.run(lambda words: 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", r"caf\xe9 \u591c \udce9"), ("utf-8", r"café 夜 \udce9")]
)
def test_what_stdout_cannot_encode_is_escaped(
    monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str
) -> None:
    """A prompt that the terminal's encoding lacks ended a command with a UnicodeEncodeError."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["image_info.py"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.setattr(entry.atexit, "register", lambda function: None)
    assert entry.run(lambda words: print("café 夜 \udce9", flush=True) or 0) == 0
    assert written.getvalue().decode(encoding).splitlines() == [shown]
