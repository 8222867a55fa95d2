import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_service
from fastapi import Request
from fastapi.testclient import TestClient
from live_service import serving

from ldm.service import a1111, native, openai, score
from ldm.service.app import READ_AT_A_TIME, Service, contract_of, create_app, in_words
from ldm.service.engine import Engine
from ldm.service.errors import Cancelled, DeadlinePassed, Refused, ServiceError
from ldm.service.logs import JsonLog
from ldm.service.moderation import Moderation
from ldm.service.schema import request_of

PATHS = {"/generate": native, "/score": score, "/v1/images/generations": openai, "/sdapi/v1/txt2img": a1111}


@pytest.fixture(scope="module")
def engine(model: tuple[Path, Path]) -> Iterator[Engine]:
    with tiny_service.running(model, max_body=0.01) as started:
        yield started


@pytest.fixture
def service(engine: Engine, tmp_path: Path) -> Service:
    return Service(engine, engine.options, log=JsonLog(str(tmp_path / "log.jsonl")))


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service), base_url="http://localhost", raise_server_exceptions=False) as found:
        yield found


def test_paths_have_their_contracts() -> None:
    for path, contract in PATHS.items():
        assert contract_of(path) is contract
    assert contract_of("/v11/images") is native
    assert contract_of("/v1") is openai


@pytest.mark.parametrize("path", PATHS)
def test_every_error_has_the_form_of_its_contract(client: TestClient, path: str) -> None:
    """Also those that no route raises: of the method, the body's size, the path."""
    error = ServiceError("", status=405, code="method_not_allowed")
    form = set(PATHS[path].error_body(error))
    answers = {
        405: client.patch(path),
        413: client.post(path, content=b"x" * 20_000),
        404: client.get(path + "/nowhere"),
        400: client.post(path, content=b"{"),
    }
    for status, answer in answers.items():
        assert answer.status_code == status
        assert set(answer.json()) == form
    assert answers[405].headers["allow"] == "POST"


