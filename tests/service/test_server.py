import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import tiny_service
from live_service import serving

from ldm.errors import FieldError
from ldm.service import server as servers
from ldm.service.app import Service
from ldm.service.engine import Engine
from ldm.service.jobs import Job
from ldm.service.logs import JsonLog
from ldm.service.server import Server, listen, url_of


@pytest.fixture(scope="module")
def engine(model: tuple[Path, Path]) -> Iterator[Engine]:
    with tiny_service.running(model) as started:
        yield started


@pytest.fixture
def server(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """It is patient for a tenth of a second."""
    monkeypatch.setattr(servers, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(servers, "WRITE_SECONDS", 0.1)
    log = JsonLog(str(tmp_path / "log.jsonl"))
    with serving(Service(engine, engine.options, log=log)) as (found, address):
        found.port = urlsplit(address).port
        yield found


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def trickle(connection: socket.socket, data: bytes) -> bytes:
    """What comes back, up to the end of the connection, for bytes that are sent one at a time, for ever."""
    connection.settimeout(0.02)
    seen, ended = b"", False
    while not ended:
        try:
            connection.sendall(data)
            part = connection.recv(65536)
            seen, ended = seen + part, not part
        except TimeoutError:
            continue
        except OSError:
            ended = True
    return seen


def test_a_head_that_trickles_in_is_cut_off(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        assert trickle(connection, b"x") == b""


def test_a_connection_that_says_nothing_is_cut_off(server: Server) -> None:
    with connect(server) as connection:
        assert connection.recv(1) == b""


def test_the_second_head_of_a_connection_is_watched_too(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in connection.recv(65536)
        assert b"200" not in trickle(connection, b"G")


def test_a_body_that_goes_on_after_its_refusal_is_cut_off(server: Server) -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: evil.com\r\nContent-Length: 1000000\r\n\r\n"
    with connect(server) as connection:
        connection.sendall(head)
        assert b"421" in trickle(connection, b"x")


def test_a_giant_body_is_refused_by_its_length(server: Server) -> None:
    head = (
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\nExpect: 100-continue"
    )
    with connect(server) as connection:
        connection.sendall(head + b"\r\n\r\n")
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"100 Continue" not in answer


def test_a_request_that_is_being_served_may_take_its_time(server: Server, gate: threading.Event) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", "/generate", json.dumps({"prompt": "a", "steps": 1}))
    threading.Timer(0.4, gate.set).start()
    assert connection.getresponse().status == 200


def test_a_client_that_reads_no_answer_is_cut_off(server: Server) -> None:
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(0.05)
        ended = False
        while not ended:
            try:
                connection.sendall(request * 50)
            except TimeoutError:
                continue
            except ConnectionError:
                ended = True


def test_what_clients_write_adds_no_header(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    body = json.dumps({"prompt": "a\r\nEvil: 1", "model": "x\r\nEvil: 1"})
    connection.request("POST", "/generate", body)
    answer = connection.getresponse()
    assert answer.status == 404
    assert answer.headers["evil"] is None
    assert answer.headers["server"] is None


def test_a_header_that_names_another_address_is_not_believed(server: Server, tmp_path: Path) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", "/models", headers={"X-Forwarded-For": "10.0.0.1"})
    assert connection.getresponse().status == 200
    while not (text := (tmp_path / "log.jsonl").read_text()):
        time.sleep(0.005)
    assert json.loads(text)["client"] == "127.0.0.1"


# The socket


def test_a_port_in_use_is_named() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(FieldError, match=f"port {port}: Address already in use"):
            listen("127.0.0.1", port)


def test_a_host_that_is_none_is_named() -> None:
    with pytest.raises(FieldError, match=r"host 192\.0\.2\.1 port 0: "):
        listen("192.0.2.1", 0)


def test_the_address_is_written_as_clients_take_it() -> None:
    assert url_of(SimpleNamespace(getsockname=lambda: ("::1", 80, 0, 0))) == "http://[::1]:80"
    assert url_of(SimpleNamespace(getsockname=lambda: ("127.0.0.1", 80))) == "http://127.0.0.1:80"


# The end


def test_the_first_signal_drains_and_the_second_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: tuple[Path, Path]
) -> None:
    draining, go, ended = threading.Event(), threading.Event(), []

    class Slow(Engine):
        def drain(self, seconds: float | None = None) -> list[Job]:
            draining.set()
            assert go.wait(20)
            return super().drain(seconds)

    engine = tiny_service.engine(model)
    engine.__class__ = Slow
    monkeypatch.setattr(os, "_exit", ended.append)
    server = Server(Service(engine, engine.options, log=JsonLog(str(tmp_path / "log.jsonl"))))
    server.handle_exit(signal.SIGTERM, None)
    assert draining.wait(20)
    assert not server.should_exit
    assert ended == []
    server.handle_exit(signal.SIGTERM, None)
    assert ended == [128 + signal.SIGTERM]
    go.set()
    while not server.should_exit:
        time.sleep(0.005)


@contextmanager
def ending(model: tuple[Path, Path], log: Path, **options: Any) -> Iterator[tuple[Server, httpx.Client]]:
    """A server for each test, as it ends in it, and a client of it."""
    with (
        tiny_service.running(model, **options) as engine,
        serving(Service(engine, engine.options, log=JsonLog(str(log)))) as (server, url),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield server, client


def asked(client: httpx.Client, **values: Any) -> str:
    """The place of a job that its client does not wait for."""
    answer = client.post("/generate", json={"prompt": "a", "steps": 1, "wait": False} | values)
    return answer.headers["location"]


def drained(server: Server, log: Path) -> dict[str, Any]:
    """The facts that the log has of the end, once that has come."""
    while not server.should_exit:
        time.sleep(0.005)
    (line,) = (line for line in map(json.loads, log.read_text().splitlines()) if line["event"] == "drained")
    return {name: value for name, value in line.items() if name not in ("time", "event")}


def test_accepted_jobs_are_finished_and_fetched_before_the_end(
    model: tuple[Path, Path], tmp_path: Path, gate: threading.Event
) -> None:
    """The service ended as soon as the last image was made, before its client could come for it."""
    log = tmp_path / "log.jsonl"
    with ending(model, log) as (server, client):
        running, waits = asked(client), asked(client, width=32, count=2)
        server.handle_exit(signal.SIGTERM, None)
        while client.get("/ready").status_code == 200:
            pass
        gate.set()
        for place in (running, waits):
            while (job := client.get(place).json())["state"] != "finished":
                assert job["state"] in ("queued", "running")
            if place == running:
                time.sleep(0.2)  # a client that asks now and then
                assert not server.should_exit
        assert [image["image"] is not None for image in job["images"]] == [True, True]
        assert drained(server, log) == {"unfinished_jobs": 0}


def test_a_lost_job_is_logged_and_its_client_told(
    model: tuple[Path, Path], tmp_path: Path, gate: threading.Event
) -> None:
    """Nothing said which jobs had been lost: the log had their number, and the client no answer."""
    log = tmp_path / "log.jsonl"
    with ending(model, log, drain=0) as (server, client):
        places = [asked(client), asked(client, width=32)]
        server.handle_exit(signal.SIGTERM, None)
        for place in places:
            while (job := client.get(place).json())["state"] != "failed":
                pass
            assert job["error"]["code"] == "draining"
        lost = [place.removeprefix("/jobs/") for place in places]
        assert drained(server, log) == {"unfinished_jobs": 2, "unfinished": lost}
        gate.set()


def test_a_job_that_nobody_comes_for_delays_the_end_for_a_moment(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ended well before the signal does not, and neither do images that were fetched one by one."""
    monkeypatch.setattr(servers, "FETCH_SECONDS", 0.3)
    log = tmp_path / "log.jsonl"
    with ending(model, log) as (server, client):
        jobs = server.service.engine.jobs
        early, fetched = asked(client), asked(client, count=2)
        for place in (early, fetched):
            jobs.get(place.removeprefix("/jobs/"), "127.0.0.1").wait(60)
        for number in (0, 1):
            assert client.get(f"{fetched}/images/{number}").status_code == 200
        time.sleep(0.3)
        left = asked(client)
        start = time.monotonic()
        server.handle_exit(signal.SIGTERM, None)
        assert drained(server, log) == {"unfinished_jobs": 0, "not_fetched": [left.removeprefix("/jobs/")]}
        assert time.monotonic() - start >= 0.3


def test_a_job_that_ended_early_in_the_drain_is_waited_for(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ended more than a moment before the drain did was neither waited for nor logged."""
    monkeypatch.setattr(servers, "FETCH_SECONDS", 0.3)
    log = tmp_path / "log.jsonl"
    with ending(model, log) as (server, client):
        engine, plain = server.service.engine, server.service.engine.drain

        def drain(seconds: float) -> list[Job]:
            lost = plain(seconds)
            time.sleep(0.6)  # as if another job had still been sampled
            return lost

        monkeypatch.setattr(engine, "drain", drain)
        left = asked(client).removeprefix("/jobs/")
        engine.jobs.get(left, "127.0.0.1").wait(60)
        server.handle_exit(signal.SIGTERM, None)
        assert drained(server, log) == {"unfinished_jobs": 0, "not_fetched": [left]}
