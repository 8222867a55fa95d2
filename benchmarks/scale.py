#!/usr/bin/env python3
"""Measure what a run of many workers and many images loses to its own bookkeeping, without a model.

Every simulated worker is a process that runs the real code of a run: it takes its batches from the counter
server, counts its steps, and records each image in the manifest. Only the model is replaced, by sleep, and
the image files stay empty, because what is in them is each worker's own work. The same workers without
bookkeeping, which sleep and create those files, are the comparison: what that costs on few cores is no loss.
With `--outdir` in memory (/dev/shm) nobody waits for a disk.

Simulated workers share the cores of one machine, real ones bring theirs. So a second row has a few workers,
which wait for no core, and puts the load of all the others on what workers share: the counter server has
their questions to answer, and the disk their lines to write.
"""

import gc
import json
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from measuring import GIB, PROMPT, in_fresh_process, memory, seconds
from report import Row, machine, write_results

from ldm.cli.entry import run
from ldm.cli.parser import Parser, number

WORKERS = (1, 8, 64, 512)
RATE = 20.0  # images/s of a worker
STEPS = 10  # of an image, each with its count for the progress bar
MOST = 1280.0  # images/s of all: what two cores can record
FEW = 8  # workers that leave most of two cores free
HELPERS = 2  # processes that make the load of the others
WARM = 2  # batches of a worker that are not timed
TARGET = 0.02  # of the images/s, at most 64 workers
IMAGES = 1_000_000
SETTINGS = {"sampler": "dpmpp_2m", "steps": STEPS, "height": 512, "width": 512, "scale": 7.5}


class StubPipeline:
    """Stands for a pipeline whose images are `steps` sleeps.

    It begins `late` by this part of an image, so that not all workers want the few cores in the same moment.
    The first batches, during which a forked process gets pages of its own, are not timed: `wall` and `cpu`
    are the seconds that the `timed` images of the others took, and `between` what of them passed from the
    last step of a batch to the first of the next one, while a device would have nothing to do.
    """

    facts: ClassVar[dict[str, str]] = {
        "config": "configs/stable-diffusion/v1-inference.yaml",
        "checkpoint": "models/sd-v1-4.ckpt",
        "model_hash": "fe4efff1e1",
        "weights": "ema",
        "precision": "bf16",
        "version": "1.0",
    }

    def __init__(self, rate: float, steps: int, late: float = 0.0):
        from ldm.pipeline.options import RuntimeOptions

        self.options, self.pause, self.late = RuntimeOptions(), 1 / rate / steps, late / rate
        self.steps, self.images, self.timed = steps, 0, 0
        self.wall = self.cpu = self.between = 0.0

    def read_images(self, request: Any) -> None:
        """The images start from no files."""

    def batches(
        self, batches: Any, on_step: Callable[[int], None] | None, on_x0: Any = None
    ) -> Iterator[list[Any]]:
        from ldm.pipeline.generated import GeneratedImage

        time.sleep(self.late)
        pixels, start, end, cpu = object(), None, 0.0, 0.0
        for count, batch in enumerate(batches, 1):
            if start is not None:
                self.between += time.perf_counter() - end
            for _ in range(self.steps):
                time.sleep(self.pause * len(batch))
                if on_step:
                    on_step(len(batch))
            end = time.perf_counter()
            self.images += len(batch)
            if count > WARM:
                self.timed += len(batch)
            elif count == WARM:
                start, cpu = end, time.process_time()
            yield [GeneratedImage(one, pixels, None, 1 / RATE, self) for one in batch]
        if self.timed:
            self.between += time.perf_counter() - end
            self.wall, self.cpu = time.perf_counter() - start, time.process_time() - cpu


class StubFolder:
    """Stands for an output folder: its image files are empty."""

    def __init__(self, path: Path):
        self.path = path
        (path / "samples").mkdir(exist_ok=True)

    def save_image(self, image: Any, texts: Any, name: str, again: bool, settings: Any) -> Path:
        path = self.path / "samples" / f"{name}.png"
        path.touch()
        return path


