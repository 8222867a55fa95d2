"""Sources by name, their filters, and the split for validation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_sets import encoded, in_memory, write_folder

from ldm.errors import InputError
from ldm.training.data.config import data_config
from ldm.training.data.folder import ImageFolder
from ldm.training.data.sources import Subset, build_source, condition, filtered, image_sizes, open_sources

SCENES = {"seed": 0, "images": 3, "image_size": 16}


def folder_section(path: Path, **more: Any) -> dict[str, Any]:
    target = "ldm.training.data.folder.ImageFolder"
    return {"train": {"target": target, "params": {"path": str(path)}}, "size": 32, **more}


def test_a_source_is_built_by_its_name() -> None:
    source = build_source("train", {"target": "ldm.scenes.source.Scenes", "params": SCENES})
    assert len(source) == 3


@pytest.mark.parametrize(
    ("target", "params", "message"),
    [
        ("os.path", {}, "data: train: target 'os.path' is not allowed; allowed: ldm.training.data.folder"),
        ("ldm.weights.loading.find", {}, "data: train: target 'ldm.weights.loading.find' is not allowed"),
        ("ldm.scenes.source.Scene", {}, "data: train: 'ldm.scenes.source.Scene' is not a source"),
        ("ldm.scenes.source.digest", {}, "data: train: 'ldm.scenes.source.digest' is not a source"),
        ("ldm.scenes.sauce.Scenes", {}, "data: train: there is no source 'ldm.scenes.sauce.Scenes'; there"),
        ("ldm.scenes.source.Scenes", {"sed": 1}, "Scenes has no parameter 'sed'; did you mean 'seed'?"),
        ("ldm.scenes.source.Scenes", {"seed": 1}, "data: train: ldm.scenes.source.Scenes: "),
        (
            "ldm.scenes.source.Scenes",
            SCENES | {"family": "x"},
            "data: Scenes: family 'x' is not one of plain",
        ),
        ("ldm.scenes.source.Scenes", SCENES | {"images": 0}, "data: Scenes: images must be a whole number"),
        ("ldm.scenes.source.Scenes", SCENES | {"soften": 2}, "data: Scenes: soften must be a number from 0"),
    ],
)
def test_what_is_no_source_is_named(target: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        build_source("train", {"target": target, "params": params})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "passing", "failing"),
    [
        (">= 5.0", [5, 5.5, "6"], [4.9, "4", None, float("nan"), "many"]),
        ("<0.1", [0, 0.05], [0.1, 1, None]),
        ("> 3", [4], [3]),
        ("<= 3", [3], [3.1]),
        ("== 512", [512, 512.0, "512"], [511, "abc", None]),
        ("!= 512", [511], [512, None]),
        ("== en", ["en"], ["de", None]),
        ("!= 'en'", ["de"], ["en", None]),
    ],
)
def test_conditions(text: str, passing: list[Any], failing: list[Any]) -> None:
    test = condition("column", text)
    assert all(map(test, passing))
    assert not any(map(test, failing))


@pytest.mark.parametrize("text", ["5", ">= five", "=> 5", "", None, ">="])
def test_what_is_no_condition_is_named(text: Any) -> None:
    with pytest.raises(
        InputError, match=r"data: filters: aesthetic: .* is not a condition such as '>= 5\.0'"
    ):
        condition("aesthetic", text)


def test_all_filters_hold(caplog: pytest.LogCaptureFixture) -> None:
    source = in_memory([(32, 32)] * 4, aesthetic=[4, 5, 6, None], punsafe=[0, 0, 0.5, 0])
    kept = filtered(source, {"aesthetic": ">= 5", "punsafe": "<= 0.1"})
    assert [kept.key(k) for k in range(len(kept))] == ["1"]
    assert kept[0].caption == kept.caption(0) == "image 1"
    assert kept.metadata == {"aesthetic": [5], "punsafe": [0]}
    assert caplog.messages == ["filters keep 1 of 4 examples (aesthetic >= 5: 2, punsafe <= 0.1: 3)"]


def test_width_and_height_are_those_of_the_images(tmp_path: Path) -> None:
    source = in_memory([(600, 500), (500, 600), (600, 600)])
    kept = filtered(source, {"width": ">= 512"}, tmp_path)
    assert [kept.key(k) for k in range(len(kept))] == ["0", "2"]
    named = in_memory([(32, 32)] * 2, width=[1000, 10])
    assert len(filtered(named, {"width": ">= 512"}, tmp_path)) == 1, "the column goes before the images"


def test_a_missing_column_is_named_with_those_there_are() -> None:
    source = in_memory([(32, 32)], aesthetic=[1], punsafe=[2])
    with pytest.raises(InputError) as error:
        filtered(source, {"aesthetics": ">= 5"})
    assert str(error.value) == (
        "data: filters: there is no column 'aesthetics'; did you mean 'aesthetic'? "
        "there are aesthetic, height, punsafe, width"
    )


def test_filters_that_leave_nothing_are_an_error() -> None:
    with pytest.raises(InputError, match=r"data: filters keep 0 of 1 examples \(aesthetic >= 5: 0\)"):
        filtered(in_memory([(32, 32)], aesthetic=[1]), {"aesthetic": ">= 5"})


def test_sizes_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = in_memory([(60, 50), (70, 20)])
    first = image_sizes(source, tmp_path)
    assert first.tolist() == [[60, 50], [70, 20]]
    monkeypatch.setattr(type(source), "size", None)
    assert np.array_equal(image_sizes(source, tmp_path), first)


def test_a_torn_file_of_sizes_is_read_again(tmp_path: Path) -> None:
    source = in_memory([(60, 50)])
    image_sizes(source, tmp_path)
    (file,) = (tmp_path / "sizes").iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    assert image_sizes(source, tmp_path).tolist() == [[60, 50]]


def test_damaged_images_have_no_size(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", 2)
    (tmp_path / "set" / "00.png").write_bytes(b"nothing")
    assert image_sizes(ImageFolder(str(tmp_path / "set")), tmp_path).tolist() == [[0, 0], [32, 32]]


def test_validation_is_split_off_by_the_key(tmp_path: Path) -> None:
    """A further image leaves the others on their side."""
    write_folder(tmp_path / "set", 30)
    data = data_config(folder_section(tmp_path / "set", validation_share=0.3))
    train, validation = open_sources(data, cache=tmp_path)
    keys = [{source.key(k) for k in range(len(source))} for source in (train, validation)]
    assert len(keys[0]) + len(keys[1]) == 30
    assert not keys[0] & keys[1]
    assert 3 <= len(keys[1]) <= 16
    (tmp_path / "set" / "99.png").write_bytes(encoded(99))
    (tmp_path / "set" / "99.txt").write_text("one more")
    again, more = open_sources(data, cache=tmp_path)
    assert keys[0] <= {again.key(k) for k in range(len(again))}
    assert keys[1] <= {more.key(k) for k in range(len(more))}
    assert train.fingerprint != again.fingerprint


def test_validation_may_be_a_source_of_its_own(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", 2)
    own = {"target": "ldm.scenes.source.Scenes", "params": SCENES}
    train, validation = open_sources(data_config(folder_section(tmp_path / "set", validation=own)))
    assert (len(train), len(validation)) == (2, 3)
    train, validation = open_sources(data_config(folder_section(tmp_path / "set")))
    assert validation is None


def test_a_split_that_leaves_nothing_is_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", 1)
    with pytest.raises(
        InputError, match=r"data: validation_share 0\.001 leaves no example of 1 for validation"
    ):
        open_sources(data_config(folder_section(tmp_path / "set", validation_share=0.001)))


def test_a_subset_has_a_fingerprint_of_its_own() -> None:
    source = in_memory([(32, 32)] * 3)
    subsets = [Subset(source, [0, 1]), Subset(source, [0, 2]), Subset(in_memory([(32, 30)] * 3), [0, 1])]
    assert len({source.fingerprint, *(subset.fingerprint for subset in subsets)}) == 4
    assert Subset(source, [0, 1]).fingerprint == subsets[0].fingerprint
