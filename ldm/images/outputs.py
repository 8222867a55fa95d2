"""Where images go: numbered files that are never overwritten, the watermark, the grid of a run."""

from __future__ import annotations

import errno
import os
import re
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.errors import InputError
from ldm.images.metadata import FORMATS, encode_image
from ldm.images.pixels import make_grid, of_one_size
from ldm.runs.manifest import RunRecord, is_running

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no later file will fit, either


class CannotWrite(InputError):
    """A file could not be written; `full` tells that there is no room for any."""

    def __init__(self, message: str, full: bool):
        super().__init__(message)
        self.full = full


class OutputFolder:
    """`outdir/samples/00000.png` … and `outdir/grid-0000.png` …; the folders are made, and tried, at once.

    A new file's number is the highest of its kind plus one. Several processes may write into one folder: each
    file is there whole or not at all, and none replaces another. InputError if a file cannot be written.
    """

    def __init__(self, outdir: str | Path, format: str = "png", quality: int = 95):
        self.path, self.format, self.quality = Path(outdir), format, quality
        self._grids = _NumberedFiles(Path(outdir), "grid-", digits=4)
        self._samples = _NumberedFiles(Path(outdir) / "samples", "", digits=5)

    @property
    def next_number(self) -> int:
        """The first sample number that no file has."""
        return self._samples.next

    def save_image(
        self, image: np.ndarray, settings: dict[str, Any] | None, name: str | None = None, again: bool = False
    ) -> Path:
        """Writes an image, uint8 [H, W, 3], with its settings, as the next sample; returns its path.

        A `name`, relative and without suffix, stands for the number; if another file has it, it becomes
        name-2 and so on. `again`: the file may be there already, from a sitting that ended before it told.
        """
        data = encode_image(image, settings, self.format, self.quality)
        return self._samples.save(data, self.format, name, again)

    def save_grid(self, grid: np.ndarray, settings: dict[str, Any] | None) -> Path:
        """Writes a grid, uint8 [H, W, 3], with its settings, as the next grid; returns its path.

        One that is too large for the folder's format is a PNG file.
        """
        format = self.format if max(grid.shape) <= LARGEST.get(self.format, max(grid.shape)) else "png"
        return self._grids.save(encode_image(grid, settings, format, self.quality), format)


LARGEST = {"jpg": 65_500, "webp": 16_383}  # pixels on a side


class _NumberedFiles:
    """The files `<prefix><number>.<format>` of one folder, which is listed once."""

    def __init__(self, folder: Path, prefix: str, digits: int):
        self.folder, self.prefix, self.digits = folder, prefix, digits
        name = re.compile(rf"{prefix}([0-9]{{{digits},}})\.({'|'.join(FORMATS)})")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _temporary_file(folder, b"can this folder be written?"):
                entries = os.listdir(folder)
            found = [name.fullmatch(entry) for entry in entries]
            for entry in entries:  # what a killed process left
                left = re.fullmatch(r"\.(.+)\.(\d+)\.[0-9a-f]{32}\.tmp", entry)
                if left and not is_running(left[1], int(left[2])):
                    (folder / entry).unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        self.next = max((int(match[1]) for match in found if match), default=-1) + 1

    def save(self, data: bytes, format: str, name: str | None = None, again: bool = False) -> Path:
        """Writes a file under its name, or the first number from `self.next` on that nobody took."""
        try:
            with _temporary_file(self.folder, data) as temporary:
                for stem in self._numbers() if name is None else _variants(name):
                    path = self.folder / f"{stem}.{format}"
                    if name is not None and "/" in name:
                        path.parent.mkdir(parents=True, exist_ok=True)
                    with suppress(FileExistsError):
                        _rename_to_new(temporary, path)
                        return path
                    if again and path.read_bytes() == data:
                        return path
        except OSError as error:
            raise self._unwritable(error) from error

    def _numbers(self) -> Iterator[str]:
        while True:
            self.next += 1
            yield f"{self.prefix}{self.next - 1:0{self.digits}d}"

    def _unwritable(self, error: OSError) -> CannotWrite:
        reason = "a file has that name" if isinstance(error, FileExistsError) else error.strerror
        full = error.errno in FULL
        advice = "make room, and --resume makes what is missing" if full else "choose another --outdir"
        return CannotWrite(f"cannot write to {self.folder.absolute()}: {reason}; {advice}", full)


def _variants(name: str) -> Iterator[str]:
    """The name, and those that stand for it where others have taken it."""
    yield name
    yield from (f"{name}-{i}" for i in count(2))


@contextmanager
def _temporary_file(folder: Path, data: bytes) -> Iterator[Path]:
    """A hidden file with `data` safely on the disk; gone at the end, unless it has been renamed."""
    path = folder / f".{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}.tmp"
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


PAGE = 64  # pictures to a grid


class PictureWriter:
    """Saves the pictures of a run, each with watermark and settings, and at the end their grids.

    Grids show up to 64 pictures each, read back from their files so that a long run needs no memory for them;
    with `images` false, as they come. They have watermarks of their own if their pictures do.
    """

    def __init__(
        self,
        folder: OutputFolder,
        record: RunRecord,
        images: bool = True,
        grid: bool = True,
        columns: int = 1,
        watermark: Watermarker | None = None,
    ):
        self.folder, self.record = folder, record
        self.save_images, self.save_grid, self.columns = images, grid, columns
        self.watermark = watermark
        self.page: list[np.ndarray] = []

    def add(
        self,
        k: int,
        image: np.ndarray,
        settings: dict[str, Any] | None,
        facts: dict[str, Any],
        name: str | None = None,
    ) -> dict[str, Any]:
        """Picture k, uint8 [H, W, 3], the settings to write into it, and what the manifest tells of it.

        Returns its line of the manifest. See `OutputFolder.save_image` for its `name`.
        """
        file = None
        if self.save_images:
            path = self.folder.save_image(self.marked(image), settings, name, self.record.resumed)
            file = path.relative_to(self.folder.path).as_posix()
        elif self.save_grid:
            self.page.append(image)
            if len(self.page) == PAGE:
                self._save_page(self.page, settings)
                self.page = []
        return self.record.add(k, file, facts)

    def finish(self, settings: dict[str, Any] | None) -> None:
        """Save the grids that are still missing."""
        if not self.save_grid:
            return
        if self.page:
            self._save_page(self.page, settings)
        done = self.record.done
        files = [done[k] for k in sorted(done) if done[k]] if self.save_images else []
        for start in range(len(self.record.grids) * PAGE, len(files), PAGE):
            names = files[start : start + PAGE]
            images = [np.asarray(Image.open(self.folder.path / name).convert("RGB")) for name in names]
            self.record.add_grid(self._save_page(images, settings).name)

    def marked(self, image: np.ndarray) -> np.ndarray:
        """With the watermark, if there is one and the image is large enough."""
        fits = self.watermark is not None and self.watermark.fits(*image.shape[:2])
        return self.watermark(image) if fits else image

    def _save_page(self, images: list[np.ndarray], settings: dict[str, Any] | None) -> Path:
        grid = make_grid(of_one_size(images), self.columns)
        single = len(images) == 1 and self.save_images  # the file itself, which has its watermark
        marked = all(Watermarker.fits(*image.shape[:2]) for image in images) and not single
        return self.folder.save_grid(self.marked(grid) if marked else grid, settings)
