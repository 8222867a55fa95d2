"""Where images go: numbered files that are never overwritten, written whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.errors import InputError
from ldm.images.metadata import FORMATS, PNG_LEVEL, encode_image, open_image, read_texts
from ldm.images.source_type import source_type

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no later file will fit, either
# What systems say of hard links that a file system, or this pair of folders, does not have: FAT and network
# drives (EPERM, EOPNOTSUPP), FUSE (ENOSYS), Windows (EINVAL), one link to a file (EMLINK), AFS (EXDEV).
NO_LINKS = (
    *(errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS),
    *(errno.EINVAL, errno.EMLINK, errno.EXDEV),
)
NO_SETTINGS: Mapping[str, Any] = {}
AGAIN = "the same command with --resume"  # makes what a run has left
LEFT_BEHIND = 60  # seconds after which a temporary file belongs to no living process: each writes for moments


class CannotWrite(InputError):
    """A file could not be written; `full` says whether there is no room for any."""

    def __init__(self, message: str, full: bool):
        super().__init__(message)
        self.full = full


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """What to raise where a file, or into a folder, could not be written."""
    reason = "a file has that name" if isinstance(error, FileExistsError) else error.strerror
    full = error.errno in FULL
    advice = "make room" if full else "choose another folder"
    return CannotWrite(f"cannot write to {path.absolute()}: {reason}; {advice}", full)


@contextmanager
def resumable(by: str | None = AGAIN) -> Iterator[None]:
    """A full disk's error in the block says what takes the run up again; `by` is None where nothing does."""
    try:
        yield
    except CannotWrite as error:
        if not (error.full and by):
            raise
        raise CannotWrite(f"{error}, and {by} makes what is missing", full=True) from error


class OutputFolder:
    """`outdir/samples/00000.png` … and `outdir/grid-0000.png` …; the folders are made, and tried, at once.

    A new file's number is the highest of its kind plus one. Several processes may write into one folder: each
    file is there whole or not at all, and none replaces another. InputError if a file cannot be written.

    A file is written under a temporary name first, `.{owner}.{uuid}.tmp`. `owner` may be set to a text, fit
    for a file name, that the processes of one run share, so that `clear` removes what the dead ones left.
    `sign` signs a file's bytes: see `ldm.images.provenance.Signer`.
    """

    def __init__(
        self,
        outdir: str | Path,
        format: str = "png",
        quality: int = 95,
        sign: Callable[[bytes, str, Mapping[str, Any]], bytes] | None = None,
    ):
        self.path, self.format, self.quality, self.sign = Path(outdir), format, quality, sign
        self.owner = uuid.uuid4().hex
        self._grids = _NumberedFiles(self.path, "grid-", digits=4, owner=self.owner)
        self._samples = _NumberedFiles(self.path / "samples", "", digits=5, owner=self.owner)

    def next_number(self) -> int:
        """The first sample number that no file has by now."""
        self._samples.next = self._samples.first_free()
        return self._samples.next

    def own(self, owner: str) -> None:
        """Write under this owner from now on, whose temporary files of dead processes are removed."""
        self.owner = owner
        self.clear(owner)

    def clear(self, owner: str) -> None:
        """Remove the temporary files of one owner, none of whose processes writes any more."""
        for files in (self._grids, self._samples):
            files.clear(owner)

    def save_image(
        self,
        image: np.ndarray,
        texts: tuple[str, str] | None,
        name: str | None = None,
        again: bool = False,
        settings: Mapping[str, Any] = NO_SETTINGS,
    ) -> Path:
        """Writes an image, uint8 [H, W, 3], with its texts, as the next sample; returns its path.

        See `encode_image` for the texts. The `settings` decide the digital source type and are the signer's.
        A `name`, relative and without suffix, stands for the number; if another file has it, it becomes
        name-2 and so on. `again`: an equal file that has the name already is taken for this one: its process
        may have ended before it could record it.
        """
        data = self._encoded(image, texts, self.format, settings)
        return self._samples.save(data, self.format, self.owner, name, again)

    def _encoded(
        self, image: np.ndarray, texts: tuple[str, str] | None, format: str, settings: Mapping[str, Any]
    ) -> bytes:
        data = encode_image(image, texts, format, self.quality, source_type(settings))
        return data if self.sign is None else self.sign(data, format, settings)

    def save_file(self, data: bytes) -> Path:
        """Writes an encoded image of the folder's format as the next sample; returns its path."""
        return self._samples.save(data, self.format, self.owner)

    def save_depth(self, depth: np.ndarray, image: Path) -> Path:
        """Writes a depth map, uint16 [H, W], as depth/<name of the image>.png, in place of an older one."""
        path = (self.path / "depth" / image.relative_to(self.path / "samples")).with_suffix(".png")
        return self._save_beside(depth, path)

    def save_control(self, seen: np.ndarray, image: Path, number: int) -> Path:
        """Writes a control image, uint8 [H, W, 3], as control/<name of the image>.png, like `save_depth`.

        Those of further ControlNets, `number` from 1, have it behind the name.
        """
        path = self.path / "control" / image.relative_to(self.path / "samples")
        return self._save_beside(seen, path.with_name(path.stem + (f"-{number}" if number else "") + ".png"))

    def _save_beside(self, pixels: np.ndarray, path: Path) -> Path:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG", compress_level=PNG_LEVEL)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _temporary_file(path.parent, file.getvalue(), self.owner) as temporary:
                temporary.replace(path)
        except OSError as error:
            raise cannot_write(path, error) from error
        return path

    def save_grid(
        self,
        grid: np.ndarray,
        texts: tuple[str, str] | None,
        name: str | None = None,
        settings: Mapping[str, Any] = NO_SETTINGS,
    ) -> Path:
        """Writes a grid, uint8 [H, W, 3], with its texts, as the next grid or under a name; returns its path.

        A name stands without suffix; if another file has it, it becomes name-2 and so on. A grid whose pixels
        or texts do not fit into a file of the folder's format is a PNG file.
        """
        format = self.format
        try:
            data = self._encoded(grid, texts, format, settings)
        except InputError:
            format = "png"
            data = self._encoded(grid, texts, format, settings)
        return self._grids.save(data, format, self.owner, name)


