import asyncio
import base64
import hmac
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse

from ldm.errors import InputError
from ldm.service.errors import ServiceError
from ldm.service.guards import BODIES, Guards, Tokens

MAX_BODY = 100


class Server:
    """Calls an ASGI application as a server does, and keeps what it answers."""

    def __init__(self, **choices: Any):
        self.seen: list[tuple[str, bytes]] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            message = await receive()
            self.seen.append((scope["state"]["client"], message["body"]))
            self.after = await receive()
            await JSONResponse({"fine": True})(scope, receive, send)

        def answer(path: str, error: ServiceError) -> JSONResponse:
            return JSONResponse({"path": path, "code": error.code}, error.status, dict(error.headers))

        self.guards = Guards(app, answer=answer, **{"max_body": MAX_BODY, **choices})

    def __call__(
        self,
        path: str = "/generate",
        *,
        method: str = "POST",
        body: Iterable[bytes | None] = (b"{}",),
        pause: float = 0.0,
        **headers: str,
    ) -> int:
        """The status of the answer to a request whose body comes in these parts; 0 without an answer."""
        given = {"host": "127.0.0.1:8000", **{name.replace("_", "-"): text for name, text in headers.items()}}
        parts = list(body)

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(pause)
            if not parts:
                return {"type": "http.disconnect"}
            part = parts.pop(0)
            if part is None:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message: dict[str, Any]) -> None:
            self.messages.append(message)

        self.messages: list[dict[str, Any]] = []
        self.unread = parts
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "client": ("127.0.0.9", 1234),
            "headers": [(name.encode(), text.encode()) for name, text in given.items()],
        }
        asyncio.run(self.guards(scope, receive, send))
        return self.messages[0]["status"] if self.messages else 0

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}


def basic(password: str, user: str = "me") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


TOKENS = Tokens({"secret-of-ann": "ann", "secret-of-bob": "bob"})


# Tokens


@pytest.mark.parametrize(
    ("headers", "client"),
    [
        ({"authorization": "Bearer secret-of-ann"}, "ann"),
        ({"authorization": "bearer  secret-of-bob"}, "bob"),
        ({"authorization": basic("secret-of-bob")}, "bob"),
        ({"api_key": "secret-of-ann"}, "ann"),
    ],
)
def test_a_token_names_the_client_in_each_form_that_clients_send(headers: dict, client: str) -> None:
    server = Server(tokens=TOKENS)
    assert server(**headers) == 200
    assert server.seen == [(client, b"{}")]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer secret-of-eve"},
        {"authorization": "Bearer "},
        {"authorization": "Basic !!!"},
        {"authorization": basic("wrong", user="secret-of-ann")},
        {"authorization": "secret-of-ann"},
        {"api_key": ""},
    ],
)
def test_without_a_known_token_nothing_is_served(headers: dict) -> None:
    server = Server(tokens=TOKENS)
    assert server(**headers) == 401
    assert "Bearer" in server.headers["www-authenticate"]
    assert server.seen == []


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_what_watches_containers_needs_no_token(path: str) -> None:
    assert Server(tokens=TOKENS)(path, method="GET") == 200
    assert Server(tokens=TOKENS)(path + "/", method="GET") == 401


def test_tokens_are_compared_in_constant_time_all_of_them_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, plain = [], hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return plain(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert TOKENS.client("secret-of-ann") == "ann"  # the first of them
    assert TOKENS.client("x") is None
    assert compared == [(32, 32)] * 4  # whatever the lengths of the tokens


def test_a_token_file_has_names_comments_and_several_tokens_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("\ufeff# clients\n\nann: one:with:colons \nann:two\nbob:three\n")
    tokens = Tokens.read(str(path))
    assert [tokens.client(token) for token in ("one:with:colons", "two", "three")] == ["ann", "ann", "bob"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("ann", "line 1: give NAME:TOKEN"),
        ("ann:good\n:token", "line 2: give NAME:TOKEN"),
        ("ann:schlüssel", "printable ASCII"),
        ("ann:same\nbob:same", "line 2: the token of ann again"),
        ("# nobody", "holds no line NAME:TOKEN"),
    ],
)
def test_a_token_file_with_a_mistake_is_one_line_without_the_token(
    tmp_path: Path, content: str, words: str
) -> None:
    path = tmp_path / "tokens"
    path.write_text(content)
    with pytest.raises(InputError, match=words) as error:
        Tokens.read(str(path))
    assert not any(secret in str(error.value) for secret in ("good", "schlüssel", "same\n"))


def test_a_token_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        Tokens.read(str(tmp_path / "none"))


# Without tokens


def test_without_tokens_the_address_is_the_client() -> None:
    server = Server()
    assert server(x_forwarded_for="10.0.0.1") == 200
    assert server.seen[0][0] == "127.0.0.9"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "me:80", "a.localhost"])
