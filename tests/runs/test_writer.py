"""The files of a run: watermark, settings, grids of what is not kept in memory."""

import weakref
from pathlib import Path

import numpy as np
import pytest
from image_files import noise
from PIL import Image

from ldm.errors import InputError
from ldm.images.outputs import CannotWrite, OutputFolder
from ldm.images.watermark import read_watermark
from ldm.pipeline.infotext import read_metadata
from ldm.runs import writer as writers
from ldm.runs.manifest import RunRecord
from ldm.runs.writer import MOST_PIXELS, PAGE, Drawing, ImageWriter, Sheet, page_size

SETTINGS = {"prompt": "a cat", "steps": 2, "height": 16, "width": 24, "watermark": "none"}


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return RunRecord(tmp_path, SETTINGS, 5)


def write(writer: ImageWriter, images: list[np.ndarray], **own: object) -> None:
    for k, image in enumerate(images):
        writer.add(k, image, SETTINGS | own, {"seed": k}, f"{k:05}")


def test_an_image_and_its_line(tmp_path: Path, record: RunRecord) -> None:
    writer = ImageWriter(OutputFolder(tmp_path), record)
    writer.grid_settings = lambda numbers: SETTINGS.copy()
    line = writer.add(3, noise(), SETTINGS, {"seed": 7}, "a/b")
    assert line == {"run": record.run, "image": 3, "file": "samples/a/b.png", "seed": 7}
    assert record.done == {3: "samples/a/b.png"}
    assert read_metadata(tmp_path / "samples/a/b.png") == SETTINGS
    bare = ImageWriter(OutputFolder(tmp_path), record, metadata=False)
    path = tmp_path / bare.add(4, noise(), SETTINGS, {}, "bare")["file"]
    assert read_metadata(path) is None


def test_images_of_a_size_for_it_have_the_watermark(tmp_path: Path, record: RunRecord) -> None:
    writer = ImageWriter(OutputFolder(tmp_path), record, columns=2)
    writer.grid_settings = lambda numbers: SETTINGS.copy()
    images = [np.asarray(Image.fromarray(noise(8, 8, seed)).resize((256, 256))) for seed in range(2)]
    write(writer, images, watermark="SDV2")
    writer.grid_settings = lambda numbers: SETTINGS | {"watermark": "SDV2"}
    writer.finish()
    for name in ("samples/00000.png", "samples/00001.png", "grid-0000.png"):
        assert read_watermark(np.asarray(Image.open(tmp_path / name).convert("RGB"))) == "SDV2"


@pytest.mark.parametrize("saved", [True, False])
def test_grids_are_paged_and_not_made_twice(
    tmp_path: Path, record: RunRecord, monkeypatch, saved: bool
) -> None:
    monkeypatch.setattr(writers, "PAGE", 2)
    writer = ImageWriter(OutputFolder(tmp_path), record, images=saved, columns=2)
    writer.grid_settings = lambda numbers: SETTINGS.copy()
    images = [noise(seed=seed) for seed in range(5)]
    with writer:
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
    writer.grid_settings = lambda numbers: SETTINGS.copy()
    write(writer, [noise(seed=seed) for seed in range(3)])
    writer.finish()
    writer.add(3, noise(seed=3), SETTINGS, {"seed": 3}, "00003")
    writer.finish()
    widths = [Image.open(path).width for path in sorted(tmp_path.glob("grid-*.png"))]
    assert len(widths) == 2
    assert widths[1] > widths[0]


def test_images_that_are_saved_are_not_kept(tmp_path: Path, record: RunRecord) -> None:
    writer = ImageWriter(OutputFolder(tmp_path), record)
    writer.grid_settings = lambda numbers: SETTINGS.copy()
    image = noise()
    gone = weakref.ref(image)
    writer.add(0, image, SETTINGS, {}, "0")
    del image
    assert gone() is None


def test_without_grids_there_are_none(tmp_path: Path, record: RunRecord) -> None:
    writer = ImageWriter(OutputFolder(tmp_path), record, images=False, grids=False)
    writer.grid_settings = lambda numbers: SETTINGS.copy()
    write(writer, [noise()])
    writer.finish()
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".png"] == []
    assert record.done == {0: None}


def test_a_sheet_stands_for_the_grids(tmp_path: Path, record: RunRecord) -> None:
    """In the order of the images; one that came to nothing is black."""
    seen = []

    def draw(images: list[np.ndarray], ended: bool) -> list[Drawing]:
        assert not ended
        seen.extend(images)
        return [Drawing(noise(32, 32), {"x": "steps"}), Drawing(noise(32, 32), {"x": "seed"}, "sheet-1")]

    writer = ImageWriter(OutputFolder(tmp_path), record, sheet=Sheet(draw))
    writer.grid_settings = lambda numbers: SETTINGS.copy()
    images = [noise(seed=seed) for seed in range(5)]
    for k in (4, 0, 1, 3):
        writer.add(k, images[k], SETTINGS, {}, str(k))
    writer.finish()
    assert all(np.array_equal(seen[k], images[k]) for k in (0, 1, 3, 4))
    assert not seen[2].any()
    assert read_metadata(tmp_path / "grid-0000.png") == SETTINGS | {"x": "steps"}
    assert read_metadata(tmp_path / "sheet-1.png") == SETTINGS | {"x": "seed"}


