"""Finished images as files: the bytes of an answer, and those that a service keeps."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from ldm.images.outputs import OutputFolder
from ldm.pipeline.infotext import without_folders
from ldm.runs.manifest import MANIFEST, append
from ldm.service.errors import ServiceError

if TYPE_CHECKING:
    from ldm.pipeline.generated import GeneratedImage
    from ldm.service.jobs import Job

Signer = Callable[[bytes, str, dict[str, Any]], bytes]  # of a file, its format and the image's settings


def encoded(
    image: GeneratedImage, format: str = "png", signer: Signer | None = None, quality: int = 95
) -> bytes:
    """A finished image as a PNG, JPEG ("jpg") or WebP file, with watermark, settings and signature."""
    if image.pixels is None:
        raise ServiceError("the image came out as NaN", code="not_finite")
    return image.encoded(format, quality, signer)


class Keeper:
    """Keeps finished images in a folder, as a run does: samples/00000.png …, and manifest.jsonl with a line
    for each. Several services, and runs, may write into one folder. InputError if it cannot be written.
    """

    def __init__(self, folder: str, signer: Signer | None = None):
        self.folder, self.signer = OutputFolder(folder), signer
        self.run = uuid.uuid4().hex[:12]  # in each line; a run of the command line has such an id, too
        self._numbers = count()
        self._lock = threading.Lock()

    def keep(self, job: Job, images: Sequence[GeneratedImage]) -> list[dict[str, Any]]:
        """Write images of a finished job and their lines, which are returned. CannotWrite."""
        return [self._keep(job, image) for image in images]

    def _keep(self, job: Job, image: GeneratedImage) -> dict[str, Any]:
        settings = image.settings
        with self._lock:
            number = next(self._numbers)
            path = self.folder.save_file(encoded(image, signer=self.signer))
            line = {
                "run": self.run,
                "image": number,
                "file": path.relative_to(self.folder.path).as_posix(),
                **without_folders(settings | {"image": number, "job": job.id}),
                "seconds": round(image.seconds, 3),
                "nan": False,
            }
            append(self.folder.path / MANIFEST, line)
        return line