def test_a_mistake_of_ours_is_one_line_without_a_traceback(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("line one\nline two")

    monkeypatch.setattr(service.engine, "submit", fail)
    for path in ("/generate", "/v1/images/generations"):
        answer = client.post(path, json={"prompt": "a"})
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "an error inside the service; its log says which"
    error, request, *_ = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (error["type"], error["message"]) == ("ZeroDivisionError", "line one line two")
    assert "traceback" not in error
    assert request["status"] == 500
    service.debug = True
    client.post("/generate", json={"prompt": "a"})
    assert "ZeroDivisionError" in (tmp_path / "log.jsonl").read_text().splitlines()[-2]


def test_messages_of_the_engine_are_without_flags_and_not_too_long() -> None:
    assert in_words("x has 9 pixels, more than --max_pixels 4") == "x has 9 pixels, more than max_pixels 4"
    assert in_words("(--list_samplers shows all)") == "(GET /sdapi/v1/samplers lists all)"
    assert in_words("a--b and\n-- c") == "a--b and -- c"
    assert len(in_words("x" * 100_000)) < 600


def test_long_values_are_not_sent_back(client: TestClient) -> None:
    answer = client.post("/generate", json={"prompt": "a", "sampler": "x" * 5000})
    assert answer.status_code == 422
    assert len(answer.content) < 1000


def test_the_page_of_routes_loads_nothing_from_anywhere(client: TestClient) -> None:
    page = client.get("/", follow_redirects=True)
    assert page.url.path == "/docs"
    assert all(path in page.text for path in PATHS)
    assert re.findall(r"(?:src|href)=\"?([^\" >]+)", page.text) == ["/openapi.json"]
    assert "<script" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert {"/generate", "/jobs/{id}", "/health"} <= client.get("/openapi.json").json()["paths"].keys()


def test_an_error_of_the_path_or_the_method_names_it(client: TestClient) -> None:
    """It said "Not Found" alone."""
    assert 'no "/nowhere/at/all"' in client.get("/nowhere/at/all").json()["error"]["message"]
    assert client.put("/generate").json()["error"]["message"] == '"/generate" takes no "PUT"'


def test_a_malformed_form_is_an_invalid_request(client: TestClient) -> None:
    """Its code was http_error, which says nothing to a program."""
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = client.post("/v1/images/edits", content=b"no form", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


def test_bounds_of_whole_numbers_are_whole(client: TestClient) -> None:
    """fastapi's model of the page made floats of them: 9.223372036854776e+18 for the seed."""
    page = client.get("/openapi.json").json()
    body = page["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert (body["properties"]["seed"]["maximum"], body["properties"]["height"]["minimum"]) == (2**63 - 1, 8)
    assert isinstance(body["properties"]["height"]["minimum"], int)  # which 8.0 is not


# Jobs


def http(gone: asyncio.Event) -> Request:
    """A request whose client leaves with the event."""

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    scope = {"type": "http", "headers": [], "path": "/", "state": {"client": "me"}}
    return Request(scope, receive)


def test_a_job_whose_client_goes_away_is_cancelled(service: Service, gate: threading.Event) -> None:
    async def work() -> None:
        gone = asyncio.Event()
        request = http(gone)
        job = await service.submit([tiny_service.request()], request)
        finishing = asyncio.ensure_future(service.finish(job, request))
        await asyncio.sleep(0)
        assert not job.over
        gone.set()
        with pytest.raises(Cancelled):
            await finishing
        assert job.state == "cancelled"

    asyncio.run(work())


def test_a_job_is_cancelled_with_the_task_that_waits_for_it(service: Service, gate: threading.Event) -> None:
    async def work() -> None:
        request = http(asyncio.Event())
        job = await service.submit([tiny_service.request()], request)
        finishing = asyncio.ensure_future(service.finish(job, request))
        await asyncio.sleep(0)
        finishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await finishing
        assert job.state == "cancelled"

    asyncio.run(work())


def test_no_thread_waits_for_a_job(service: Service, gate: threading.Event) -> None:
    async def work() -> None:
        request = http(asyncio.Event())
        job = await service.submit([tiny_service.request()], request)
        before = threading.active_count()
        waiting = [asyncio.ensure_future(service.finish(job, request)) for _ in range(50)]
        await asyncio.sleep(0)
        assert threading.active_count() == before
        gate.set()
        assert all(found is job for found in await asyncio.gather(*waiting))

    asyncio.run(work())


def test_a_deadline_is_the_waiting_requests_too(service: Service, gate: threading.Event) -> None:
    async def work() -> None:
        request = http(asyncio.Event())
        job = await service.submit([tiny_service.request()], request, timeout=0.05)
        with pytest.raises(DeadlinePassed):
            await service.finish(job, request)

    asyncio.run(work())


def test_few_requests_are_read_at_a_time(service: Service) -> None:
    """A request of 28 KB is an image of 16 MB, and 200 of them at once were decoded side by side."""

    async def work() -> None:
        async with AsyncExitStack() as stack:
            for _ in range(READ_AT_A_TIME):
                await stack.enter_async_context(service.room(http(asyncio.Event())))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05), service.room(http(asyncio.Event())):
                    pass
        late = http(asyncio.Event())
        late.state.arrived = time.monotonic() - 2
        with pytest.raises(DeadlinePassed):
            async with service.room(late, timeout=1):
                pass

    asyncio.run(work())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"json": {"prompt": "a", "init_img": "no image"}}),
        ("/sdapi/v1/img2img", {"json": {"prompt": "a", "init_images": ["no image"]}}),
        ("/v1/images/edits", {"data": {"prompt": "a"}, "files": {"image": b"no image"}}),
        ("/score", {"json": {"input_data": {"columns": ["prompt", "image"], "data": [["a", "no image"]]}}}),
    ],
)
def test_no_image_is_decoded_that_has_no_room(model: tuple[Path, Path], path: str, body: dict) -> None:
    """Each was decoded before the queue was asked, and refused afterwards."""
    with tiny_service.running(model, queue_size=1, max_images=1) as engine, tiny_service.held(engine):
        engine.submit([tiny_service.request()], client="other")
        with TestClient(
            create_app(Service(engine, engine.options, log=JsonLog())), base_url="http://localhost"
        ) as client:
            answer = client.post(path, **body)
        assert answer.status_code == 429
        assert "Retry-After" in answer.headers
        engine.close()


