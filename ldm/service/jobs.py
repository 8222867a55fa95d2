"""Jobs: what a client asked for, how far it is, and what came of it."""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ldm.log import LOG
from ldm.service.errors import Cancelled, DeadlinePassed, ServiceError, UnknownJob

if TYPE_CHECKING:
    from ldm.pipeline.generated import GeneratedImage
    from ldm.pipeline.request import ImageRequest

QUEUED, RUNNING, FINISHED, FAILED, CANCELLED = "queued", "running", "finished", "failed", "cancelled"
ENDED = (FINISHED, FAILED, CANCELLED)


class Job:
    """Requests of one client that are answered together. Any thread may read it, wait for it or cancel it.

    `state` is "queued", "running", "finished", "failed" or "cancelled". `images` are there once it is
    finished, in the order of `requests`; `error` once it has failed or was cancelled. `progress` is 0 … 1.
    `preview` is a PNG file of what its images look like so far, if previews were asked for. `deadline` is on
    the clock of `time.monotonic`, `timeout` seconds after the request `arrived`, by default now. `to_fetch`
    has the numbers of the images that its client has still to come for, where none waits for the answer.
    """

    def __init__(
        self,
        client: str,
        model: str,
        requests: tuple[ImageRequest, ...],
        timeout: float,
        *,
        wants_preview: bool = False,
        arrived: float | None = None,
    ):
        self.id = uuid.uuid4().hex
        self.client, self.model, self.requests = client, model, requests
        self.timeout, self.wants_preview = timeout, wants_preview
        self.created = time.monotonic()
        self.deadline = (self.created if arrived is None else arrived) + timeout
        self.started: float | None = None
        self.ended: float | None = None
        self.state = QUEUED
        self.images: tuple[GeneratedImage, ...] = ()
        self.error: ServiceError | None = None
        self.progress = 0.0
        self.preview: bytes | None = None
        self.held_bytes = 0  # of what others keep as long as this job: encoded files of its images
        self.to_fetch: set[int] = set()
        self._position: Callable[[Job], int] | None = None
        self._on_over: Callable[[Job], None] | None = None
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._listeners: list[Callable[[Job], None]] = []

    @property
    def over(self) -> bool:
        """Whether it has finished, failed or been cancelled."""
        return self.state in ENDED

    @property
    def position(self) -> int:
        """Images that are ahead of its first waiting one, about; 0 once it runs."""
        return self._position(self) if self.state == QUEUED and self._position else 0

    @property
    def seconds(self) -> float:
        """From when it was submitted to its end, or to now."""
        return (self.ended or time.monotonic()) - self.created

    def listen(self, callback: Callable[[Job], None]) -> Callable[[], None]:
        """Have `callback` called with the job at every change, by the thread that brings it about; at once
        if the job is over. It must not block. Returns a function that ends this.
        """
        with self._lock:
            over = self.over
            if not over:
                self._listeners.append(callback)
        if over:
            callback(self)

        def end() -> None:
            with self._lock:
                if callback in self._listeners:
                    self._listeners.remove(callback)

        return end

    def wait(self, timeout: float | None = None) -> Job:
        """Block until the job is over, or so many seconds have passed. Returns the job."""
        self._over.wait(timeout)
        return self

    def cancel(self) -> bool:
        """Give the job up; False if it was over already. Its place is free again at the next step."""
        return self.fail(Cancelled(), CANCELLED)

    # For the engine

    def run(self) -> None:
        with self._changing() as alive:
            if alive and self.state == QUEUED:
                self.state, self.started = RUNNING, time.monotonic()

    def show(self, progress: float, preview: bytes | None = None) -> None:
        with self._changing() as alive:
            if alive:
                self.progress = max(self.progress, min(progress, 1.0))
                self.preview = preview or self.preview

    def finish(self, images: tuple[GeneratedImage, ...]) -> bool:
        """False if the job was over already."""
        with self._changing() as alive:
            if alive:
                self.images, self.progress, self.preview = images, 1.0, None
                self._end(FINISHED)
        return alive

    def fail(self, error: ServiceError, state: str = FAILED) -> bool:
        """False if the job was over already."""
        with self._changing() as alive:
            if alive:
                self.error, self.preview = error, None
                self._end(state)
        return alive

    def expire(self) -> bool:
        """Give the job up because its deadline has passed; False if it was over already."""
        return self.fail(DeadlinePassed(self.timeout))

    def _end(self, state: str) -> None:
        self.ended, self.state = time.monotonic(), state  # in this order: whoever sees its end sees when

    @contextmanager
    def _changing(self) -> Iterator[bool]:
        """Whether the job may still change; its listeners are called behind the block, without the lock."""
        with self._lock:
            alive = not self.over
            yield alive
            listeners = list(self._listeners) if alive else []
            if alive and self.over:
                self._listeners.clear()
        if alive and self.over:
            try:
                if self._on_over:
                    self._on_over(self)
            finally:  # whoever waits must not wait for ever
                self._over.set()
        for listener in listeners:
            try:
                listener(self)
            except Exception:  # one who listens must not end the work for others
                LOG.debug("a listener failed", exc_info=True)


class Jobs:
    """The jobs by id: those that go on, and for a while those that are over.

    Of the latter at most `most` are kept, of at most `most_bytes` together, for `seconds`.
    """

    def __init__(self, most: int = 1000, most_bytes: int = 2**28, seconds: float = 600.0):
        self.most, self.most_bytes, self.seconds = most, most_bytes, seconds
        self._active: dict[str, Job] = {}
        self._over: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, job: Job) -> None:
        self.tidy()
        with self._lock:
            self._active[job.id] = job

    def get(self, id: str, client: str) -> Job:
        """A client's job. UnknownJob if there is none, whoever else may have one of this id."""
        self.tidy()
        with self._lock:
            job = self._active.get(id) or self._over.get(id)
        if job is None or job.client != client:
            raise UnknownJob(id)
        return job

    def active(self) -> list[Job]:
        """Those that are not over, in the order in which they came."""
        with self._lock:
            return [job for job in self._active.values() if not job.over]

    def to_fetch(self, since: float) -> list[Job]:
        """Those that ended after `since`, by `time.monotonic`, and that their clients have not come for."""
        with self._lock:
            jobs = [*self._over.values(), *self._active.values()]
        return [job for job in jobs if job.over and job.to_fetch and job.ended > since]

    def tidy(self) -> None:
        """Let go of what need not be kept any more."""
        with self._lock:
            for job in [job for job in self._active.values() if job.over]:
                self._over[job.id] = self._active.pop(job.id)
            oldest = time.monotonic() - self.seconds
            size = sum(map(_bytes, self._over.values()))
            while self._over:
                job = next(iter(self._over.values()))
                within = len(self._over) <= self.most and size <= self.most_bytes
                if within and (job.ended or 0) >= oldest:
                    break
                size -= _bytes(job)
                del self._over[job.id]

    def __len__(self) -> int:
        return len(self._active) + len(self._over)


def _bytes(job: Job) -> int:
    """Bytes of a job's images, of what belongs to them and of what is kept with them."""
    arrays = [each for image in job.images for each in (image.pixels, image.depth, image.painted)]
    arrays += [each for image in job.images for each in image.controls]
    return job.held_bytes + sum(each.nbytes for each in arrays if each is not None)
