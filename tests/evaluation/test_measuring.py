"""Figures of images, images of folders and references."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_evaluation import pictures

from ldm.errors import InputError
from ldm.evaluation import measuring
from ldm.evaluation.fid import FrechetDistance, Statistics, frechet_distance
from ldm.scenes.scene import held_out


def colours(images) -> np.ndarray:
    """A stand-in for a network: the mean colour."""
    return np.stack([image.mean((0, 1)) for image in images])


def test_figures_of_images_of_which_some_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "BATCH", 3)
    images = list(enumerate(pictures(10, 0)))
    reference = Statistics.of(colours(pictures(20, 1)))
    del images[4]
    seen = []

    def agree(pixels, numbers):
        seen.extend(numbers)
        return np.array([k % 2 == 0 for k in numbers])

    read = []
    measure = measuring.Measures(colours, FrechetDistance(reference), agree, 0)
    distance, agreement = measure(iter(images), 10, read.append)
    assert seen == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert read == [3, 3, 3]
    there = Statistics.of(colours([image for _, image in images]))
    assert distance.value == pytest.approx(frechet_distance(reference, there))
    assert distance.low < distance.value < distance.high
    assert agreement.value == 0.4  # of all ten: the missing one counts as wrong

    similarity = measuring.Measures(colours, FrechetDistance(reference), lambda p, n: np.array(n) / 10, 0)
    _, agreement = similarity(iter(images), 10)
    assert agreement.value == pytest.approx(4.1 / 9)  # of those that are there


def manifest(folder: Path, lines: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_files_of_a_run(tmp_path: Path) -> None:
    """An image that failed and came out well when the run was taken up again is there."""
    lines = [{"image": k, "file": f"samples/{k}.png"} for k in (1, 0)]
    lines += [{"image": 2, "file": None, "nan": True}, {"image": 3, "file": None, "error": "full"}]
    manifest(tmp_path, [*lines, {"image": 3, "file": "samples/3.png"}])
    files = measuring.sampled_files(tmp_path, 4)
    assert files == [tmp_path / "samples/0.png", tmp_path / "samples/1.png", None, tmp_path / "samples/3.png"]
    with pytest.raises(InputError, match="has 3 of 5 images; the same command makes the others"):
        measuring.sampled_files(tmp_path, 5)


def test_reference_images_of_other_sizes(tmp_path: Path) -> None:
    """The middle of each, in the size of what is measured."""
    wide = np.zeros((30, 90, 3), np.uint8)
    wide[:, 30:60] = (10, 200, 30)
    Image.fromarray(wide).save(tmp_path / "b.png")
    Image.new("L", (200, 100), 77).save(tmp_path / "a.JPG")
    (tmp_path / "words.txt").touch()
    files = measuring.reference_files(tmp_path)
    assert [path.name for path in files] == ["a.JPG", "b.png"]
    grey, green = measuring.cropped(files, 20, 20)
    assert grey.shape == green.shape == (20, 20, 3)
    assert (green[:, 5:15] == (10, 200, 30)).all()
    assert (np.abs(grey.astype(int) - 77) <= 1).all()
    found = measuring.reference_statistics(measuring.cropped(files, 20, 20), colours)
    assert found.mean == pytest.approx(colours([grey, green]).mean(0))


def test_references_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent is not there"):
        measuring.reference_files(tmp_path / "absent")
    with pytest.raises(InputError, match=r"has no images .*val2017"):
        measuring.reference_files(tmp_path)
    (tmp_path / "a.png").write_text("no image")
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(InputError, match=r"a\.png"):
        list(measuring.cropped(measuring.reference_files(tmp_path), 8, 8))


def test_scenes_and_their_renders() -> None:
    scenes = measuring.asked_scenes(3, 5)
    assert [scene.second is not None for scene in scenes] == [False, False, True, True, True]
    assert all(map(held_out, scenes))
    assert measuring.asked_scenes(3, 5) == scenes
    drawn = list(measuring.renders(scenes, 3, 32))
    assert [image.shape for image in drawn] == [(32, 32, 3)] * 5
    again = list(measuring.renders(scenes, 4, 32))
    assert not np.array_equal(drawn[0], again[0])