class Waits:
    """How long each call of a function took, in seconds."""

    def __init__(self, function: Callable):
        self.function, self.seconds = function, []

    def __call__(self, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.function(*args, **options)
        finally:
            self.seconds.append(time.perf_counter() - start)


def round_of_requests(lines: int) -> list[Any]:
    """The requests of a prompt file, all with a prompt of their own."""
    from ldm.pipeline.request import ImageRequest

    return [ImageRequest(f"{PROMPT}, number {i}", watermark="none", **SETTINGS) for i in range(lines)]


def connect(port: int, master: bool) -> Any:
    from torch.distributed import PrefixStore, TCPStore

    limit = timedelta(seconds=300)
    return PrefixStore(
        "ldm-run-0", TCPStore("127.0.0.1", port, is_master=master, wait_for_workers=False, timeout=limit)
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork(size: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` returns in each of `size` forked processes; those that fail have said why on stderr.

    Forked, because a fresh Python with torch takes seconds and 200 MB for each of hundreds of workers.
    """
    gc.freeze()  # the collector would copy the pages that all share
    children = []
    for rank in range(size):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with os.fdopen(writer, "wb") as file:
                    pickle.dump(work(rank), file)
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        os.close(writer)
        children.append((pid, reader))
    results = []
    for pid, reader in children:
        with os.fdopen(reader, "rb") as file:
            data = file.read()
        os.waitpid(pid, 0)
        results.append(pickle.loads(data) if data else None)
    gc.unfreeze()
    if None in results:
        raise RuntimeError(f"{results.count(None)} of {size} simulated workers failed")
    return results


def simulate(
    workers: int, rate: float, images: int, folder: Path, others: int = 0, bookkeeping: bool = True
) -> dict[str, Any]:
    """A run of so many workers, each sampling `rate` images/s and creating their files in the folder.

    The load of `others` like them is put on the counter server and the disk meanwhile.
    """
    import torch.distributed  # noqa: F401, all that a worker imports

    port, share = free_port(), images // workers

    def without_bookkeeping(rank: int) -> dict[str, Any]:
        from ldm.runs.worker import BackgroundWriter

        pipeline = StubPipeline(rate, STEPS, rank / workers)
        batch, samples = round_of_requests(1), StubFolder(folder)
        with ThreadPoolExecutor(1) as thread:
            files = BackgroundWriter(thread)  # as in a run: a slow disk is no bookkeeping

            def save(generated: list[Any], i: int) -> None:
                for one in generated:
                    samples.save_image(one, None, f"{rank * share + i:05}", False, {})

            for i, generated in enumerate(pipeline.batches([batch] * share, None)):
                files.submit(save, generated, i)
            files.finish()
        return measured(pipeline)

    def work(rank: int) -> dict[str, Any]:
        if rank >= workers:
            return make_load(port, folder, others * rate / HELPERS)
        return run_worker(rank, workers, StubPipeline(rate, STEPS, rank / workers), port, images, folder)

    with tempfile.TemporaryDirectory() as rehearsal:  # imports what all workers would import one by one
        run_worker(0, 1, StubPipeline(1000.0, 1), 0, 100, Path(rehearsal))
    helpers = HELPERS if others else 0
    results = fork(workers + helpers, work if bookkeeping else without_bookkeeping)
    results, loads = results[:workers], results[workers:]
    made, timed = (sum(one[name] for one in results) for name in ("images", "timed"))
    found = {
        "images": made,
        "images/s": sum(one["timed"] / one["wall"] for one in results if one["timed"]),
        "seconds an image": sum(one["wall"] for one in results) / timed,
        "seconds between images": sum(one["between"] for one in results) / timed,
        "CPU seconds an image": sum(one["cpu"] for one in results) / timed,
    }
    if bookkeeping:
        for name in ("store", "line"):
            waits = sorted(wait for one in results for wait in one[name])
            found |= {
                f"{name}: calls an image": len(waits) / made,
                f"{name}: seconds a call": sum(waits) / len(waits),
                f"{name}: seconds, 99 % below": waits[int(0.99 * len(waits))],
            }
        found["job: seconds until all have it"] = max(one["joined"] for one in results)
        found["end: seconds"] = results[0]["end"]
        found["images/s of the others"] = sum(load["images/s"] for load in loads)
    return found


def make_load(port: int, folder: Path, rate: float) -> dict[str, float]:
    """What `rate` images/s of other workers ask of the counter server and write, until rank 0 has ended.

    That is a count for each batch and some for the progress bar, and a line of the usual length on the disk.
    """
    files = [open(folder / f"others-{os.getpid()}-{i}", "ab", buffering=0) for i in range(32)]  # noqa: SIM115
    line, images, limit = b"x" * 600 + b"\n", 0, 200.0
    store = connect(port, False)
    start = time.perf_counter()
    try:
        while (now := time.perf_counter() - start) < limit:
            if images >= now * rate:
                time.sleep(0.001)
                continue
            for _ in range(2 if images % 3 == 0 else 1):
                store.add("dealt to others", 1)
            file = files[images % len(files)]
            file.write(line)
            os.fsync(file.fileno())
            images += 1
    except RuntimeError:  # the store has ended
        pass
    return {"images/s": images / (time.perf_counter() - start)}


def measured(pipeline: StubPipeline) -> dict[str, Any]:
    return {name: getattr(pipeline, name) for name in ("images", "timed", "wall", "between", "cpu")}


def run_worker(
    rank: int, workers: int, pipeline: StubPipeline, port: int, images: int, folder: Path
) -> dict[str, Any]:
    """One worker of a run, as `ldm.runs.run` and its `follow` set it up."""
    from ldm.runs.manifest import RunRecord
    from ldm.runs.plan import file_names, plan_run
    from ldm.runs.processes import OTHERS_SIGNS, Place, Team
    from ldm.runs.worker import Interrupt, Job, ReportOptions, make_images
    from ldm.runs.writer import ImageWriter

    team = Team(Place(rank, workers))
    if workers > 1:
        team.store = connect(port, team.leads)
        team.store.add("met", 1)
        team._give_signs_of_life("signs of life" if team.leads else OTHERS_SIGNS)
        team._all("met", workers, 300)
    start, job = time.perf_counter(), None
    if team.leads:
        plan = plan_run(round_of_requests(100), 42, images // 100, 1, None)
        record = RunRecord(folder, SETTINGS, len(plan.requests))
        record.start(0)
        names = file_names("{number:05}", plan, 0, {"checkpoint": "sd-v1-4.ckpt"})
        job = Job(plan, plan.remaining(record.missing()), names, record, {"n_samples": 1})
    job = team.share(job)
    joined = time.perf_counter() - start
    store, line = Waits(team.store.add), Waits(job.record.add)
    team.store, job.record.add = SimpleNamespace(add=store), line
    writer = ImageWriter(StubFolder(folder), job.record, grids=False, metadata=False)
    make_images(pipeline, job, writer, team, Interrupt(), ReportOptions(bar=False))
    start = time.perf_counter()
    if team.leads:
        del job.record.add
        (getattr(job.record, "gather", None) or job.record.refresh)()
        with job.record.ending():
            assert not job.record.missing()
    end = time.perf_counter() - start
    return measured(pipeline) | {
        "joined": joined,
        "end": end,
        "store": store.seconds,
        "line": line.seconds,
    }


def server_capacity(clients: int, limit: float = 2.0) -> float:
    """Counts a second that the counter server answers, asked by so many processes without a pause."""
    import torch.distributed  # noqa: F401

    port, size = free_port(), clients + 1

    def work(rank: int) -> int:
        store, calls = connect(port, rank == 0), 0
        store.add("met", 1)
        while store.add("met", 0) < size:
            time.sleep(0.01)
        end = time.perf_counter() + limit
        while rank and time.perf_counter() < end:
            store.add("dealt", 1)
            calls += 1
        store.add("done", 1)
        while not rank and store.add("done", 0) < size:
            time.sleep(0.05)
        return calls

    return sum(fork(size, work)) / limit


def measure_workers(sizes: Sequence[int], length: float, outdir: Path | None) -> Iterator[Row]:
    capacity = in_fresh_process(server_capacity, 8)
    yield Row(
        "counts a second that the counter server answers, 8 processes asking",
        "",
        f"{capacity:,.0f}",
        values={"counts/s": capacity},
    )
    for workers in sizes:
        rate = min(RATE, MOST / workers)
        what = f"images/s lost to bookkeeping, {workers} workers of {rate:g} images/s"
        yield row_of(what, workers, *simulate_both(workers, rate, length, outdir))
        if workers > FEW and workers * RATE <= MOST:
            what = (
                f"the same without want of cores: {FEW} of {workers} workers, beside the questions of the "
                "others to the counter server and their lines on the disk"
            )
            yield row_of(what, FEW, *simulate_both(FEW, RATE, length, outdir, workers - FEW))


def row_of(what: str, workers: int, plain: dict[str, Any], real: dict[str, Any]) -> Row:
    """What so many workers lose, and where a run's time for bookkeeping goes."""
    lost = max(0.0, 1 - real["images/s"] / plain["images/s"])
    between = real["seconds between images"] - plain["seconds between images"]
    cores = real["CPU seconds an image"] * real["images/s"]
    others = f" beside {real['images/s of the others']:,.0f}" if real["images/s of the others"] else ""
    aimed = workers <= 64
    return Row(
        what,
        f"< {TARGET:.0%}" if aimed else "",
        f"{lost:.1%} ({real['images/s']:,.1f} of {plain['images/s']:,.1f} images/s{others}; "
        f"{1000 * between:.2f} ms between two images, of which a count is "
        f"{1000 * real['store: seconds a call']:.2f} ms, and beside the sampling a manifest's line "
        f"{1000 * real['line: seconds a call']:.2f} ms; {workers} workers use {cores:.2f} of "
        f"{os.cpu_count()} cores)",
        lost < TARGET if aimed else None,
        {"lost": lost, "with bookkeeping": real, "without": plain},
    )


def simulate_both(
    workers: int, rate: float, length: float, outdir: Path | None, others: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run of `length` seconds without bookkeeping, and the same with it."""
    images = max(100, round(workers * rate * length / 100) * 100)

    def simulated(others: int, bookkeeping: bool) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=outdir) as folder:
            return in_fresh_process(simulate, workers, rate, images, Path(folder), others, bookkeeping)

    return simulated(0, False), simulated(others, True)


# a million images


def plan_million(lines: int, images: int) -> dict[str, float]:
    """Seconds and peak memory from the requests of a prompt file to the job that the workers are given."""
    from ldm.runs.manifest import RunRecord
    from ldm.runs.plan import file_names, plan_run
    from ldm.runs.worker import Job

    requests = round_of_requests(lines)
    with tempfile.TemporaryDirectory() as name:

        def plan() -> None:
            plan = plan_run(requests, 42, images // lines, 4, None)
            record = RunRecord(Path(name), SETTINGS, len(plan.requests), [{} for _ in requests])
            todo = plan.remaining(record.missing())
            record.start(0)
            names = file_names("{number:05}", plan, record.first, {"checkpoint": "sd-v1-4.ckpt"})
            job = Job(plan, todo, names, record, {"n_samples": 4})
            found["images"] = sum(map(len, job.batches))
            found["bytes of the job"] = len(pickle.dumps(job))
            with record.ending():
                pass

        found: dict[str, float] = {}
        found["seconds"] = seconds(plan)
    assert found["images"] == images
    return found | {"peak": memory()["peak"]}


def resume_million(images: int, workers: int, outdir: Path | None) -> dict[str, float]:
    """Seconds and peak memory of taking up a run of which all but one image in ten are there.

    It was killed, so that each worker's lines are still in a file of its own where the code has such files.
    """
    from ldm.runs.manifest import MANIFEST, RunRecord
    from ldm.runs.plan import plan_run

    with tempfile.TemporaryDirectory(dir=outdir) as name:
        folder = Path(name)
        (folder / "samples").mkdir()
        record = RunRecord(folder, SETTINGS, images)
        record.start(0)
        with record.ending():
            pass
        files = [folder / MANIFEST]
        if hasattr(record, "gather"):
            files += [pickle.loads(pickle.dumps(record)).manifest for _ in range(workers - 1)]
        size = write_lines(files, record.run, images)
        plan = plan_run(round_of_requests(1000), 42, images // 1000, 4, None)
        again = RunRecord(folder, SETTINGS, images)
        found: dict[str, float] = {"manifest": size}

        def decide() -> None:
            assert again.resume()
            found["batches"] = len(plan.remaining(again.missing()))

        with again.ending():
            found["seconds"] = seconds(decide)
        assert found["batches"]
    return found | {"peak": memory()["peak"]}


def write_lines(files: Sequence[Path], run_id: str, images: int) -> int:
    """Nine images of ten and their lines, spread over the files; returns the bytes of all lines."""
    facts = StubPipeline.facts | round_of_requests(1)[0].settings() | {"n_samples": 4, "seconds": 0.05}
    size = 0
    with ExitStack() as stack:
        opened = [stack.enter_context(open(path, "w")) for path in files]
        for k in range(images):
            if k % 10 == 9:
                continue
            file = f"samples/{k:05}.png"
            os.close(os.open(files[0].parent / file, os.O_CREAT))
            line = {"run": run_id, "image": k, "file": file, **facts, "seed": 42 + k, "nan": False}
            size += opened[k % len(files)].write(json.dumps(line) + "\n")
    return size


def measure_planning(outdir: Path | None) -> Iterator[Row]:
    found = in_fresh_process(plan_million, 1000, IMAGES)
    yield Row(
        f"{IMAGES:,} images planned, 1,000 prompts 1,000 times over, up to the job for the workers",
        "< 10 s, 500 MB",
        f"{found['seconds']:.1f} s, peak memory of the process {found['peak'] / 1e6:.0f} MB, job "
        f"{found['bytes of the job'] / 1e6:.1f} MB",
        found["seconds"] < 10 and found["peak"] < 500e6,
        found,
    )


def measure_resuming(outdir: Path | None) -> Iterator[Row]:
    found = in_fresh_process(resume_million, IMAGES, 64, outdir)
    yield Row(
        f"a killed run of 64 workers and {IMAGES:,} images taken up, 900,000 of them done",
        "< 20 s",
        f"{found['seconds']:.1f} s for {found['manifest'] / GIB:.2f} GiB of lines, peak memory of the "
        f"process {found['peak'] / 1e6:.0f} MB",
        found["seconds"] < 20,
        found,
    )


def parser() -> Parser:
    parser = Parser(prog="scale.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=("workers", "planning", "resuming"), help="measure only these")
    add("--workers", nargs="+", type=number(int, 1), default=list(WORKERS), help="numbers of workers")
    add("--seconds", type=number(float, 0), default=8.0, help="length of each simulated run (8)")
    add("--outdir", type=Path, help="folder for the simulated runs (the system's temporary one)")
    add("--name", default="scale", help="results go to benchmarks/results/NAME.json and .md (scale)")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no stack traces when the store ends
    facts = machine()
    parts = {
        "workers": lambda: measure_workers(options.workers, options.seconds, options.outdir),
        "planning": lambda: measure_planning(options.outdir),
        "resuming": lambda: measure_resuming(options.outdir),
    }
    rows: dict[str, list[Row]] = {}
    for name in options.only or parts:
        for row in parts[name]():
            rows.setdefault(name, []).append(row)
            table = write_results(options.name, facts, rows)  # every time: what is interrupted keeps its rows
    print(table, end="")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
