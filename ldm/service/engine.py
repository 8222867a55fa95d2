"""The engine of a service: a queue before the pipelines, which one thread samples with.

Requests of all clients that agree in what a batch must share (`ImageRequest.batch_key`) are sampled together.
A batch starts when the device is free. Where many clients ask again as soon as they are answered, the engine
waits a moment for them, a small part of a batch's time, so that they form one batch and not two.

Loading a model takes seconds. Where not all fit into memory, requests for one that would have to be loaded
give way to those for models that are there, for a bounded time (`ServiceOptions.model_wait`).
"""

from __future__ import annotations

import atexit
import os
import secrets
import sys
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import FieldError, InputError
from ldm.images.preview import factors_of
from ldm.log import LOG, notice, problem
from ldm.pipeline.batches import with_start_seeds
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.pipeline import LARGEST_BATCH
from ldm.pipeline.request import ImageRequest, image_seed
from ldm.service.batch import (
    Abandoned,
    Batch,
    Entry,
    Failure,
    batch_key,
    image_bytes,
    independent,
    without_images,
)
from ldm.service.errors import (
    BadRequest,
    Draining,
    LimitExceeded,
    QueueFull,
    ServiceError,
    about_image,
    from_input_error,
)
from ldm.service.jobs import ENDED, Job, Jobs
from ldm.service.limits import check_files, check_limits, check_size
from ldm.service.models import Models, NamedModel
from ldm.service.options import FOLDERS, ServiceOptions
from ldm.service.outputs import Keeper, Signer
from ldm.service.queue import FairQueue, Full, Waiting
from ldm.weights.loading import find

if TYPE_CHECKING:
    from ldm.pipeline.generated import GeneratedImage

BATCH = 8  # images sampled together, where the options say nothing
GATHER = 0.05  # the part of a batch's time for which its clients are waited for
GATHER_LEAST, GATHER_MOST = 0.05, 0.5  # seconds; an answer and its next request take some 25 ms
# A request gives way for `model_wait` at most, for so many times what loading its model takes, as more would
# save little, and for this part of the time to its deadline, as it still has to be sampled.
TIMES_LOAD, PART_OF_DEADLINE = 20, 0.5
HELD_BYTES = 2**31  # of decoded images that all requests came with that wait or run
FIRST_GUESS = 1.0  # seconds an image, as long as none was made
KEEPING = 32  # jobs whose images wait to be written, at most
LAST_LAYER = 5.0  # seconds for which an engine that ends waits for a layer that is being computed
SMOOTHING = 0.2  # the weight of the newest batch in the measured seconds an image


