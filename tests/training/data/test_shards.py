"""WebDataset shards, read by number."""

import io
import os
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from image_sets import encoded, image, write_shard
from PIL import Image

from ldm.errors import InputError
from ldm.training.data import shards
from ldm.training.data.example import DamagedExample
from ldm.training.data.shards import WebDataset
from ldm.training.data.sources import filtered


def members(numbers: range, form: str = "png") -> dict[str, object]:
    found: dict[str, object] = {}
    for number in numbers:
        found[f"{number:05}.{form}"] = encoded(number, form=form)
        found[f"{number:05}.txt"] = f"image {number}"
        found[f"{number:05}.json"] = {"aesthetic": number, "caption": "not this one"}
    return found


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def test_examples_of_several_shards(tmp_path: Path, cache: str) -> None:
    write_shard(tmp_path / "0.tar", members(range(3)))
    write_shard(tmp_path / "1.tar", members(range(3, 5), "webp"))
    source = WebDataset(str(tmp_path / "{0..1}.tar"), cache=cache)
    assert len(source) == 5
    assert [source.caption(k) for k in range(5)] == [f"image {k}" for k in range(5)]
    assert source.key(3) == "1.tar:00003"
    assert {name: list(column) for name, column in source.metadata.items()} == {"aesthetic": [0, 1, 2, 3, 4]}
    assert np.array_equal(source[2].image, image(2))
    assert source.size(4) == (32, 32)
    assert np.array_equal(pickle.loads(pickle.dumps(source))[0].image, image(0))


def test_the_webdataset_package_reads_the_same(tmp_path: Path, cache: str) -> None:
    """Its own writer's shards, and its own reader's examples."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "set.tar")) as writer:
        for number in range(4):
            writer.write(
                {
                    "__key__": f"folder.d/{number}",
                    "png": image(number),
                    "txt": f"words {number}",
                    "json": {"width": number},
                    "mask.png": image(number + 9),
                }
            )
    source = WebDataset(str(tmp_path / "set.tar"), cache=cache)
    theirs = list(webdataset.WebDataset(str(tmp_path / "set.tar"), shardshuffle=False).decode("rgb8"))
    assert len(source) == len(theirs) == 4
    for index, sample in enumerate(theirs):
        example = source[index]
        assert example.key.endswith(f":{sample['__key__']}")
        assert np.array_equal(example.image, sample["png"])
        assert example.caption == sample["txt"]
        assert source.metadata["width"][index] == sample["json"]["width"]
        assert set(example.maps) == {"mask"}


def test_all_ways_to_name_shards(tmp_path: Path, cache: str) -> None:
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", members(range(number, number + 1)))
    names = [str(tmp_path / f"{number}.tar") for number in range(3)]
    braces = str(tmp_path / "{0,1,2}.tar")
    for path in (str(tmp_path), names, braces, [names[0], str(tmp_path / "{1..2}.tar")]):
        assert len(WebDataset(path, cache=cache)) == 3


def test_the_index_is_kept(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "0.tar", members(range(3)))
    first = WebDataset(str(tmp_path / "0.tar"), cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "index_shard", None)
        again = WebDataset(str(tmp_path / "0.tar"), cache=cache)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again[1].image, first[1].image)
    write_shard(tmp_path / "0.tar", members(range(5)))
    changed = WebDataset(str(tmp_path / "0.tar"), cache=cache)
    assert len(changed) == 5
    assert changed.fingerprint != first.fingerprint
    for file in Path(cache).rglob("*.json"):
        file.write_text("{torn")
    assert len(WebDataset(str(tmp_path / "0.tar"), cache=cache)) == 5


def test_a_truncated_shard_keeps_what_is_whole(
    tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_shard(tmp_path / "0.tar", members(range(4)))
    torn = write_shard(tmp_path / "1.tar", members(range(4)))
    data = torn.read_bytes()
    torn.write_bytes(data[: len(data) // 2])
    (tmp_path / "2.tar").write_bytes(b"this is no tar file" * 100)
    source = WebDataset(str(tmp_path), cache=cache)
    assert 5 <= len(source) < 8
    for index in range(len(source)):
        assert np.array_equal(source[index].image, image(index % 4))
    assert set(source.left_out) == {str(torn), str(tmp_path / "2.tar")}
    assert f"2 of 3 shards are damaged: {torn}, {tmp_path}/2.tar" in caplog.messages


@pytest.mark.parametrize("cut", range(100, 20000, 977))
def test_wherever_a_shard_is_cut_the_rest_can_be_read(tmp_path: Path, cache: str, cut: int) -> None:
    torn = write_shard(tmp_path / "1.tar", members(range(4)))
    write_shard(tmp_path / "2.tar", members(range(1)))
    torn.write_bytes(torn.read_bytes()[:cut])
    source = WebDataset(str(tmp_path), cache=cache)
    for index in range(len(source)):
        example = source[index]
        assert np.array_equal(example.image, image(int(example.key[-5:])))
        assert example.caption == f"image {int(example.key[-5:])}"


def test_examples_without_image_or_caption_are_left_out(tmp_path: Path, cache: str) -> None:
    path = write_shard(
        tmp_path / "0.tar",
        {
            "a.txt": "no image",
            "b.png": encoded(1),
            "c.png": encoded(2),
            "c.json": {"caption": "in JSON"},
            "d.png": encoded(3),
            "d.json": "no JSON",
            "e.png": b"no image",
            "e.txt": "damaged",
        },
    )
    source = WebDataset(str(path), cache=cache)
    assert [source.caption(k) for k in range(len(source))] == ["in JSON", "damaged"]
    assert source.left_out == {
        f"{path}:a": "there is no image for this caption",
        f"{path}:b": "it has no caption",
        f"{path}:d": "its .json cannot be read",
    }
    with pytest.raises(DamagedExample, match=r"0\.tar:e: it is not an image"):
        source[1]


def test_nothing_left_is_an_error(tmp_path: Path, cache: str) -> None:
    with pytest.raises(InputError, match=r"data: there is no shard .*0\.tar, nor .*2\.tar"):
        WebDataset(str(tmp_path / "{0..2}.tar"), cache=cache)
    with pytest.raises(InputError, match=r"data: .* has no \.tar files"):
        WebDataset(str(tmp_path), cache=cache)
    write_shard(tmp_path / "0.tar", {"a.txt": "words"})
    with pytest.raises(InputError, match=r"data: there is no example in 1 shards \(.*0\.tar:a: there is no"):
        WebDataset(str(tmp_path), cache=cache)


def test_maps_are_members(tmp_path: Path, cache: str) -> None:
    depth = io.BytesIO()
    Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2)).save(depth, "png")
    members = {"a.png": encoded(1, 2, 2), "a.txt": "x", "a.control.png": encoded(5)}
    path = write_shard(tmp_path / "0.tar", members | {"a.depth.png": depth.getvalue()})
    maps = WebDataset(str(path), cache=cache)[0].maps
    assert maps["depth"].tolist() == [[0, 1], [2, 3]]
    assert np.array_equal(maps["control"], image(5))


def test_a_copied_set_is_the_same_set(tmp_path: Path, cache: str) -> None:
    """Keys and fingerprint had the path and the time in them: a resumed run refused copied shards."""
    for name in "ab":
        for number in range(2):
            path = write_shard(tmp_path / name / f"{number}.tar", members(range(3)))
            os.utime(path, ns=(ord(name), 1))
    one, other = (WebDataset(str(tmp_path / name), cache=cache) for name in "ab")
    assert one.fingerprint == other.fingerprint
    assert [one.key(k) for k in range(6)] == [other.key(k) for k in range(6)]
    changed = members(range(3)) | {"00001.txt": "IMAGE 1"}
    write_shard(tmp_path / "b" / "1.tar", changed)
    assert WebDataset(str(tmp_path / "b"), cache=cache).fingerprint != one.fingerprint


def test_a_caption_in_the_middle_of_a_large_shard_is_part_of_the_fingerprint(
    tmp_path: Path, cache: str
) -> None:
    """A hash of the ends of a shard alone would not see it."""
    filler = {f"{k}.bin": b"0" * 2**16 for k in "ab"}
    prints = []
    for caption in ("a cat", "a dog"):
        middle = {"c.png": encoded(1), "c.txt": caption}
        path = write_shard(tmp_path / "0.tar", {"a.bin": filler["a.bin"], **middle, "d.bin": filler["b.bin"]})
        prints.append(WebDataset(str(path), cache=cache).fingerprint)
    assert prints[0] != prints[1]


def test_one_process_indexes_a_shard(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process of a run read all shards; now the others wait for the first one's index."""
    path = write_shard(tmp_path / "0.tar", members(range(3)))
    calls, plain, first = [], shards.index_shard, threading.Event()

    def index(*arguments: object) -> dict:
        calls.append(1)
        first.set()
        time.sleep(0.2)
        return plain(*arguments)

    monkeypatch.setattr(shards, "index_shard", index)
    found: list[int] = []
    both = [
        threading.Thread(target=lambda: found.append(len(WebDataset(str(path), cache=cache))))
        for _ in range(2)
    ]
    both[0].start()
    first.wait(10)
    both[1].start()
    for thread in both:
        thread.join()
    assert found == [3, 3]
    assert len(calls) == 1
    assert not list(Path(cache).rglob("*.lock"))


