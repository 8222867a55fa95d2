"""Notices, problems and the log file: known to every room, tied to none."""

from __future__ import annotations

import logging
import sys
import unicodedata
from contextlib import suppress

from ldm.errors import InputError

LOG = logging.getLogger("ldm")
JOINERS = "\u200c\u200d"  # of letters and emoji
SAID: set[str] = set()  # the notices that are given once; a command begins with none


def one_line(message: object) -> str:
    """The message without the line ends that a file name or a library's error may bring along."""
    return " ".join(str(message).splitlines())


def printable(text: str) -> str:
    """The text with escapes in place of what a terminal would obey, or cannot show.

    Spaces of any script stay, and what joins emoji.
    """

    def is_plain(c: str) -> bool:
        return c.isprintable() or c in JOINERS or unicodedata.category(c) == "Zs"

    return "".join(c if is_plain(c) else c.encode("unicode_escape", "replace").decode() for c in text)


def notice(message: str) -> None:
    """One line for the user that is no result: on stderr unless --quiet, and in the log."""
    LOG.warning(one_line(message))


def notice_once(message: str) -> None:
    """A notice that a command gives once, however often its reason comes again."""
    if message not in SAID:
        SAID.add(message)
        notice(message)


def problem(message: str) -> None:
    """One line that --quiet does not silence, either."""
    LOG.error(one_line(message))


class Stderr(logging.Handler):
    """Writes to what is stderr at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


class LogFile(logging.FileHandler):
    """A log file that says once, in one line, that it cannot be written."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            error = sys.exc_info()[1]
            problem(f"--log_file {self.path}: {getattr(error, 'strerror', None) or error}")

    def __init__(self, path: str):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.path = path
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def close(self) -> None:
        with suppress(OSError):  # what is still to be written has been reported
            super().close()


def log_to(path: str | None, quiet: bool) -> None:
    """From now on the log goes to this file, too, and to none before; `quiet` keeps notices off stderr.

    InputError if the file cannot be written.
    """
    LOG.setLevel(logging.INFO)
    for handler in [handler for handler in LOG.handlers if isinstance(handler, LogFile)]:
        LOG.removeHandler(handler)
        handler.close()
    if not LOG.hasHandlers():  # in a program that has set up none
        LOG.addHandler(Stderr())
    least = logging.ERROR if quiet else logging.WARNING
    for handler in LOG.handlers:
        handler.filters[:] = [
            lambda record: record.levelno >= least
        ]  # tqdm's stand-in keeps filters, not levels
    if path is None:
        return
    try:
        LOG.addHandler(LogFile(path))
    except OSError as error:
        raise InputError(f"--log_file {path}: {error.strerror}") from error
