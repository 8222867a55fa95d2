"""Images of several jobs that are sampled together: how far they are, how they look, what went wrong."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import InputError
from ldm.images.metadata import encode_image
from ldm.images.preview import drawn, to_colours
from ldm.pipeline.memory import is_out_of_memory
from ldm.pipeline.request import IMAGE_SETTINGS, ImageRequest, image_name
from ldm.sampling import catalogue
from ldm.service.errors import OutOfMemory, ServiceError, from_input_error
from ldm.service.jobs import Job

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.pipeline.generated import GeneratedImage
    from ldm.pipeline.pipeline import Pipeline

BYTES_A_PIXEL = 4  # as Pillow holds colours
PREVIEW_INTERVAL = 0.5  # seconds between two previews of a job: to draw one means to wait for the device


class Abandoned(Exception):
    """Nobody waits for the images of a batch any more."""


@dataclass(frozen=True)
class Origin:
    """What a finished image's settings say about its model, without keeping that in memory."""

    facts: dict[str, Any]
    loras: dict[str, str]

    @property
    def adapters(self) -> Origin:
        return self

    def recorded(self, request: ImageRequest) -> dict[str, str]:
        """The hashes of the request's LoRAs, as `Adapters.recorded` gives them."""
        return self.loras


@dataclass
class Entry:
    """One image of a job."""

    job: Job
    number: int
    request: ImageRequest  # with its images, which the job lets go of when it is over


@dataclass
class Batch:
    """Images that are sampled together, and how far they are. The callbacks of `Pipeline.batches`."""

    entries: Sequence[Entry]
    made: dict[str, dict[int, Any]]  # finished images of jobs
    factors: Any = None  # from latents to colours, if previews may be shown
    taken: int = 0
    shown: float = field(default=float("-inf"))

    def __post_init__(self) -> None:
        first = self.entries[0].request
        # a sampler that chooses their number itself takes about as many
        self.steps = len(self.entries) * max(1, first.steps_to_run + first.second_steps)
        self.rows: dict[Job, list[int]] = {}
        for row, entry in enumerate(self.entries):
            self.rows.setdefault(entry.job, []).append(row)

    @property
    def jobs(self) -> list[Job]:
        return list(self.rows)

    def check(self, *_: Any) -> None:
        """`Abandoned` once nobody waits for any of the images. It is called before layers, too."""
        if all(job.over for job in self.rows):
            raise Abandoned

    @contextmanager
    def watching(self, pipeline: Pipeline) -> Iterator[None]:
        """Inside, `check` is called before each layer of the model: a step of a large image takes minutes.

        Only on a CPU, where a layer is computed when it is called. On a GPU a step is short, and hooks would
        stop what is recorded or compiled; what OpenVINO compiled for a CPU has no layers to hook, either.
        """
        hooks = []
        if pipeline.device.type == "cpu" and not pipeline.options.compile:
            from torch import nn

            layers = [one for one in pipeline.model.modules() if isinstance(one, nn.Conv2d | nn.Linear)]
            hooks = [layer.register_forward_pre_hook(self.check) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def on_step(self, images: int) -> None:
        """`Abandoned` once nobody waits for any of the images."""
        self.check()
        self.taken += images
        for job, rows in self.rows.items():
            done = len(self.made.get(job.id, ())) + len(rows) * min(self.taken / self.steps, 1.0)
            job.show(done / len(job.requests))

    def on_x0(self, step: int, x0: Tensor) -> None:
        """Shows each job what its own images look like so far, and nobody else's."""
        wanting = [job for job in self.rows if job.wants_preview and not job.over]
        # Where only a part of the batch is sampled at a time, the rows of x0 do not say whose they are.
        if not wanting or self.factors is None or len(x0) != len(self.entries):
            return
        if time.monotonic() < self.shown + PREVIEW_INTERVAL:
            return
        for job in wanting:
            job.show(job.progress, encode_image(drawn(to_colours(x0[self.rows[job]], self.factors)), None))
        self.shown = time.monotonic()


@dataclass(frozen=True)
class Failure:
    """What went wrong with a batch, without the error itself, whose traceback holds its tensors."""

    error: ServiceError  # for the clients
    brief: str  # for the log
    no_memory: bool
    ends_the_device: bool  # CUDA's errors stay, but for lack of memory

    @classmethod
    def of(cls, error: Exception, folders: Iterable[Path] = ()) -> Failure:
        """`folders` are those that clients are not shown."""
        text = str(error)
        brief = f"{type(error).__name__}: {text[:500]}"
        # the pipeline's own InputError about it comes when not even one image fits
        no_memory = is_out_of_memory(error)
        if no_memory:
            shown: ServiceError = OutOfMemory(
                "out of memory with one image of this size; ask for a smaller one"
            )
        elif isinstance(error, ServiceError):
            shown = ServiceError(error.message, status=error.status, code=error.code)
        elif isinstance(error, InputError):
            shown = from_input_error(error, folders)
        else:  # its message is not made for clients
            shown = ServiceError("sampling failed; the service's log says why", code="sampling_failed")
        return cls(shown, brief, no_memory, "CUDA error" in text and not no_memory)


def batch_key(job: Job, number: int) -> tuple:
    """What images that are sampled together agree in."""
    request = job.requests[number]
    key = job.model, request.batch_key()
    # one stream is drawn for all images of a batch, an adaptive sampler's steps are each image's own
    alone = request.rng == "compvis" or catalogue.SAMPLERS[request.sampler].adaptive
    return (*key, job.id) if alone else key


def image_bytes(requests: Iterable[ImageRequest]) -> int:
    """The memory of the decoded images that requests come with; one that several share counts once."""
    images: dict[int, Any] = {}
    for request in requests:
        given = [getattr(request, name) for name in IMAGE_SETTINGS] + [one.image for one in request.controls]
        images |= {id(image): image for image in given if hasattr(image, "size")}
    return sum(BYTES_A_PIXEL * image.width * image.height for image in images.values())


def without_images(request: ImageRequest) -> ImageRequest:
    """The request with the names of its images in place of them, which its settings record."""
    found: dict[str, Any] = {
        name: image_name(value)
        for name in IMAGE_SETTINGS
        if (value := getattr(request, name)) is not None and not isinstance(value, str)
    }
    if any(not isinstance(one, str) for one in request.control):
        found["control"] = tuple(map(str, request.control))
    return request.twin(**found) if found else request


def independent(image: GeneratedImage, pipeline: Pipeline) -> GeneratedImage:
    """A finished image that keeps neither its model nor what its client sent in memory."""
    loras = pipeline.adapters.recorded(image.request) if image.request.loras else {}
    origin = Origin(pipeline.facts, loras)
    return replace(image, request=without_images(image.request), pipeline=origin)
