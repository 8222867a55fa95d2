"""The record of runs in an output folder: what each image is, and what an interrupted run still lacks.

`manifest.jsonl` has a line for every image, written when the image is finished. The hidden `.runs.jsonl` has
one for every run that started, with the file numbers that are its own: image k of a run is file `first + k`.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from ldm.errors import InputError
from ldm.images.outputs import CannotWrite, cannot_write
from ldm.pipeline.infotext import without_folders
from ldm.runs.lease import Lease, state

MANIFEST, RUNS, LOCK = "manifest.jsonl", ".runs.jsonl", ".runs.lock"


class RunRecord:
    """One run in an output folder, new or taken up again, as one of its processes sees it.

    `settings` are all that its files depend on, and `lines` what each line of prompts has of its own beside
    them; both are compared when a run is taken up again. `done` maps the finished images to their files, None
    where files are not saved. An image that came to nothing (NaN, a failed write) is in `failed`.
    """

    def __init__(
        self, outdir: Path, settings: dict[str, Any], images: int, lines: Sequence[dict[str, Any]] = ()
    ):
        self.outdir, self.images = outdir, images
        self.settings = as_read(without_folders(settings))
        self.lines = [as_read(without_folders(line)) for line in lines]
        self.run = uuid.uuid4().hex[:12]
        self.first = 0
        self.done: dict[int, str | None] = {}
        self.failed: set[int] = set()
        self.grids: set[str] = set()  # by the images in them
        self.resumed = False
        self._lease: Lease | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For the other processes of the run: the lease is the leader's."""
        return vars(self) | {"_lease": None}

    def start(self, next_number: int | Callable[[], int]) -> None:
        """Claim the file numbers from `next_number` on, behind those that living runs have claimed.

        A function is asked for it while no other run can start or end: one that ended since the folder was
        last listed has no claim any more, and its files have to be seen.
        """
        with self._alone():
            number = next_number() if callable(next_number) else next_number
            claims = [line for line in self._claims().values() if state(self.outdir, line["run"]) != "free"]
            self.first = max([number, *(line["first"] + line["images"] for line in claims)])
            self._take_lease()
            self._enter(first=self.first, images=self.images, settings=self.settings, lines=self.lines)

    def resume(self) -> bool:
        """Take up the last run of the same settings; False where the folder has no run at all.

        Raises InputError that names the differences where it has only others, and where the run goes on in
        another process. Whether a run on another machine still goes on takes up to a minute to see.
        """
        runs = [line for line in read_lines(self.outdir / RUNS) if "settings" in line]
        if not runs:
            return False
        mine = [line for line in runs if not self.differences(line)]
        if not mine:
            raise InputError(
                f"--resume: {self.outdir} has no run of these settings; its last one had "
                f"{self.differences(runs[-1])}"
            )
        self.run, self.first = mine[-1]["run"], mine[-1]["first"]
        self._take_lease()
        with self._alone():
            for line in read_lines(self.outdir / RUNS):
                if line.get("run") == self.run and "grid" in line:
                    self.grids.add(line.get("of"))
            self._enter(first=self.first, images=self.images)
        self.resumed = True
        self.refresh()
        return True

    def differences(self, other: dict[str, Any]) -> str:
        """What differs from another run's entry, in words: "steps 50, now 20; scale 7.5, now 5"."""
        words = differences(other["settings"], self.settings)
        theirs = other.get("lines", [])
        for number, (before, now) in enumerate(zip(theirs, self.lines, strict=False), 1):
            if words or before == now:
                continue
            # a line says only what is not as in `settings`
            words = differences(other["settings"] | before, self.settings | now) or differences(before, now)
            words = f"line {number}: {words}"
        if not words and len(theirs) != len(self.lines):
            words = f"lines {len(theirs)}, now {len(self.lines)}"
        return words

    def refresh(self) -> None:
        """Bring `done` and `failed` up to date with the manifest, to which other processes may have added."""
        self.done, self.failed = {}, set()
        for line in read_lines(self.outdir / MANIFEST):
            if line.get("run") != self.run:
                continue
            k, file = line["image"], line["file"]
            if "error" in line or line.get("nan"):
                if k not in self.done:
                    self.failed.add(k)
            elif file is None or (self.outdir / file).exists():
                self.done[k] = file
                self.failed.discard(k)

    def add(
        self, image: int, file: str | None, facts: dict[str, Any], failed: bool = False
    ) -> dict[str, Any]:
        """Record that image number `image` is finished: its file, relative to the folder.

        `failed` if it came to nothing. Returns its line of the manifest.
        """
        line = {"run": self.run, "image": image, "file": file, **without_folders(facts)}
        append(self.outdir / MANIFEST, line)
        if failed:
            self.failed.add(image)
        else:
            self.done[image] = file
            self.failed.discard(image)
        return line

    def add_grid(self, file: str, images: Sequence[str]) -> None:
        """Record a grid of these image files."""
        self.grids.add(_of(images))
        self._enter(grid=file, of=_of(images))

    def has_grid(self, images: Sequence[str]) -> bool:
        """Whether there is a grid of just these image files: one that came later may have been left out."""
        return _of(images) in self.grids

    def missing(self) -> list[int]:
        """The images that are still to be made, those that came to nothing among them."""
        return [k for k in range(self.images) if k not in self.done]

    @property
    def lost(self) -> bool:
        """Whether another machine has taken the run up, because this one gave no sign of life for long."""
        return self._lease is not None and self._lease.lost.is_set()

    @contextmanager
    def ending(self) -> Iterator[None]:
        """The record ends with the block, however that ends."""
        try:
            yield
        finally:
            if self._lease is not None:
                if not self.lost:
                    with suppress(CannotWrite):  # a run whose lease has ended has ended, too
                        self._enter(ended=True)
                self._lease.release()

    def _take_lease(self) -> None:
        lease = Lease(self.outdir, self.run)
        lease.acquire()
        self._lease = lease  # only now: `ending` ends the run of whoever has its lease

    def _claims(self) -> dict[str, dict[str, Any]]:
        """The last entry with file numbers of each run that has not ended."""
        claims = {}
        for line in read_lines(self.outdir / RUNS):
            if "first" in line:
                claims[line["run"]] = line
            elif "ended" in line:
                claims.pop(line["run"], None)
        return claims

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other run starts or is taken up in this folder meanwhile."""
        with folder_lock(self.outdir):
            yield

    def _enter(self, **facts: Any) -> None:
        append(self.outdir / RUNS, {"run": self.run, **facts})


def _of(images: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(images).encode()).hexdigest()[:16]


def last_settings(outdir: str | Path) -> dict[str, Any]:
    """Settings of the folder's last run; empty if there was none."""
    runs = [line["settings"] for line in read_lines(Path(outdir) / RUNS) if "settings" in line]
    return runs[-1] if runs else {}


def as_read(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back."""
    return json.loads(json.dumps(settings))


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs, in words: "steps 50, now 20; scale 7.5, now 5"."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name} {_short(before.get(name))}, now {_short(now.get(name))}" for name in names)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else f"{text[:57]}…"


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Only one process at a time is inside, where the file system has locks; they end with their process."""
    lock = FileLock(folder / LOCK, is_singleton=True)  # which may be taken again within
    try:
        lock.acquire()
    except (NotImplementedError, OSError):  # a network drive without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def append(path: Path, line: dict[str, Any]) -> None:
    """Add one line, which is on the disk when this returns; a torn one before it is closed off first.

    CannotWrite if the disk is full or the file cannot be written.
    """
    data = json.dumps(line).encode() + b"\n"
    try:
        with folder_lock(path.parent), open(path, "a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    data = b"\n" + data
            file.write(data)
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that are whole; none if it is not there."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    for line in data.split(b"\n"):
        try:
            content = json.loads(line)
        except ValueError:  # torn by a power cut, or empty
            continue
        if isinstance(content, dict):
            yield content