def test_examples_without_a_map_are_known(tmp_path: Path, cache: str) -> None:
    """Without it, the first batch with such an example failed."""
    path = write_shard(tmp_path / "0.tar", members(range(3)) | {"00002.control.png": encoded(5)})
    assert WebDataset(str(path), cache=cache).has_maps["control"].tolist() == [False, False, True]


def test_metadata_of_any_sort_is_as_it_was(tmp_path: Path, cache: str) -> None:
    """Columns are kept as numbers, or as text where they hold anything else: a dict an example took 1 KiB."""
    rows = [
        {"score": 1.5, "language": "en", "wide": True, "id": 2**60 + 1},
        {"score": 2, "language": None, "wide": False, "id": 3},
        {"late": 7},
        {"score": "none", "language": "zürich", "late": 8.5, "tags": ["a", {"b": 1}]},
    ]
    files: dict[str, object] = {}
    for number, row in enumerate(rows):
        files |= {f"{number}.png": encoded(number), f"{number}.json": row | {"caption": f"ümlaut {number}"}}
    write_shard(tmp_path / "0.tar", files)
    source = WebDataset(str(tmp_path / "0.tar"), cache=cache)
    names = dict.fromkeys(name for row in rows for name in row)
    assert {name: list(column) for name, column in source.metadata.items()} == {
        name: [row.get(name) for row in rows] for name in names
    }
    assert [source.caption(k) for k in range(4)] == [f"ümlaut {k}" for k in range(4)]
    assert [type(value) for value in source.metadata["wide"][:2]] == [bool, bool]
    assert len(filtered(source, {"late": ">= 8"})) == 1
    assert pickle.loads(pickle.dumps(source)).metadata["id"][0] == 2**60 + 1
