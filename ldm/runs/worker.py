"""The making of a run's images by one process: sampled, checked, saved and told, batch by batch."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ldm.errors import InputError
from ldm.images.outputs import CannotWrite, PictureWriter
from ldm.log import LOG, notice
from ldm.runs.processes import Team

if TYPE_CHECKING:
    import numpy as np

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.pipeline.generate import Settings
    from ldm.pipeline.safety import SafetyChecker
    from ldm.runs.manifest import RunRecord
    from ldm.sampling.batches import Batch


@dataclass(frozen=True)
class Kind:
    """What images that may share a batch have in common."""

    settings: Settings
    init_image: np.ndarray | None
    facts: dict[str, Any]  # what is told of each


@dataclass(frozen=True)
class Job:
    """What the processes of a run have to agree on."""

    kinds: list[Kind]
    batches: list[Batch]  # with images that are missing
    names: dict[int, str]  # of the files of these batches, without suffix
    record: RunRecord


@dataclass(frozen=True)
class Telling:
    """What of the images is told, and where."""

    metadata: bool = True  # settings in the files
    json: bool = False  # the manifest's lines also on stdout
    bar: bool = True


class Safety:
    """The safety checker's verdicts as a run takes them; without a checker nothing is checked."""

    def __init__(self, checker: SafetyChecker | None = None, blacken: bool = True):
        self.checker, self.blacken = checker, blacken

    def __call__(
        self, images: Sequence[np.ndarray | None]
    ) -> list[tuple[np.ndarray | None, dict[str, bool]]]:
        """Each image, black if it was found, with what is to be told; None (a NaN image) stays None."""
        there = [image for image in images if image is not None]
        if self.checker is None or not there:
            return [(image, {}) for image in images]
        verdicts = iter(self.checker(there))
        checked: list[tuple[np.ndarray | None, dict[str, bool]]] = []
        for image in images:
            if image is None:
                checked.append((None, {}))
                continue
            found = next(verdicts)
            checked.append((image * 0 if found and self.blacken else image, {"nsfw_content_detected": found}))
        return checked


def make(
    model: LatentDiffusion,
    job: Job,
    writer: PictureWriter,
    team: Team,
    interrupt: Interrupt,
    safety: Safety,
    telling: Telling,
) -> int:
    """Make and save this process's share of the missing images, until all are there or the user ends it.

    Files are written in a thread while the next batch is sampled. The team counts the images that "failed".
    Returns how many of the team's other processes were lost, if this one leads it.
    """
    from ldm.pipeline.generate import generate

    missing = set(job.record.missing())
    steps = [kind.settings.steps_to_run for kind in job.kinds]
    adaptive = any(kind.settings.sampler == "dpm_adaptive" for kind in job.kinds)
    total = None if adaptive else sum(len(batch) * steps[batch.kind] for batch in job.batches)
    images = sum(map(len, job.batches))

    def save_batch(batch: Batch, checked: list[tuple], seconds: float) -> None:
        kind, each = job.kinds[batch.kind], round(seconds / len(batch), 3)
        own_facts = image_facts(kind.settings, batch)
        for (image, flags), prompt, own in zip(checked, batch.prompts, own_facts, strict=True):
            k = own["image"]
            if k in missing:
                facts = kind.facts | {"prompt": prompt} | own | flags
                line = facts | {"seconds": each, "nan": image is None}
                saved = save(writer, k, image, facts if telling.metadata else None, line, job.names[k])
                if telling.json:
                    print(json.dumps(saved | {"outdir": str(writer.folder.path)}), flush=True)
                if saved["nan"] or "error" in saved:
                    team.count("failed", 1)

    with ThreadPoolExecutor(1) as thread, StepBar(images, total, team, telling.bar) as bar:
        handing = Handing(thread)
        for number, mine in groupby(team.deal(job.batches), key=lambda batch: batch.kind):
            kind = job.kinds[number]
            start = time.perf_counter()
            for batch, pictures in generate(model, mine, kind.settings, bar.step, kind.init_image):
                checked = safety(pictures)
                seconds = time.perf_counter() - start
                handing.over(save_batch, batch, checked, seconds)
                bar.finish(len(batch))
                start = time.perf_counter()
                if interrupt.asked:
                    team.stop()
        handing.finish()
        return team.finish(tick=lambda: bar.step(0))


class Handing:
    """Work for a thread, one piece at a time: what fails there fails here, at the next or at the end."""

    def __init__(self, thread: ThreadPoolExecutor):
        self.thread = thread
        self.work: Future | None = None

    def over(self, function: Any, *args: Any) -> None:
        self.finish()
        self.work = self.thread.submit(function, *args)

    def finish(self) -> None:
        if self.work is not None:
            self.work.result()


def save(
    writer: PictureWriter,
    k: int,
    image: np.ndarray | None,
    settings: dict[str, Any] | None,
    told: dict[str, Any],
    name: str,
) -> dict[str, Any]:
    """Write image k and its line of the manifest, which is returned; a notice if it is NaN or not written.

    Raises CannotWrite where no later image could be written, either.
    """
    if image is None:
        notice(f"image {k} ({told['prompt']!r}) came out as NaN and is skipped")
        return writer.record.add(k, None, told)
    try:
        line = writer.add(k, image, settings, told, name)
    except InputError as error:
        if isinstance(error, CannotWrite) and error.full:
            raise
        notice(f"image {k}: {error}")
        return writer.record.add(k, None, told | {"error": str(error)})
    LOG.info("image %d: %s, %s s", k, line["file"], line["seconds"])
    return line


def image_facts(settings: Settings, batch: Batch) -> list[dict[str, int]]:
    """Number and seeds of each image, to make it alone; in the original's one stream it has no seed."""
    from ldm.sampling.noise import image_seed, start_seeds

    facts = []
    for i, (k, given) in enumerate(zip(batch.numbers, batch.seeds or [None] * len(batch), strict=True)):
        own = {"image": k}
        if settings.rng == "image":
            own["seed"] = image_seed(settings.seed, k) if given is None else given
            if settings.variation_seed is not None:
                own["variation_seed"] = image_seed(settings.variation_seed, k)
            if settings.fixed_code:
                first = settings.seed if settings.start_seed is None else settings.start_seed
                own["start_seed"] = start_seeds(first, batch)[i]
        facts.append(own)
    return facts


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
        self.bar.update(self.team.count("steps", images) - self.bar.n)

    def finish(self, images: int) -> None:
        """A batch of `images` is done."""
        self.team.count("images", images)

    def __exit__(self, *_: object) -> None:
        self.step(0)  # what the others did since this process's last step
        rate = self.team.count("images", 0) / max(time.perf_counter() - self.start, 1e-9)
        self.bar.set_postfix_str(f"{rate:.2f} images/s")
        self.bar.close()
        self.stack.close()
