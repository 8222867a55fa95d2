"""Real runs of txt2img.py in processes of their own, and what they leave in their folder."""

import subprocess
import sys
import time
from pathlib import Path

from commands import SCRIPTS

from ldm.runs.manifest import LOCK, MANIFEST, RUNS, read_lines


def manifest(folder: Path) -> list[dict]:
    return list(read_lines(folder / MANIFEST))


def data(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its record and its lease."""
    names = (LOCK, MANIFEST, RUNS)
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in names]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if not path.name.startswith(".run-")
    }


def start(folder: Path, model: tuple[Path, Path], *argv: object, **options) -> subprocess.Popen:
    """A run of 50 batches of four images."""
    base = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 2, "--n_samples", 4, "--n_iter", 50]
    base += ["--prompt", "a cat", "--watermark", "none", "--safety", "off", "--outdir", folder]
    return subprocess.Popen(
        [sys.executable, SCRIPTS / "txt2img.py", *map(str, [*base, *argv])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for(folder: Path, images: int) -> None:
    """Wait until a run has finished so many images, which takes a minute on a machine that is busy."""
    end = time.monotonic() + 240
    while len(manifest(folder)) < images:
        assert time.monotonic() < end, "the run makes no images"
        time.sleep(0.01)
