"""Folders of captioned images."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from image_sets import encoded, image, write_folder

from ldm.errors import InputError
from ldm.training.data.example import DamagedExample
from ldm.training.data.folder import ImageFolder


def keys(source: ImageFolder) -> list[str]:
    return [source.key(k) for k in range(len(source))]


def test_captions_beside_the_images(tmp_path: Path) -> None:
    write_folder(tmp_path, 2)
    write_folder(tmp_path / "more" / "below", 1, 20, 10)
    (tmp_path / "photo.JPG").write_bytes(encoded(3, form="jpeg"))
    (tmp_path / "photo.txt").write_text("\ufeffa photo,\nof two lines\n", encoding="utf-8")
    source = ImageFolder(str(tmp_path))
    assert keys(source) == ["00.png", "01.png", "photo.JPG", "more/below/00.png"]
    captions = [source.caption(k) for k in range(4)]
    assert captions == ["image 0", "image 1", "a photo, of two lines", "image 0"]
    assert np.array_equal(source[1].image, image(1))
    assert (source[1].key, source[1].caption, source[1].maps) == ("01.png", "image 1", {})
    assert source.size(3) == (20, 10)
    assert pickle.loads(pickle.dumps(source))[3].image.shape == (10, 20, 3)


def test_captions_in_metadata(tmp_path: Path) -> None:
    """As the datasets library's imagefolder has it: file names relative to the file that names them."""
    write_folder(tmp_path / "train", 3)
    rows = [
        {"file_name": "00.png", "text": "from the file", "aesthetic": 5.5},
        {"file_name": "01.png", "aesthetic": 4, "language": "en"},
    ]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = ImageFolder(str(tmp_path))
    assert [source.caption(k) for k in range(3)] == ["from the file", "image 1", "image 2"]
    assert source.metadata == {"aesthetic": [5.5, 4, None], "language": [None, "en", None]}


def test_metadata_as_a_table_and_beside_each_image(tmp_path: Path) -> None:
    write_folder(tmp_path, 2)
    (tmp_path / "metadata.csv").write_text("file_name,words,punsafe\n00.png,a first,0.5\n")
    (tmp_path / "01.json").write_text(json.dumps({"words": "a second", "punsafe": 0.1}))
    source = ImageFolder(str(tmp_path), text_key="words")
    assert [source.caption(k) for k in range(2)] == ["a first", "a second"]
    assert source.metadata == {"punsafe": ["0.5", 0.1]}


def test_a_comma_that_has_no_quotes(tmp_path: Path) -> None:
    """It ended in AttributeError: 'NoneType' object has no attribute 'endswith'."""
    write_folder(tmp_path, 2)
    (tmp_path / "metadata.csv").write_text('file_name,text\n00.png,"one, two"\n01.png,one, two\n')
    source = ImageFolder(str(tmp_path))
    assert [source.caption(k) for k in range(2)] == ["one, two", "image 1"]
    assert "a text with a comma needs quotes" in source.left_out["metadata.csv:2"]


def test_one_caption_for_all(tmp_path: Path) -> None:
    write_folder(tmp_path, 2)
    (tmp_path / "01.txt").unlink()
    source = ImageFolder(str(tmp_path), caption="a photo of sks dog")
    assert [source.caption(k) for k in range(2)] == ["image 0", "a photo of sks dog"]


def test_what_has_no_counterpart_is_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path, 5)
    (tmp_path / "01.txt").unlink()
    (tmp_path / "03.txt").unlink()
    (tmp_path / "04.png").unlink()
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "gone.png", "text": "x"}\nno JSON\n{"text": "y"}\n'
    )
    (tmp_path / ".hidden.png").write_bytes(b"x")
    source = ImageFolder(str(tmp_path))
    assert keys(source) == ["00.png", "02.png"]
    assert source.left_out == {
        "metadata.jsonl:2": "the line is not a JSON object",
        "metadata.jsonl:3": "the line names no file_name",
        "01.png": "it has no caption",
        "03.png": "it has no caption",
        "gone.png": "there is no image for this caption",
        "04.txt": "there is no image for this caption",
    }
    assert f"{tmp_path}: 2 left out, because it has no caption: 01.png, 03.png" in caplog.messages
    assert len(caplog.messages) == 4


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data: .*/none is not a folder"):
        ImageFolder(str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"data: .* has no images: \.jpg, \.jpeg, \.png, \.webp files"):
        ImageFolder(str(tmp_path))
    (tmp_path / "alone.txt").write_text("words")
    with pytest.raises(InputError, match="has no images"):
        ImageFolder(str(tmp_path))
    (tmp_path / "a.png").write_bytes(encoded(1))
    with pytest.raises(InputError, match=r"data: none of the 1 images in .* has a caption: a \.txt file"):
        ImageFolder(str(tmp_path))


