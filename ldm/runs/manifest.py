"""The record of runs in an output folder: what each image is, and what an interrupted run still lacks.

`manifest.jsonl` has a line for every image, written when the image is finished. The hidden `.runs.jsonl` has
one for every run that started, with the file numbers that are its own: image k of a run is file `first + k`.

Where a run has several processes, all but the one with rank 0 write their lines to hidden files of their own,
`.run-<id>.<process>.jsonl`: one file for all would let them wait for each other's lock and disk, and network
drives do not append for several machines at once. Rank 0 moves the lines into `manifest.jsonl` when the run
ends. Those of a run that was killed are moved when it is taken up, or when another one starts in the folder.
`read_manifest` reads all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from ldm.errors import InputError
from ldm.images.outputs import CannotWrite, cannot_write
from ldm.pipeline.infotext import without_folders
from ldm.runs.lease import Lease, state
from ldm.runs.options import RunOptions

MANIFEST, RUNS, LOCK = "manifest.jsonl", ".runs.jsonl", ".runs.lock"
PART = re.compile(r"\.run-(?P<run>[0-9a-f]+)\.[0-9a-f]{32}(\.at-(?P<begin>\d+))?\.jsonl")
SYNC_INTERVAL = 1.0  # seconds; a power cut costs the images since the last time, which are made again
SHOWN = 3  # names in a message
POLL = 0.005  # seconds between two looks whether the folder's lock is free, which is held for about one


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
        self.manifest = outdir / MANIFEST  # where this process writes its lines
        self._lease: Lease | None = None
        self._synced = 0.0  # when this process's own file last went to the disk

    def __getstate__(self) -> dict[str, Any]:
        """For the other processes of the run: what they need of it, as there may be hundreds of them.

        The lease is the leader's, and so are the files' names, of which it makes grids.
        """
        return vars(self) | {"_lease": None, "lines": [], "done": dict.fromkeys(self.done)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_synced": 0.0})  # clocks of other machines differ
        self.manifest = self.outdir / f".run-{self.run}.{uuid.uuid4().hex}.jsonl"

    def start(self, next_number: int | Callable[[], int]) -> None:
        """Claim the file numbers from `next_number` on, behind those that living runs have claimed.

        A function is asked for it while no other run can start or end: one that ended since the folder was
        last listed has no claim any more, and its files have to be seen.
        """
        with self._alone():
            self._move_lines_of_dead_runs()
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
        runs = started_runs(self.outdir)
        if not runs:
            # a service that keeps its images in a folder records jobs, and no runs
            if any("job" not in line for line in read_manifest(self.outdir)):
                raise InputError(
                    f"--resume: {self.outdir} has images, but not the hidden file {RUNS} that says of which "
                    "runs; copy it too, or leave out --resume"
                )
            return False
        mine = [line for line in runs if not self.differences(line)]
        if not mine:
            raise InputError(
                f"--resume: {self.outdir} has no run of these settings; its last one had "
                f"{self.differences(runs[-1])}{self._advice(runs[-1])}"
            )
        self.run, self.first = mine[-1]["run"], mine[-1]["first"]
        self._take_lease()
        with self._alone():
            for line in read_lines(self.outdir / RUNS):
                if line.get("run") == self.run and "grid" in line:
                    self.grids.add(line.get("of"))
            self._enter(first=self.first, images=self.images)
        for part in parts(self.outdir, self.run):
            move_lines(part, self.outdir / MANIFEST)
        self.refresh()
        self.resumed = True
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

    def _advice(self, other: dict[str, Any]) -> str:
        """What to do if another run had the files that this one starts from, and more of them."""
        for name in ("init_img", "mask", "depth"):
            now = {(self.settings | line).get(name) for line in self.lines} - {None}
            before = {(other["settings"] | line).get(name) for line in other.get("lines", [])} - {None}
            if now and now < before:
                gone = ", ".join(sorted(before - now)[:SHOWN]) + (", …" if len(before - now) > SHOWN else "")
                return f"; it also had {gone}: put back what is gone, or leave out --resume"
        return ""

    def earlier(self, chosen: Iterable[str]) -> dict[str, Any]:
        """Settings of the folder's newest run that differs from this one in the `chosen` settings alone.

        Those of its last run if there is none, so that an error names what else differs; empty without any.
        """
        runs, blank = started_runs(self.outdir), dict.fromkeys(chosen)
        alike = [
            run
            for run in runs
            if blank.keys() <= run["settings"].keys()
            and run["settings"] | blank == self.settings | blank
            and run.get("lines", []) == self.lines
        ]
        return (alike or runs)[-1]["settings"] if runs else {}

    def refresh(self) -> None:
        """Bring `done` and `failed` up to date with the manifest, to which other processes may have added."""

        @cache
        def names(folder: str) -> frozenset[str]:
            """Listed once: a network drive is asked for each of a million files otherwise."""
            try:
                return frozenset(os.listdir(self.outdir / folder))
            except OSError:
                return frozenset()

        def exists(file: str) -> bool:
            folder, _, name = file.rpartition("/")
            return name in names(folder) or (self.outdir / file).exists()

        self.done, self.failed = {}, set()
        for line in read_manifest(self.outdir, self.run):
            self._note(line, exists)

    def _note(self, line: dict[str, Any], exists: Callable[[str], bool]) -> None:
        k, file = line["image"], line["file"]
        if "error" in line or line.get("nan"):
            if k not in self.done:
                self.failed.add(k)
        elif file is None or exists(file):
            self.done[k] = file
            self.failed.discard(k)

    def gather(self) -> None:
        """Move what the run's other processes have recorded into the manifest, and into `done` and `failed`.

        CannotWrite if the disk is full; the rest is then moved the next time.
        """
        _list_anew(self.outdir)
        for part in parts(self.outdir, self.run):
            for line in image_lines(part):
                self._note(line, lambda file: True)
            move_lines(part, self.outdir / MANIFEST)

    def add(
        self, image: int, file: str | None, facts: dict[str, Any], failed: bool = False
    ) -> dict[str, Any]:
        """Record that image number `image` is finished: its file, relative to the folder.

        `failed` if it came to nothing. Returns its line of the manifest.
        """
        line = {"run": self.run, "image": image, "file": file, **without_folders(facts)}
        if self.manifest.name == MANIFEST:
            append(self.manifest, line)
        else:
            due = time.monotonic() >= self._synced + SYNC_INTERVAL
            append(self.manifest, line, shared=False, sync=due)
            self._synced = time.monotonic() if due else self._synced
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

    def add_costs(self, costs: dict[str, Any]) -> None:
        """Record what the run, or this part of it, took."""
        self._enter(costs=costs)

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
                    with suppress(InputError):  # what other processes have recorded stays in their files
                        self.gather()
                    with suppress(CannotWrite):  # a run whose lease has ended has ended, too
                        self._enter(ended=True)
                self._lease.release()

    def _take_lease(self) -> None:
        lease = Lease(self.outdir, self.run)
        lease.acquire()
        self._lease = lease  # only now: `ending` ends the run of whoever has its lease

    def _move_lines_of_dead_runs(self) -> None:
        """Into the manifest, although nobody has taken these runs up."""
        found = parts(self.outdir)
        runs = {PART.fullmatch(part.name)["run"] for part in found}
        dead = {run for run in runs if state(self.outdir, run) == "free"}
        for part in found:
            if PART.fullmatch(part.name)["run"] in dead:
                with suppress(InputError):  # another user's, or a full disk: they stay where they are
                    move_lines(part, self.outdir / MANIFEST)

    def _claims(self) -> dict[str, dict[str, Any]]:
        """The last entry with file numbers of each run that has not ended."""
        claims = {}
        for line in read_lines(self.outdir / RUNS):
            if {"run", "first", "images"} <= line.keys():
                claims[line["run"]] = line
            elif "ended" in line:
                claims.pop(line.get("run"), None)
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


def started_runs(outdir: str | Path) -> list[dict[str, Any]]:
    """The entries of a folder's runs, in the order in which they began: settings, lines, file numbers."""
    names = {"run", "settings", "first", "images"}
    return [line for line in read_lines(Path(outdir) / RUNS) if names <= line.keys()]