def test_addresses_and_local_names_are_served(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Me")
    assert Server()(host=host) == 200


@pytest.mark.parametrize(
    "host", ["evil.com", "evil.com:8000", "127.0.0.1.evil.com", "[", "a@evil.com", "evil", "ai:80"]
)
def test_a_name_of_the_internet_that_points_here_is_not_served(host: str) -> None:
    """DNS rebinding: a page reaches the service of its visitor's machine under its own name.

    Names without a dot were served, whoever had them.
    """
    assert Server()(host=host) == 421
    assert Server(tokens=TOKENS)(host=host, authorization="Bearer secret-of-ann") == 200


@pytest.mark.parametrize("origin", ["http://evil.com", "null", "http://127.0.0.1:1", "http://["])
def test_pages_of_other_sites_may_not_send_requests(origin: str) -> None:
    assert Server()(origin=origin) == 403
    assert Server(tokens=TOKENS)(origin=origin, authorization=basic("secret-of-ann")) == 403
    assert Server(tokens=TOKENS)(origin=origin, authorization="Bearer secret-of-ann") == 200


def test_the_services_own_pages_may() -> None:
    assert Server()(origin="http://127.0.0.1:8000") == 200


# Bodies


def test_a_body_in_parts_arrives_whole_and_then_the_connection_speaks() -> None:
    server = Server()
    assert server(body=[b"ab", b"cd", b"ef"]) == 200
    assert server.seen == [("127.0.0.9", b"abcdef")]
    assert server.after == {"type": "http.disconnect"}


def test_a_body_that_is_too_large_is_refused_before_it_is_read() -> None:
    server = Server()
    assert server(content_length=str(MAX_BODY + 1), expect="100-continue", body=()) == 413
    assert server.headers["connection"] == "close"
    assert server(content_length="9" * 5000, expect="100-continue", body=()) == 413


def test_a_body_that_grows_too_large_is_cut_off() -> None:
    server = Server()
    assert server(body=[bytes(50)] * 1000) == 413
    assert len(server.unread) > 990
    assert server(body=[bytes(MAX_BODY)]) == 200
    assert server(body=[bytes(MAX_BODY), b"x"]) == 413
    assert [len(body) for _, body in server.seen] == [MAX_BODY]


def test_a_body_that_trickles_in_is_cut_off() -> None:
    server = Server(grace=0.05, rate=1e9)
    assert server(body=[b"x"] * 1000, pause=0.02) == 408
    assert server.headers["connection"] == "close"
    assert server.seen == []


def test_a_body_that_keeps_up_its_rate_may_take_longer() -> None:
    assert Server(grace=0.0001, rate=0.01)(body=[b"abc"] * 3) == 200


def test_a_client_that_goes_away_within_its_body_gets_no_answer() -> None:
    server = Server()
    assert server(body=[b"{", None]) == 0
    assert server.seen == []


# Many requests at a time


def scope_of(path: str) -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": path, "headers": [], "client": ("127.0.0.9", 1)}


async def statuses(guards: Guards, asked: list[tuple[str, int]]) -> list[int]:
    """The answers to requests (path, bytes of the body) that come at the same time."""
    found = [0] * len(asked)

    async def ask(k: int, path: str, size: int) -> None:
        parts = [
            {"type": "http.request", "body": bytes(size // 2), "more_body": more} for more in (True, False)
        ]

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0)
            return parts.pop(0) if parts else {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                found[k] = message["status"]
                headers[k] = {name.decode(): value.decode() for name, value in message["headers"]}

        await guards(scope_of(path), receive, send)

    headers: dict[int, dict[str, str]] = {}
    await asyncio.gather(*(ask(k, *each) for k, each in enumerate(asked)))
    assert all(int(headers[k]["retry-after"]) > 0 for k, status in enumerate(found) if status == 503)
    return found


def waiting_guards(**choices: Any) -> Guards:
    """Guards of an application that answers late."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.05)
        await JSONResponse({})(scope, receive, send)

    def answer(path: str, error: ServiceError) -> JSONResponse:
        return JSONResponse({"code": error.code}, error.status, dict(error.headers))

    return Guards(app, answer=answer, max_body=MAX_BODY, **choices)


def test_the_bodies_of_all_requests_together_have_a_bound() -> None:
    """A thousand connections could have sent, and had held, the largest body each."""
    guards = waiting_guards()
    found = asyncio.run(statuses(guards, [("/generate", MAX_BODY)] * 40))
    assert (found.count(200), found.count(503)) == (BODIES, 40 - BODIES)
    assert asyncio.run(statuses(guards, [("/generate", MAX_BODY)] * BODIES)) == [200] * BODIES  # all released


def test_probes_are_answered_above_the_limit_of_requests() -> None:
    """The server's own limit answered them with 503, too, and so a busy service looked broken."""
    guards = waiting_guards(connections=2)
    paths = ["/generate"] * 4 + ["/health", "/ready"]
    found = asyncio.run(statuses(guards, [(path, 2) for path in paths]))
    assert found == [200, 200, 503, 503, 200, 200]
    assert asyncio.run(statuses(guards, [("/generate", 2)])) == [200]


# Answers


def test_answers_have_security_headers_and_none_that_let_other_sites_in() -> None:
    server = Server()
    server()
    assert server.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in server.headers["content-security-policy"]
    assert not any(name.startswith("access-control-") for name in server.headers)
