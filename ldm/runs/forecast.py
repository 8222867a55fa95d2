"""How long a run will take, and what it will cost: from what earlier runs on this machine took, or a probe.

Every run leaves in the user's cache folder how long a step of one of its batches took, and all else that a
batch takes besides its steps (text encoder, decoder, files).
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.cache import cache_folder
from ldm.errors import FieldError
from ldm.fields import changed
from ldm.pipeline.memory import peak_memory, reset_peak_memory
from ldm.pipeline.request import ImageRequest
from ldm.runs.costs import Costs, device_name, duration, energy, factor_of, mass, rounded
from ldm.runs.options import RunOptions
from ldm.runs.plan import Plan
from ldm.sampling import catalogue
from ldm.weights.hashes import quick_hash

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline

FILE = "speeds.json"  # in the cache folder
KEPT = 300  # speeds, the oldest of which give way
KEPT_BATCHES = 10_000  # of a run, whose times are kept
PROBE_STEPS = 3
REMEMBERED, PROBED = "remembered", "measured in a probe"


@dataclass
class Speed:
    """What batches of one sort take: seconds of a step, of all else, and of the start of a process."""

    step: float
    rest: float
    start: float
    memory: int  # bytes at the peak
    date: str = ""
    batches: int = 1  # that it was measured on; the first one of a process takes longer

    def batch(self, steps: int) -> float:
        """Seconds of a batch."""
        return self.rest + steps * self.step

    def scaled(self, share: float) -> Speed:
        """Of batches with another number of images, if their time is in proportion."""
        return replace(self, step=share * self.step, rest=share * self.rest)


class BatchTime(NamedTuple):
    """What a batch took."""

    numbers: tuple[int, ...]  # of its images
    seconds: float
    step: float | None  # seconds of one, the median of all but the first; None where there was no other


@dataclass
class Stopwatch:
    """The times of a process's batches: of the first one, and of the last of all others."""

    begun: float = field(default_factory=lambda: time.perf_counter())
    last: float | None = None  # when the step before ended
    steps: list[float] = field(default_factory=list)  # of the batch in hand
    spoilt: bool = False  # the batch was begun again, for it did not fit
    batches: list[BatchTime] = field(default_factory=list)
    left_out: float = 0.0  # seconds of the batches between

    def step(self, images: int) -> None:
        now = time.perf_counter()
        self.spoilt |= images < 0
        if self.last is not None:
            self.steps.append(now - self.last)
        self.last = now

    def finish(self, numbers: tuple[int, ...]) -> None:
        """The batch of these images is done."""
        now = time.perf_counter()
        if not self.spoilt:
            step = median(self.steps) if self.steps else None
            self.batches.append(BatchTime(numbers, now - self.begun, step))
        if len(self.batches) > KEPT_BATCHES:
            self.left_out += self.batches.pop(1).seconds
        self.begun, self.last, self.steps, self.spoilt = now, None, [], False


@dataclass(frozen=True)
class Sort:
    """What decides how long a batch of images takes on a model: all of these batches are of one sort."""

    images: int
    steps: int
    facts: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, pipeline: Pipeline, request: ImageRequest, images: int) -> Sort:
        """The sort of a batch of such requests, which are resolved. A pixel upscaler has no steps."""
        sampled = hasattr(pipeline, "last_pass")
        last = pipeline.last_pass(request) if sampled else request
        facts = {
            "size": (request.width, request.height),
            "final size": (last.width, last.height),
            "second pass": request.second_steps > 0,
            "sampler": request.sampler,
            "guided": request.guided,
            "texts": request.parts,
            "controls": len(request.controls),
            "init image": request.init_img is not None,
            "mask": request.repaints,
            "loras": len(request.loras),
            "tile": request.tile,
        }
        steps = request.steps_to_run + request.second_steps if sampled else 0
        return cls(images, steps, tuple(facts.items()))


def machine(pipeline: Pipeline) -> dict[str, Any]:
    """What decides how long the work of a pipeline takes, whatever the request."""
    import torch

    options = changed(pipeline.options)
    return {
        "device": device_name(pipeline.device),
        "threads": torch.get_num_threads() if pipeline.device.type == "cpu" else None,
        "model": quick_hash(pipeline.files.weights),
        "precision": pipeline.precision,
        **{name: options[name] for name in options if name not in ("device", "batch_size", "precision")},
    }