def chosen_seed(options: RunOptions, known: Mapping[str, Any] | None = None) -> tuple[int, bool]:
    """The seed of a run, and whether it was chosen just now: -1 leaves it to chance, or to the run that is
    taken up.

    That is the folder's newest run whose settings are the same as far as they are `known`, or else its last.
    """
    seed = options.seed
    if seed == -1 and options.resume:
        known, runs = as_read(dict(known or {})), started_runs(options.outdir)
        alike = [run for run in runs if {**known, **run["settings"]} == {**run["settings"], **known}]
        seed = (alike or runs)[-1]["settings"].get("seed", -1) if runs else -1
    return (new_seed(), True) if seed == -1 else (seed, False)


def new_seed() -> int:
    return secrets.randbelow(2**32)


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
    # A singleton may be taken again within. A soft lock, a file that is there, would outlive a dead machine.
    lock = FileLock(folder / LOCK, is_singleton=True, fallback_to_soft=False)
    try:
        lock.acquire(poll_interval=POLL)
    except (NotImplementedError, OSError):  # a network drive without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def append(path: Path, line: dict[str, Any], shared: bool = True, sync: bool = True) -> None:
    """Add one line, with `sync` on the disk when this returns; a torn one before it is closed off first.

    Without `sync` a line outlives its process, but not a power cut. A file that is not `shared` is written by
    this process alone. CannotWrite if the disk is full or the file cannot be written.
    """
    data = json.dumps(line).encode() + b"\n"
    alone = folder_lock(path.parent) if shared else nullcontext()
    try:
        with alone, open(path, "a+b") as file:
            _close_off(file)
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error


