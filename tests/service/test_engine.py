import gc
import io
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lora_files
import numpy as np
import pytest
import tiny_service
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_service import held, request, running, spied

from ldm.errors import InputError
from ldm.pipeline import pipeline as pipeline_module
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import ImageRequest
from ldm.pipeline.safety import Safety
from ldm.pipeline.settings.control import Control
from ldm.runs.manifest import read_manifest
from ldm.service import engine as engine_module
from ldm.service.engine import Engine
from ldm.service.errors import (
    BadRequest,
    DeadlinePassed,
    Draining,
    LimitExceeded,
    OutOfMemory,
    QueueFull,
    ServiceError,
    UnknownJob,
    UnknownModel,
)
from ldm.service.jobs import Job
from ldm.service.limits import check_files
from ldm.service.models import NamedModel
from ldm.service.options import ServiceOptions

PATIENCE = 30  # seconds; a wait that takes as long has failed


@pytest.fixture(scope="module")
def engine(model: tuple[Path, Path]) -> Iterator[Engine]:
    with running(model, max_images=16, max_steps=60, max_pixels=64 * 64, max_prompt=500) as started:
        yield started


@pytest.fixture(scope="module")
def alone(model: tuple[Path, Path]) -> Callable[[ImageRequest], np.ndarray]:
    """The image of a request by itself."""
    config, weights = map(str, model)
    pipeline = Pipeline.load(weights, config, RuntimeOptions(device="cpu"), safety="off")

    def pixels(request: ImageRequest) -> np.ndarray:
        (image,) = pipeline.generate([request])
        return image.pixels

    return pixels


def photo(size: tuple[int, int] = (16, 16), colour: str = "red") -> Image.Image:
    return Image.new("RGB", size, colour)


def images_of(job: Job) -> list[np.ndarray]:
    job.wait(PATIENCE)
    assert job.error is None
    assert job.state == "finished"
    return [image.pixels for image in job.images]


def failed(job: Job) -> ServiceError:
    job.wait(PATIENCE)
    assert job.state == "failed"
    assert job.images == ()
    return job.error


def goes_on(engine: Engine) -> None:
    """Whatever came before: the next request is served."""
    assert len(images_of(engine.submit([request()], client="the next one"))) == 1


