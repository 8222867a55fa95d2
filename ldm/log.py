"""Notices, problems and the log file: known to every room, tied to none."""

from __future__ import annotations

import logging

from ldm.errors import InputError

LOG = logging.getLogger("ldm")


def one_line(message: object) -> str:
    """The message without the line ends that a file name or a library's error may bring along."""
    return " ".join(str(message).splitlines())


def notice(message: str) -> None:
    """One line for the user that is no result: on stderr unless --quiet, and in the log."""
    LOG.warning(one_line(message))


def problem(message: str) -> None:
    """One line that --quiet does not silence, either."""
    LOG.error(one_line(message))


def log_to(path: str | None, quiet: bool) -> None:
    """Until `run` ends, the lines of the log go to a file, too; `quiet` keeps notices off stderr.

    InputError if the file cannot be written.
    """
    LOG.setLevel(logging.INFO)
    least = logging.ERROR if quiet else logging.WARNING
    for handler in LOG.handlers:
        handler.addFilter(lambda record: record.levelno >= least)  # tqdm's stand-in keeps filters, not levels
    if path is None:
        return
    try:
        file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"--log_file {path}: {error.strerror}") from error
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    LOG.addHandler(file)
