#!/usr/bin/env python3
"""Everything that only a GPU can settle, in one command: is the fast path exact, and how fast is it?

    python benchmarks/gpu_check.py                                 # under 8 minutes on an H200
    python benchmarks/gpu_check.py --only compiled v2_compiled --cache outputs/compiled
    python benchmarks/gpu_check.py --device cpu --tiny             # a dry run of its code

Random weights are made on the device, and nothing is downloaded. The items come in the order of what they are
worth. Each is done in a process that a failed one does not take along, and what it found is in OUT/gpu.json
and OUT/gpu.md at once. The exit code is 1 if something was not as it should be.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu.check import Check
from report import Row, machine, markdown, package_version

from ldm.cli.entry import run
from ldm.cli.parser import Parser, number
from ldm.log import notice
from ldm.weights.loading import ROOT


@dataclass(frozen=True)
class Item:
    """`function`, of a module in benchmarks/gpu, yields rows; on an H200 it takes about `seconds`."""

    function: str
    seconds: float
    about: str


# The most valuable first. What needs the compiler comes last: how long that takes is known least.
ITEMS = {
    "replay": Item("exact.replay", 75, "recordings equal eager calls bit for bit"),
    "image": Item("speed.image", 35, "one image end to end, and its parts"),
    "memory": Item("exact.memory", 45, "--low_vram: exactness and peaks"),
    "batches": Item("speed.batches", 40, "images/s over the batch size"),
    "v2": Item("speed.v2", 20, "SD 2.1 at 768x768"),
    "nan": Item("exact.nan_fallback", 20, "a decoder beyond float16"),
    "oom": Item("exact.out_of_memory", 20, "memory that ends"),
    "failed_recording": Item("exact.failed_recording", 10, "a recording that fails"),
    "approximations": Item("exact.approximations", 10, "--deepcache and --tome with recordings"),
    "first": Item("speed.first", 15, "the first image of a process"),
    "ladder": Item("speed.ladder", 30, "what each idea gains"),
    "diffusers": Item("speed.diffusers", 45, "against diffusers"),
    "first_compiled": Item("speed.first_compiled", 100, "the first image of a process, compiled"),
    "compiled": Item("exact.compiled", 60, "--compile: distance, graph breaks, recompilations"),
    "ladder_compiled": Item("speed.ladder_compiled", 100, "what the compiler and its ideas gain"),
    "diffusers_compiled": Item("speed.diffusers_compiled", 100, "against diffusers, both compiled"),
    "tiled": Item("exact.tiled", 40, "--compile with --vae_tiling"),
    "v2_compiled": Item("speed.v2_compiled", 100, "SD 2.1 at 768x768, --compile"),
}


@dataclass
class Outcome:
    """What became of an item: "done", "failed", "stopped" (out of minutes) or "skipped"."""

    state: str = "under way"
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    why: str = ""  # a traceback, or why it was skipped


# the process that does the items


def serve(pipe: Connection, check: Check) -> None:
    """Do the items that are asked for by the name of their function: rows, then None or a traceback."""
    with suppress(OSError):  # so that it can be ended together with what it has started
        os.setsid()
    pipe.send(facts(check))
    while True:
        try:
            function = pipe.recv()
        except EOFError:
            return
        module, _, name = function.partition(".")
        try:
            for row in getattr(import_module(f"gpu.{module}"), name)(check):
                pipe.send(row)
            pipe.send(None)
        except Exception:
            pipe.send(traceback.format_exc().replace(f"{ROOT}/", ""))
            return  # what is left of it, on the device too, must not disturb the next item


def facts(check: Check) -> dict[str, Any]:
    """What the figures depend on; nothing that says whose machine it is."""
    import torch

    return {
        **machine(check.device),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version() if check.cuda else None,
        "triton": package_version("triton"),
        "commit": commit(),
        "dry run": True if check.tiny else None,
    }


def output_of(*command: str) -> str | None:
    """The first line that a command prints; None if it cannot be run, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] or None if done.returncode == 0 else None


def commit() -> str:
    """The commit that is checked out, and whether files of it were changed."""
    found = output_of("git", "rev-parse", "--short=10", "HEAD")
    if found is None:
        return "unknown"
    return found + (
        " with changes" if output_of("git", "status", "--porcelain", "--untracked-files=no") else ""
    )


class Worker:
    """A process that serves, started when the first item, or the first after a failed one, needs it."""

    def __init__(self, check: Check):
        self.pipe, other = Pipe()
        self.process = get_context("spawn").Process(target=serve, args=(other, check))
        self.process.start()
        other.close()
        self.facts = self.pipe.recv()

    def rows(self, item: Item, deadline: float) -> Iterator[Row]:
        """The rows as they are found; RuntimeError with a traceback, or TimeoutError at the deadline."""
        self.pipe.send(item.function)
        while True:
            if not self.pipe.poll(max(0.0, deadline - time.time())):
                raise TimeoutError
            try:
                found = self.pipe.recv()
            except EOFError:
                self.process.join(10)
                raise RuntimeError(f"its process ended with exit code {self.process.exitcode}") from None
            if found is None:
                return
            if isinstance(found, str):
                raise RuntimeError(found)
            yield found

    def end(self) -> None:
        """End the process and all that it has started."""
        self.pipe.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


