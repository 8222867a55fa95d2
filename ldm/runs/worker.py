"""One process's share of a run: images sampled, saved and reported, batch by batch."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.errors import InputError
from ldm.images.outputs import CannotWrite
from ldm.log import LOG, notice
from ldm.pipeline.generated import GeneratedImage
from ldm.runs.costs import rounded
from ldm.runs.forecast import Forecast, Sort, Stopwatch
from ldm.runs.manifest import RunRecord
from ldm.runs.plan import Plan
from ldm.runs.processes import Team
from ldm.runs.writer import ImageWriter
from ldm.sampling import catalogue

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline
    from ldm.pipeline.request import ImageRequest
    from ldm.sampling.steps import Callback


@dataclass(frozen=True)
class ImageCosts:
    """What a line of the manifest says about the costs of its image."""

    watts: float  # of the device
    factor: float  # kg of CO2 per kWh
    expected: Forecast | None  # where the speed was known before the run

    def of(self, pipeline: Pipeline, image: GeneratedImage, images: int) -> dict[str, float]:
        """Of an image that was made in a batch of so many `images`."""
        kwh = image.seconds / 3600 * self.watts / 1000
        found = {"kwh": rounded(kwh), "co2_kg": rounded(kwh * self.factor)}
        if self.expected is None:
            return found
        batch = self.expected.by_sort.get(Sort.of(pipeline, image.request, images))
        return {"planned_seconds": batch and round(batch / images, 3)} | found


@dataclass(frozen=True)
class Job:
    """What the processes of a run have to agree on."""

    plan: Plan
    batches: Sequence[tuple[int, ...]]  # with images that are missing
    names: Sequence[str]  # of the files of all images, without suffix
    record: RunRecord
    facts: dict[str, Any]  # of the run, recorded with each of its images
    costs: ImageCosts | None = None


@dataclass(frozen=True)
class ReportOptions:
    """How a process reports on its images."""

    json: bool = False  # the manifest's lines also on stdout
    bar: bool = True


def make_images(
    pipeline: Pipeline,
    job: Job,
    writer: ImageWriter,
    team: Team,
    interrupt: Interrupt,
    report: ReportOptions,
    preview: Callback = None,
    watch: Stopwatch | None = None,
) -> int:
    """Make and save this process's share of the missing images, until all are there or the user ends it.

    Files are written in a thread while the next batch is sampled. `preview` is called after every step with
    the step and the clean latents, and `watch` takes the times of the batches. Returns how many of the team's
    other processes were lost, if this one leads it.
    """
    watch = watch or Stopwatch()
    images, steps = total(job) if report.bar else (0, None)
    taken: list[tuple[int, ...]] = []  # the batches under way, which `share` yields as requests
    finished: list[tuple[tuple[int, ...], list[GeneratedImage]]] = []  # and one that is not yet being saved

    def share() -> Any:
        for numbers in team.deal(job.batches):
            save_finished()
            requests = readable(numbers)
            if requests:
                taken.append(tuple(requests))
                yield list(requests.values())
            if interrupt.asked or job.record.lost:
                team.stop(interrupt.asked)

    def readable(numbers: tuple[int, ...]) -> dict[int, ImageRequest]:
        """The requests of a batch by number, but for those whose files cannot be read, which are recorded."""
        requests = dict(zip(numbers, job.plan.batch(numbers), strict=True))
        for k, request in list(requests.items()):
            try:
                pipeline.read_images(request)
            except InputError as error:
                if request.rng == "compvis":  # without it the others would have other noise
                    raise
                del requests[k]
                if k not in job.record.done:
                    background.submit(save_failed, k, request, error)
        return requests

    def save_failed(k: int, request: ImageRequest, error: InputError) -> None:
        report_line(refuse(pipeline, writer, k, request, job.facts, error))

    def save_finished() -> None:
        """With the next batch in hand: while the thread prepares a file, the question for one would wait."""
        if finished:
            background.submit(save_batch, *finished.pop())

    def save_batch(numbers: tuple[int, ...], generated: list[GeneratedImage]) -> None:
        for k, image in zip(numbers, generated, strict=True):
            if k not in job.record.done:
                costs = job.costs.of(pipeline, image, len(numbers)) if job.costs else {}
                report_line(save(writer, k, image, job.facts, job.names[k], costs))

    def report_line(line: dict[str, Any]) -> None:
        if report.json:
            print(json.dumps(line | {"outdir": str(writer.folder.path)}), flush=True)

    with ThreadPoolExecutor(1) as thread, StepBar(images, steps, team, report.bar) as bar:
        background = BackgroundWriter(thread)

        def on_step(images: int) -> None:
            watch.step(images)
            bar.step(images)

        try:
            for generated in pipeline.batches(share(), on_step, preview):
                watch.finish(taken[0])
                finished.append((taken.pop(0), generated))
                bar.finish(len(generated))
        finally:
            save_finished()
        background.finish()
        return team.finish(tick=lambda: bar.step(0))


def total(job: Job) -> tuple[int, int | None]:
    """All images of a job and their steps; None if a sampler chooses their number."""
    lines = job.plan.images_of_lines(job.batches)
    requests = [(images, job.plan.requests.of_round[i]) for i, images in lines.items()]
    if any(catalogue.SAMPLERS[request.sampler].adaptive for _, request in requests):
        return lines.total(), None
    steps = (images * (request.steps_to_run + request.second_steps) for images, request in requests)
    return lines.total(), sum(steps)


def save(
    writer: ImageWriter,
    k: int,
    image: GeneratedImage,
    facts: dict[str, Any],
    name: str,
    costs: dict[str, float],
) -> dict[str, Any]:
    """Write image k and its line of the manifest, which is returned; a notice if it is NaN or not written.

    Raises CannotWrite where no later image could be written, either.
    """
    settings = facts | image.settings | {"image": k}
    line = settings | {"seconds": round(image.seconds, 3), **costs, "nan": image.pixels is None}
    if image.pixels is None:
        notice(f"image {k} ({image.request.prompt!r}) came out as NaN and is skipped")
        return writer.record.add(k, None, line, failed=True)
    try:
        line = writer.add(k, image.pixels, settings, line, name, image.depth, image.painted, image.controls)
    except InputError as error:
        if isinstance(error, CannotWrite) and error.full:
            raise
        notice(f"image {k}: {error}")
        return writer.record.add(k, None, line | {"error": str(error)}, failed=True)
    LOG.info("image %d: %s, %s s", k, line["file"], line["seconds"])
    return line


def refuse(
    pipeline: Pipeline,
    writer: ImageWriter,
    k: int,
    request: ImageRequest,
    facts: dict[str, Any],
    error: InputError,
) -> dict[str, Any]:
    """Record, with a notice, that image k is not made, as a file that it starts from cannot be read.

    Returns its line of the manifest.
    """
    notice(f"image {k}: {error}")
    line = facts | GeneratedImage(request, None, None, 0.0, pipeline).settings
    line |= {"image": k, "seconds": 0.0, "nan": False, "error": str(error)}
    return writer.record.add(k, None, line, failed=True)


class BackgroundWriter:
    """Work for a thread, one piece at a time: what fails there fails here, at the next piece or the end."""

    def __init__(self, thread: ThreadPoolExecutor):
        self.thread = thread
        self.work: Future | None = None

    def submit(self, function: Callable[..., None], *args: Any) -> None:
        self.finish()
        self.work = self.thread.submit(function, *args)

    def finish(self) -> None:
        if self.work is not None:
            self.work.result()


class Interrupt:
    """The first Ctrl-C or SIGTERM asks the run to end after the batch in hand, a second one ends it."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> Interrupt:
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere signals are not ours
            self.before = {name: signal.signal(name, self._ask) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        notice("ending after the images in hand; once more ends at once")

    def __exit__(self, *_: object) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)


class StepBar:
    """A progress bar over the team's `steps` for all images, None if unknown, and images/s at its end.

    Notices go above it.
    """

    def __init__(self, images: int, steps: int | None, team: Team | None = None, shown: bool = True):
        from tqdm import tqdm

        self.team = team or Team()
        self.bar = tqdm(total=steps, unit="step", desc=f"{images} images", disable=not shown)
        self.stack = ExitStack()
        self.start = time.perf_counter()

    def __enter__(self) -> StepBar:
        from tqdm.contrib.logging import logging_redirect_tqdm

        if not self.bar.disable:
            self.stack.enter_context(logging_redirect_tqdm([LOG]))
        return self

    def step(self, images: int) -> None:
        """One step of a batch of `images` is done."""
        self.bar.update(self.team.tally("steps", images) - self.bar.n)

    def finish(self, images: int) -> None:
        """A batch of `images` is done."""
        self.team.tally("images", images)

    def __exit__(self, *_: object) -> None:
        self.team.send_tallies()  # and learn what the others did since this process's last step
        self.step(0)
        rate = self.team.tally("images", 0) / max(time.perf_counter() - self.start, 1e-9)
        self.bar.set_postfix_str(f"{rate:.2f} images/s")
        self.bar.close()
        self.stack.close()