@pytest.mark.parametrize("finished", [True, False])
def test_a_sheet_is_drawn_once_however_the_run_ends(
    tmp_path: Path, record: RunRecord, finished: bool
) -> None:
    """A run that was interrupted had no sheet, with --skip_save nothing at all."""
    drawn = []

    def draw(images: list[np.ndarray], ended: bool) -> list[Drawing]:
        drawn.append((ended, [bool(image.any()) for image in images]))
        return []

    with ImageWriter(OutputFolder(tmp_path), record, images=False, sheet=Sheet(draw)) as writer:
        writer.grid_settings = lambda numbers: SETTINGS.copy()
        writer.add(3, noise(), SETTINGS, {}, "3")
        if finished:
            writer.finish()
    assert drawn == [(not finished, [False, False, False, True, False])]


def test_a_grid_has_the_settings_of_its_own_images(tmp_path: Path, record: RunRecord, monkeypatch) -> None:
    """Each one carried the prompts of the whole run, of which no JPEG file holds many."""
    monkeypatch.setattr(writers, "PAGE", 2)
    for name, saved in (("saved", True), ("unsaved", False)):
        record = RunRecord(tmp_path / name, SETTINGS, 5)
        with ImageWriter(OutputFolder(tmp_path / name), record, images=saved) as writer:
            writer.grid_settings = lambda numbers: SETTINGS | {"prompt": " ".join(map(str, numbers))}
            write(writer, [noise(seed=seed) for seed in range(5)])
            writer.finish()
        grids = [read_metadata(path)["prompt"] for path in sorted((tmp_path / name).glob("grid-*"))]
        assert grids == ["0 1", "2 3", "4"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_images_that_are_in_no_file_are_saved_at_any_end(tmp_path: Path, record: RunRecord, error) -> None:
    """They were thrown away, and recorded as made."""

    def ended() -> None:
        with ImageWriter(OutputFolder(tmp_path), record, images=False, columns=2) as writer:
            writer.grid_settings = lambda numbers: SETTINGS | {"images": list(numbers)}
            write(writer, [noise(seed=seed) for seed in range(2)])
            raise error

    with pytest.raises(error):
        ended()
    assert read_metadata(tmp_path / "grid-0000.png")["images"] == [0, 1]


def test_an_image_that_was_deleted_meanwhile_is_missing(tmp_path: Path, record: RunRecord) -> None:
    """The run ended with "cannot read the image" and without a grid."""
    writer = ImageWriter(OutputFolder(tmp_path), record, columns=5)
    writer.grid_settings = lambda numbers: SETTINGS | {"images": list(numbers)}
    write(writer, [noise(seed=seed) for seed in range(5)])
    (tmp_path / "samples/00003.png").unlink()
    writer.finish()
    assert read_metadata(tmp_path / "grid-0000.png")["images"] == [0, 1, 2, 4]
    assert (record.missing(), writer.lacking) == ([3], 0)


def test_a_page_that_cannot_be_made_is_left_out(
    tmp_path: Path, record: RunRecord, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One damaged image was the end of the run, and of all grids."""
    writer = ImageWriter(OutputFolder(tmp_path), record)
    writer.grid_settings, writer.page_size = lambda numbers: SETTINGS | {"images": list(numbers)}, 2
    write(writer, [noise(seed=seed) for seed in range(5)])
    (tmp_path / "samples/00002.png").write_bytes(b"no image")
    writer.finish()
    assert [read_metadata(path)["images"] for path in sorted(tmp_path.glob("grid-*"))] == [[0, 1], [4]]
    (message,) = caplog.messages
    assert message.startswith("no grid of samples/00002.png to samples/00003.png: cannot read the image ")
    assert writer.lacking == 1
    (tmp_path / "samples/00002.png").write_bytes((tmp_path / "samples/00001.png").read_bytes())
    writer.finish()
    assert len(list(tmp_path.glob("grid-*"))) == 3


@pytest.mark.parametrize("full", [False, True])
def test_only_a_full_disk_ends_a_run_whose_grid_cannot_be_saved(
    tmp_path: Path, record: RunRecord, monkeypatch, full: bool
) -> None:
    def refuse(*_: object, **options: object) -> None:
        raise CannotWrite("cannot write", full)

    writer = ImageWriter(OutputFolder(tmp_path), record)
    write(writer, [noise()])
    monkeypatch.setattr(writer.folder, "save_grid", refuse)
    writer.grid_settings = lambda numbers: SETTINGS.copy()
    if full:
        with pytest.raises(InputError):
            writer.finish()
    else:
        writer.finish()
    assert writer.lacking == (not full)


def test_large_images_have_small_pages() -> None:
    """64 images of 1536x1536 pixels made a grid of 151 million, which our own readers refuse."""
    assert page_size([(64, 64)], 3) == page_size([(1024, 1024), (64, 64)], 3) == PAGE
    for size, columns in ((1536, 3), (1536, 30), (4096, 4), (8000, 1)):
        images = page_size([(size, 64), (64, size)], columns)
        rows = -(-images // columns)
        assert 1 <= images < PAGE
        assert rows * min(columns, images) * size**2 <= MOST_PIXELS
    assert page_size([(9000, 9000)], 1) == 0


@pytest.mark.parametrize("saved", [True, False])
def test_images_that_are_too_large_for_a_grid(
    tmp_path: Path, record: RunRecord, caplog: pytest.LogCaptureFixture, saved: bool
) -> None:
    """A single image that our own readers refuse, made with a raised --max_pixels, failed the run."""
    with ImageWriter(OutputFolder(tmp_path), record, images=saved) as writer:
        writer.grid_settings, writer.page_size = lambda numbers: SETTINGS.copy(), 0
        write(writer, [noise(), noise()])
        writer.finish()
    assert len(list(tmp_path.glob("grid-*"))) == (0 if saved else 2)
    assert caplog.messages == (["no grid: an image alone has more than 80,000,000 pixels"] if saved else [])
    assert writer.lacking == 0