def level(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference, in levels of 255."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# Images


def test_an_image_of_a_batch_is_what_it_is_alone(
    engine: Engine, alone: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        request("a red cube", seed=1),
        request("a blue sphere on a table", seed=2, negative_prompt="red"),
        request("a cone", seed=3, scale=3.0),
        request("a red cube", seed=1, scale=12.0),
        request("noise", seed=9, fixed_code=True, start_seed=5),
        request("varied", seed=6, variation_seed=1, variation_strength=0.3),
    ]
    batches = spied(engine, monkeypatch)
    with held(engine, seed=99):
        jobs = [engine.submit([one], client=str(k)) for k, one in enumerate(requests)]
    made = [images_of(job)[0] for job in jobs]
    assert batches[1] == [one.prompt for one in requests]
    for pixels, one, job in zip(made, requests, jobs, strict=True):
        assert level(pixels, alone(one)) <= 1
        assert job.images[0].settings["prompt"] == one.prompt
        assert job.images[0].seed == one.seed
    assert level(made[0], made[3]) > 1  # or the test could not fail


def test_an_init_image_and_a_mask_of_a_batch_are_its_own(engine: Engine, alone: Callable) -> None:
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    colours = ["red", "green", "blue"]
    plain = [request(init_img=photo(colour=one), strength=0.5) for one in colours]
    masked = [request(init_img=photo(colour=one), strength=1.0, mask=mask) for one in colours]
    with held(engine):
        jobs = [engine.submit([one], client=str(k)) for k, one in enumerate(plain + masked)]
    for job, one in zip(jobs, plain + masked, strict=True):
        assert level(images_of(job)[0], alone(one)) <= 1


def test_images_of_a_job_come_in_its_order(engine: Engine, alone: Callable) -> None:
    requests = [request(seed=k, height=16 + 16 * (k % 2), width=16) for k in range(10)]
    made = images_of(engine.submit(requests, client="a"))
    for pixels, one in zip(made, requests, strict=True):
        assert pixels.shape[0] == one.height
        assert level(pixels, alone(one)) <= 1


def test_requests_without_seeds_get_some(engine: Engine) -> None:
    first = engine.submit([request(seed=None), request(seed=5), request(seed=None)], client="a")
    second = engine.submit([request(seed=None)], client="a")
    images_of(first)
    images_of(second)
    seeds = [image.seed for image in first.images + second.images]
    assert seeds[1] == 5
    assert len(set(seeds)) == 4
    assert [one.seed for one in first.requests] == seeds[:3]


def test_images_of_one_stream_are_not_mixed_with_others(
    engine: Engine, alone: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = spied(engine, monkeypatch)
    one = request("stream", rng="compvis")
    with held(engine):
        jobs = [engine.submit([one], client=client) for client in "ab"]
    for job in jobs:
        assert level(images_of(job)[0], alone(one)) <= 1
    assert batches[1:] == [["stream"], ["stream"]]


# Batches and turns


def test_requests_of_one_key_that_arrive_together_are_sampled_together(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = spied(engine, monkeypatch)
    with held(engine):
        jobs = [engine.submit([request(f"small {k}")], client=str(k)) for k in range(3)]
        jobs += [engine.submit([request("large", width=32)], client="large")]
        jobs += [engine.submit([request(f"small {k}")], client=str(k)) for k in range(3, 6)]
        assert engine.queue_length == 7
        assert engine.running == 1
    for job in jobs:
        images_of(job)
    assert batches == [["hold"], [f"small {k}" for k in range(6)], ["large"]]


def test_nobody_waits_for_all_of_another_clients_images(engine: Engine) -> None:
    ended: list[str] = []
    with held(engine):
        many = [engine.submit([request(steps=1)] * 8, client="many") for _ in range(4)]
        one = engine.submit([request(width=32)], client="one")
        for job in [*many, one]:
            job.listen(lambda job: ended.append(job.client) if job.over else None)
        assert [job.position for job in many] == [1, 9, 17, 25]
        assert one.position == 1
    for job in [*many, one]:
        images_of(job)
    assert ended == ["many", "one", "many", "many", "many"]


def test_clients_that_are_about_to_ask_again_are_waited_for(model: tuple[Path, Path]) -> None:
    engine = tiny_service.engine(model)  # whose thread has not started
    queue = engine._queue
    engine._expected, engine._last_seconds, engine._free_since = 2, 1e9, time.monotonic() + 1e6
    taken: list[int] = []
    with engine._changed:
        queue.put([SimpleNamespace(client="a", job="a", key="key")])

        def second() -> None:
            with engine._changed:
                queue.put([SimpleNamespace(client="b", job="b", key="key")])
                engine._changed.notify_all()

        thread = threading.Thread(target=second)
        thread.start()
        engine._gather(8)
        taken.append(len(queue))
        engine._expected = 1
        engine._gather(8)  # nobody else is expected
    thread.join()
    assert taken == [2]


def test_the_queue_is_bounded(model: tuple[Path, Path]) -> None:
    with running(model, queue_size=4, max_images=4) as engine:
        with held(engine):
            jobs = [engine.submit([request()], client="a") for _ in range(3)]
            with pytest.raises(QueueFull) as full:
                engine.submit([request()] * 2, client="b")
            jobs.append(engine.submit([request()], client="b"))
            with pytest.raises(QueueFull):
                engine.submit([request()], client="c")
            assert int(full.value.headers["Retry-After"]) >= 1
            jobs[0].cancel()
            jobs.append(engine.submit([request()], client="c"))
        for job in jobs[1:]:
            images_of(job)
        assert engine.counters["requests_refused"] == 2
        assert engine.counters["jobs_cancelled"] == 1


def test_the_images_that_requests_start_from_have_a_limit(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue of few images could hold as many GB of what these start from. One that several share counts
    once, requests without any always have room, and one that is over makes room.
    """
    monkeypatch.setattr("ldm.service.engine.HELD_BYTES", 2 * 4 * 16 * 16)
    started = request(init_img=photo(), strength=0.5)
    with held(engine):
        jobs = [engine.submit([started] * 2, client="a"), engine.submit([from_photo()], client="b")]
        with pytest.raises(QueueFull):
            engine.submit([from_photo()], client="c")
        jobs.append(engine.submit([request()], client="c"))
        jobs[0].cancel()
        jobs.append(engine.submit([from_photo()], client="c"))
    for job in jobs[1:]:
        images_of(job)
    images_of(engine.submit([from_photo((64, 64))], client="a"))  # however large, alone it may come


def test_images_are_held_before_there_is_a_job(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of requests that moderation was still asked about did not count, but for their number."""
    monkeypatch.setattr("ldm.service.engine.HELD_BYTES", 4 * 16 * 16)
    refused = engine.counters["requests_refused"]
    with engine.holding([from_photo()]):
        with pytest.raises(QueueFull), engine.holding([from_photo()]):
            pass
        with pytest.raises(QueueFull):
            engine.submit([from_photo()], client="b")
        assert engine.counters["requests_refused"] == refused + 2
    assert engine._held == {}
    with engine.holding([request()]), engine.holding([from_photo()]):
        pass


def test_an_error_says_which_image_it_is_about(engine: Engine) -> None:
    """Of a table with many lines nobody knew which one the engine had refused."""
    for bad in (request(steps=501), request(height=12, width=16), request(init_img="a.png", strength=0.5)):
        with pytest.raises(ServiceError) as caught:
            engine.submit([request(), bad], client="a")
        assert caught.value.number == 1
    with pytest.raises(ServiceError) as caught:
        engine.submit([request()], client="a", model="three")
    assert caught.value.number is None


def from_photo(size: tuple[int, int] = (16, 16)) -> ImageRequest:
    return request(init_img=photo(size), strength=0.5, height=16, width=16)


def test_many_threads_get_their_own_images(engine: Engine, model: tuple[Path, Path]) -> None:
    config, weights = map(str, model)
    pipeline = Pipeline.load(weights, config, RuntimeOptions(device="cpu", batch_size=8), safety="off")
    requests = [request(f"prompt {k}", seed=k, steps=1) for k in range(12)]
    expected = [image.pixels for image in pipeline.generate(requests)]
    assert min(level(a, b) for a, b in combinations(expected, 2)) > 4
    wrong: list[str] = []

    def client(k: int) -> None:
        for n in range(6):
            numbers = [(k + n + i) % 12 for i in range(1 + n % 3)]
            try:
                job = engine.submit([requests[i] for i in numbers], client=str(k % 4), preview=n == 0)
            except QueueFull:
                continue
            if (k + n) % 5 == 0:
                job.cancel()
            job.wait(PATIENCE)
            seen = [level(image.pixels, expected[i]) for image, i in zip(job.images, numbers, strict=False)]
            if (job.state, len(seen)) not in (("finished", len(numbers)), ("cancelled", 0)) or max(
                seen, default=0
            ) > 1:
                wrong.append(f"client {k}: {job.state}, {seen}, {job.error}")

    threads = [threading.Thread(target=client, args=(k,)) for k in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert engine.queue_length == 0


# Ends


def test_a_waiting_job_is_cancelled_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = spied(engine, monkeypatch)
    with held(engine):
        job = engine.submit([request("cancelled")] * 3, client="a")
        assert engine.queue_length == 3
        assert engine.cancel(job.id, "a").state == "cancelled"
        assert engine.queue_length == 0
        assert job.error.status == 499
    goes_on(engine)
    assert ["cancelled"] * 3 not in batches


def test_a_running_job_makes_room_at_the_next_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine.models.pipeline("tiny").model
    calls, plain = [], model.apply_model
    monkeypatch.setattr(model, "apply_model", lambda *inputs: (calls.append(1), plain(*inputs))[1])
    images = engine.counters["images"]
    with held(engine, steps=60) as job:
        assert job.cancel()
        assert job.state == "cancelled"
        following = engine.submit([request(steps=3)], client="a")
    images_of(following)
    assert len(calls) <= 2 + 3  # of 60
    assert engine.counters["images"] == images + 1
    assert job.images == ()


def test_others_of_a_batch_go_on_when_one_is_cancelled(engine: Engine, alone: Callable) -> None:
    others = [request(f"other {k}", seed=k, steps=4) for k in range(3)]
    with held(engine):
        jobs = [engine.submit([one], client="a") for one in others]
        cancelled = engine.submit([request("cancelled", steps=4)], client="b")
        cancelled.listen(lambda job: job.cancel() if job.progress > 0.3 else None)
    for job, one in zip(jobs, others, strict=True):
        assert level(images_of(job)[0], alone(one)) <= 1
    assert cancelled.state == "cancelled"


@pytest.mark.parametrize("waits", [True, False])
def test_a_deadline_ends_a_job_wherever_it_is(engine: Engine, waits: bool) -> None:
    with held(engine) as job:
        if waits:
            job = engine.submit([request()] * 2, client="a", timeout=0.05)
        else:
            job.deadline = time.monotonic()
            with engine._changed:
                engine._changed.notify_all()
        error = failed(job)  # while the engine's thread stands still
        assert isinstance(error, DeadlinePassed)
        assert error.status == 504
        assert engine.queue_length == 0
    goes_on(engine)


def test_the_time_before_the_queue_counts(engine: Engine) -> None:
    """The deadline began when the request had been read and moderated, however long that took."""
    job = engine.submit([request()] * 2, client="a", timeout=5, arrived=time.monotonic() - 6)
    assert isinstance(failed(job), DeadlinePassed)


def test_a_client_may_not_ask_for_more_time_than_there_is(model: tuple[Path, Path]) -> None:
    with running(model, deadline=30) as engine:
        assert engine.submit([request()], client="a", timeout=1e6).timeout == 30
        assert engine.submit([request()], client="a", timeout=7).timeout == 7
        with pytest.raises(BadRequest, match="timeout -1"):
            engine.submit([request()], client="a", timeout=-1)


def test_a_job_of_another_client_is_unknown(engine: Engine) -> None:
    job = engine.submit([request()], client="a")
    assert engine.job(job.id, "a") is job
    for ask in (engine.job, engine.cancel):
        with pytest.raises(UnknownJob):
            ask(job.id, "b")
    assert len(images_of(job)) == 1
    with pytest.raises(UnknownJob):
        engine.job(job.id, "b")


# Faults


def test_a_nan_image_ends_its_job_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pipeline_module.finite_images
    with held(engine):
        jobs = [engine.submit([request(seed=k)], client=str(k)) for k in range(3)]
        monkeypatch.setattr(
            pipeline_module, "finite_images", lambda x: [k != 1 and ok for k, ok in enumerate(plain(x))]
        )
    assert failed(jobs[1]).code == "not_finite"
    assert len(images_of(jobs[0]) + images_of(jobs[2])) == 2
    goes_on(engine)


def out_of_memory(monkeypatch: pytest.MonkeyPatch, engine: Engine, most: int) -> None:
    """From now on the UNet has room for so many images."""
    pipeline = engine.models.pipeline("tiny")
    model, plain = pipeline.model, pipeline.model.apply_model
    monkeypatch.setattr(pipeline, "_largest", {})

    def apply_model(x: torch.Tensor, *inputs: Any) -> torch.Tensor:
        if len(x) > 2 * most:  # with guidance
            raise torch.OutOfMemoryError("out of memory")
        return plain(x, *inputs)

    monkeypatch.setattr(model, "apply_model", apply_model)


def test_what_does_not_fit_is_sampled_in_parts(
    engine: Engine, alone: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(seed=k, steps=3) for k in range(5)]
    with held(engine):
        jobs = [engine.submit([one], client=str(one.seed), preview=True) for one in requests]
        previews: list[bytes] = []
        for job in jobs:
            job.listen(lambda job: previews.append(job.preview) if job.preview else None)
        out_of_memory(monkeypatch, engine, 1)
    for job, one in zip(jobs, requests, strict=True):
        assert level(images_of(job)[0], alone(one)) <= 1
    assert previews == []  # for nobody knows whose they are
    batches = spied(engine, monkeypatch)
    images_of(engine.submit(requests, client="a"))
    assert [len(batch) for batch in batches] == [1] * 5  # it has learned


def test_out_of_memory_ends_its_jobs_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        with held(engine):
            jobs = [engine.submit([request(seed=k)], client=str(k)) for k in range(2)]
            out_of_memory(patch, engine, 0)
        for job in jobs:
            error = failed(job)
            assert isinstance(error, OutOfMemory)
            assert "16" not in error.message.replace("16x16", "")
    goes_on(engine)


def test_a_request_that_fails_does_not_harm_its_batch(
    engine: Engine, alone: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = engine.models.pipeline("tiny")
    plain = pipeline.embed

    def embed(prompt: str, *reading: Any) -> torch.Tensor:
        if prompt == "poison":
            raise ZeroDivisionError("/srv/secret/place")
        return plain(prompt, *reading)

    monkeypatch.setattr(pipeline, "embed", embed)
    good = [request("good", seed=1), request("better", seed=2)]
    with held(engine):
        jobs = [engine.submit([one], client=one.prompt) for one in [good[0], request("poison"), good[1]]]
    error = failed(jobs[1])
    assert (error.status, error.code) == (500, "sampling_failed")
    assert "secret" not in error.message
    for job, one in zip([jobs[0], jobs[2]], good, strict=True):
        assert level(images_of(job)[0], alone(one)) <= 1
    assert engine.healthy


def test_an_error_that_stays_makes_the_engine_unhealthy(
    model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(model) as engine:
        pipeline = engine.models.pipeline("tiny")

        def broken(*inputs: Any) -> None:
            raise RuntimeError("CUDA error: device-side assert triggered")

        assert engine.healthy
        assert engine.ready
        monkeypatch.setattr(pipeline, "embed", broken)
        assert failed(engine.submit([request()], client="a")).code == "sampling_failed"
        assert not engine.healthy
        assert not engine.ready
        with pytest.raises(ServiceError, match="the device fails"):
            engine.submit([request()], client="a")


def test_a_model_that_cannot_be_loaded_at_the_start_is_an_input_error(
    model: tuple[Path, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(model[1].read_bytes()[:-100])
    with pytest.raises(InputError, match=r"broken\.safetensors"):
        tiny_service.engine((model[0], broken)).start()


def test_a_model_that_cannot_be_loaded_later_ends_its_jobs_alone(
    model: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(model[1].read_bytes())
    named = [NamedModel("tiny", str(model[1]), str(model[0])), NamedModel("copy", str(copy), str(model[0]))]
    with Engine.open(named, ServiceOptions(), RuntimeOptions(device="cpu"), safety="off") as engine:
        save_file({name: each for name, each in load_file(copy).items() if "middle_block" not in name}, copy)
        error = failed(engine.submit([request()], client="a", model="copy"))
        assert (error.status, error.code) == (503, "model_failed")
        assert str(tmp_path) not in error.message
        goes_on(engine)


# Models


def test_each_model_answers_for_itself(model: tuple[Path, Path]) -> None:
    with running(model, names=("one", "two"), loaded_models=1) as engine:
        assert engine.loaded_models == ("one",)
        with held(engine):
            jobs = [engine.submit([request()], client="a", model=name) for name in ("two", "one", "two")]
        for job in jobs:
            images_of(job)
        assert engine.counters["model_loads"] >= 2
        assert len(engine.loaded_models) == 1
        with pytest.raises(UnknownModel, match="choose from one, two"):
            engine.submit([request()], client="a", model="three")


def test_finished_images_do_not_keep_a_model_in_memory(model: tuple[Path, Path]) -> None:
    with running(model, names=("one", "two")) as engine:
        job = engine.submit([request()], client="a", model="one")
        images_of(job)
        weights = weakref.ref(engine.models.pipeline("one").model)
        images_of(engine.submit([request()], client="a", model="two"))
        assert weights() is None
        assert job.images[0].settings["checkpoint"].endswith("tiny.safetensors")


# Limits and what comes in


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 61}, "steps: 61 are more than this service's 60"),
        ({"steps": 40, "hires": 2.0, "hires_strength": 1.0}, "steps: 80"),
        ({"height": 64, "width": 72}, "72x64 are 4,608 pixels; the most is 4,096"),
        ({"hires": 5.0}, "80x80"),
        ({"height": 65_536, "init_img": photo(), "strength": 0.5}, "65536x65536"),
        ({"width": 65_536}, "65536x16"),
        (
            {"init_img": photo((64, 64)), "strength": 0.5, "mask": photo(), "outpaint": (8, 8, 8, 8)},
            "80x80|4,096",
        ),
        ({"prompt": "a" * 501}, "prompt: 501 characters"),
        ({"negative_prompt": "a" * 501}, "negative_prompt: 501 characters"),
        ({"prompt_to": "a" * 501, "prompt_mix": 0.5}, "prompt_to: 501 characters"),
        ({"prompt": "<lora:a:1>" * 9, "prompt_syntax": "a1111"}, "lora: 9 with those of the prompt"),
        ({"prompt": "a AND b AND c", "prompt_syntax": "a1111", "steps": 21}, "21 steps .* 3 parts .* are 63"),
        ({"prompt": " AND ".join("a" * 17), "prompt_syntax": "a1111", "steps": 1}, "17 parts .* 16"),
    ],
)
def test_a_request_beyond_the_limits_is_refused(engine: Engine, values: dict, words: str) -> None:
    with pytest.raises((LimitExceeded, BadRequest), match=words) as caught:
        engine.submit([request(**values)], client="a")
    assert caught.value.status == 422
    goes_on(engine)


def test_so_many_images_are_not_of_one_request(engine: Engine) -> None:
    with pytest.raises(LimitExceeded, match="17 images: a request may ask for 16"):
        engine.submit([request()] * 17, client="a")
    with pytest.raises(BadRequest, match="no image"):
        engine.submit([], client="a")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"height": 12}, "height 12 is not a multiple of 8"),
        ({"init_img": photo(), "strength": 0.5, "noise_level": None, "depth": photo()}, "depth"),
    ],
)
def test_what_the_model_cannot_do_names_the_field(engine: Engine, values: dict, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        engine.submit([request(**values)], client="a")
    goes_on(engine)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"init_img": "/etc/passwd", "strength": 0.5}, "init_img: give the image itself"),
        ({"init_img": photo(), "strength": 0.5, "mask": "/etc/passwd"}, "mask: give the image itself"),
        ({"lora": ("/etc/passwd",)}, "lora: this service has none"),
        ({"lora": ("name",)}, "lora: this service has none"),
        ({"prompt": "<lora:/etc/passwd:1>", "prompt_syntax": "a1111"}, "lora: this service has none"),
        ({"embedding": ("/etc/passwd",)}, "embedding: this service has none"),
        ({"control": (Control("/etc/passwd", photo()),)}, "control: this service has none"),
        ({"control": ("net.safetensors:/etc/passwd",)}, "control 0: give the image itself"),
        ({"hires": 2.0, "hires_upscaler": "/etc/passwd"}, "hires_upscaler: this service has latent and"),
    ],
)
def test_no_file_is_read_because_a_client_names_it(engine: Engine, values: dict, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        engine.submit([request(**values)], client="a")
    assert "/etc" not in caught.value.message


@pytest.mark.parametrize("name", ["../outside", "loras/../../outside", "/outside", "~/outside", "a\\..\\b"])
def test_names_stay_within_their_folder(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("loras", "embeddings", "control"):
        (tmp_path / folder).mkdir()
    (tmp_path / "outside").write_bytes(b"secret")
    folders = {
        "lora_folder": "loras",
        "embedding_folder": str(tmp_path / "embeddings"),
        "control_folder": "control",
    }
    engine = tiny_service.engine(model, **folders)
    for values in (
        {"lora": (name,)},
        {"prompt": f"<lora:{name}:1>", "prompt_syntax": "a1111"},
        {"embedding": (name,)},
        {"control": (Control(name, photo()),)},
        {"embedding": ("outside",)},  # is a file in the working folder
        {"control": (Control("outside", photo()),)},
    ):
        with pytest.raises(BadRequest, match="there is no"):
            check_files(request(**values), engine.options)


def test_loras_of_the_folder_are_each_requests_own(model: tuple[Path, Path], tmp_path: Path) -> None:
    for k, name in enumerate(("one", "two")):
        lora_files.write(tmp_path / f"{name}.safetensors", lora_files.v1_layers(), seed=k)
    config, weights = map(str, model)
    runtime = RuntimeOptions(device="cpu")
    pipeline = Pipeline.load(weights, config, runtime, safety="off", lora_folder=str(tmp_path))
    requests = [
        request(),
        request(lora=("one",)),
        request(lora=(f"{tmp_path}/two.safetensors:0.5",)),
        request("a red cube <lora:two:0.5>", prompt_syntax="a1111"),
        request(),
    ]
    expected = [image.pixels for image in pipeline.generate(requests)]
    with running(model, lora_folder=str(tmp_path)) as engine:
        with held(engine):
            jobs = [engine.submit([one], client=str(k)) for k, one in enumerate(requests)]
        for job, pixels in zip(jobs, expected, strict=True):
            assert level(images_of(job)[0], pixels) <= 1
        with pytest.raises(BadRequest) as caught:
            engine.submit([request(lora=("three",))], client="a")
        assert str(tmp_path) not in caught.value.message
    assert level(expected[0], expected[1]) > 1
    assert level(expected[0], expected[2]) > 1


# Previews


def test_a_preview_shows_the_jobs_own_images_alone(engine: Engine) -> None:
    requests = [[request("a", seed=1)], [request("b", seed=2), request("c", seed=3)], [request("d", seed=4)]]
    with held(engine):
        jobs = [engine.submit(each, client=str(k), preview=k < 2) for k, each in enumerate(requests)]
        seen: dict[str, list[bytes]] = {job.id: [] for job in jobs}
        for job in jobs:
            job.listen(lambda job: seen[job.id].append(job.preview) if job.preview else None)
    for job in jobs:
        images_of(job)
        assert job.preview is None  # the images are there
    assert seen[jobs[2].id] == []
    together = [np.asarray(Image.open(io.BytesIO(seen[job.id][0])).convert("RGB")) for job in jobs[:2]]
    assert together[0].shape == (256, 256, 3)
    assert together[1].shape[1] > 512  # a grid of two
    for k, found in enumerate(together):
        with engine._changed:
            job = engine.submit(requests[k], client="alone", preview=True)
            by_itself = []
            job.listen(lambda job, found=by_itself: found.append(job.preview) if job.preview else None)
        images_of(job)
        assert level(found, np.asarray(Image.open(io.BytesIO(by_itself[0])).convert("RGB"))) <= 1
    assert level(together[0], together[1][:256, :256]) > 1


@pytest.mark.parametrize("reason", ["safety", "moderation"])
def test_what_has_not_been_checked_is_not_shown(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    if reason == "safety":
        pipeline = engine.models.pipeline("tiny")
        monkeypatch.setitem(pipeline.__dict__, "safety", Safety(lambda images: [True] * len(images)))
    else:
        monkeypatch.setattr(engine, "options", replace(engine.options, moderate="module:function"))
    seen = []
    with held(engine):
        job = engine.submit([request(steps=5)], client="a", preview=True)
        job.listen(lambda job: seen.append(job.preview) if job.preview else None)
    (pixels,) = images_of(job)
    assert seen == []
    assert job.images[0].nsfw is (True if reason == "safety" else None)
    assert pixels.any() == (reason != "safety")  # black where it was found


# Its life


def test_draining_finishes_what_is_there_and_takes_nothing_new(model: tuple[Path, Path]) -> None:
    with running(model) as engine:
        left: list[list[Job]] = []
        with held(engine) as first:
            waits = engine.submit([request()] * 3, client="a")
            thread = threading.Thread(target=lambda: left.append(engine.drain(PATIENCE)))
            thread.start()
            while engine.ready:
                time.sleep(0.001)
            assert engine.healthy
            with pytest.raises(Draining) as caught:
                engine.submit([request()], client="b")
            assert caught.value.status == 503
        thread.join()
        assert left == [[]]
        assert (first.state, waits.state) == ("finished", "finished")


def test_what_does_not_finish_in_time_is_given_up(model: tuple[Path, Path]) -> None:
    with running(model) as engine, held(engine) as first:
        waits = engine.submit([request()], client="a")
        assert engine.drain(0) == [first, waits]
        for job in (first, waits):
            assert isinstance(failed(job), Draining)
        assert engine.queue_length == 0


def test_an_engine_ends_at_the_next_step(model: tuple[Path, Path]) -> None:
    engine = tiny_service.engine(model).start()
    jobs = [engine.submit([request(steps=100)], client="a") for _ in range(3)]
    engine.close()
    assert {job.state for job in jobs} <= {"failed", "finished"}
    assert engine.loaded_models == ()
    assert not engine.healthy
    engine.close()  # a second time does nothing
    with pytest.raises(Draining):
        engine.submit([request()], client="a")


@pytest.mark.parametrize("part", ["first_stage_model.encoder", "model", "first_stage_model.decoder"])
def test_a_job_that_is_over_makes_room_at_the_next_layer(engine: Engine, part: str) -> None:
    """To encode, one call of the UNet or to decode a large image took minutes past the deadline."""
    model = engine.models.pipeline("tiny").model
    layers = [one for one in model.get_submodule(part).modules() if isinstance(one, torch.nn.Conv2d)]
    called, before = [], [len(one._forward_pre_hooks) for one in model.modules()]

    def cancel(layer: torch.nn.Module, *_: Any) -> None:
        called.append(layer)
        job.cancel()

    hooks = [layer.register_forward_hook(cancel) for layer in layers]
    try:
        with engine._changed:  # so that the job does not begin before it has its name here
            job = engine.submit([request(init_img=photo(), strength=0.5)], client="a")
        job.wait(PATIENCE)
        wait_until(lambda: not engine.running)
        assert len(called) == 1
    finally:
        for hook in hooks:
            hook.remove()
    assert job.state == "cancelled"
    goes_on(engine)
    wait_until(lambda: not engine.running)
    assert [len(one._forward_pre_hooks) for one in model.modules()] == before


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_an_engine_ends_although_a_layer_goes_on(
    model: tuple[Path, Path], gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`close` waited for the thread that samples, however long it computed."""
    monkeypatch.setattr(engine_module, "LAST_LAYER", 0.05)
    engine = tiny_service.engine(model).start()
    job = engine.submit([request()], client="a")
    wait_until(lambda: job.state == "running")
    assert not engine.stuck
    engine.close()
    assert isinstance(failed(job), Draining)
    assert engine.stuck
    assert engine.loaded_models == ("tiny",)
    gate.set()
    engine._worker.join(PATIENCE)
    engine.close()
    assert not engine.stuck
    assert engine.loaded_models == ()


@pytest.mark.parametrize("place", ["_batch_size", "_count"])
def test_what_fails_beside_sampling_ends_its_jobs_alone(
    model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """An error outside of sampling itself ended the thread, and all clients waited for ever."""
    with running(model) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(engine, place, lambda *_: 1 / 0)
            error = failed(engine.submit([request()], client="a"))
        assert error.code == "sampling_failed"
        goes_on(engine)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_ended(
    model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs stayed queued where the thread that samples had died."""
    with running(model) as engine:
        monkeypatch.setattr(engine, "_serve", lambda first: sys.exit(1))
        jobs = [engine.submit([request()], client=client) for client in "a"]
        assert [failed(job).code for job in jobs] == ["device_failed"]
        wait_until(lambda: not engine.healthy)
        with pytest.raises(ServiceError) as caught:
            engine.submit([request()], client="a")
        assert caught.value.status == 503


def test_an_image_far_beyond_the_models_size_is_refused(model: tuple[Path, Path]) -> None:
    """The limit was that of a model of 512 pixels for every model."""
    with running(model) as engine, pytest.raises(LimitExceeded, match="the most is 1,048,576"):
        engine.submit([request(height=1024, width=1032)], client="a")


def test_no_folder_is_shown_where_a_file_cannot_be_used(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of folders behind a space, and relative ones, were in the answer."""
    monkeypatch.chdir(tmp_path)
    for folder in ("my loras", "in/side"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "broken.safetensors").write_bytes(b"no LoRA")
        for given in (folder, str(tmp_path / folder)):
            with running(model, lora_folder=given) as engine, pytest.raises(BadRequest) as caught:
                engine.submit([request(lora=(f"{given}/broken.safetensors",))], client="a")
            message = caught.value.message
            assert "broken.safetensors" in message
            assert not any(part in message for part in ("my", "loras/", "in/", "side", str(tmp_path))), (
                message
            )


def test_memory_is_bounded_over_many_jobs(model: tuple[Path, Path]) -> None:
    with running(model) as engine:
        engine.jobs.most = 10
        pixels, sent, jobs = [], [], []
        for k in range(40):
            image = photo()
            sent.append(weakref.ref(image))
            asked = [request(f"prompt {k}", seed=k, steps=1, init_img=image, strength=1.0)]
            if k % 3 == 0:
                asked = [request(f"prompt {k}", seed=None, steps=1)] * 2
            job = engine.submit(asked, client=str(k % 7))
            if k % 5 == 0:
                job.cancel()
            jobs.append(weakref.ref(job))
            pixels += [weakref.ref(each) for each in job.wait(PATIENCE).images]
        del job, image, asked
        images_of(engine.submit([request()], client="a"))  # the thread has let go of the one before
        gc.collect()
        assert sum(ref() is not None for ref in jobs) <= 11
        assert sum(ref() is not None for ref in pixels) <= 22
        assert sum(ref() is not None for ref in sent) == 0  # those of jobs that are kept, too
        assert engine._made == {}
        assert len(engine._queue) == 0
        assert engine._queue._clients == {}
        assert len(engine.jobs) <= 12


def test_finished_images_are_kept(model: tuple[Path, Path], tmp_path: Path) -> None:
    with running(model, keep=str(tmp_path / "kept")) as engine:
        jobs = [engine.submit([request(f"prompt {k}", seed=k)], client="a") for k in range(5)]
        engine.submit([request("never")], client="b").cancel()
        for job in jobs:
            images_of(job)
    lines = list(read_manifest(tmp_path / "kept"))
    assert sorted((line["job"], line["seed"], line["prompt"]) for line in lines) == sorted(
        (job.id, k, f"prompt {k}") for k, job in enumerate(jobs)
    )
    assert len(list((tmp_path / "kept" / "samples").iterdir())) == 5


def test_an_image_that_cannot_be_kept_is_answered_all_the_same(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(model, keep=str(tmp_path)) as engine:
        monkeypatch.setattr(engine.keeper, "keep", lambda job: (_ for _ in ()).throw(OSError("disk full")))
        images_of(engine.submit([request()] * 2, client="a"))
        goes_on(engine)
        assert engine.counters["images"] == 3
    assert engine.counters["images_not_kept"] == 3


def test_a_folder_that_cannot_be_written_is_an_error_at_once(
    model: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        tiny_service.engine(model, keep=str(tmp_path / "file"))


def test_submitting_does_not_wait_for_sampling(engine: Engine) -> None:
    with held(engine):
        jobs = [
            engine.submit([request(init_img=photo(), strength=0.5)], client="a", preview=True)
            for _ in range(3)
        ]
        assert {job.state for job in jobs} == {"queued"}
    for job in jobs:
        images_of(job)


@pytest.mark.parametrize("size", [1, 3])
def test_batches_are_of_the_size_of_the_options(
    model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    runtime = RuntimeOptions(device="cpu", batch_size=size)
    with tiny_service.engine(model, runtime=runtime) as engine:
        batches = spied(engine, monkeypatch)
        with held(engine):
            job = engine.submit([request(seed=k) for k in range(6)], client="a")
        images_of(job)
    assert [len(batch) for batch in batches[1:]] == [size] * (6 // size)


def test_a_batch_as_large_as_fits_is_found_once(
    model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = RuntimeOptions(device="cpu", batch_size="auto")
    with tiny_service.engine(model, runtime=runtime) as engine:
        asked = []
        pipeline = engine.models.pipeline("tiny")
        monkeypatch.setattr(pipeline, "fitting_batch", lambda requests, most: asked.append(most) or 2)
        batches = spied(engine, monkeypatch)
        images_of(engine.submit([request(seed=k) for k in range(6)], client="a"))
    assert [len(batch) for batch in batches] == [2, 2, 2]
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"scale": 1.0}, {"scale": 1.0, "cfg_pp": True}),
        ({"height": 16, "width": 16}, {"height": 16, "width": 16, "hires": 2.0, "hires_upscaler": "lanczos"}),
    ],
    ids=["CFG++", "a second pass"],
)
def test_what_takes_more_memory_is_tried_by_itself(
    model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, first: dict, second: dict
) -> None:
    """CFG++ at a scale of 1 is guided, and a second pass larger: both came in batches that fit without."""
    asked: list[ImageRequest] = []
    with tiny_service.engine(model, runtime=RuntimeOptions(device="cpu", batch_size="auto")) as engine:
        pipeline = engine.models.pipeline("tiny")
        monkeypatch.setattr(pipeline, "fitting_batch", lambda requests, most: asked.extend(requests) or 2)
        for values in (first, second, first, second):
            images_of(engine.submit([request(sampler="euler", **values)], client="a"))
    assert len(asked) == 2


@pytest.mark.slow
def test_a_process_that_forgets_to_close_ends_well(model: tuple[Path, Path], tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, tiny_service\n"
        "engine = tiny_service.engine(sys.argv[1:3]).start()\n"
        "engine.submit([tiny_service.request(steps=100)], client='a')\n"
    )
    here = Path(__file__).parents[1]
    ended = subprocess.run(
        [sys.executable, "-c", code, *map(str, model)],
        capture_output=True,
        text=True,
        cwd=here.parent,
        env={"PYTHONPATH": f"{here}:{here.parent}", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