def test_damaged_files_are_named_when_they_are_read(tmp_path: Path) -> None:
    write_folder(tmp_path, 3)
    (tmp_path / "00.png").write_bytes(encoded(0)[:200])
    (tmp_path / "01.txt").write_bytes(b"\xff\xfe\xfa broken")
    source = ImageFolder(str(tmp_path))
    for index, name in ((0, "00.png"), (1, "01.png")):
        with pytest.raises(DamagedExample) as error:
            source[index]
        assert error.value.key == name
    assert source[2].caption == "image 2"


def test_maps_lie_in_folders_of_their_own_or_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "images" / "a", 2)
    write_folder(tmp_path / "masks" / "a", 2)
    (tmp_path / "edges.png").write_bytes(encoded(9))
    row = {"file_name": "00.png", "control_file_name": "../../edges.png"}
    (tmp_path / "images" / "a" / "metadata.jsonl").write_text(json.dumps(row))
    masks = {"mask": str(tmp_path / "masks")}
    source = ImageFolder(str(tmp_path / "images"), maps=masks)
    assert set(np.unique(source[0].maps["mask"])) == {0.0, 1.0}
    assert np.array_equal(source[0].maps["control"], image(9))
    assert set(source[1].maps) == {"mask"}
    assert {name: has.tolist() for name, has in source.has_maps.items()} == {
        "mask": [True, True],
        "control": [True, False],
    }
    assert source.metadata == {}
    (tmp_path / "masks" / "a" / "01.png").unlink()
    assert ImageFolder(str(tmp_path / "images"), maps=masks).has_maps["mask"].tolist() == [True, False]
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"maps: mask: .*none has no file for any of the images"):
        ImageFolder(str(tmp_path / "images"), maps={"mask": str(tmp_path / "none")})
    for wrong in ("abc", {"mask": 5}):
        with pytest.raises(InputError, match="maps must be names with their places"):
            ImageFolder(str(tmp_path / "images"), maps=wrong)
    with pytest.raises(InputError, match="maps: 'edges' is not one of mask, depth, control, small"):
        ImageFolder(str(tmp_path / "images"), maps={"edges": str(tmp_path)})
    with pytest.raises(InputError, match=r"maps: mask: .*gone is not a folder"):
        ImageFolder(str(tmp_path / "images"), maps={"mask": str(tmp_path / "gone")})


def test_the_fingerprint_is_that_of_images_captions_and_maps(tmp_path: Path) -> None:
    write_folder(tmp_path, 2)
    prints = [ImageFolder(str(tmp_path)).fingerprint]
    assert ImageFolder(str(tmp_path)).fingerprint == prints[0]
    (tmp_path / "00.txt").write_text("another caption")
    prints.append(ImageFolder(str(tmp_path)).fingerprint)
    (tmp_path / "00.txt").write_text("another CAPTION")
    prints.append(ImageFolder(str(tmp_path)).fingerprint)
    (tmp_path / "00.png").write_bytes(encoded(8) + b"more")
    prints.append(ImageFolder(str(tmp_path)).fingerprint)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "01.png", "text": "new"}')
    prints.append(ImageFolder(str(tmp_path)).fingerprint)
    (tmp_path / "01.png").unlink()
    prints.append(ImageFolder(str(tmp_path)).fingerprint)
    assert len(set(prints)) == 6


def test_broken_links_are_left_out(tmp_path: Path) -> None:
    """One link to a file that was gone ended the run with a traceback."""
    write_folder(tmp_path, 3)
    for name in ("01.png", "02.txt"):
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(tmp_path / "gone")
    source = ImageFolder(str(tmp_path))
    assert keys(source) == ["00.png"]
    why = "it cannot be read: No such file or directory"
    assert source.left_out == {"01.png": why, "02.png": why}
    (tmp_path / "00.png").unlink()
    (tmp_path / "00.png").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"no image in .* can be read, such as 00\.png: it cannot be read"):
        ImageFolder(str(tmp_path))


def test_a_folder_is_read_once_however_many_links_name_it(tmp_path: Path) -> None:
    """A link to the folder above gave every image forty times."""
    write_folder(tmp_path / "a", 2)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert keys(ImageFolder(str(tmp_path))) == ["a/00.png", "a/01.png"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "linked").symlink_to(tmp_path / "a")
    assert keys(ImageFolder(str(tmp_path / "other"))) == ["linked/00.png", "linked/01.png"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images were missing without a word."""
    write_folder(tmp_path, 1)
    write_folder(tmp_path / "secret", 1)
    plain = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert ImageFolder(str(tmp_path)).left_out == {"secret": "the folder cannot be read: Permission denied"}


def test_a_copied_folder_is_the_same_set(tmp_path: Path) -> None:
    """The fingerprint had times in it: a resumed run refused data that was copied or touched."""
    write_folder(tmp_path / "a", 2)
    write_folder(tmp_path / "b", 2)
    os.utime(tmp_path / "b" / "00.png", ns=(1, 1))
    os.utime(tmp_path / "b" / "00.txt", ns=(1, 1))
    one, other = (ImageFolder(str(tmp_path / name)).fingerprint for name in "ab")
    assert one == other
