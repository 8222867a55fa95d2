"""The settings of a check, for all of its items. Imports no torch."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ldm.log import LOG


@dataclass(frozen=True)
class Check:
    """`tiny` is a dry run: a miniature of the models, few steps, and stand-ins for what only CUDA has."""

    device: str
    tiny: bool
    folder: Path  # for files that are measured
    cache: Path  # for compiled code
    deadline: float  # by time.time()

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def side(self, pixels: int) -> int:
        """An image's side; in a dry run 8 pixels for each 64 beyond 192."""
        return max(1, pixels // 64 - 3) * 8 if self.tiny else pixels

    def steps(self, count: int) -> int:
        return min(count, 2) if self.tiny else count

    def repeats(self, count: int) -> int:
        return 1 if self.tiny else count


@contextmanager
def notices() -> Iterator[list[str]]:
    """The notices to the user that are given meanwhile. They also go where they always go."""
    lines: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    keeper = Keeper()
    LOG.addHandler(keeper)
    try:
        yield lines
    finally:
        LOG.removeHandler(keeper)
