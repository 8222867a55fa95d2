"""Sources by their names in a YAML file: built, filtered by column, and split for validation."""

import difflib
import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from ldm.cache import cache_folder
from ldm.errors import InputError
from ldm.log import notice
from ldm.training.data.config import DataConfig
from ldm.training.data.example import DamagedExample, Example, Source
from ldm.training.files import whole
from ldm.util import check_params

ROOMS = ("ldm.training.data.", "ldm.scenes.")  # whose classes a `target:` may name


class Subset:
    """Some of a source's examples, by number."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices = source, np.asarray(indices, np.int64)
        self.in_memory = getattr(source, "in_memory", False)
        self.left_out: Mapping[str, str] = getattr(source, "left_out", {})

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.source.fingerprint.encode() + self.indices.tobytes()).hexdigest()

    @property
    def metadata(self) -> dict[str, list[Any]]:
        return {name: [values[i] for i in self.indices] for name, values in self.source.metadata.items()}

    @property
    def has_maps(self) -> dict[str, np.ndarray]:
        return {name: has[self.indices] for name, has in getattr(self.source, "has_maps", {}).items()}

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        return self.source.key(int(self.indices[index]))

    def caption(self, index: int) -> str:
        return self.source.caption(int(self.indices[index]))

    def size(self, index: int) -> tuple[int, int]:
        return self.source.size(int(self.indices[index]))

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]


def open_sources(
    data: DataConfig, allow_target: Iterable[str] = (), cache: Path | None = None
) -> tuple[Source, Source | None]:
    """The examples to train on and those for validation, filtered; None where there are none of these.

    The sizes of images are kept in the folder `cache`. InputError for a source that cannot be built, a filter
    that cannot be applied, or where nothing is left.
    """
    train = filtered(build_source("train", data.train, allow_target), data.filters, cache)
    if data.validation is not None:
        return train, filtered(build_source("validation", data.validation, allow_target), data.filters, cache)
    if not data.validation_share:
        return train, None
    chosen = np.array([_share(train.key(i)) < data.validation_share for i in range(len(train))])
    if chosen.all() or not chosen.any():
        which = "training" if chosen.all() else "validation"
        raise InputError(
            f"data: validation_share {data.validation_share} leaves no example of {len(train)} for {which}"
        )
    return Subset(train, np.flatnonzero(~chosen)), Subset(train, np.flatnonzero(chosen))


def build_source(name: str, section: Mapping[str, Any], allow_target: Iterable[str] = ()) -> Source:
    """The source that `{target: …, params: …}` describes; `name` is its key in the `data:` section."""
    target, params = section["target"], section.get("params") or {}
    module, _, cls = target.rpartition(".")
    allowed = any(target.startswith(f"{prefix.rstrip('.')}.") for prefix in allow_target)
    if not allowed and not target.startswith(ROOMS):
        raise InputError(f"data: {name}: target {target!r} is not allowed; allowed: {known_sources()}")
    try:
        owner = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"data: {name}: there is no source {target!r}; there are {known_sources()}"
        ) from error
    if not (isinstance(owner, type) and hasattr(owner, "caption") and owner.__module__ == module):
        raise InputError(f"data: {name}: {target!r} is not a source; there are {known_sources()}")
    check_params(owner, params)
    try:
        return owner(**params)
    except TypeError as error:  # a parameter that is missing
        raise InputError(f"data: {name}: {target}: {error}") from error


def known_sources() -> str:
    return ", ".join(
        f"ldm.{name}"
        for name in (
            "training.data.folder.ImageFolder",
            "training.data.shards.WebDataset",
            "training.data.table.Parquet",
            "scenes.source.Scenes",
        )
    )


_CONDITION = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*")
_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def condition(column: str, text: Any) -> Callable[[Any], bool]:
    """A test of one value of a column, such as ">= 5.0" or "== en". A value that is missing never passes.

    Numbers are compared as numbers, also where the column has them as text. InputError if the text is no
    condition.
    """
    match = _CONDITION.fullmatch(str(text))
    number = _number(match[2]) if match else None
    if match is None or (number is None and match[1] not in ("==", "!=")):
        raise InputError(
            f"data: filters: {column}: {text!r} is not a condition such as '>= 5.0', '< 0.5' or '== en'"
        )
    test, wanted = _TESTS[match[1]], match[2].strip("'\"")

    def passes(value: Any) -> bool:
        if value is None or value != value:  # NaN
            return False
        if number is None:
            return test(str(value), wanted)
        value = _number(value)
        return value is not None and test(value, number)

    return passes


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def filtered(source: Source, filters: Mapping[str, Any], cache: Path | None = None) -> Source:
    """The examples whose columns meet all conditions.

    Where a source has no columns `width` and `height`, they are those of its images. InputError for a column
    that is missing, and where nothing is left.
    """
    if not filters:
        return source
    tests = {column: condition(column, text) for column, text in filters.items()}
    columns: dict[str, Sequence[Any]] = dict(source.metadata)
    for place, side in enumerate(("width", "height")):
        if side in tests and side not in columns:
            columns[side] = image_sizes(source, cache)[:, place]
    for column in tests:
        if column not in columns:
            known = sorted({*columns, "width", "height"})
            nearest = difflib.get_close_matches(column, known, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise InputError(
                f"data: filters: there is no column {column!r}; {hint}there are {', '.join(known)}"
            )
    kept, counts = np.ones(len(source), bool), []
    for column, test in tests.items():
        fits = np.fromiter(map(test, columns[column]), bool, len(source))
        counts.append(f"{column} {filters[column]}: {fits.sum():,}")
        kept &= fits
    summary = f"filters keep {kept.sum():,} of {len(source):,} examples ({', '.join(counts)})"
    if not kept.any():
        raise InputError(f"data: {summary}")
    notice(summary)
    return Subset(source, np.flatnonzero(kept))


def image_sizes(source: Source, cache: Path | None = None) -> np.ndarray:
    """Widths and heights of a source's images, int32 [n, 2]; 0, 0 where one is damaged.

    They are read once and kept in a file by the source's fingerprint.
    """
    kept = (cache or default_cache()) / "sizes" / f"{source.fingerprint[:32]}.npy"
    with suppress(OSError, ValueError, EOFError):
        sizes = np.load(kept)
        if sizes.shape == (len(source), 2):
            return sizes

    def size(index: int) -> tuple[int, int]:
        try:
            return source.size(index)
        except DamagedExample:
            return 0, 0

    with ThreadPoolExecutor(8) as pool:  # they wait for the disk
        found = tqdm(pool.map(size, range(len(source))), "reading sizes", len(source), leave=False)
        sizes = np.array(list(found), np.int32).reshape(-1, 2)
    with suppress(OSError, InputError):  # without it they are read again
        write_whole(kept, lambda file: np.save(file, sizes))
    return sizes


def default_cache() -> Path:
    """Where indices of sources are kept, if nobody names a folder."""
    try:
        return cache_folder() / "training"
    except RuntimeError as error:
        raise InputError(f"there is no folder for caches, because {error}; set XDG_CACHE_HOME") from error


def write_whole(path: Path, write: Callable[[Any], None]) -> None:
    """Write a binary file, whole or not at all."""
    with whole(path) as unfinished, unfinished.open("wb") as file:
        write(file)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time is in this block for `path`, so that several do not make the same file.

    Where the folder takes no locks, all of them go on: the file is written whole anyway.
    """
    lock = FileLock(path.with_name(f"{path.name}.lock"), fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)


