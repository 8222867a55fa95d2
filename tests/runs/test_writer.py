"""The files of a run: watermark, settings, grids of what is not kept in memory."""

import weakref
from pathlib import Path

import numpy as np
import pytest
from image_files import noise
from PIL import Image

from ldm.images.outputs import OutputFolder
from ldm.images.watermark import read_watermark
from ldm.pipeline.infotext import read_metadata
from ldm.runs import writer as writers
from ldm.runs.manifest import RunRecord
from ldm.runs.writer import Drawing, ImageWriter, Sheet

SETTINGS = {"prompt": "a cat", "steps": 2, "height": 16, "width": 24, "watermark": "none"}


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return RunRecord(tmp_path, SETTINGS, 5)


def write(writer: ImageWriter, images: list[np.ndarray], **own: object) -> None:
    for k, image in enumerate(images):
        writer.add(k, image, SETTINGS | own, {"seed": k}, f"{k:05}")


def test_an_image_and_its_line(tmp_path: Path, record: RunRecord) -> None:
    writer = ImageWriter(OutputFolder(tmp_path), record)
    writer.grid_settings = SETTINGS.copy
    line = writer.add(3, noise(), SETTINGS, {"seed": 7}, "a/b")
    assert line == {"run": record.run, "image": 3, "file": "samples/a/b.png", "seed": 7}
    assert record.done == {3: "samples/a/b.png"}
    assert read_metadata(tmp_path / "samples/a/b.png") == SETTINGS
    bare = ImageWriter(OutputFolder(tmp_path), record, metadata=False)
    path = tmp_path / bare.add(4, noise(), SETTINGS, {}, "bare")["file"]
    assert read_metadata(path) is None


def test_images_of_a_size_for_it_have_the_watermark(tmp_path: Path, record: RunRecord) -> None:
    writer = ImageWriter(OutputFolder(tmp_path), record, columns=2)
    writer.grid_settings = SETTINGS.copy
    images = [np.asarray(Image.fromarray(noise(8, 8, seed)).resize((256, 256))) for seed in range(2)]
    write(writer, images, watermark="SDV2")
    writer.grid_settings = lambda: SETTINGS | {"watermark": "SDV2"}
    writer.finish()
    for name in ("samples/00000.png", "samples/00001.png", "grid-0000.png"):
        assert read_watermark(np.asarray(Image.open(tmp_path / name).convert("RGB"))) == "SDV2"


@pytest.mark.parametrize("saved", [True, False])
def test_grids_are_paged_and_not_made_twice(
    tmp_path: Path, record: RunRecord, monkeypatch, saved: bool
) -> None:
    monkeypatch.setattr(writers, "PAGE", 2)
    writer = ImageWriter(OutputFolder(tmp_path), record, images=saved, columns=2)
    writer.grid_settings = SETTINGS.copy
    images = [noise(seed=seed) for seed in range(5)]
    write(writer, images)
    writer.finish()
    grids = [np.asarray(Image.open(tmp_path / f"grid-000{k}.png").convert("RGB")) for k in range(3)]
    assert [grid.shape[1] > 40 for grid in grids] == [True, True, False]
    if saved:
        writer.finish()
        assert not (tmp_path / "grid-0003.png").exists()
        assert len(list((tmp_path / "samples").iterdir())) == 5
    assert read_metadata(tmp_path / "grid-0000.png") == SETTINGS


def test_an_image_that_came_later_gets_into_a_grid(tmp_path: Path, record: RunRecord) -> None:
    """A run with a NaN image, which its resumption made, kept the grid that lacks it."""
    writer = ImageWriter(OutputFolder(tmp_path), record, columns=5)
    writer.grid_settings = SETTINGS.copy
    write(writer, [noise(seed=seed) for seed in range(3)])
    writer.finish()
    writer.add(3, noise(seed=3), SETTINGS, {"seed": 3}, "00003")
    writer.finish()
    widths = [Image.open(path).width for path in sorted(tmp_path.glob("grid-*.png"))]
    assert len(widths) == 2
    assert widths[1] > widths[0]


def test_images_that_are_saved_are_not_kept(tmp_path: Path, record: RunRecord) -> None:
    writer = ImageWriter(OutputFolder(tmp_path), record)
    writer.grid_settings = SETTINGS.copy
    image = noise()
    gone = weakref.ref(image)
    writer.add(0, image, SETTINGS, {}, "0")
    del image
    assert gone() is None


def test_without_grids_there_are_none(tmp_path: Path, record: RunRecord) -> None:
    writer = ImageWriter(OutputFolder(tmp_path), record, images=False, grids=False)
    writer.grid_settings = SETTINGS.copy
    write(writer, [noise()])
    writer.finish()
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".png"] == []
    assert record.done == {0: None}


def test_a_sheet_stands_for_the_grids(tmp_path: Path, record: RunRecord) -> None:
    """In the order of the images; one that came to nothing is black."""
    seen = []

    def draw(images: list[np.ndarray]) -> list[Drawing]:
        seen.extend(images)
        return [Drawing(noise(32, 32), {"x": "steps"}), Drawing(noise(32, 32), {"x": "seed"}, "sheet-1")]

    writer = ImageWriter(OutputFolder(tmp_path), record, sheet=Sheet(draw))
    writer.grid_settings = SETTINGS.copy
    images = [noise(seed=seed) for seed in range(5)]
    for k in (4, 0, 1, 3):
        writer.add(k, images[k], SETTINGS, {}, str(k))
    writer.finish()
    assert all(np.array_equal(seen[k], images[k]) for k in (0, 1, 3, 4))
    assert not seen[2].any()
    assert read_metadata(tmp_path / "grid-0000.png") == SETTINGS | {"x": "steps"}
    assert read_metadata(tmp_path / "sheet-1.png") == SETTINGS | {"x": "seed"}
