"""The record of runs in an output folder: what each image is, and what an interrupted run still lacks.

`manifest.jsonl` has a line for every image, written when the image is finished. The hidden `.runs.jsonl` has
one for every run that started, with the file numbers that are its own: image k of a run is file `first + k`.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Any

from ldm.errors import InputError
from ldm.images.metadata import FILE_SETTINGS

MANIFEST, RUNS = "manifest.jsonl", ".runs.jsonl"


class RunRecord:
    """One run in an output folder, new or taken up again.

    `settings` are all that its images depend on; they are compared when a run is taken up again. `done` maps
    the finished images to their files, None for those that came to nothing.
    """

    def __init__(self, outdir: Path, settings: dict[str, Any], images: int):
        self.outdir, self.images = outdir, images
        self.settings = json.loads(json.dumps(without_folders(settings)))  # as it reads back
        self.run = uuid.uuid4().hex[:12]
        self.first = 0
        self.done: dict[int, str | None] = {}
        self.grids: list[str] = []
        self.resumed = False

    def start(self, next_number: int) -> None:
        """Claim the file numbers from `next_number` on, behind those that running runs have claimed."""
        with self._alone():
            claims = self._going_on().values()
            self.first = max([next_number, *(line["first"] + line["images"] for line in claims)])
            self._enter(first=self.first, images=self.images, settings=self.settings)

    def resume(self) -> bool:
        """Take up the last run of the same settings; False where the folder has no run at all.

        Raises InputError that names the differences where it has only others.
        """
        with self._alone():
            runs = [line for line in read_lines(self.outdir / RUNS) if "settings" in line]
            if not runs:
                return False
            mine = [line for line in runs if line["settings"] == self.settings]
            if not mine:
                raise InputError(
                    f"--resume: {self.outdir} has no run of these settings; its last one had "
                    f"{differences(runs[-1]['settings'], self.settings)}"
                )
            self.run, self.first = mine[-1]["run"], mine[-1]["first"]
            if other := self._going_on().get(self.run):
                raise InputError(f"--resume: that run is still going on, as process {other['pid']}")
            for line in read_lines(self.outdir / RUNS):
                if line.get("run") == self.run and "grid" in line:
                    self.grids.append(line["grid"])
            self._enter(first=self.first, images=self.images)
        self.resumed = True
        self.refresh()
        return True

    def refresh(self) -> None:
        """What is done, as the manifest tells it: other processes may have added to it."""
        self.done = {}
        for line in read_lines(self.outdir / MANIFEST):
            mine = line.get("run") == self.run and "error" not in line
            if mine and (not line["file"] or (self.outdir / line["file"]).exists()):
                self.done[line["image"]] = line["file"]

    def add(self, image: int, file: str | None, facts: dict[str, Any]) -> dict[str, Any]:
        """Image number `image` is finished: its file, relative to the folder, None if it came to nothing.

        Returns its line of the manifest.
        """
        self.done[image] = file
        line = {"run": self.run, "image": image, "file": file, **without_folders(facts)}
        append(self.outdir / MANIFEST, line)
        return line

    def add_grid(self, file: str) -> None:
        self.grids.append(file)
        self._enter(grid=file)

    def end(self) -> None:
        """The process is done with it, finished or not: its claim on numbers ends."""
        self._enter(ended=True)

    @staticmethod
    def last_settings(outdir: Path) -> dict[str, Any]:
        """Of the folder's last run; empty if there was none."""
        runs = [line["settings"] for line in read_lines(outdir / RUNS) if "settings" in line]
        return runs[-1] if runs else {}

    def _going_on(self) -> dict[str, dict[str, Any]]:
        """The claims of runs that have not ended and whose processes are there."""
        claims = {}
        for line in read_lines(self.outdir / RUNS):
            if "first" in line:
                claims[line["run"]] = line
            elif "ended" in line:
                claims.pop(line["run"], None)
        return {run: line for run, line in claims.items() if is_running(line["host"], line["pid"])}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other run starts or is taken up in this folder meanwhile."""
        with open(self.outdir / MANIFEST, "ab") as file, locked(file):
            yield

    def missing(self) -> list[int]:
        return [k for k in range(self.images) if k not in self.done]

    def _enter(self, **facts: Any) -> None:
        line = {"run": self.run, **facts, "pid": os.getpid(), "host": socket.gethostname()}
        append(self.outdir / RUNS, line)


def without_folders(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with files by their names alone: where they lie is nobody's business, and may change."""
    return settings | {key: PurePath(settings[key]).name for key in FILE_SETTINGS if settings.get(key)}


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs, in words: "steps 50, now 20; scale 7.5, now 5"."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name} {_short(before.get(name))}, now {_short(now.get(name))}" for name in names)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else f"{text[:57]}…"


def append(path: Path, line: dict[str, Any]) -> None:
    """One more line, on the disk when this returns; a torn one before it is closed off first."""
    data = json.dumps(line).encode() + b"\n"
    with open(path, "a+b", buffering=0) as file, locked(file):
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                data = b"\n" + data
        file.write(data)
        os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that are whole; none if it is not there."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    for line in data.split(b"\n"):
        try:
            content = json.loads(line)
        except ValueError:  # torn by a power cut, or empty
            continue
        if isinstance(content, dict):
            yield content


@contextmanager
def locked(file: IO[bytes]) -> Iterator[None]:
    """Only one process at a time is inside, where the system can tell; the lock ends with its process."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def is_running(host: str, pid: int) -> bool:
    """Whether a process is there; on another machine nobody can tell, so yes."""
    if host != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