def stamp(path: Path) -> str:
    """Size and time of a file's last change, by which a cache on this machine knows that it is the same."""
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def ends(path: Path, length: int = 2**16) -> str:
    """Size of a large file and a hash of its first and last 64 KiB, which its copies have, too."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        found = hashlib.sha256()
        for start in (0, max(0, size - length)):
            file.seek(start)
            found.update(file.read(length))
    return f"{size}-{found.hexdigest()}"


def relative_names(paths: Sequence[Path]) -> list[str]:
    """The paths below the folder that they have in common, so that a set is the same wherever it lies."""
    paths = [path.absolute() for path in paths]
    root = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(root).as_posix() for path in paths]


def check_maps(what: str, maps: Any, known: Sequence[str]) -> None:
    """InputError unless `maps` is {name of a map: text}, or None."""
    if maps is None:
        return
    if not isinstance(maps, Mapping) or not all(isinstance(value, str) for value in maps.values()):
        raise InputError(f"{what}: maps must be names with their places, as in {{mask: PATH}}, not {maps!r}")
    if unknown := [name for name in maps if name not in known]:
        raise InputError(f"{what}: maps: {unknown[0]!r} is not one of {', '.join(known)}")


def digest(values: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def examples_named(names: Sequence[str], most: int = 3) -> str:
    """A few names of many: "a, b, c and 7 more"."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def _share(key: str) -> float:
    """0 <= share < 1 by a hash, so that an example stays on its side when others come or go."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
