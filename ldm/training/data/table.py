"""Parquet files with a column of image files."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.errors import InputError
from ldm.log import notice
from ldm.training.data.example import DamagedExample
from ldm.training.data.images import MAPS, EncodedSource
from ldm.training.data.sources import (
    alone,
    check_maps,
    default_cache,
    digest,
    ends,
    examples_named,
    relative_names,
    stamp,
    write_whole,
)


class DamagedTable(Exception):
    """A file that cannot be read, or that has something else in its columns. It is left out."""


class Parquet(EncodedSource):
    """The rows of .parquet files, which have the bytes of image files in the column `image`.

    `path` is a file, a folder of them or a list. The column holds the bytes themselves or, as the datasets
    library writes it, {"bytes", "path"}. `text` is the column of captions; `maps` names columns of maps, as
    in `{control: edges}`; the other columns are for `filters`. Parquet can only be read in large pieces, so
    the images are copied once into a file in the folder `cache`, from which each is read by its number.
    Damaged files, those whose columns of images hold something else, and rows without an image or a caption
    are left out, counted and reported. InputError for a column that is missing, and where nothing is left.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        image: str = "image",
        text: str = "text",
        maps: Mapping[str, str] | None = None,
        cache: str | None = None,
    ):
        _pyarrow()
        check_maps("data", maps, MAPS)
        self.columns = {"image": image, **(maps or {})}
        paths = _listed(path)
        self.left_out: dict[str, str] = {}
        self.copies: list[Path] = []
        self.rows: list[tuple[int, int]] = []  # number of the file, row in it
        self.names: list[str] = []
        self.captions: list[str] = []
        self.metadata: dict[str, list[Any]] = {}
        has_maps: dict[str, list[bool]] = {name: [] for name in maps or {}}
        changes: list[Any] = [self.columns, text]
        for name, file in zip(relative_names(paths), tqdm(paths, "opening tables", leave=False), strict=True):
            try:
                with _reading():
                    table = _pyarrow().parquet.ParquetFile(file)
                    _check_columns(file, table.schema_arrow.names, [*self.columns.values(), text])
                    others = self._others(table, text)
                    changes.append([name, ends(file), digest(others[text])])
                copy = _copied(file, table, list(self.columns.values()), cache)
            except DamagedTable as error:
                self.left_out[str(file)] = str(error)
                continue
            number, before = len(self.copies), len(self.rows)
            self.copies.append(copy)
            copied = _open(copy)
            present = copied.column(image).is_valid().to_pylist()
            texts = others.pop(text)
            kept = []
            for row, caption in enumerate(texts):
                if caption is None or not present[row]:
                    why = "it has no caption" if caption is None else "there is no image for this caption"
                    self.left_out[f"{file}:{row}"] = why
                else:
                    kept.append(row)
            self.rows += [(number, row) for row in kept]
            self.names += [f"{name}:{row}" for row in kept]
            for one, has in has_maps.items():
                there = copied.column(self.columns[one]).is_valid().to_pylist()
                has += [there[row] for row in kept]
            self.captions += [str(texts[row]) for row in kept]
            for column in {**self.metadata, **others}:  # files may differ in these
                values = others.get(column)
                new = [None if values is None else values[row] for row in kept]
                self.metadata.setdefault(column, [None] * before).extend(new)
        self.fingerprint = digest(changes)
        self.has_maps = {one: np.array(has) for one, has in has_maps.items() if any(has)}
        if self.left_out:
            notice(f"{len(self.left_out):,} left out of the tables: {examples_named(list(self.left_out))}")
        if not self.rows:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(self.left_out.items())[:3])
            raise InputError(
                f"data: there is no example in {len(paths)} tables ({reasons or 'all are empty'})"
            )
        self._tables: dict[int, Any] = {}

    def _others(self, table: Any, text: str) -> dict[str, list[Any]]:
        """All plain columns but those of images."""
        import pyarrow.types as types

        plain = [
            column.name
            for column in table.schema_arrow
            if column.name not in self.columns.values()
            and not (types.is_nested(column.type) or types.is_binary(column.type))
        ]
        return table.read(list(dict.fromkeys([text, *plain]))).to_pydict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": {}}  # every process maps the files itself

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        return self.names[index]

    def _maps(self, index: int) -> list[str]:
        return [name for name, has in self.has_maps.items() if has[index]]

    def _read(self, index: int, name: str) -> bytes:
        number, row = self.rows[index]
        if number not in self._tables:
            self._tables[number] = _open(self.copies[number])
        data = self._tables[number].column(self.columns[name])[row].as_py()
        if data is None:
            raise DamagedExample(self.key(index), f"its {self.columns[name]} is missing")
        return data


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError('Parquet files need the pyarrow package: pip install -e ".[training]"') from error
    return pyarrow


def _listed(path: str | Sequence[str]) -> list[Path]:
    paths: list[Path] = []
    for each in [path] if isinstance(path, str) else path:
        one = Path(each)
        paths += sorted(one.rglob("*.parquet")) if one.is_dir() else [one]
    if missing := [one for one in paths if not one.exists()]:
        raise InputError(f"data: there is no file {missing[0]}")
    if not paths:
        raise InputError(f"data: {path} has no .parquet files")
    return paths


@contextmanager
def _reading() -> Iterator[None]:
    """Turns whatever pyarrow raises about a file's contents into DamagedTable."""
    try:
        yield
    except (OSError, _pyarrow().ArrowException, UnicodeDecodeError) as error:
        why = " ".join((getattr(error, "strerror", None) or str(error)).split())
        raise DamagedTable(f"the file is damaged: {why}") from error


def _check_columns(file: Path, there: list[str], wanted: list[str]) -> None:
    for name in wanted:
        if name not in there:
            raise InputError(f"data: {file} has no column {name!r}; there are {', '.join(there)}")


def _copied(file: Path, table: Any, columns: list[str], cache: str | None) -> Path:
    """The columns of images as an Arrow file, whose rows can be read one by one."""
    import pyarrow as arrow

    folder = (Path(cache) if cache else default_cache()) / "tables"
    copy = folder / f"{digest([str(file.absolute()), stamp(file), columns])[:32]}.arrow"
    schema = arrow.schema([(name, arrow.large_binary()) for name in columns])

    def write(out: Any) -> None:
        with arrow.ipc.new_file(out, schema) as writer:
            batches = table.iter_batches(batch_size=64, columns=columns)
            with tqdm(desc=f"copying {file.name}", total=table.metadata.num_rows, leave=False) as bar:
                while True:
                    with _reading():  # its errors are the table's, and those of the writer the copy's
                        batch = next(batches, None)
                    if batch is None:
                        break
                    arrays = [_bytes(name, batch.column(name)) for name in columns]
                    writer.write_batch(arrow.record_batch(arrays, schema=schema))
                    bar.update(len(batch))

    with alone(copy):
        if not copy.exists():
            write_whole(copy, write)
    return copy


def _bytes(name: str, column: Any) -> Any:
    """A column's bytes, which may lie in a structure. DamagedTable if it holds something else."""
    import pyarrow as arrow
    from pyarrow import types

    if types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = arrow.compute.struct_field(column, "bytes")
    if not (types.is_binary(column.type) or types.is_large_binary(column.type)):
        raise DamagedTable(f"the column {name!r} holds {column.type}, not the bytes of image files")
    return column.cast(arrow.large_binary())


def _open(copy: Path) -> Any:
    import pyarrow as arrow

    with arrow.memory_map(str(copy)) as file:
        return arrow.ipc.open_file(file).read_all()
