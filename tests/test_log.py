"""Notices, and the file that they go to."""

import logging
import os
from pathlib import Path

import pytest

from ldm import log


@pytest.fixture(autouse=True)
def handlers():
    before, log.LOG.handlers = log.LOG.handlers, []
    yield
    for handler in log.LOG.handlers:
        handler.close()
    log.LOG.handlers = before


def test_a_later_log_file_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    """Each run of one program added a file, and every line was written as often."""
    for name in ("a.log", "b.log", "b.log"):
        log.log_to(str(tmp_path / name), quiet=True)
        log.notice(name)
    assert [path.read_text().count(".log") for path in sorted(tmp_path.iterdir())] == [1, 2]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_a_full_disk_is_one_line(capsys) -> None:
    """Every line of the log printed a traceback, and the end of the command another."""
    log.LOG.addHandler(log.Stderr())
    log.log_to("/dev/full", quiet=True)
    log.notice("a")
    log.notice("b")
    for handler in log.LOG.handlers:
        handler.close()
    assert capsys.readouterr().err.splitlines() == ["--log_file /dev/full: No space left on device"]


def test_a_notice_of_once_is_given_once(capsys) -> None:
    log.SAID.clear()
    log.LOG.addHandler(log.Stderr())
    for message in ("a", "b", "a"):
        log.notice_once(message)
    assert capsys.readouterr().err.splitlines() == ["a", "b"]


def test_quiet_keeps_notices_off_stderr(capsys) -> None:
    log.LOG.addHandler(log.Stderr())
    log.log_to(None, quiet=True)
    log.notice("a notice")
    log.problem("a problem")
    assert capsys.readouterr().err.splitlines() == ["a problem"]
    assert log.LOG.level == logging.INFO