def test_a_requests_time_runs_from_its_arrival(
    service: Service, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read slowly, or moderated slowly, had its whole deadline left."""

    def slow(*given: Any, **named: Any) -> Any:
        time.sleep(0.3)
        return request_of(*given, **named)

    monkeypatch.setattr("ldm.service.native.request_of", slow)
    with TestClient(create_app(service), base_url="http://localhost") as client:
        start = time.monotonic()
        answer = client.post("/generate", json={"prompt": "a", "timeout": 0.2})
    assert answer.status_code == 504
    assert time.monotonic() - start < 0.5


def test_files_of_a_job_are_made_once(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        request = http(asyncio.Event())
        job = await service.finish(await service.submit([tiny_service.request()], request), request)
        several = await asyncio.gather(*(service.files(job) for _ in range(5)), service.files(job, "webp"))
        assert all(files[0] is several[0][0] for files in several[:5])
        assert several[5][0].data[8:12] == b"WEBP"

    asyncio.run(work())


def test_files_count_as_bytes_of_their_job(service: Service) -> None:
    """The bound on what finished jobs keep did not see them."""

    async def work() -> None:
        request = http(asyncio.Event())
        job = await service.finish(await service.submit([tiny_service.request()], request), request)
        (png,), (webp,) = await service.files(job), await service.files(job, "webp")
        assert job.held_bytes == len(png.data) + len(webp.data)

    asyncio.run(work())


# Moderation


def test_a_failure_of_moderation_is_not_kept(engine: Engine) -> None:
    """One 503 stayed the answer for as long as the job."""
    failing = [True]

    async def ask(what: str, content: object) -> str | None:
        if what == "image" and failing:
            failing.clear()
            raise OSError("no answer")
        return None

    async def work() -> None:
        request = http(asyncio.Event())
        job = await service.finish(await service.submit([tiny_service.request()], request), request)
        (first,), (second,) = await service.files(job), await service.files(job)
        assert (first.error.status, second.error) == (503, None)

    service = Service(engine, engine.options, moderation=Moderation(ask), log=JsonLog())
    asyncio.run(work())


def moderated(engine: Engine, objects_to: str) -> Service:
    asked = []

    async def ask(what: str, content: object) -> str | None:
        asked.append((what, content))
        return "violence" if what == objects_to else None

    service = Service(engine, engine.options, moderation=Moderation(ask), log=JsonLog())
    service.asked = asked
    return service


def test_slow_moderation_keeps_nobody_from_being_read(engine: Engine) -> None:
    """Eight requests whose prompts moderation was slow about kept all others from being read, or refused."""
    asked, released = [], threading.Event()

    async def ask(what: str, content: object) -> None:
        asked.append(content)
        while what == "prompt" and not released.is_set():
            await asyncio.sleep(0.005)

    def post(url: str, prompt: str, steps: int = 1) -> int:
        return httpx.post(f"{url}/generate", json={"prompt": prompt, "steps": steps}, timeout=60).status_code

    service = Service(engine, engine.options, moderation=Moderation(ask, deadline=60), log=JsonLog())
    with serving(service) as (_, url), ThreadPoolExecutor(READ_AT_A_TIME) as pool:
        slow = [pool.submit(post, url, f"slow {k}") for k in range(READ_AT_A_TIME)]
        try:
            while len(asked) < READ_AT_A_TIME:
                time.sleep(0.005)
            assert post(url, "too many steps", 100_000) == 422
            assert not any(one.done() for one in slow)
        finally:
            released.set()
        assert [one.result() for one in slow] == [200] * READ_AT_A_TIME


def test_what_is_too_late_is_not_asked_about(
    model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that waited for moderation were still asked about when they were past their deadlines, or when
    the service ended, which then had a plain text for them.
    """
    monkeypatch.setattr("ldm.service.moderation.PROMPTS", 1)
    asked, released = [], threading.Event()

    async def ask(what: str, content: object) -> None:
        asked.append(content)
        while not released.is_set():
            await asyncio.sleep(0.005)

    def post(url: str, prompt: str, **values: Any) -> tuple[int, str]:
        body = {"prompt": prompt, "steps": 1} | values
        answer = httpx.post(f"{url}/generate", json=body, timeout=60)
        return answer.status_code, answer.json()["error"]["code"]

    with tiny_service.running(model) as engine, ThreadPoolExecutor(3) as pool:
        service = Service(engine, engine.options, moderation=Moderation(ask, deadline=60), log=JsonLog())
        with serving(service) as (_, url):
            try:
                first = pool.submit(post, url, "first")
                while not asked:
                    time.sleep(0.005)
                late, waits = pool.submit(post, url, "late", timeout=0.2), pool.submit(post, url, "waits")
                while len(engine._held) < 3:  # all wait for their answers
                    time.sleep(0.005)
                time.sleep(0.2)
                engine.drain(0)
            finally:
                released.set()
            assert late.result() == (504, "deadline_passed")
            assert first.result() == waits.result() == (503, "draining")
    assert asked == ["first"]


def test_a_refused_prompt_is_not_sampled(engine: Engine) -> None:
    service = moderated(engine, "prompt")
    with TestClient(create_app(service), base_url="http://localhost") as client:
        answer = client.post("/generate", json={"prompt": "a", "steps": 1})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "content_policy")
    assert "violence" in answer.json()["error"]["message"]
    assert service.asked == [("prompt", "a")]


