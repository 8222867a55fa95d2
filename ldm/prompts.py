"""Prompts from a file, one per line, and the batches they make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldm.errors import InputError


def read_prompts(path: str) -> list[str]:
    """The lines of a UTF-8 text file, in order, without blank ones; what is in a line stays as it is.

    A byte order mark and the line ends of any system are fine. InputError if the file cannot be read, is not
    UTF-8 text or holds no prompt.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"--from-file {path}: {error.strerror}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(path, data, error.start) from error
    if "\0" in text:
        raise _not_text(path, data, data.index(0))

    # Files put together with `cat` have byte order marks in the middle, too.
    lines = [line.removeprefix("\ufeff") for line in text.splitlines()]
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"--from-file {path}: no prompt in it; write one per line")
    return prompts


def _not_text(path: str, data: bytes, position: int) -> InputError:
    line = len((data[:position] + b".").splitlines())
    return InputError(
        f"--from-file {path}: line {line} holds the byte 0x{data[position]:02x}, which is not UTF-8 text; "
        "save the prompts as UTF-8"
    )


@dataclass(frozen=True)
class Batch:
    """Images that are sampled together."""

    prompts: tuple[str, ...]
    first: int  # number of the first image within the run, from 0
    position: int = 0  # of the first image within the batch that this one was cut from

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def numbers(self) -> range:
        """Of the images, within the run."""
        return range(self.first, self.first + len(self.prompts))

    def singles(self) -> list[Batch]:
        """The same images one at a time."""
        return [Batch((prompt,), self.first + i, self.position + i) for i, prompt in enumerate(self.prompts)]


def plan(prompts: list[str], n_iter: int, n_samples: int) -> list[Batch]:
    """A run's batches in the original's order: all prompts, `n_samples` at a time, `n_iter` times over."""
    return [
        Batch(tuple(prompts[start : start + n_samples]), iteration * len(prompts) + start)
        for iteration in range(n_iter)
        for start in range(0, len(prompts), n_samples)
    ]