class Speeds:
    """The speeds in the cache folder of a pipeline's work. A damaged file counts as an empty one."""

    def __init__(self, pipeline: Pipeline):
        self.entries: list[dict[str, Any]] = _read()
        self.machine = machine(pipeline) if self.entries else {}
        self.pipeline = pipeline

    def find(self, sort: Sort) -> Speed | None:
        """The speed of this work; else that of the same work on another number of images, in proportion."""
        wanted = self._work(sort)
        found = [entry for entry in self.entries if entry["work"] == wanted]
        if not found:
            return None
        nearest = min(found, key=lambda entry: abs(entry["images"] - sort.images))
        speed = Speed(**nearest["speed"])
        return speed if nearest["images"] == sort.images else speed.scaled(sort.images / nearest["images"])

    def add(self, found: Mapping[Sort, Speed]) -> None:
        """Keep these speeds, also for later runs. Where nothing can be written, they are kept here alone."""
        self.machine = self.machine or machine(self.pipeline)
        for sort, speed in found.items():
            entry = {"work": self._work(sort), "images": sort.images}
            before = [other for other in self.entries if other.items() >= entry.items()]
            if any(Speed(**other["speed"]).batches > speed.batches == 1 for other in before):
                continue  # one batch says less than several
            self.entries = [other for other in self.entries if not other.items() >= entry.items()]
            self.entries.append(entry | {"speed": vars(speed)})
        self.entries = self.entries[-KEPT:]
        with suppress(OSError, RuntimeError):
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = folder / f"{FILE}.{os.getpid()}"
            unfinished.write_text(json.dumps(self.entries, indent=1))
            unfinished.replace(folder / FILE)

    def _work(self, sort: Sort) -> dict[str, Any]:
        """As JSON gives it back."""
        return json.loads(json.dumps(self.machine | dict(sort.facts)))


def _read() -> list[dict[str, Any]]:
    try:
        entries = json.loads((cache_folder() / FILE).read_bytes())
        for entry in entries:
            Speed(**entry["speed"]).batch(int(entry["images"]))
            dict(entry["work"])
        return list(entries)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError):
        return []


@dataclass(frozen=True)
class Forecast:
    """What a run will take, on all of its processes together."""

    images: int
    batches: int
    steps: int
    seconds: float  # from the reading of the model on
    memory: int  # bytes at the peak, of a process or its GPU
    processes: int
    source: str  # REMEMBERED or PROBED
    by_sort: Mapping[Sort, float]  # seconds of a batch


def sorts(pipeline: Pipeline, plan: Plan, batches: Iterable[tuple[int, ...]]) -> Counter[Sort]:
    """How many batches of each sort there are. FieldError for a sampler that chooses its number of steps."""
    of_round = plan.requests.of_round
    groups, found = Counter((batch[0] % len(of_round), len(batch)) for batch in batches), Counter()
    for (i, images), times in groups.items():
        if catalogue.SAMPLERS[of_round[i].sampler].adaptive:
            text = "{plan}: {sampler} {name} chooses the number of its steps, which nobody knows before"
            raise FieldError(text, name=of_round[i].sampler)
        found[Sort.of(pipeline, of_round[i], images)] += times
    return found