def test_a_refused_image_is_not_handed_out(engine: Engine) -> None:
    service = moderated(engine, "image")
    with TestClient(create_app(service), base_url="http://localhost") as client:
        body = {"prompt": "a", "steps": 1, "count": 2}
        image, _ = client.post("/generate", json=body).json()["images"]
        accept = {"Accept": "image/png"}
        assert client.post("/generate", json={"prompt": "a", "steps": 1}, headers=accept).status_code == 400
    assert image["image"] is None
    assert image["nsfw_content_detected"] is True
    assert image["error"]["code"] == Refused().code
    assert service.asked[1][1].startswith(b"\x89PNG")


def test_an_image_that_nobody_judged_is_not_kept(model: tuple[Path, Path], tmp_path: Path) -> None:
    """With a hook that fails, and is closed then, clients got 503 and the folder their images."""

    async def judge(what: str, content: str | bytes) -> str | None:
        if what == "image":
            raise OSError("no answer")

    folder = tmp_path / "kept"
    with tiny_service.running(model, keep=str(folder)) as engine:
        service = Service(engine, engine.options, moderation=Moderation(judge))
        with TestClient(create_app(service), base_url="http://localhost") as client:
            body = {"input_data": {"columns": ["prompt"], "data": ["a cube"]}}
            assert client.post("/score", json=body).status_code == 503
            while engine.running:
                time.sleep(0.005)
    assert not list((folder / "samples").iterdir())
    assert not (folder / "manifest.jsonl").exists()


def test_a_refused_image_is_not_kept(model: tuple[Path, Path], tmp_path: Path) -> None:
    """Images were kept as soon as they were finished, before moderation had seen them."""
    seen: list[bytes] = []

    async def judge(what: str, content: str | bytes) -> str | None:
        if what == "prompt":
            return None
        seen.append(content)
        return "red" if len(seen) == 1 else None

    folder = tmp_path / "kept"
    with tiny_service.running(model, keep=str(folder)) as engine:
        service = Service(engine, engine.options, moderation=Moderation(judge))
        with TestClient(create_app(service), base_url="http://localhost") as client:
            answers = [client.post("/generate", json={"prompt": "a cube", "steps": 2}) for _ in range(2)]
            while engine.running:  # the last image is handed to the keeper after its answer
                time.sleep(0.005)
    assert [answer.status_code for answer in answers] == [400, 200]
    assert len(seen) == 2  # once each
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    assert len(list((folder / "samples").iterdir())) == len(lines) == 1