def _close_off(file: BinaryIO) -> int:
    """End a torn last line, so that the next one is whole. Returns the file's size."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            size += file.write(b"\n")
    return size


def parts(outdir: Path, run: str | None = None) -> list[Path]:
    """The files with lines that one process of a run, or of any run, has written and nobody has moved yet."""
    try:
        found = map(PART.fullmatch, os.listdir(outdir))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot read {outdir}: {error.strerror}") from error
    return sorted(outdir / match[0] for match in found if match and run in (None, match["run"]))


def move_lines(part: Path, manifest: Path) -> None:
    """Append a part's lines to the manifest and remove it. CannotWrite if that cannot be done.

    Its name says where in the manifest they begin before they are written there: a process that takes up the
    work of one that was killed in between goes on at the byte where that one stopped. A part that another
    process has moved meanwhile is none of this one's business.
    """
    try:
        with folder_lock(manifest.parent), open(manifest, "a+b") as file:
            begin = PART.fullmatch(part.name)["begin"]
            if begin is None:
                begin = _close_off(file)
                file.flush()
                os.fsync(file.fileno())  # the name must not say more than is there after a power cut
                named = part.with_suffix(f".at-{begin}.jsonl")
                with suppress(FileNotFoundError):
                    part.rename(named)
                _sync_folder(part.parent)
                part = named
            if not part.exists():
                return
            with open(part, "rb") as lines:
                if not _continues(file, int(begin), lines):  # another run has written behind a torn end
                    _close_off(file)
                    lines.seek(0)
                shutil.copyfileobj(lines, file, 2**20)
            file.flush()
            os.fsync(file.fileno())
            part.unlink()
    except OSError as error:
        raise cannot_write(manifest, error) from error


def _continues(file: BinaryIO, begin: int, lines: BinaryIO) -> bool:
    """Whether a file from `begin` on has all `lines`, or only their beginning, which is then read."""
    file.seek(begin)
    while there := file.read(2**20):
        if not there.startswith(lines.read(len(there))):
            return False
    return True


def _sync_folder(folder: Path) -> None:
    """Bring a changed name to the disk, where the system can do that for a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _list_anew(folder: Path) -> None:
    """Have a network drive list a folder as it is by now.

    For up to a minute it leaves out what another machine has created (man 5 nfs, acdirmax), unless this one
    changes something there.
    """
    file = folder / f".runs.{uuid.uuid4().hex}.tmp"
    with suppress(OSError):
        file.touch()
        file.unlink()


def read_manifest(outdir: Path, run: str | None = None) -> Iterator[dict[str, Any]]:
    """All lines of a folder's images, or of those of one run, in whichever files they are.

    They may be moved meanwhile: then none is left out, but one may come twice.
    """
    outdir, seen = Path(outdir), set()
    while new := [part for part in parts(outdir, run) if part not in seen]:
        for part in new:
            seen.add(part)
            yield from image_lines(part)
    for line in image_lines(outdir / MANIFEST):  # last, with the lines of parts that have gone by now
        if run in (None, line.get("run")):
            yield line


def image_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that name an image's number and its file; what else is there is not an image's."""
    for line in read_lines(path):
        if isinstance(line.get("image"), int) and "file" in line and isinstance(line["file"], str | None):
            yield line


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that are whole; none if it is not there."""
    try:
        with open(path, "rb") as file:
            for line in file:
                try:
                    content = json.loads(line)
                except ValueError:  # torn by a power cut, or empty
                    continue
                if isinstance(content, dict):
                    yield content
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
