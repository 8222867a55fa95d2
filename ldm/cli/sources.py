"""The images that a command starts from: files, and what is in folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ldm.errors import FieldError, InputError

SHOWN = 3  # names in a notice


def image_files(sources: Sequence[str], max_pixels: int) -> tuple[list[str], list[str]]:
    """The files among `sources`, and the readable images in the folders among them, by name; and notices.

    Numbers in names count as numbers: image 2 comes before image 10. What cannot be read in a folder is left
    out, with a notice for the folder: one broken file of hundreds is not to end a night's run. A file that is
    named itself is not looked at. InputError for a folder without a readable image.
    """
    from ldm.images.init_image import is_readable

    files: list[str] = []
    notices: list[str] = []
    for source in sources:
        folder = Path(source)
        if not folder.is_dir():
            files.append(source)
            continue
        inside = files_inside(folder)
        readable = [str(path) for path in inside if is_readable(path, max_pixels)]
        if not readable:
            raise InputError(f"the folder {folder} holds no image that can be read")
        if others := [path.name for path in inside if str(path) not in set(readable)]:
            notices.append(
                f"{folder}: {len(others)} of {len(inside)} files are no readable images ({_some(others)})"
            )
        files += readable
    return files, notices


def paired_files(images: Sequence[str], folder: str, setting: str) -> list[str]:
    """For each image the file of the folder that has its name, whatever the suffix.

    `setting` is what the files are to the images, such as "mask". FieldError that names the images without a
    file, and for an image with several.
    """
    by_name = {path.name: path for path in files_inside(Path(folder))}
    by_stem: dict[str, list[str]] = {}
    for name in by_name:
        by_stem.setdefault(Path(name).stem, []).append(name)
    found, missing = [], []
    for image in images:
        name = Path(image).name
        same = [name] if name in by_name else by_stem.get(Path(name).stem, [])
        if len(same) > 1:
            raise FieldError(
                "{" + setting + "} {folder}: {image} has {number} of them: {names}; leave one",
                folder=folder,
                image=name,
                number=len(same),
                names=_some(same),
            )
        if same:
            found.append(str(by_name[same[0]]))
        elif name not in missing:
            missing.append(name)
    if missing:
        raise FieldError(
            "{" + setting + "} {folder}: no file for {number} of {all} images: {names}; it has the image's "
            "name, with any suffix",
            folder=folder,
            number=len(missing),
            all=len(set(images)),
            names=_some(missing),
        )
    return found


def files_inside(folder: Path) -> list[Path]:
    """The files in a folder but for hidden ones, in natural order. InputError if it cannot be read."""
    try:
        inside = [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."]
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
    return sorted(inside, key=lambda path: (_natural(path.name), path.name))


def _natural(name: str) -> list[str | int]:
    """A name as texts and numbers in turn."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