class _NumberedFiles:
    """The files `<prefix><number>.<format>` of one folder, which is listed once."""

    def __init__(self, folder: Path, prefix: str, digits: int, owner: str):
        self.folder, self.prefix, self.digits = folder, prefix, digits
        self.name = re.compile(rf"{prefix}([0-9]{{{digits},}})\.({'|'.join(FORMATS)})")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _temporary_file(folder, b"can this folder be written?", owner) as temporary:
                now = temporary.stat().st_mtime  # by the clock that the other files' times are of
                entries = os.listdir(folder)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        for entry in entries:
            if re.fullmatch(r"\..+\.[0-9a-f]{32}\.tmp", entry):
                with suppress(OSError):  # another process was faster, or it is another user's
                    if now - (folder / entry).stat().st_mtime > LEFT_BEHIND:
                        (folder / entry).unlink()
        self.next = self.first_free(entries)

    def first_free(self, entries: list[str] | None = None) -> int:
        """The highest number of a file, of `entries` or of the folder as it is now, and one more."""
        try:
            found = map(self.name.fullmatch, os.listdir(self.folder) if entries is None else entries)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        return max((int(match[1]) for match in found if match), default=-1) + 1

    def clear(self, owner: str) -> None:
        for entry in os.listdir(self.folder):
            if re.fullmatch(rf"\.{re.escape(owner)}\.[0-9a-f]{{32}}\.tmp", entry):
                with suppress(OSError):
                    (self.folder / entry).unlink()

    def save(
        self, data: bytes, format: str, owner: str, name: str | None = None, again: bool = False
    ) -> Path:
        """Writes a file under its name, or the first number from `self.next` on that nobody took."""
        try:
            if name is not None and "/" in name:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            with _temporary_file(self.folder, data, owner) as temporary:
                for stem in self._numbers() if name is None else _variants(name):
                    path = self.folder / f"{stem}.{format}"
                    if _is_renamed(temporary, path) or (again and same_image(path, data)):
                        return path
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def _numbers(self) -> Iterator[str]:
        while True:
            self.next += 1
            yield f"{self.prefix}{self.next - 1:0{self.digits}d}"


def same_image(path: Path, data: bytes) -> bool:
    """Whether a file holds the same pixels and texts as `data`; their signatures may differ."""
    if path.read_bytes() == data:
        return True
    try:
        with open_image(path) as one, open_image(io.BytesIO(data)) as other:
            same = one.format == other.format and one.size == other.size
            same = same and one.convert("RGB").tobytes() == other.convert("RGB").tobytes()
        return same and read_texts(path) == read_texts(io.BytesIO(data))
    except InputError:  # a damaged file is another one
        return False


def _variants(name: str) -> Iterator[str]:
    """The name, and those that stand for it where others have taken it."""
    yield name
    yield from (f"{name}-{i}" for i in count(2))


@contextmanager
def _temporary_file(folder: Path, data: bytes, owner: str) -> Iterator[Path]:
    """A hidden file with `data` safely on the disk; gone at the end, unless it has been renamed."""
    path = folder / f".{owner}.{uuid.uuid4().hex}.tmp"
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def rename_to_new(source: Path, target: Path) -> Path:
    """Gives a file the target's name, or name-2 and so on where other files have it; returns its path."""
    paths = (target.with_stem(stem) for stem in _variants(target.stem))
    path = next(path for path in paths if _is_renamed(source, path))
    source.unlink(missing_ok=True)
    return path


def _is_renamed(source: Path, target: Path) -> bool:
    """Gives a file a name, which may be its second one, if no other file has that; whether none had it."""
    try:
        _rename_to_new(source, target)
    except FileExistsError:
        return False
    return True


def _rename_to_new(source: Path, target: Path) -> None:
    """Gives a file a name that none has yet; FileExistsError where `os.rename` would replace one."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        target.touch(exist_ok=False)  # without hard links: take the name first, then fill it
        try:
            source.replace(target)
        except BaseException:
            target.unlink()
            raise
