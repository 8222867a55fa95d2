"""Hashes that name a checkpoint in the settings of an image, and whether a recorded one is that of a file."""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

from ldm.cache import cache_folder
from ldm.weights.diffusers_layout import unet_file
from ldm.weights.files import check_file, user_file


def hashed_file(path: str | Path) -> Path:
    """The file whose hash stands for a checkpoint: of a diffusers folder its UNet's weights, or their first
    shard. InputError for one that is missing or cannot be read."""
    path = Path(path)
    check_file(path)
    return unet_file(path) if path.is_dir() else path


def quick_hash(path: str | Path) -> str:
    """Eight hex digits that distinguish checkpoints at no cost: the `Model hash` of A1111's versions of 2022.

    SHA-256 of the 64 KiB at offset 1 MiB, or of the whole file where that is shorter. InputError for a file
    that is missing or cannot be read.
    """
    path = hashed_file(path)
    with user_file(path), path.open("rb") as file:
        file.seek(0x100000)
        part = file.read(0x10000)
        if not part:
            file.seek(0)
            part = file.read()
    return hashlib.sha256(part).hexdigest()[:8]


def file_hash(path: str | Path, progress: Callable[[int], Any] | None = None) -> str:
    """The first ten hex digits of a file's SHA-256: the `Model hash` that today's tools write.

    It takes seconds for gigabytes, and nothing as long as the file's size, inode and times of change stay
    those of its entry in the cache folder. `progress` is called with the number of bytes of each part that is
    read. InputError for a file that is missing or cannot be read.
    """
    return _sha256(Path(path), progress)[:10]


def known_hash(path: str | Path) -> str | None:
    """The `file_hash` of a file if the cache folder has it; the file is not read. InputError as there."""
    path = hashed_file(path).resolve()
    with user_file(path), path.open("rb") as file:
        known = _cached(path, _state(file.fileno()))
    return known and known[:10]


def same_model(recorded: str, path: str | Path) -> bool | None:
    """Whether a hash that some tool recorded is that of a file; None if it is no hash that is known here.

    Known are A1111's 8 digits of 2022, the 10 of today's tools and the 64 of a whole SHA-256, in upper or
    lower case. InputError for a file that is missing or cannot be read.
    """
    recorded = recorded.strip().lower()
    if not re.fullmatch("[0-9a-f]{8}|[0-9a-f]{10}|[0-9a-f]{64}", recorded):
        return None
    found = quick_hash(path) if len(recorded) == 8 else _sha256(Path(path))
    return found.startswith(recorded)


class FileHash:
    """The `file_hash` of a file, or another one, computed in a thread of its own: sampling need not wait.

    An unfinished computation does not keep the program from ending.
    """

    def __init__(self, path: str | Path, compute: Callable[[str | Path], str] | None = None):
        self._future: Future[str] = Future()
        threading.Thread(target=self._compute, args=(path, compute or file_hash), daemon=True).start()

    def _compute(self, path: str | Path, compute: Callable[[str | Path], str]) -> None:
        try:
            self._future.set_result(compute(path))
        except Exception as error:
            self._future.set_exception(error)

    def result(self) -> str:
        """The hash, once it is known; InputError if the file could not be read."""
        return self._future.result()

    def then(self, callback: Callable[[str], Any]) -> None:
        """Call `callback(hash)` when the hash is known, from the computing thread, or at once if it is.

        It is not called where the file could not be read.
        """

        def done(future: Future[str]) -> None:
            if future.exception() is None:
                callback(future.result())

        self._future.add_done_callback(done)


class _Reported:
    """A file that reports the number of bytes of each part that is read."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], Any]):
        self.file, self.progress = file, progress

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self.file.readinto(buffer)
        self.progress(count)
        return count


def _sha256(path: Path, progress: Callable[[int], Any] | None = None) -> str:
    """All 64 hex digits of a file's SHA-256, from the cache where that has them."""
    path = hashed_file(path).resolve()
    with user_file(path), path.open("rb") as file:
        state = _state(file.fileno())
        if known := _cached(path, state):
            return known
        read = _Reported(file, progress) if progress else file
        digest = hashlib.file_digest(read, "sha256").hexdigest()
        if _state(file.fileno()) == state:  # nobody wrote to the file meanwhile
            _write_cache(str(path), state | {"sha256": digest})
    return digest


def _cached(path: Path, state: dict[str, int]) -> str | None:
    """The SHA-256 in the cache of a file in this state."""
    entry = _read_cache().get(str(path))
    known = entry.get("sha256") if isinstance(entry, dict) and entry.items() >= state.items() else None
    return known if isinstance(known, str) and re.fullmatch("[0-9a-f]{64}", known) else None


def _state(descriptor: int) -> dict[str, int]:
    status = os.fstat(descriptor)
    # another file of the same size and time may have been renamed, or copied, to this path
    times = {"mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
    return {"size": status.st_size, "inode": status.st_ino, **times}


# The cache only saves time: where it is damaged or cannot be written, the program does without it.
def _read_cache() -> dict[str, Any]:
    """The entries {"size", "inode", "mtime_ns", "ctime_ns", "sha256"} by resolved path."""
    try:
        entries = json.loads((cache_folder() / "hashes.json").read_bytes())
    except (OSError, ValueError, RuntimeError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _write_cache(path: str, entry: dict[str, Any]) -> None:
    from filelock import FileLock

    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "hashes.json.lock", timeout=10, fallback_to_soft=False):
            temporary = folder / "hashes.json.tmp"
            temporary.write_text(json.dumps(_read_cache() | {path: entry}, indent=1))
            temporary.replace(folder / "hashes.json")  # a reader finds the old file or the new one
    except (OSError, RuntimeError):
        pass
