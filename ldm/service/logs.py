"""The log of requests: a JSON object a line. What clients write cannot begin a line of its own."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import IO, Any

from ldm.errors import InputError
from ldm.log import problem

LONGEST = 2000  # characters of a text in the log


class JsonLog:
    """Writes events to a file, or to what is stderr at that moment. Any thread may write.

    Prompts are written only with `prompts`: they are the users' own.
    """

    def __init__(self, path: str | None = None, *, prompts: bool = False):
        """InputError if the file cannot be written."""
        self.path, self.prompts = path, prompts
        self._lock = threading.Lock()
        self._failed = False
        self._file: IO[str] | None = None
        if path is not None:
            try:
                self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
            except OSError as error:
                raise InputError(f"--log_file {path}: {error.strerror}") from error

    def write(self, event: str, **facts: Any) -> None:
        """One line: the time, the event, and all facts that are not None."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        given = {name: _plain(value) for name, value in facts.items() if value is not None}
        line = json.dumps({"time": now, "event": event, **given})  # in ASCII: no line ends of any alphabet
        with self._lock:
            try:
                print(line, file=self._file or sys.stderr, flush=True)
            except (OSError, ValueError) as error:  # a full disk, or a file that has been closed
                if not self._failed and self._file:
                    problem(f"--log_file {self.path}: {error}; the service goes on without its log")
                self._failed = True

    def texts(self, texts: Iterable[str]) -> list[str] | None:
        """Prompts as the log may have them."""
        return list(texts) if self.prompts else None

    def close(self) -> None:
        with self._lock:
            if self._file:
                self._file.close()


def _plain(value: Any) -> Any:
    """A value that JSON has, of bounded length."""
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
