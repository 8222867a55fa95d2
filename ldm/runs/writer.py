"""The files of a run: images with watermark and settings, grids, the manifest's lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.errors import InputError
from ldm.images.metadata import open_image
from ldm.images.outputs import CannotWrite, OutputFolder
from ldm.images.pixels import make_grid, of_one_size
from ldm.images.watermark import Watermarker
from ldm.log import notice, problem
from ldm.pipeline.infotext import image_texts
from ldm.runs.manifest import RunRecord

PAGE = 64  # images of a grid: one of thousands is a file that nobody can open
MOST_PIXELS = 80_000_000  # of a grid, without the lines between: our readers refuse more than 89 million


class Drawing(NamedTuple):
    """A page of a sheet, uint8 [H, W, 3]; its file records the `facts`, and is a grid's without a name."""

    image: np.ndarray
    facts: dict[str, Any]
    name: str | None = None


@dataclass(frozen=True)
class Sheet:
    """Drawings of all images of a run in place of grids: `draw` of the images, uint8 [H, W, 3], in order.

    It is told, too, whether the run `ended` early, so that those that are missing, and black, never come.
    """

    draw: Callable[[list[np.ndarray], bool], Sequence[Drawing]]


def page_size(sizes: Iterable[tuple[int, int]], columns: int) -> int:
    """The most images, of up to these heights and widths, of a grid; 0 if one alone has too many pixels."""
    heights, widths = zip(*sizes, strict=True)
    cells = MOST_PIXELS // (max(heights) * max(widths))
    return next((n for n in range(PAGE, 0, -1) if math.ceil(n / columns) * min(n, columns) <= cells), 0)


class ImageWriter:
    """Writes a run's images and grids. Images that are saved are not kept: grids are made from the files.

    `grid_settings` gives the settings of a grid of the images of these numbers, and `page_size` is how many
    images a grid has at most. As a context manager it saves at the end, however that comes, a grid of the
    images that are in no file yet, or the sheet, which no later run could draw. `lacking` counts the grids
    that could not be made, and `sheet_saved` says whether the sheet, or a page of it, is there.
    """

    def __init__(
        self,
        folder: OutputFolder,
        record: RunRecord,
        *,
        images: bool = True,
        grids: bool = True,
        metadata: bool = True,
        depths: bool = False,
        controls: bool = False,
        columns: int = 1,
        sheet: Sheet | None = None,
    ):
        self.folder, self.record, self.sheet = folder, record, sheet
        self.save_images, self.save_grids, self.metadata, self.columns = images, grids, metadata, columns
        self.save_depths, self.save_controls = depths, controls
        self.grid_settings: Callable[[Sequence[int]], dict[str, Any]] = lambda numbers: {}
        self.page_size, self.lacking, self.sheet_saved = PAGE, 0, False
        self.page: dict[int, np.ndarray] = {}  # of images that are not saved, or the sheet's

    def add(
        self,
        k: int,
        image: np.ndarray,
        settings: dict[str, Any],
        line: dict[str, Any],
        name: str | None,
        depth: np.ndarray | None = None,
        painted: np.ndarray | None = None,
        controls: Sequence[np.ndarray] = (),
    ) -> dict[str, Any]:
        """Save image k, uint8 [H, W, 3], with its settings; returns its line of the manifest.

        `line` is what the manifest says about it besides its file. See `OutputFolder.save_image` for `name`.
        `depth`, uint16 [H, W], is the depth map that the image was painted over. `painted`, bool [H, W], are
        the pixels that may have the watermark. `controls` are what its ControlNets saw, uint8 [h, w, 3].
        """
        file = None
        if self.sheet and self.save_grids:
            self.page[k] = image
        if self.save_images:
            marked = Watermarker.of(settings["watermark"])(image, painted)
            resumed = self.record.resumed
            path = self.folder.save_image(marked, self.texts(settings), name, resumed, settings)
            file = path.relative_to(self.folder.path).as_posix()
            if self.save_depths and depth is not None:
                saved = self.folder.save_depth(depth, path)
                line = line | {"depth_file": saved.relative_to(self.folder.path).as_posix()}
            if self.save_controls and controls:
                paths = [self.folder.save_control(seen, path, i) for i, seen in enumerate(controls)]
                names = [saved.relative_to(self.folder.path).as_posix() for saved in paths]
                line = line | {"control_files": names}
        elif self.save_grids and not self.sheet:
            self.page[k] = image
            if len(self.page) >= self.page_size:
                self._save_unsaved()
        return self.record.add(k, file, line)

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._save_unsaved()

    def finish(self) -> None:
        """Save the sheet, or the grids of saved images that are still missing."""
        if not self.save_grids:
            return
        if self.sheet:
            self._save_sheet(ended=False)
        elif self.save_images:
            self._save_grids()

    def _save_unsaved(self) -> None:
        """Save a grid of the images that are in no file yet, or the sheet if it has not been saved."""
        if self.sheet:
            if self.page:
                self._save_sheet(ended=True)
            return
        page, self.page = self.page, {}
        if page:
            with self._reported(f"no grid of images {min(page)} to {max(page)}"):
                self._save_page(list(page.values()), self.grid_settings(list(page)))

    def _save_grids(self) -> None:
        if not self.page_size:
            notice(f"no grid: an image alone has more than {MOST_PIXELS:,} pixels")
            return
        self.record.refresh()  # some may have been deleted while the run went on
        done = self.record.done
        numbers = [k for k in sorted(done) if done[k]]
        for start in range(0, len(numbers), self.page_size):
            page = numbers[start : start + self.page_size]
            names = [done[k] for k in page]
            if self.record.has_grid(names):
                continue
            with self._reported(f"no grid of {names[0]} to {names[-1]}"):
                images = [self._read(name) for name in names]
                self.record.add_grid(self._save_page(images, self.grid_settings(page)).name, names)

    @contextmanager
    def _reported(self, otherwise: str) -> Iterator[None]:
        """What keeps a page from being saved is reported, and the run goes on; but a full disk ends it."""
        try:
            yield
        except InputError as error:
            if isinstance(error, CannotWrite) and error.full:
                raise
            problem(f"{otherwise}: {error}")
            self.lacking += 1

    def _read(self, name: str) -> np.ndarray:
        with open_image(self.folder.path / name) as image:
            return np.asarray(image.convert("RGB"))

    def texts(self, settings: dict[str, Any]) -> tuple[str, str] | None:
        return image_texts(settings) if self.metadata else None

    def _save_sheet(self, ended: bool) -> None:
        """An image that came to nothing, or that is missing where the run `ended` early, is black."""
        settings = self.grid_settings(range(self.record.images))
        made, self.page = self.page, {}
        black = np.zeros((settings["height"], settings["width"], 3), np.uint8)
        for page in self.sheet.draw([made.get(k, black) for k in range(self.record.images)], ended):
            with self._reported(f"no {page.name or 'sheet'}"):
                drawn = Watermarker.of(settings["watermark"])(page.image)
                facts = settings | page.facts
                self.folder.save_grid(drawn, self.texts(facts), page.name, facts)
                self.sheet_saved = True

    def _save_page(self, images: list[np.ndarray], settings: dict[str, Any]) -> Path:
        grid = make_grid(of_one_size(images), self.columns)
        single = len(images) == 1 and self.save_images  # the file itself, which has its watermark
        fits = all(Watermarker.fits(*image.shape[:2]) for image in images)
        if fits and not single:
            grid = Watermarker.of(settings["watermark"])(grid)
        return self.folder.save_grid(grid, self.texts(settings), settings=settings)
