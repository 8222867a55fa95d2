"""The folders of finished images, each session's own, which last as long as its tab is open."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Collection
from pathlib import Path


class Results:
    """Folders inside `folder`, which must be there, one for each finished job. Thread-safe."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._of: dict[str, list[Path]] = {}  # by session
        self._lock = threading.Lock()

    def add(self, session: str, name: str) -> Path:
        """A new folder of a session, which only this user can read. Its name must not come from a client.

        OSError if it cannot be made.
        """
        path = self.folder / name
        path.mkdir(mode=0o700)
        with self._lock:
            self._of.setdefault(session, []).append(path)
        return path

    def keep(self, session: str, wanted: Collection[Path]) -> None:
        """Remove the folders of a session but for those that are still wanted."""
        with self._lock:
            paths = self._of.pop(session, [])
            if kept := [path for path in paths if path in wanted]:
                self._of[session] = kept
        for path in paths:
            if path not in wanted:
                shutil.rmtree(path, ignore_errors=True)
