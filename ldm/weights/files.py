"""The files that a user names: whether they are there, and InputError for what the system refuses."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import InputError

# A path with a null byte is a ValueError: no file can have it.
ABSENT = (FileNotFoundError, NotADirectoryError, ValueError)


@contextmanager
def user_file(path: str | Path) -> Iterator[None]:
    """Turn an OSError of the block into an InputError that names the file and the system's reason."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {error.strerror or error}") from error


def exists(path: Path) -> bool:
    """Whether a path leads to a file or folder; InputError where that cannot be found out, as in a folder
    without permission."""
    with user_file(path):
        try:
            path.stat()
        except ABSENT:
            return False
        return True


def files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and those below it, links among them. InputError if it cannot be read.

    Each folder is searched once, and links last, so that a folder proper is not found by a link to it alone,
    and links in a circle come to an end.
    """

    def refuse(error: OSError) -> None:
        if Path(error.filename) == folder:  # of those below it some may be for others only
            raise error

    starts, seen = [folder], set()
    for start in starts:  # which grows
        with user_file(start):
            for place, folders, files in os.walk(start, onerror=refuse):
                real = os.path.realpath(place)
                if real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                starts += [path for name in folders if (path := Path(place, name)).is_symlink()]
                yield from (Path(place, name) for name in files)


def check_file(path: Path) -> None:
    """InputError if there is no file with anything in it, and no diffusers folder with all of its parts."""
    with user_file(path):
        try:
            status = path.stat()
        except ABSENT as error:
            where = f" (a link to {path.readlink()}, which is not there)" if path.is_symlink() else ""
            raise InputError(
                f"no checkpoint at {path}{where}: put or link one there, or name another file"
            ) from error
        if stat.S_ISDIR(status.st_mode):
            from ldm.weights import diffusers_layout  # which uses this module

            if not diffusers_layout.is_diffusers_folder(path):
                raise InputError(
                    f"{path} is a folder without model_index.json: give a .ckpt or .safetensors file, or a "
                    "whole diffusers folder"
                )
            diffusers_layout.check_folder(path)
        elif status.st_size == 0:
            raise InputError(f"{path} is empty: download or copy it again")
