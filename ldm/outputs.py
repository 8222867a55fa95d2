"""Where images go: numbered PNG files that are never overwritten, the watermark, the grid of a run."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import InputError
from ldm.images import make_grid
from ldm.metadata import encode_png


class OutputFolder:
    """`outdir/samples/00000.png` … and `outdir/grid-0000.png` …; the folders are made, and tried, at once.

    A new file's number is the highest of its kind plus one. Several processes may write into one folder: each
    file is there whole or not at all, and none replaces another. InputError if a file cannot be written.
    """

    def __init__(self, outdir: str | Path):
        self._grids = _NumberedFiles(Path(outdir), "grid-", digits=4)
        self._samples = _NumberedFiles(Path(outdir) / "samples", "", digits=5)

    def save_image(self, image: np.ndarray, settings: dict[str, Any] | None) -> Path:
        """Writes an image, uint8 [H, W, 3], with its settings, as the next sample; returns its path."""
        return self._samples.save(encode_png(image, settings))

    def save_grid(self, grid: np.ndarray, settings: dict[str, Any] | None) -> Path:
        """Writes a grid, uint8 [H, W, 3], with its settings, as the next grid; returns its path."""
        return self._grids.save(encode_png(grid, settings))


class _NumberedFiles:
    """The files `<prefix><number>.png` of one folder, which is listed once."""

    def __init__(self, folder: Path, prefix: str, digits: int):
        self.folder, self.prefix, self.digits = folder, prefix, digits
        name = re.compile(rf"{prefix}([0-9]{{{digits},}})\.png")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _temporary_file(folder, b"can this folder be written?"):
                found = [name.fullmatch(entry) for entry in os.listdir(folder)]
        except OSError as error:
            raise self._unwritable(error) from error
        self.next = max((int(match[1]) for match in found if match), default=-1) + 1

    def save(self, data: bytes) -> Path:
        """Writes a file under the first number from `self.next` on that no other process has taken."""
        try:
            with _temporary_file(self.folder, data) as temporary:
                while True:
                    path = self.folder / f"{self.prefix}{self.next:0{self.digits}d}.png"
                    self.next += 1
                    with suppress(FileExistsError):
                        _rename_to_new(temporary, path)
                        return path
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> InputError:
        reason = "a file has that name" if isinstance(error, FileExistsError) else error.strerror
        return InputError(f"cannot write to {self.folder.absolute()}: {reason}; choose another --outdir")


@contextmanager
def _temporary_file(folder: Path, data: bytes) -> Iterator[Path]:
    """A hidden file with `data` safely on the disk; gone at the end, unless it has been renamed."""
    path = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _rename_to_new(source: Path, target: Path) -> None:
    """Gives a file a name that none has yet; FileExistsError where `os.rename` would replace one."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links here (FAT, some network drives): take the name first, then fill it
        target.touch(exist_ok=False)
        source.replace(target)


class Watermarker:
    """The invisible watermark of the original scripts: `message`, over and over, in its wavelets.

    InputError if the package that writes it cannot be imported: make one before the model is loaded.
    """

    def __init__(self, message: str = "StableDiffusionV1"):
        if not message:
            raise InputError("the watermark's message is empty; give one, or use --watermark none")
        try:
            from imwatermark import WatermarkEncoder
        except ImportError as error:
            raise InputError(
                f"the watermark cannot be written ({error}); "
                "run `pip install invisible-watermark` or use --watermark none"
            ) from error
        self._encoder = WatermarkEncoder()
        self._encoder.set_watermark("bytes", message.encode("utf-8"))

    @staticmethod
    def fits(height: int, width: int) -> bool:
        """The watermark needs 256 x 256 pixels, in any shape."""
        return height * width >= 256 * 256

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Image uint8 [H, W, 3], RGB, for which `fits` holds -> a copy with the watermark."""
        bgr = self._encoder.encode(image[..., ::-1], "dwtDct")
        return np.ascontiguousarray(bgr[..., ::-1])


class PictureWriter:
    """Saves the pictures of a run, each with watermark and settings, and at the end their grid.

    A grid shows the pictures without their watermarks and has one of its own, as in the original.
    """

    def __init__(
        self,
        folder: OutputFolder,
        watermark: Callable[[np.ndarray], np.ndarray] | None = None,
        images: bool = True,
        grid: bool = True,
    ):
        self.folder = folder
        self.watermark = watermark or (lambda image: image)
        self.save_images, self.save_grid = images, grid
        self.images: list[np.ndarray] = []

    def add(self, image: np.ndarray, settings: dict[str, Any] | None) -> None:
        """The next picture, uint8 [H, W, 3], and the settings to write into it."""
        if self.save_images:
            self.folder.save_image(self.watermark(image), settings)
        if self.save_grid:
            self.images.append(image)

    def finish(self, columns: int, settings: dict[str, Any] | None) -> None:
        """Save the grid of all pictures, `columns` to a row."""
        if self.images:
            self.folder.save_grid(self.watermark(make_grid(self.images, columns)), settings)
