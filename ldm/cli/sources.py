"""The images that a command is to enlarge: files, and what is in folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.errors import InputError

SHOWN = 3  # names in a notice


def image_files(sources: Sequence[str], max_pixels: int) -> tuple[list[str], list[str]]:
    """The files among `sources`, and the readable images in the folders among them, by name; and notices.

    What cannot be read in a folder is left out, with a notice for the folder: one broken file of hundreds is
    not to end a night's run. A file that is named itself is not looked at. InputError for a folder without a
    readable image.
    """
    from ldm.images.init_image import is_readable

    files: list[str] = []
    notices: list[str] = []
    for source in sources:
        folder = Path(source)
        if not folder.is_dir():
            files.append(source)
            continue
        try:
            inside = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
        except OSError as error:
            raise InputError(f"{folder} cannot be read: {error.strerror}") from error
        readable = [str(path) for path in inside if is_readable(path, max_pixels)]
        if not readable:
            raise InputError(f"the folder {folder} holds no image that can be read")
        if others := [path.name for path in inside if str(path) not in set(readable)]:
            names = ", ".join(others[:SHOWN]) + (", …" if len(others) > SHOWN else "")
            notices.append(f"{folder}: {len(others)} of {len(inside)} files are no readable images ({names})")
        files += readable
    return files, notices
