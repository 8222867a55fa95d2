"""A folder of images with captions."""

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import InputError
from ldm.log import notice
from ldm.training.data.example import DamagedExample, Example
from ldm.training.data.images import MAPS, SUFFIXES, decode, decode_map, decode_size
from ldm.training.data.sources import check_maps, digest, examples_named

METADATA = ("metadata.jsonl", "metadata.csv")


class ImageFolder:
    """The .jpg, .png and .webp files of a folder and of those in it.

    An image's caption is its line in `metadata.jsonl` or `metadata.csv` (columns `file_name`, relative to
    that file, and `text_key`), or else a .txt file of the same name beside it, or else `caption`. Further
    columns, also those of a .json file of the same name, are for `filters`. Maps, such as a mask, lie in
    folders of their own under the same names (`maps: {mask: PATH}`), or columns such as `mask_file_name` name
    them. Images without a caption, captions without an image, and files, folders and lines that cannot be
    read are left out, counted and reported. InputError where nothing is left.

    Its fingerprint is of names, sizes of files, captions and metadata: a copy of the folder is the same set.
    """

    def __init__(
        self,
        path: str,
        caption: str | None = None,
        text_key: str = "text",
        maps: Mapping[str, str] | None = None,
    ):
        self.root = Path(path)
        if not self.root.is_dir():
            raise InputError(f"data: {path} is not a folder")
        check_maps(f"data: {path}", maps, MAPS)
        for name, folder in (maps or {}).items():
            if not Path(folder).is_dir():
                raise InputError(f"data: {path}: maps: {name}: {folder} is not a folder")
        self.left_out: dict[str, str] = {}
        images, others = self._listed({Path(folder).resolve() for folder in (maps or {}).values()})
        if not images:
            reasons = "".join(f"; {name}: {why}" for name, why in list(self.left_out.items())[:3])
            raise InputError(f"data: {path} has no images: {', '.join(SUFFIXES)} files{reasons}")
        rows = self._rows(others, text_key)
        self.keys: list[str] = []
        self.captions: list[str | None] = []  # None: it is in the .txt file
        self.rows: list[dict[str, Any]] = []
        self.map_files: list[dict[str, str]] = []
        changes = [caption, text_key]
        for name in images:
            stem = os.path.splitext(name)[0]
            row = self._beside(f"{stem}.json", others) | rows.pop(name, {})
            text = row.pop(text_key, None)
            beside = f"{stem}.txt"
            if text is None and beside not in others:
                text = caption
            if text is None and beside not in others:
                self.left_out[name] = "it has no caption"
                continue
            found = self._maps(name, row, maps or {})
            try:
                sizes = {one: (self.root / file).stat().st_size for one, file in found.items()}
                sizes["image"] = (self.root / name).stat().st_size
                words = text
                if text is None:
                    words = hashlib.sha256((self.root / beside).read_bytes()).hexdigest()
            except OSError as error:  # such as a link to a file that is gone
                self.left_out[name] = f"it cannot be read: {error.strerror or error}"
                continue
            self.keys.append(name)
            self.captions.append(None if text is None else str(text))
            self.map_files.append(found)
            self.rows.append(row)
            changes.append([name, words, row, sizes])
        used = {os.path.splitext(name)[0] for name in images}
        alone = [name for name in others if name.endswith(".txt") and os.path.splitext(name)[0] not in used]
        self.left_out |= dict.fromkeys([*rows, *alone], "there is no image for this caption")
        self.fingerprint = digest(changes)
        unread = [name for name in images if self.left_out.get(name, "").startswith("it cannot be read")]
        if not self.keys and unread:
            raise InputError(
                f"data: no image in {path} can be read, such as {unread[0]}: {self.left_out[unread[0]]}"
            )
        if not self.keys:
            raise InputError(
                f"data: none of the {len(images)} images in {path} has a caption: a .txt file beside it, a "
                f"line in {METADATA[0]} with file_name and {text_key}, or `caption` for all of them"
            )
        for why in dict.fromkeys(self.left_out.values()):
            names = [name for name, reason in self.left_out.items() if reason == why]
            notice(f"{path}: {len(names):,} left out, because {why}: {examples_named(names)}")
        for name, folder in (maps or {}).items():
            if not any(name in found for found in self.map_files):
                raise InputError(f"data: {path}: maps: {name}: {folder} has no file for any of the images")

    def _listed(self, passed: set[Path]) -> tuple[list[str], set[str]]:
        """The names of images, sorted, and those of other files, relative to the folder.

        Hidden ones are left out, and what lies in the folders `passed`. A folder that links name again is
        read once.
        """
        images, others, seen = [], set(), {os.path.realpath(folder) for folder in passed}

        def unreadable(error: OSError) -> None:
            name = os.path.relpath(error.filename, self.root)
            self.left_out[name] = f"the folder cannot be read: {error.strerror}"

        for folder, subfolders, names in os.walk(self.root, onerror=unreadable, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__")))
            below = os.path.relpath(folder, self.root)
            for name in sorted(names):
                if name.startswith("."):
                    continue
                relative = name if below == "." else f"{below}/{name}"
                if name.lower().endswith(SUFFIXES):
                    images.append(relative)
                else:
                    others.add(relative)
        return images, others

    def _rows(self, others: set[str], text_key: str) -> dict[str, dict[str, Any]]:
        """The rows of all metadata files by the names of their images."""
        rows: dict[str, dict[str, Any]] = {}
        for file in sorted(name for name in others if os.path.basename(name) in METADATA):
            below = os.path.dirname(file)
            for number, row in self._lines(file):
                if None in row:  # where csv.DictReader puts the fields that are too many
                    self.left_out[f"{file}:{number}"] = (
                        "the line has more fields than the first one: a text with a comma needs quotes"
                    )
                    continue
                name = row.pop("file_name", None)
                if not isinstance(name, str):
                    self.left_out[f"{file}:{number}"] = "the line names no file_name"
                    continue
                if number == 1 and text_key not in row and not row.keys():
                    raise InputError(f"data: {self.root / file} has no column {text_key!r} nor any other")
                for column in [column for column in row if column.endswith("_file_name")]:
                    row[column] = os.path.normpath(os.path.join(below, str(row[column])))
                rows[os.path.normpath(os.path.join(below, name))] = row
        return rows

    def _lines(self, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            with (self.root / file).open(encoding="utf-8-sig", newline="") as lines:
                if file.endswith(".csv"):
                    yield from enumerate(csv.DictReader(lines), 1)
                    return
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise ValueError
                        yield number, row
                    except ValueError:
                        self.left_out[f"{file}:{number}"] = "the line is not a JSON object"
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"data: {self.root / file} cannot be read: {error}") from error

    def _beside(self, name: str, others: set[str]) -> dict[str, Any]:
        """The metadata in a .json file."""
        if name not in others:
            return {}
        try:
            row = json.loads((self.root / name).read_text(encoding="utf-8-sig"))
            if not isinstance(row, dict):
                raise ValueError
        except (OSError, ValueError):
            self.left_out[name] = "it is not a JSON object"
            return {}
        return row

    def _maps(self, name: str, row: dict[str, Any], folders: Mapping[str, str]) -> dict[str, str]:
        """The files that there are of an image's maps, by their names in `Example.maps`."""
        found = {}
        for kind in MAPS:
            if named := row.pop(f"{kind}_file_name", None):
                found[kind] = str(named)
            elif kind in folders:
                stem = Path(folders[kind], os.path.splitext(name)[0]).absolute()
                found[kind] = next(
                    (
                        f"{stem}{suffix}"
                        for suffix in (".png", *SUFFIXES)
                        if os.path.exists(f"{stem}{suffix}")
                    ),
                    f"{stem}.png",
                )
        return {one: file for one, file in found.items() if (self.root / file).is_file()}

    @property
    def has_maps(self) -> dict[str, np.ndarray]:
        names = [name for name in MAPS if any(name in found for found in self.map_files)]
        return {name: np.array([name in found for found in self.map_files]) for name in names}

    @property
    def metadata(self) -> dict[str, list[Any]]:
        columns = dict.fromkeys(column for row in self.rows for column in row)
        return {column: [row.get(column) for row in self.rows] for column in columns}

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, index: int) -> str:
        return self.keys[index]

    def caption(self, index: int) -> str:
        text = self.captions[index]
        if text is not None:
            return text
        try:
            file = (self.root / self.keys[index]).with_suffix(".txt")
            return " ".join(file.read_text(encoding="utf-8-sig").split())
        except (OSError, UnicodeDecodeError) as error:
            raise DamagedExample(self.keys[index], f"its caption cannot be read: {error}") from error

    def size(self, index: int) -> tuple[int, int]:
        return decode_size(self.root / self.keys[index], self.keys[index])

    def __getitem__(self, index: int) -> Example:
        key = self.keys[index]
        files = self.map_files[index].items()
        maps = {name: decode_map(self.root / file, name, key) for name, file in files}
        return Example(key, decode(self.root / key, key), self.caption(index), maps)