# results


def write_results(folder: Path, about: dict[str, Any], outcomes: dict[str, Outcome]) -> str:
    """The table so far, after writing it and every reading to the folder."""
    rows = [row for outcome in outcomes.values() for row in outcome.rows]
    table = markdown(about, rows)
    table += "".join(f"\n{line}\n" for line in remarks(outcomes))
    record = {"machine": about, "items": {name: asdict(outcome) for name, outcome in outcomes.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("gpu.json", json.dumps(record, indent=1, default=str) + "\n"), ("gpu.md", table)):
        unfinished = folder / f".{name}.{os.getpid()}"
        unfinished.write_text(text)
        unfinished.replace(folder / name)
    return table


def remarks(outcomes: dict[str, Outcome]) -> Iterator[str]:
    """A line for each item that is not done, with the end of its traceback."""
    for name, outcome in outcomes.items():
        if outcome.state != "done":
            last = outcome.why.strip().splitlines()[-1:] or [""]
            yield f"`{name}` {outcome.state} after {outcome.seconds:.0f} s: {last[0]}"


def check_item(worker: Worker | None, check: Check, name: str, outcome: Outcome, note: Any) -> Worker | None:
    """Do an item; returns the process for the next one, None if a new one is needed. `note` saves a row."""
    item, start = ITEMS[name], time.time()
    try:
        worker = worker or Worker(check)
        for row in worker.rows(item, check.deadline):
            outcome.rows.append(row)
            outcome.seconds = time.time() - start
            note(worker.facts)
        outcome.state = "done"
    except TimeoutError:
        outcome.state, outcome.why = "stopped", "the minutes were over"
    except (RuntimeError, EOFError, OSError) as error:
        outcome.state, outcome.why = "failed", str(error) or f"its process did not start ({error!r})"
        print(outcome.why, file=sys.stderr)
    outcome.seconds = time.time() - start
    if outcome.state != "done" and worker:
        worker.end()
        worker = None
    return worker


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    listed = "".join(f"\n  {name:<18}{item.about}, {item.seconds:.0f} s" for name, item in ITEMS.items())
    made = Parser(
        prog="gpu_check.py", description=__doc__, epilog=f"items:{listed}", formatter_class=formatter
    )
    add = made.add_argument
    add("--out", type=Path, default=ROOT / "outputs/gpu-check", metavar="DIR", help="for gpu.json and gpu.md")
    add("--cache", type=Path, metavar="DIR", help="keeps compiled code for a further call")
    add("--minutes", type=number(float, 0.1), default=8.0, help="items that do not fit are skipped (8)")
    add(
        "--only",
        nargs="+",
        choices=ITEMS,
        default=list(ITEMS),
        metavar="ITEM",
        help="only these, in this order",
    )
    add("--device", default="cuda", help="cuda, cuda:N or, with --tiny, cpu (cuda)")
    add(
        "--tiny", action="store_true", help="a dry run: miniature models, few steps; no figure means anything"
    )
    return made


def main(argv: list[str] | None = None) -> int:
    from ldm.pipeline.device import choose_device

    options = parser().parse_args(argv)
    choose_device(options.device)
    outcomes: dict[str, Outcome] = {}
    about: dict[str, Any] = {}
    worker = None
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        cache = (options.cache or folder / "cache").absolute()
        # The user's own cache would make the first image's figures those of another command.
        os.environ |= {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(cache)}
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        deadline = time.time() + 60 * options.minutes
        check = Check(options.device, options.tiny, folder, cache, deadline)

        def note(found: dict[str, Any]) -> None:
            about.update(found)
            write_results(options.out, about, outcomes)

        try:
            for each in dict.fromkeys(options.only):
                outcome = outcomes[each] = Outcome()
                if check.left() < (1 if check.tiny else ITEMS[each].seconds):
                    outcome.state = "skipped"
                    outcome.why = f"{check.left():.0f} s were left, it takes about {ITEMS[each].seconds:.0f}"
                else:
                    notice(f"{each}: {ITEMS[each].about} … ({check.left():.0f} s left)")
                    worker = check_item(worker, check, each, outcome, note)
                table = write_results(options.out, about, outcomes)
        finally:
            if worker:
                worker.end()
    print(table, end="")
    wrong = any(row.met is False for outcome in outcomes.values() for row in outcome.rows)
    return int(wrong or any(outcome.state != "done" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(run(main))