def forecast(
    pipeline: Pipeline,
    plan: Plan,
    batches: Iterable[tuple[int, ...]],
    processes: int = 1,
    speeds: Speeds | None = None,
    source: str = REMEMBERED,
) -> Forecast | None:
    """What these batches will take; None if the speed of some of them is not known."""
    speeds = speeds or Speeds(pipeline)
    if not speeds.entries:
        return None
    try:
        numbers = sorts(pipeline, plan, batches)
    except FieldError:
        return None
    known = {sort: speeds.find(sort) for sort in numbers}
    if None in known.values() or not known:
        return None
    by_sort = {sort: speed.batch(sort.steps) for sort, speed in known.items()}
    total, count = sum(times * by_sort[sort] for sort, times in numbers.items()), numbers.total()
    return Forecast(
        images=sum(times * sort.images for sort, times in numbers.items()),
        batches=count,
        steps=sum(times * sort.steps for sort, times in numbers.items()),
        # each process makes whole batches
        seconds=max(speed.start for speed in known.values()) + total * -(-count // processes) / count,
        memory=max(speed.memory for speed in known.values()),
        processes=processes,
        source=source,
        by_sort=by_sort,
    )


def probed(pipeline: Pipeline, plan: Plan, processes: int) -> Forecast:
    """The forecast of a plan, after a few steps of each sort of batch whose speed is not known.

    Nothing is written but these speeds. FieldError for a sampler that chooses its number of steps.
    """
    speeds, source = Speeds(pipeline), REMEMBERED
    unknown = {sort for sort in sorts(pipeline, plan, plan.batches) if speeds.find(sort) is None}
    for batch in plan.batches if unknown else ():
        sort = Sort.of(pipeline, plan.requests[batch[0]], len(batch))
        if sort in unknown:
            unknown.remove(sort)
            speeds.add({sort: _probe(pipeline, plan.batch(batch))})
            source = PROBED
        if not unknown:
            break
    return forecast(pipeline, plan, plan.batches, processes, speeds, source)


def _probe(pipeline: Pipeline, requests: Sequence[ImageRequest]) -> Speed:
    """The speed of a batch, from a few of its steps."""
    begun = time.perf_counter()
    device = pipeline.device
    pipeline.model  # noqa: B018
    pipeline.safety  # noqa: B018
    read = time.perf_counter() - begun
    reset_peak_memory(device)
    given = any(request.timesteps or request.sigmas for request in requests)
    few = [request if given else request.twin(steps=min(request.steps, PROBE_STEPS)) for request in requests]
    times = []
    for _ in range(2):  # the first batch prepares much that later ones find ready
        watch = Stopwatch()
        for _ in pipeline.batches([few], watch.step):
            watch.finish(())
        times += watch.batches or [BatchTime((), time.perf_counter() - watch.begun, None)]
    first, second = times
    step, rest = _parts(second, Sort.of(pipeline, few[0], len(few)).steps)
    start = read + max(0.0, first.seconds - second.seconds)
    return Speed(step, rest, start, peak_memory(device), _today(), len(times))


def _parts(batch: BatchTime, steps: int) -> tuple[float, float]:
    """Seconds of a step and of the rest of a batch of so many `steps`; of a single one all is the step."""
    if steps == 0:
        return 0.0, batch.seconds
    step = batch.seconds / steps if batch.step is None else batch.step
    return step, max(0.0, batch.seconds - steps * step)


def remember(pipeline: Pipeline, plan: Plan, watch: Stopwatch, seconds: float) -> None:
    """Keep what this process's batches took, of a run whose work took `seconds` in all."""
    of_round = plan.requests.of_round
    times: dict[Sort, list[tuple[float, float]]] = {}
    for batch in watch.batches:
        request = of_round[batch.numbers[0] % len(of_round)]
        if not catalogue.SAMPLERS[request.sampler].adaptive:
            sort = Sort.of(pipeline, request, len(batch.numbers))
            times.setdefault(sort, []).append(_parts(batch, sort.steps))
    if not times:
        return
    found, speeds = {}, Speeds(pipeline)
    for sort, parts in times.items():
        usual = parts[1:] or parts  # the first batch prepares much that later ones find ready
        step, rest = (median(values) for values in zip(*usual, strict=True))
        if len(parts) == 1 and sort.steps:  # what is not steps is mostly the start of the process, then
            known = speeds.find(sort)
            rest = min(rest, known.rest) if known and known.batches > 1 else 0.0
        found[sort] = Speed(step, rest, 0.0, peak_memory(pipeline.device), _today(), len(parts))
    spent = sum(len(times[sort]) * speed.batch(sort.steps) for sort, speed in found.items())
    for speed in found.values():
        speed.start = max(0.0, seconds - spent - watch.left_out)
    speeds.add(found)


def _today() -> str:
    return time.strftime("%Y-%m-%d")


def print_forecast(pipeline: Pipeline, found: Forecast, watts: float, options: RunOptions) -> None:
    """What a run will take: a line each for time, memory, energy and CO2, or all of it as JSON."""
    costs = Costs(found.seconds / 3600, watts * found.processes, factor_of(options.region))
    if options.json:
        facts = {
            "images": found.images,
            "batches": found.batches,
            "steps": found.steps,
            "seconds": rounded(found.seconds),
            "source": found.source,
            "memory_bytes": found.memory,
            "processes": found.processes,
        }
        print(json.dumps(facts | costs.record()))
        return
    name = device_name(pipeline.device)
    each = f"{watts:g} W" if found.processes == 1 else f"{found.processes} x {watts:g} W"
    power = "given" if options.power else "by the device's name"
    region = f"{options.region}, {costs.factor:g}" if options.region[:1].isalpha() else options.region
    print(f"images   {found.images} in {found.batches} batches, {found.steps} steps")
    print(f"time     {duration(found.seconds)} on {name} ({found.source})")
    print(f"memory   {found.memory / 2**30:.2f} GiB at the peak")
    print(f"energy   {energy(costs.kwh)} ({costs.how}: {each}, {power})")
    print(f"CO2      {mass(costs.co2_kg)} ({region} kg per kWh)")
