"""The page in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from commands import SCRIPTS


@contextmanager
def page(
    model: tuple[Path, Path], folder: Path, python: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process that serves a model, given as config and weights, and its address; it is killed in the end.

    `python` are further arguments of the interpreter before the script; `folder` has its temporary files.
    """
    config, weights = model
    command = [sys.executable, *python, str(SCRIPTS / "webui.py"), "--port", "0", "--safety", "off"]
    command += ["--model", f"tiny={weights},{config}"]
    environment = {**os.environ, "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
    ) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("The page is at http://127.0.0.1:"), process.stderr.read()
            yield process, line.split()[-1]
        finally:
            process.kill()
