"""An engine on the miniature of tiny.py, which makes images of 16 x 16 pixels in milliseconds."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.request import ImageRequest
from ldm.service.engine import Engine
from ldm.service.jobs import Job
from ldm.service.models import NamedModel
from ldm.service.options import ServiceOptions


def request(prompt: str = "a red cube", seed: int | None = 7, **values: Any) -> ImageRequest:
    return ImageRequest(prompt, seed=seed, **{"steps": 2, **values})


def engine(
    model: tuple[Path, Path],
    names: Sequence[str] = ("tiny",),
    runtime: RuntimeOptions | None = None,
    **options: Any,
) -> Engine:
    """An engine that is not started yet; `model` is the fixture's (config, weights), under these names."""
    config, weights = map(str, model)
    named = [NamedModel(name, weights, config) for name in names]
    runtime = runtime or RuntimeOptions(device="cpu", batch_size=8)
    return Engine.open(named, ServiceOptions(**options), runtime, safety="off")


@contextmanager
def running(model: tuple[Path, Path], names: Sequence[str] = ("tiny",), **options: Any) -> Iterator[Engine]:
    """A started engine, which ends with the block."""
    with engine(model, names, **options) as started:
        yield started


@contextmanager
def held(engine: Engine, **values: Any) -> Iterator[Job]:
    """Inside, the engine's thread stands still after the first step of this job."""
    entered, released = threading.Event(), threading.Event()

    def hold(job: Job) -> None:
        if job.state == "running" and job.progress > 0:
            entered.set()
            released.wait(60)

    with engine._changed:  # so that the job does not begin before its listener is there
        job = engine.submit([request("hold", **{"steps": 20, **values})], client="holder")
        job.listen(hold)
    try:
        assert entered.wait(60)
        yield job
    finally:
        released.set()


def spied(engine: Engine, monkeypatch: Any, name: str = "tiny") -> list[list[str]]:
    """The prompts of each batch that a loaded model samples from now on."""
    seen: list[list[str]] = []
    pipeline = engine.models.pipeline(name)
    plain = pipeline.batches

    def batches(given: Sequence[Sequence[ImageRequest]], *callbacks: Any) -> Any:
        seen.extend([one.prompt for one in batch] for batch in given)
        return plain(given, *callbacks)

    monkeypatch.setattr(pipeline, "batches", batches)
    return seen
