"""WebDataset shards: tar files whose members of one name are one example (https://github.com/webdataset)."""

import bisect
import json
import math
import os
import tarfile
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.errors import InputError
from ldm.log import notice
from ldm.training.data.example import DamagedExample
from ldm.training.data.images import MAPS, SUFFIXES, EncodedSource
from ldm.training.data.sources import (
    alone,
    default_cache,
    digest,
    ends,
    examples_named,
    relative_names,
    stamp,
    write_whole,
)

MEMBERS = ("image", *MAPS)
IMAGES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
_FORMAT = 1  # of an index; raised whenever the same shard gives another one


class Texts(Sequence[str]):
    """Texts in one piece of memory, of which a list takes several times as much in every process."""

    def __init__(self) -> None:
        self.data, self.ends = bytearray(), array("q", [0])

    def append(self, text: str) -> None:
        self.data += text.encode("utf-8", "surrogatepass")
        self.ends.append(len(self.data))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self.data[self.ends[place] : self.ends[place + 1]].decode("utf-8", "surrogatepass")


class Column(Sequence[Any]):
    """A column of metadata: numbers, NaN where there is none, or JSON as soon as one value is no number."""

    def __init__(self, missing: int):
        """It begins with examples that lack it."""
        self.numbers, self.texts = array("d", [math.nan]) * missing, Texts()

    def append(self, value: Any) -> None:
        plain = value is None or (type(value) in (int, float) and abs(value) <= 2**53)
        if not plain and not self.texts:
            for each in self.numbers:
                self.texts.append(json.dumps(_plain(each)))
            self.numbers = array("d")
            self.texts.append(json.dumps(value))
        elif self.texts:
            self.texts.append(json.dumps(value))
        else:
            self.numbers.append(math.nan if value is None else value)

    def __len__(self) -> int:
        return len(self.texts) or len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        return json.loads(self.texts[index]) if self.texts else _plain(self.numbers[index])


def _plain(number: float) -> int | float | None:
    """A number as JSON had it: None for NaN, and whole ones without a point."""
    if math.isnan(number):
        return None
    return int(number) if number.is_integer() else number


class WebDataset(EncodedSource):
    """The examples of uncompressed .tar files on disk: members KEY.jpg (.png, .webp), KEY.txt and KEY.json.

    `path` is a file, a folder of them, a list, or text with braces, as in "train-{0000..0099}.tar". The
    caption is the .txt member, or else `text_key` of the .json one, whose other values are for `filters`; a
    member such as KEY.mask.png is a map. Each shard is read through once, for an index that is kept in the
    folder `cache`: from then on examples are read by their number. Damaged shards, and examples without an
    image or a caption, are left out, counted and reported. InputError where nothing is left.
    """

    def __init__(self, path: str | Sequence[str], text_key: str = "caption", cache: str | None = None):
        self.shards = expanded(path)
        folder = (Path(cache) if cache else default_cache()) / "shards"
        self.left_out: dict[str, str] = {}
        self.starts: list[int] = []  # number of the first example of each shard
        self.keys, self.captions = Texts(), Texts()
        self.places = array("q")  # offset and size of each of an example's MEMBERS, or -1, -1
        self.metadata: dict[str, Column] = {}
        self.names = relative_names(self.shards)
        changes: list[Any] = [text_key]
        for number, shard in enumerate(tqdm(self.shards, "indexing shards", leave=False)):
            self.starts.append(len(self))
            try:
                changes.append([self.names[number], ends(shard)])
                index = _kept_index(shard, text_key, folder)
            except OSError as error:
                self.left_out[str(shard)] = f"the shard cannot be read: {error.strerror or error}"
                continue
            changes.append(digest(index["examples"]))
            if index["damage"]:
                self.left_out[str(shard)] = f"the shard is damaged: {index['damage']}"
            for key, why in index["left_out"].items():
                self.left_out[f"{shard}:{key}"] = why
            for key, entry in index["examples"].items():
                self._add(key, entry)
        self.fingerprint = digest(changes)
        reasons = "; ".join(f"{name}: {why}" for name, why in list(self.left_out.items())[:3])
        if not len(self):
            raise InputError(
                f"data: there is no example in {len(self.shards)} shards ({reasons or 'all are empty'})"
            )
        if self.left_out:
            damaged = [name for name in self.left_out if name in set(map(str, self.shards))]
            if damaged:
                notice(f"{len(damaged)} of {len(self.shards)} shards are damaged: {examples_named(damaged)}")
            if others := len(self.left_out) - len(damaged):
                notice(f"{others:,} left out of the shards: {reasons}")

    def _add(self, key: str, entry: dict[str, Any]) -> None:
        """Take over what the index says of an example."""
        row = entry["row"]
        for name in row:
            if name not in self.metadata:
                self.metadata[name] = Column(len(self))
        for name, column in self.metadata.items():
            column.append(row.get(name))
        for member in MEMBERS:
            self.places.extend(entry["members"].get(member, (-1, -1)))
        self.captions.append(entry["caption"])
        self.keys.append(key)

    @property
    def has_maps(self) -> dict[str, np.ndarray]:
        there = np.array(self.places).reshape(-1, len(MEMBERS), 2)[:, :, 0] >= 0
        return {name: has for name, has in zip(MEMBERS, there.T, strict=True) if name in MAPS and has.any()}

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, index: int) -> str:
        return f"{self.names[self._shard(index)]}:{self.keys[index]}"

    def _maps(self, index: int) -> list[str]:
        return [name for name in MAPS if self._place(index, name)[0] >= 0]

    def _shard(self, index: int) -> int:
        return bisect.bisect_right(self.starts, index) - 1

    def _place(self, index: int, member: str) -> tuple[int, int]:
        """Offset and size of a member in its shard."""
        start = 2 * (index * len(MEMBERS) + MEMBERS.index(member))
        return self.places[start], self.places[start + 1]

    def _read(self, index: int, member: str) -> bytes:
        offset, size = self._place(index, member)
        try:
            with self.shards[self._shard(index)].open("rb", buffering=0) as file:
                return os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise DamagedExample(self.key(index), error.strerror or str(error)) from error


