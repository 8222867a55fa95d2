"""How things are timed: a call, whole processes, and what a process of its own takes of memory."""

import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ldm.errors import InputError
from ldm.weights.loading import ROOT

GIB = 2**30
PROMPT = "a red cube on top of a blue sphere"


def in_fresh_process(function: Callable, *args: Any) -> Any:
    """What the function returns in a new Python: nothing is imported yet, and peak memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def seconds(work: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def timed_runs(command: list[str], repeats: int) -> list[float]:
    """Wall times of whole processes; InputError with its last line if one of them fails."""

    def once() -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise InputError((done.stderr.strip() or "no message").splitlines()[-1].replace(f"{ROOT}/", ""))

    return [seconds(once) for _ in range(repeats)]


def memory() -> dict[str, int]:
    """This process's memory now and at its peak, in bytes, mapped pages that were touched included (Linux).

    Not `getrusage`'s ru_maxrss: that starts from the peak of the process which started this one.
    """
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = {"now": "VmRSS", "anonymous": "RssAnon", "peak": "VmHWM"}
    return {name: int(status[key].split()[0]) * 1024 for name, key in kilobytes.items()}
