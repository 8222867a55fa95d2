import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import tiny_service
from live_service import serving

from ldm.errors import FieldError
from ldm.service import server as servers
from ldm.service.app import Service
from ldm.service.engine import Engine
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
        def drain(self, seconds: float | None = None) -> int:
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
