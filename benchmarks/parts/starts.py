"""Whole processes of `txt2img.py`: its `--help`, and one image."""

import argparse
import re
import subprocess
import sys
import tempfile
from statistics import median

from measuring import PROMPT, timed_runs
from report import Row

from ldm.errors import InputError
from ldm.weights.loading import BUNDLED_CONFIG, ROOT


def measure_help(options: argparse.Namespace) -> list[Row]:
    command = [str(ROOT / "scripts/txt2img.py"), "--help"]
    tracing = [sys.executable, "-X", "importtime", *command]
    # this run, which is not timed, also writes the .pyc files
    imports = subprocess.run(tracing, capture_output=True, text=True).stderr
    has_torch = bool(re.search(r"\| +torch$", imports, re.M))
    times = timed_runs([sys.executable, *command], 5)
    return [
        Row(
            "`txt2img.py --help`, whole process, median of 5",
            "< 0.5 s, torch not imported",
            f"{median(times):.2f} s, torch {'' if has_torch else 'not '}imported",
            median(times) < 0.5 and not has_torch,
            {"seconds": times, "torch imported": has_torch},
        )
    ]


def measure_image(options: argparse.Namespace) -> list[Row]:
    what, target = "one image of scenes-128, 50 PLMS steps, whole process, median of 3", "< 8 s"
    arguments = ["--plms", "--n_samples", "1", "--n_iter", "1", "--skip_grid"]
    arguments += ["--prompt", PROMPT, "--config", str(ROOT / BUNDLED_CONFIG)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "scripts/txt2img.py"), *arguments, "--outdir", folder]
        try:
            times = timed_runs(command, 3)
        except InputError as error:
            return [Row(what, target, f"not measured: {error}")]
    return [Row(what, target, f"{median(times):.2f} s", median(times) < 8, {"seconds": times})]
