"""The folders of finished images, each session's own, which last as long as its tab is open."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Results:
    """Folders inside `folder`, which must be there, one for each finished job. Thread-safe."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._of: dict[str, list[Path]] = {}  # by session, as long as that is there
        self._lock = threading.Lock()

    def enter(self, session: str) -> None:
        """A session is there, and looks at what is added for it until it leaves."""
        with self._lock:
            self._of.setdefault(session, [])

    @contextmanager
    def adding(self, session: str, name: str) -> Iterator[Path]:
        """A new folder of a session, which only this user can read, to be filled within the block.

        It is removed at the end of the block if the session has left by then, and so can look at it no more.
        Its name must not come from a client. OSError if it cannot be made.
        """
        path = self.folder / name
        path.mkdir(mode=0o700)
        try:
            yield path
        finally:
            with self._lock:
                is_there = session in self._of
                if is_there:
                    self._of[session].append(path)
            if not is_there:
                _remove([path])

    def keep(self, session: str, wanted: Collection[Path]) -> None:
        """Remove the folders of a session but for those that are still wanted."""
        with self._lock:
            paths = self._of.get(session, [])
            if paths:
                self._of[session] = [path for path in paths if path in wanted]
        _remove(path for path in paths if path not in wanted)

    def leave(self, session: str) -> None:
        """The session is there no more: remove its folders, and later those that are being filled."""
        with self._lock:
            paths = self._of.pop(session, [])
        _remove(paths)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
