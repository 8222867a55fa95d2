"""Long runs: what their bookkeeping takes, two processes, what a resumed one lacks, and planning."""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from measuring import PROMPT, in_fresh_process, seconds
from report import Row

from ldm.errors import InputError
from ldm.weights.loading import ROOT, SMALL_CONFIG


def measure_runs(options: argparse.Namespace) -> list[Row]:
    spent, whole = in_fresh_process(bookkeeping_share, 48)
    share = spent / whole
    one, two = images_per_second(1, 160), images_per_second(2, 160)
    again = in_fresh_process(resume_seconds, 100_000)
    planning = in_fresh_process(planning_seconds, 10_000)
    return [
        Row(
            "metadata, PNG and manifest of 48 images of scenes-64, 50 PLMS steps, of the run's time",
            "< 3 %",
            f"{share:.1%} ({1000 * spent / 48:.1f} ms an image, beside the sampling)",
            share < 0.03,
            {"spent": spent, "whole": whole},
        ),
        Row(
            "two processes (`--devices 2`), images/s, against one that is pinned to one core",
            "at least 1.6x",
            f"{two / one:.2f}x ({two:.2f} and {one:.2f} images/s, 160 images of 20 steps)",
            two / one >= 1.6,
            {"one": one, "two": two},
        ),
        Row(
            "what is missing among 100,000 lines of a manifest",
            "< 2 s",
            f"{again:.1f} s",
            again < 2,
            {"seconds": again},
        ),
        Row(
            "10,000 JSON lines with own options planned",
            "< 2 s",
            f"{planning:.1f} s",
            planning < 2,
            {"seconds": planning},
        ),
    ]


def bookkeeping_share(images: int) -> tuple[float, float]:
    """Seconds that metadata, encoding, writing and the manifest take in a run, and those of the run."""
    from ldm.cli.arguments import parse
    from ldm.cli.parser import txt2img_parser
    from ldm.runs import worker
    from ldm.runs.run import run

    spent: list[float] = []
    worker.save = timed(worker.save, spent)
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--prompt", PROMPT, "--config", str(ROOT / SMALL_CONFIG), "--outdir", folder, "--quiet"]
        argv += ["--n_samples", "4", "--n_iter", str(images // 4), "--safety", "off", "--plms"]
        command = parse(txt2img_parser(), argv)

        def whole_run() -> None:
            pipeline = command.pipeline()
            run(pipeline, command.requests(pipeline), command.run)

        with redirect_stdout(io.StringIO()):
            whole = seconds(whole_run)
    return sum(spent), whole


def timed(function: Callable, spent: list[float]) -> Callable:
    """The function, which notes how long each call takes."""

    def call(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args)
        finally:
            spent.append(time.perf_counter() - start)

    return call


def images_per_second(devices: int, images: int) -> float:
    """Of a run of scenes-64 by processes of one thread each, one to a core, as its bar says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "scripts/txt2img.py"), "--prompt", PROMPT, "--outdir", folder]
        command += ["--config", str(ROOT / SMALL_CONFIG), "--device", "cpu", "--devices", str(devices)]
        command += ["--n_samples", "4", "--n_iter", str(images // 4), "--steps", "20", "--skip_grid"]
        if devices == 1 and shutil.which("taskset"):
            command = ["taskset", "-c", "0", *command]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        rates = re.findall(r"([0-9.]+) images/s", done.stderr)
        if done.returncode or not rates:
            raise InputError((done.stderr.strip() or "no message").splitlines()[-1].replace(f"{ROOT}/", ""))
        return float(rates[-1])


def resume_seconds(lines: int) -> float:
    """How long it takes to find what a run lacks whose manifest has so many lines."""
    from ldm.runs.manifest import RunRecord

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record = RunRecord(folder, {"steps": 50}, lines)
        record.start(0)
        with record.ending():
            write_half_a_manifest(folder, record, lines)
        again = RunRecord(folder, {"steps": 50}, lines)

        def decide() -> None:
            again.resume()
            assert len(again.missing()) == lines // 2

        with again.ending():
            return seconds(decide)


def write_half_a_manifest(folder: Path, record: Any, lines: int) -> None:
    """Every other image of a run and its line of the manifest, and as many lines of another run."""
    from ldm.runs.manifest import MANIFEST

    (folder / "samples").mkdir()
    settings = {"prompt": PROMPT, "sampler": "ddim", "steps": 50, "scale": 7.5, "height": 512, "width": 512}
    with open(folder / MANIFEST, "w") as manifest:
        for k in range(0, lines, 2):
            file = f"samples/{k:05}.png"
            (folder / file).touch()
            manifest.write(json.dumps({"run": record.run, "image": k, "file": file, **settings}) + "\n")
        for k in range(1, lines, 2):
            line = {"run": "another", "image": k, "file": f"samples/{k:05}.png", **settings}
            manifest.write(json.dumps(line) + "\n")


def planning_seconds(lines: int) -> float:
    """How long it takes from the arguments of a command, whose JSON lines each have options of their own, to
    the plan of its run; after imports, and without the model.
    """
    import ldm.pipeline.pipeline  # noqa: F401, imports torch
    from ldm.cli.arguments import parse
    from ldm.cli.parser import txt2img_parser
    from ldm.runs.plan import plan_run

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.jsonl")
        own = ({"seed": k, "steps": 10 + k % 40, "scale": 1.5 + k / lines} for k in range(lines))
        path.write_text("".join(json.dumps({"prompt": PROMPT, **options}) + "\n" for options in own))
        argv = ["--from-file", str(path), "--config", str(ROOT / SMALL_CONFIG), "--n_iter", "1"]
        argv += ["--sampler", "dpmpp_2m", "--safety", "off", "--device", "cpu"]

        def plan() -> None:
            command = parse(txt2img_parser(), argv)
            requests = list(command.requests(command.pipeline()))
            found = plan_run(requests, command.run.seed, command.run.n_iter, command.run.n_samples, None)
            assert len(found.requests) == lines

        return seconds(plan)
