"""Parquet files with image bytes, read by number."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_sets import encoded, image

from ldm.errors import InputError
from ldm.training.data import table
from ldm.training.data.example import DamagedExample
from ldm.training.data.table import Parquet
from ldm.training.files import DiskFull

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def write(path: Path, count: int, **columns: list[Any]) -> Path:
    given = {"image": [encoded(k) for k in range(count)], "text": [f"image {k}" for k in range(count)]}
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(arrow.table(given | columns), path, row_group_size=3)
    return path


def test_rows_of_several_files(tmp_path: Path, cache: str) -> None:
    write(tmp_path / "set" / "a.parquet", 5, aesthetic=[1.0, 2.0, None, 4.0, 5.0])
    write(tmp_path / "set" / "b.parquet", 2, language=["en", "de"])
    source = Parquet(str(tmp_path / "set"), cache=cache)
    assert len(source) == 7
    assert [source.caption(k) for k in (0, 4, 5, 6)] == ["image 0", "image 4", "image 0", "image 1"]
    assert source.key(6) == "b.parquet:1"
    assert source.metadata == {
        "aesthetic": [1.0, 2.0, None, 4.0, 5.0, None, None],
        "language": [None] * 5 + ["en", "de"],
    }
    assert np.array_equal(source[4].image, image(4))
    assert np.array_equal(pickle.loads(pickle.dumps(source))[5].image, image(0))
    assert source.size(0) == (32, 32)


def test_the_columns_of_the_datasets_library(tmp_path: Path, cache: str) -> None:
    images = [{"bytes": encoded(k), "path": f"{k}.png"} for k in range(2)]
    path = write(tmp_path / "a.parquet", 2, image=images, edges=[encoded(k + 5) for k in range(2)])
    source = Parquet(str(path), maps={"control": "edges"}, cache=cache)
    assert np.array_equal(source[1].image, image(1))
    assert np.array_equal(source[1].maps["control"], image(6))
    assert source.metadata == {}


def test_images_are_copied_once(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", 4)
    first = Parquet(str(path), cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(table, "write_whole", None)
        assert Parquet(str(path), cache=cache).fingerprint == first.fingerprint
    write(path, 5)
    again = Parquet(str(path), cache=cache)
    assert len(again) == 5
    assert again.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"image": "jpg"}, "a.parquet has no column 'jpg'; there are image, text"),
        ({"text": "caption"}, "a.parquet has no column 'caption'; there are image, text"),
        ({"image": "text"}, "a.parquet: the column 'text' holds string, not the bytes of image files"),
        ({"maps": {"edges": "image"}}, "data: maps: 'edges' is not one of mask, depth, control, small"),
    ],
)
def test_columns_that_do_not_fit_are_named(
    tmp_path: Path, cache: str, params: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "a.parquet", 2)
    with pytest.raises(InputError) as error:
        Parquet(str(path), cache=cache, **params)
    assert message in str(error.value)


def test_damage_is_left_out_and_counted(tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture) -> None:
    images = [encoded(0), None, b"no image", encoded(3)]
    path = write(tmp_path / "a.parquet", 4, image=images, text=["a", "b", "c", None])
    torn = write(tmp_path / "b.parquet", 4)
    torn.write_bytes(torn.read_bytes()[:-50])
    source = Parquet([str(path), str(torn)], cache=cache)
    assert [source.caption(k) for k in range(len(source))] == ["a", "c"]
    assert source.left_out[f"{path}:1"] == "there is no image for this caption"
    assert source.left_out[f"{path}:3"] == "it has no caption"
    assert source.left_out[str(torn)].startswith("the file is damaged: ")
    assert caplog.messages == [f"3 left out of the tables: {path}:1, {path}:3, {torn}"]
    with pytest.raises(DamagedExample, match=r"a\.parquet:2: it is not an image"):
        source[1]


def test_nothing_left_is_an_error(tmp_path: Path, cache: str) -> None:
    torn = tmp_path / "b.parquet"
    torn.write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"data: there is no example in 1 tables \(.*the file is damaged"):
        Parquet(str(torn), cache=cache)
    with pytest.raises(InputError, match=r"data: there is no file .*gone\.parquet"):
        Parquet(str(tmp_path / "gone.parquet"), cache=cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no \.parquet files"):
        Parquet(str(tmp_path / "empty"), cache=cache)


def test_a_full_disk_is_no_damage(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", 2)

    def full(*_: Any) -> None:
        raise DiskFull("no room")

    monkeypatch.setattr(table, "write_whole", full)
    with pytest.raises(DiskFull):
        Parquet(str(path), cache=cache)


@pytest.mark.parametrize("column", [0, 1])
def test_a_corrupt_page_is_damage_of_its_file(tmp_path: Path, cache: str, column: int) -> None:
    """pyarrow's OSError about one page ended the run with "….arrow cannot be written"."""
    whole, torn = write(tmp_path / "a.parquet", 4), write(tmp_path / "b.parquet", 6)
    place = parquet.ParquetFile(torn).metadata.row_group(1).column(column).data_page_offset
    data = bytearray(torn.read_bytes())
    data[place : place + 16] = b"\xff" * 16
    torn.write_bytes(data)
    source = Parquet([str(whole), str(torn)], cache=cache)
    assert len(source) == 4
    assert list(source.left_out) == [str(torn)]
    assert source.left_out[str(torn)].startswith("the file is damaged: ")
    assert not list(Path(cache).rglob(".*")), "no unfinished copy stays"


def test_one_file_with_another_type_of_column_is_left_out(tmp_path: Path, cache: str) -> None:
    """A single file whose column of images held text ended the run."""
    whole, other = write(tmp_path / "a.parquet", 2), write(tmp_path / "b.parquet", 2, image=["x", "y"])
    source = Parquet([str(whole), str(other)], cache=cache)
    assert len(source) == 2
    assert source.left_out == {str(other): "the column 'image' holds string, not the bytes of image files"}


def test_an_error_of_the_copy_is_no_damage(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of reading and of writing are told apart."""
    path = write(tmp_path / "a.parquet", 2)

    class Refused:
        def __init__(self, *_: Any) -> None:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(arrow.ipc, "new_file", Refused)
    with pytest.raises(InputError, match=r"\.arrow cannot be written: Input/output error"):
        Parquet(str(path), cache=cache)


def test_a_copied_set_is_the_same_set(tmp_path: Path, cache: str) -> None:
    """Keys and fingerprint had the path and the time in them: a resumed run refused copied files."""
    path = write(tmp_path / "a" / "x.parquet", 4)
    (tmp_path / "b").mkdir()
    copy = tmp_path / "b" / "x.parquet"
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(1, 1))
    one, other = (Parquet(str(tmp_path / name), cache=cache) for name in "ab")
    assert one.fingerprint == other.fingerprint
    assert [one.key(k) for k in range(4)] == [other.key(k) for k in range(4)]
    write(copy, 4, text=["image 0", "image 1", "IMAGE 2", "image 3"])
    assert Parquet(str(copy), cache=cache).fingerprint != one.fingerprint


def test_rows_without_a_map_are_known(tmp_path: Path, cache: str) -> None:
    """Without it, the first batch with such a row failed."""
    path = write(tmp_path / "a.parquet", 3, edges=[encoded(5), None, encoded(6)])
    source = Parquet(str(path), maps={"control": "edges"}, cache=cache)
    assert source.has_maps["control"].tolist() == [True, False, True]
    assert [set(source[k].maps) for k in range(3)] == [{"control"}, set(), {"control"}]
