"""Running the scripts in this process, and what became of it."""

import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from ldm.cli.arguments import Arguments
from ldm.pipeline.infotext import read_metadata
from ldm.runs.manifest import LOCK, MANIFEST, RUNS

SCRIPTS = Path(__file__).parents[1] / "scripts"


@dataclass
class Result:
    code: int
    out: list[str]  # lines of stdout
    err: list[str]  # lines of stderr without the progress bar
    folder: Path

    @property
    def files(self) -> list[str]:
        """Every file in the output folder, hidden ones too, but for the record of runs."""
        paths = (path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())
        return sorted(str(path) for path in paths if path.name not in (MANIFEST, RUNS, LOCK))

    @property
    def paths(self) -> list[Path]:
        return sorted((self.folder / "samples").glob("*.png"))

    @property
    def images(self) -> list[np.ndarray]:
        return [pixels(path) for path in self.paths]

    @property
    def settings(self) -> list[dict]:
        return [read_metadata(path) for path in self.paths]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def lines(stderr: str) -> list[str]:
    stripped = map(str.strip, stderr.splitlines())
    return [line for line in stripped if line and not re.match(r"\d+ images:", line)]


@functools.cache
def script(name: str) -> ModuleType:
    """The module of scripts/<name>.py."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def effective(arguments: Arguments, flag: str) -> Any:
    """What a flag comes to in a command's arguments, given or not: False for a switch that is not given."""
    name = flag.removeprefix("--").replace("-", "_")
    switch = name in ("plms", "dpm_solver", "laion400m")
    if name in ("config", "ckpt", "C", "f", "from_file") or switch:
        return arguments.given.get(name, False if switch else None)
    known = {"ddim_steps": "steps", "ddim_eta": "eta", "H": "height", "W": "width"}
    name = known.get(name, name)
    for owner in (arguments.run, arguments.request, arguments.runtime):  # the seed is the run's
        if hasattr(owner, name):
            return getattr(owner, name)
    raise AssertionError(f"{flag} is in no dataclass")


def refused(result: Result, *words: str) -> None:
    """Exit code 2, one line that says why, and no file."""
    assert result.code == 2
    assert len(result.err) == 1
    assert re.match(r"\w+\.py: error: ", result.err[0])
    for word in words:
        assert word in result.err[0]
    assert result.out == []
    assert result.files == []