class Engine:
    """Takes requests from any thread and makes their images in a thread of its own.

    `start` it, `submit` requests, read their `Job`s. At the end `drain` and `close` it.
    """

    def __init__(
        self,
        models: Models,
        options: ServiceOptions | None = None,
        runtime: RuntimeOptions | None = None,
        *,
        signer: Signer | None = None,
    ):
        self.models, self.options = models, options or ServiceOptions()
        self.runtime = runtime or models.runtime
        self.jobs = Jobs()
        self.folders = (*self.options.folders, *models.folders)  # clients need not know where they are
        self.keeper = Keeper(self.options.keep, signer) if self.options.keep else None
        self.to_keep: Callable[[Job], Sequence[GeneratedImage]] = _all_images  # asked in another thread
        self._queue: FairQueue[Entry] = FairQueue(self.options.queue_size)
        self._made: dict[str, dict[int, GeneratedImage]] = {}  # images of jobs that lack others
        self._held: dict[str, int] = {}  # bytes of the images that active jobs, and `holding`, came with
        self._running = 0
        self._changed = threading.Condition()
        self._draining = self._closing = False
        self._broken: str | None = None
        self._worker: threading.Thread | None = None
        self._clock: threading.Thread | None = None
        self._background: ThreadPoolExecutor | None = None
        self._keeping: deque[Future] = deque()
        self._fitting: dict[tuple, int] = {}
        self._free_since, self._last_seconds, self._expected = 0.0, 0.0, 0
        self._ended: Counter[str] = Counter()
        self._refused = self._images = self._not_kept = self._batches = 0
        self._sampling_seconds = 0.0
        self._seconds_per_image: float | None = None

    @classmethod
    def open(
        cls,
        named: Sequence[NamedModel | str],
        options: ServiceOptions,
        runtime: RuntimeOptions | None = None,
        *,
        signer: Signer | None = None,
        loras: Sequence[Path] = (),
        **choices: Any,
    ) -> Engine:
        """The engine of models, NAME=CKPT[,CONFIG] each, or of the linked or bundled one without any.

        `loras` may be named beside those of the options' folder, which go first. `choices` are those of
        `Pipeline.open`, but for those that the service's options decide. InputError.
        """
        for name in FOLDERS:
            folder = getattr(options, name)
            if folder is not None and not find(folder).is_dir():
                raise FieldError("{" + name + "} {folder} is no folder", folder=folder)
        limits = {"max_pixels": options.max_pixels, "lora_folder": options.lora_folder}
        models = Models(named, runtime, loaded=options.loaded_models, loras=loras, **limits, **choices)
        return cls(models, options, signer=signer)

    # Its life

    def start(self, load: bool = True) -> Engine:
        """Begin to take requests; with `load` the default model is in memory when this returns.

        InputError if it cannot be loaded.
        """
        loaded: Future[None] = Future()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="keep")
        self._worker = threading.Thread(
            target=self._work, args=(loaded if load else None,), name="sampling", daemon=True
        )
        self._clock = threading.Thread(target=self._watch_deadlines, name="deadlines", daemon=True)
        atexit.register(self.close)  # a process cannot end well while torch computes in a thread
        self._worker.start()
        self._clock.start()
        if load:
            try:
                loaded.result()
            except BaseException:
                self.close()
                raise
        return self

    @property
    def healthy(self) -> bool:
        """Whether images can be made at all; never again after a fault that leaves the device unusable."""
        return self._broken is None and self._worker is not None and self._worker.is_alive()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.healthy and not self._draining

    def drain(self, seconds: float | None = None) -> list[Job]:
        """Take no further requests, and finish those that are there within so many seconds.

        The others fail with `Draining`. Returns their jobs.
        """
        until = time.monotonic() + (self.options.drain if seconds is None else seconds)
        with self._changed:
            self._draining = True
            while self.jobs.active() and self.healthy and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
        return self._give_up()

    @property
    def stuck(self) -> bool:
        """Whether the engine was closed and something is computed all the same, which nothing can stop.

        The process then has to end by `os._exit`: to end it by a return would fail in torch's threads.
        """
        return self._closing and self._worker is not None and self._worker.is_alive()

    def close(self) -> None:
        """End now: what still waits or runs fails with `Draining`, sampling stops at the next step.

        It takes a few seconds at most; look at `stuck` then.
        """
        with self._changed:
            self._draining = self._closing = True
            self._changed.notify_all()
        self._give_up()
        for thread in (self._worker, self._clock):
            if thread is not None and thread is not threading.current_thread():
                thread.join(LAST_LAYER)
        if self._background is not None:
            self._background.shutdown()  # what is finished is kept
        if not self.stuck:  # else its weights are in use
            self.models.close()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _give_up(self) -> list[Job]:
        message = "the service ended before the request was finished"
        return [job for job in self.jobs.active() if job.fail(Draining(message))]

    # Requests

    def submit(
        self,
        requests: Sequence[ImageRequest],
        *,
        client: str,
        model: str | None = None,
        timeout: float | None = None,
        preview: bool = False,
        arrived: float | None = None,
    ) -> Job:
        """The job of requests that are answered together, by the model of this name or the default one.

        Requests without seeds get some by chance. `timeout` in seconds is at most the service's own, and runs
        since the request `arrived` on the clock of `time.monotonic`, by default from now on. It never waits
        for images to be sampled. ServiceError if they cannot be served.
        """
        with self._counting_refusals():
            model = model or self.models.default
            return self._submit(tuple(requests), client, model, timeout, preview, arrived)

    @contextmanager
    def holding(self, requests: Sequence[ImageRequest]) -> Iterator[None]:
        """Inside, the images that requests start from count as a job's do, although there is no job yet.

        QueueFull without room for them.
        """
        key, size = uuid.uuid4().hex, image_bytes(requests)
        with self._counting_refusals(), self._changed:
            self._check_bytes(size)
            self._held[key] = size
        try:
            yield
        finally:
            with self._changed:
                del self._held[key]

    def check_room(self, client: str, images: int = 1) -> None:
        """ServiceError if a client's request for so many images would be refused now, whatever they show."""
        with self._counting_refusals():
            self._check_ready()
            self._check_room(client, images)

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except ServiceError:
            with self._changed:
                self._refused += 1
            raise

    def _check_ready(self) -> None:
        if not self.ready:
            failing = ServiceError("the device fails", code="device_failed", status=503)
            raise Draining() if self._draining else failing

    def _submit(
        self,
        requests: tuple[ImageRequest, ...],
        client: str,
        model: str,
        timeout: float | None,
        preview: bool,
        arrived: float | None,
    ) -> Job:
        self._check_ready()
        self.models.open(model)
        timeout = self.options.deadline if timeout is None else timeout
        if not timeout > 0:
            raise BadRequest(f"timeout {timeout:g}: give seconds above 0")
        self._check_count(len(requests))
        self._check_room(client, len(requests))  # before work is spent on what is refused anyway
        most_pixels = self.options.pixels_of(self.models.native_size(model))
        resolved = []
        for k, request in enumerate(requests):
            with about_image(k):
                check_files(request, self.options)
                check_limits(request, self.options, most_pixels)
                resolved.append(self._resolved(model, request, most_pixels))
        first = secrets.randbelow(2**32)
        seeded = [
            request if request.seed is not None else request.twin(seed=image_seed(first, k))
            for k, request in enumerate(resolved)
        ]
        started = tuple(with_start_seeds(seeded, seeded[0].seed))
        timeout, job_bytes = min(timeout, self.options.deadline), image_bytes(started)
        job = Job(client, model, started, timeout, wants_preview=preview, arrived=arrived)
        job._position, job._on_over = self._position, self._over
        waiting = [
            Waiting(client, job.id, batch_key(job, k), Entry(job, k, one)) for k, one in enumerate(started)
        ]
        with self._changed:
            if self._draining:
                raise Draining()
            self._check_room(client, len(requests))
            self._check_bytes(job_bytes)
            self._queue.put(waiting)
            self._held[job.id] = job_bytes
            self.jobs.add(job)
            self._changed.notify_all()
        return job

    def _resolved(self, model: str, request: ImageRequest, most_pixels: int) -> ImageRequest:
        try:
            resolved, (height, width) = self.models.resolve(model, request)
        except InputError as error:
            raise from_input_error(error, self.folders) from error
        check_size(height, width, most_pixels)
        check_limits(resolved, self.options, most_pixels)
        return resolved

    def _check_count(self, images: int) -> None:
        if not images:
            raise BadRequest("no image is asked for")
        if images > self.options.max_images:
            raise LimitExceeded(
                f"{images} images: a request may ask for {self.options.max_images} at most", status=422
            )

    def _check_room(self, client: str, images: int) -> None:
        """QueueFull without room for so many images."""
        with self._changed:
            try:
                self._queue.check(client, images)
            except Full as full:
                raise QueueFull(full.excess * (self._seconds_per_image or FIRST_GUESS)) from None

    def _check_bytes(self, size: int) -> None:
        """QueueFull without room for so many bytes of images that requests start from; any may come alone."""
        with self._changed:
            held = sum(self._held.values())
            if size and held and held + size > HELD_BYTES:
                raise QueueFull(self._seconds_per_image or FIRST_GUESS)

    def job(self, id: str, client: str) -> Job:
        """A client's job; UnknownJob if it has none of this id, whoever else may have one."""
        return self.jobs.get(id, client)

    def cancel(self, id: str, client: str) -> Job:
        """Cancel a client's job. UnknownJob."""
        job = self.job(id, client)
        job.cancel()
        return job

    def _position(self, job: Job) -> int:
        with self._changed:
            return self._queue.ahead(job.id)

    def _over(self, job: Job) -> None:
        """A job is over, however it ended: what it has in the queue makes room."""
        with self._changed:
            self._queue.discard(job.id)
            self._made.pop(job.id, None)
            self._held.pop(job.id, None)
            self._ended[job.state] += 1
            # Images that a client sent are of no use any more, and large.
            job.requests = tuple(without_images(request) for request in job.requests)
            self._changed.notify_all()

    # What there is to see

    @property
    def queue_length(self) -> int:
        """Images that wait."""
        with self._changed:
            return len(self._queue)

    @property
    def running(self) -> int:
        """Images that are being sampled."""
        return self._running

    @property
    def seconds_per_image(self) -> float | None:
        """As measured of late, where several are sampled together; None as long as none was made."""
        return self._seconds_per_image

    @property
    def loaded_models(self) -> tuple[str, ...]:
        """Those in memory, the one used last at the end."""
        return self.models.loaded

    @property
    def counters(self) -> dict[str, float]:
        """What has happened so far, by name; jobs by how they ended."""
        with self._changed:
            return {
                **{f"jobs_{state}": self._ended[state] for state in ENDED},
                "requests_refused": self._refused,
                "images": self._images,
                "images_not_kept": self._not_kept,
                "batches": self._batches,
                "sampling_seconds": self._sampling_seconds,
                "model_loads": self.models.loads,
                "model_load_seconds": self.models.load_seconds,
                "model_evictions": self.models.evictions,
            }

    # The thread that samples

    def _work(self, loaded: Future[None] | None) -> None:
        if loaded is not None:
            try:
                self.models.pipeline(self.models.default)
            except BaseException as error:
                loaded.set_exception(error)
                return
            loaded.set_result(None)
        try:
            while (first := self._first()) is not None:
                self._serve(first)
        finally:
            if not self._closing:
                self._break()

    def _first(self) -> Waiting[Entry] | None:
        """The image that is next, once there is one; None at the end."""
        with self._changed:
            while not self._closing:
                gives_way = self._preference()
                first = self._queue.first(gives_way)
                if first is None:
                    self._changed.wait()
                elif gives_way(first) and (left := self._until_load(first.entry.job.model)) > 0:
                    self._changed.wait(left)
                else:
                    return first
        return None

    def _until_load(self, model: str) -> float:
        """Seconds for which a model is not loaded yet although nothing else waits: clients that were just
        answered may ask again for one that is in memory.
        """
        return self._free_since + _moment(self.models.seconds_to_load(model)) - time.monotonic()

    def _preference(self) -> Callable[[Waiting[Entry]], bool]:
        """Says of a waiting request whether those for models that are in memory go before it.

        Its time runs while its model is not there: if it ran from when a request began to wait, a long queue
        for two models would have them loaded in turn for each batch. A model that was loaded is preferred for
        half of this time, or a smaller part where several wait, so that each of them has its turn.
        """
        waiting = {one.entry.job.model for one in self._queue}
        missing = {name for name in waiting if self.models.needs_room(name)}
        now = time.monotonic()

        def gives_way(one: Waiting[Entry]) -> bool:
            job = one.entry.job
            if job.model not in missing:
                return False
            since = max(job.created, self.models.evicted(job.model))
            most = min(
                self.options.model_wait,
                TIMES_LOAD * self.models.seconds_to_load(job.model),
                PART_OF_DEADLINE * (job.deadline - since),
            )
            turn = most / (2 * len(missing))
            return now < min(since + most, max(since, self.models.loaded_at) + turn)

        return gives_way

    def _serve(self, first: Waiting[Entry]) -> None:
        """Make the images of the batch that begins with this one. Whatever fails ends its jobs alone."""
        entries = [first.entry]
        try:
            most = self._batch_size(first.entry)  # may sample
            with self._changed:
                self._gather(most)
                entries = [one.entry for one in self._queue.take(most, first)]
                self._running = len(entries)
            self._sample(entries)
        except Exception as error:
            LOG.debug("a batch failed", exc_info=True)
            failure = Failure.of(error, self.folders)
            problem(f"a batch failed: {failure.brief}")
            for entry in entries:
                entry.job.fail(failure.error)
        finally:
            with self._changed:
                self._running = 0
                self._changed.notify_all()

    def _break(self) -> None:
        """The thread that samples ends against all expectation: nobody may wait for it."""
        self._broken = "the thread that samples has ended"
        problem(f"{self._broken}: no image can be made until the service is started anew")
        message = "the service cannot make images any more; its log says why"
        for job in self.jobs.active():
            try:
                job.fail(ServiceError(message, code="device_failed", status=503))
            except Exception:
                LOG.debug("a job could not be ended", exc_info=True)
        with self._changed:
            self._changed.notify_all()

    def _gather(self, most: int) -> None:
        """Wait a moment for clients that were just answered and are about to ask again."""
        wanted = min(most, self._expected)
        pause = _moment(self._last_seconds)
        while not self._closing and 0 < len(self._queue) < wanted:
            left = self._free_since + pause - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                break

    def _batch_size(self, first: Entry) -> int:
        size, request = self.runtime.batch_size or BATCH, first.request
        if size != "auto":
            return min(size, self.models.fitted(first.job.model, request))
        key = first.job.model, request.height, request.width, request.hires, request.rows
        if key not in self._fitting:
            try:
                pipeline = self.models.pipeline(first.job.model)
                self._fitting[key] = pipeline.fitting_batch([request], LARGEST_BATCH)
            except Exception:  # whatever is wrong comes up again with the request itself
                return 1
        return self._fitting[key]

    def _sample(self, entries: Sequence[Entry]) -> None:
        """Make images of entries, and end their jobs by what comes out. Raises nothing."""
        entries = [entry for entry in entries if not entry.job.over]
        if not entries:
            return
        batch = Batch(entries, self._made)
        for job in batch.jobs:
            job.run()
        start, failure, images = time.monotonic(), None, []
        try:
            images = self._images_of(batch)
        except Abandoned:
            LOG.info("a batch of %d images was abandoned", len(entries))
            return
        except Exception as error:
            LOG.debug("sampling failed", exc_info=True)
            failure = Failure.of(error, self.folders)
        # outside of the block above, whose error holds the tensors
        if failure:
            self._fail(batch, failure)
        else:
            self._count(batch, time.monotonic() - start)
            self._add(batch, images)

    def _images_of(self, batch: Batch) -> list[GeneratedImage]:
        name = batch.jobs[0].model
        try:
            pipeline = self.models.pipeline(name)
        except InputError as error:
            problem(f"model {name}: {error}")
            message = f"the model {name} cannot be loaded"
            raise ServiceError(message, code="model_failed", status=503) from None
        if not (self.options.moderate or pipeline.safety.checker):  # which see finished images alone
            batch.factors = factors_of(float(getattr(pipeline.model, "scale_factor", 0.0)))
        requests = [entry.request for entry in batch.entries]
        try:
            with batch.watching(pipeline):
                (images,) = pipeline.batches([requests], batch.on_step, batch.on_x0)
            return [independent(image, pipeline) for image in images]
        finally:
            pipeline.forget_files()

    def _count(self, batch: Batch, seconds: float) -> None:
        images, before = len(batch.entries), self._seconds_per_image
        each = seconds / images
        with self._changed:
            self._images += images
            self._batches += 1
            self._sampling_seconds += seconds
            self._seconds_per_image = each if before is None else before + SMOOTHING * (each - before)
            self._expected = images + len(self._queue)
            self._free_since, self._last_seconds = time.monotonic(), seconds

    def _add(self, batch: Batch, images: Sequence[GeneratedImage]) -> None:
        for entry, image in zip(batch.entries, images, strict=True):
            if image.pixels is None:
                message = "the image came out as NaN; other settings may do, or a precision of more bits"
                entry.job.fail(ServiceError(message, code="not_finite", number=entry.number))
            with self._changed:
                if not entry.job.over:
                    self._made.setdefault(entry.job.id, {})[entry.number] = image
        for job in batch.jobs:
            made = self._made.get(job.id, {})
            if len(made) == len(job.requests):
                self._finish(job, tuple(made[number] for number in sorted(made)))

    def _finish(self, job: Job, images: tuple[GeneratedImage, ...]) -> None:
        if self.keeper is not None:  # before: who sees the job finished may wait for its images to be kept
            self._keeping.append(self._background.submit(self._keep, job))
        job.finish(images)
        while len(self._keeping) > KEEPING:
            self._keeping.popleft().result()

    def _keep(self, job: Job) -> None:
        if job.wait().state != "finished":  # it was cancelled at the last moment
            return
        try:
            self.keeper.keep(job, self.to_keep(job))
        except Exception as error:  # the client has its images
            problem(f"--keep: {error}")
            with self._changed:
                self._not_kept += len(job.images)

    def finish_keeping(self) -> None:
        """Return when the images of all jobs that are finished now have been kept."""
        for writing in list(self._keeping):
            writing.result()

    def _fail(self, batch: Batch, failure: Failure) -> None:
        """End the jobs of a batch that failed; of several each is tried alone, so that none harms others."""
        if failure.no_memory and "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()
        if failure.ends_the_device:
            self._broken = failure.brief
        elif len(batch.jobs) > 1 and not self._closing:
            notice(f"a batch of {len(batch.jobs)} jobs failed, each is tried alone: {failure.brief}")
            for rows in batch.rows.values():
                self._sample([batch.entries[row] for row in rows])
            return
        problem(f"sampling failed: {failure.brief}")
        for job in batch.jobs:
            job.fail(failure.error)

    # The thread that watches the time

    def _watch_deadlines(self) -> None:
        while True:
            with self._changed:
                if self._closing:
                    return
                active, now = self.jobs.active(), time.monotonic()
                late = [job for job in active if job.deadline <= now]
                if not late:
                    nearest = min((job.deadline for job in active), default=None)
                    self._changed.wait(None if nearest is None else nearest - now)
            for job in late:  # without the lock: their listeners may ask for anything
                job.expire()


def _moment(seconds: float) -> float:
    """How long clients are waited for so that work of so many seconds is saved."""
    return min(max(GATHER * seconds, GATHER_LEAST), GATHER_MOST)


def _all_images(job: Job) -> Sequence[GeneratedImage]:
    return job.images


def leave(engine: Engine, code: int) -> int:
    """The exit code of a command whose engine is closed; where that is stuck, the process ends here."""
    if engine.stuck:
        notice("an image is still being computed; the process ends without it")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