def expanded(path: str | Sequence[str]) -> list[Path]:
    """The shards that a path, a list or a text with braces names; InputError if there are none."""
    expand, _ = _webdataset()
    paths: list[Path] = []
    for each in [path] if isinstance(path, str) else path:
        names = [Path(name) for name in expand(str(each))]
        for name in names:
            paths += sorted(name.glob("*.tar")) if name.is_dir() else [name]
    if not paths:
        raise InputError(f"data: {path} has no .tar files")
    if not any(one.is_file() for one in paths):
        raise InputError(f"data: there is no shard {paths[0]}" + (f", nor {paths[-1]}" if paths[1:] else ""))
    return paths


def _webdataset() -> tuple[Any, Any]:
    """How the webdataset package expands lists of shards, and splits the name of a member."""
    try:
        from webdataset.shardlists import expand_urls
        from webdataset.tariterators import base_plus_ext
    except ImportError as error:
        raise InputError('shards need the webdataset package: pip install -e ".[training]"') from error
    return expand_urls, base_plus_ext


def _kept_index(shard: Path, text_key: str, folder: Path) -> dict[str, Any]:
    """The index of a shard: from its file, if that was made of the same shard."""
    name = digest([_FORMAT, str(shard.absolute()), stamp(shard), text_key])[:32]
    kept = folder / f"{name}.json"
    with suppress(OSError, ValueError):
        return json.loads(kept.read_text(encoding="utf-8"))
    with alone(kept):
        with suppress(OSError, ValueError):  # another process may have made it meanwhile
            return json.loads(kept.read_text(encoding="utf-8"))
        index = index_shard(shard, text_key)
        with suppress(OSError, InputError):  # without the file the shard is indexed again
            write_whole(kept, lambda file: file.write(json.dumps(index).encode()))
    return index


def index_shard(shard: Path, text_key: str) -> dict[str, Any]:
    """Where each example's members are: {"examples": {key: …}, "left_out": {key: why}, "damage": str | None}.

    An example has "members" {"image" or a map: [offset, size]}, "caption" and "row", its metadata. Whatever
    lies before the first damage of a shard is kept.
    """
    _, split = _webdataset()
    found: dict[str, dict[str, Any]] = {}
    damage, length = None, shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                tar.members = []  # tarfile keeps them all
                if not member.isfile():
                    continue
                key, suffix = split(member.name)
                if key is None:
                    continue
                if member.offset_data + member.size > length:
                    damage = f"it ends within {member.name}"
                    found.pop(key, None)
                    break
                entry = found.setdefault(key, {"members": {}, "caption": None, "row": {}})
                _add(entry, suffix.lower(), member, tar)
    except (tarfile.TarError, OSError, EOFError) as error:
        damage = str(error)
        if found:
            found.popitem()  # members of the last example may be missing
    left_out = {}
    for key, entry in list(found.items()):
        text = entry["row"].pop(text_key, None)
        if entry["caption"] is None:
            entry["caption"] = None if text is None else str(text)
        why = entry.pop("why", None)
        if "image" not in entry["members"]:
            why = "there is no image for this caption"
        elif entry["caption"] is None:
            why = why or "it has no caption"
        if why:
            left_out[key] = why
            del found[key]
    return {"examples": found, "left_out": left_out, "damage": damage}


def _add(entry: dict[str, Any], suffix: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    kind, _, last = suffix.rpartition(".")
    place = [member.offset_data, member.size]
    if suffix in IMAGES:
        entry["members"]["image"] = place
    elif last in IMAGES and kind in MAPS:
        entry["members"][kind] = place
    elif suffix in ("txt", "json"):
        try:
            text = tar.extractfile(member).read().decode("utf-8-sig")
            if suffix == "txt":
                entry["caption"] = " ".join(text.split())
            else:
                entry["row"] = dict(json.loads(text))
        except (ValueError, TypeError):
            entry["why"] = f"its .{suffix} cannot be read"
