"""What stands before the service: who may ask, how much may be sent, and how slowly.

`Guards` is ASGI middleware. The body of a request is read here, whole, before a route sees it, so that a
limit that is passed is answered in the contract's own form. What happens on a connection before there is a
request, such as headers that trickle in, is the server's to watch (`ldm.service.server`).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from ldm.errors import InputError
from ldm.service.credentials import read_credentials
from ldm.service.errors import LimitExceeded, ServiceError

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health", "/ready")  # without a token: what starts and watches containers has none
CONNECTIONS = 1000  # requests at a time; further ones are answered with 503, but for those of OPEN
BODIES = 16  # times the largest body: the bytes of all bodies that arrive or are worked on
RETRY_SECONDS = 5  # after which there may be room again
BODY_GRACE = 20.0  # seconds in which a body may begin to arrive
BODY_RATE = 16_384  # bytes a second that it has to keep up from then on
LINGER = 2.0  # seconds of a body too large that are read and dropped, so that its sender reads the answer
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Tokens:
    """Who has which token. They are compared as SHA-256 sums in constant time, all of them each time."""

    def __init__(self, tokens: Mapping[str, str]):
        """`tokens` are names by token."""
        self._names = {_digest(token): name for token, name in tokens.items()}

    @classmethod
    def read(cls, path: str) -> Tokens:
        """The tokens of a file with a line NAME:TOKEN each; a name may have several. InputError.

        Blank lines, and those that begin with #, say nothing.
        """
        found: dict[str, str] = {}
        for name, token, place in read_credentials(path, "--token_file", "NAME:TOKEN"):
            if not token.isascii() or not token.isprintable():
                raise InputError(f"{place}: the token is not in printable ASCII")
            if token in found:
                raise InputError(f"{place}: the token of {found[token]} again; each client has its own")
            found[token] = name
        return cls(found)

    def client(self, token: str) -> str | None:
        """The name of the client that has this token."""
        given, found = _digest(token), None
        for digest, name in self._names.items():
            if hmac.compare_digest(digest, given):
                found = name
        return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


class Guards:
    """Lets requests through to `app` that may be served; `answer` makes a response of a path's error.

    The client's name is put into the scope's state: of its token, or else the address that it calls from. So
    is when the request arrived, its body included, on the clock of `time.monotonic`.
    """

    def __init__(
        self,
        app: App,
        *,
        answer: Callable[[str, ServiceError], App],
        max_body: int,
        tokens: Tokens | None = None,
        grace: float = BODY_GRACE,
        rate: float = BODY_RATE,
        connections: int = CONNECTIONS,
    ):
        self.app, self.answer, self.tokens = app, answer, tokens
        self.max_body, self.grace, self.rate, self.connections = max_body, grace, rate, connections
        self._requests = self._held = 0  # now: those that are not answered, and the bytes of their bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        send = _with_security_headers(send)
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        self._requests += 1
        try:
            try:
                scope.setdefault("state", {})["client"] = self._client(scope, headers)
                if self._requests > self.connections and scope["path"] not in OPEN:
                    raise _busy("too many requests are open")
                body = await self._body(headers, receive)
                scope["state"]["arrived"] = time.monotonic()
            except ServiceError as error:
                return await self.answer(scope["path"], error)(scope, receive, send)
            if body is not None:  # else the client has gone
                try:
                    await self.app(scope, _replayed(body, receive), send)
                finally:
                    self._held -= len(body)
        finally:
            self._requests -= 1

    def _client(self, scope: Scope, headers: Mapping[str, str]) -> str:
        address = (scope.get("client") or ("local",))[0]
        if self.tokens is None:
            _check_host(headers.get("host", ""))
            _check_origin(scope["method"], headers)
            return address
        scheme, token = _credentials(headers)
        client = None if token is None else self.tokens.client(token)
        if client is None:
            if scope["path"] in OPEN:
                return address
            raise ServiceError(
                "no token that this service knows: send it as Authorization: Bearer TOKEN",
                status=401,
                code="unauthorized",
                headers={"WWW-Authenticate": 'Bearer, Basic realm="images", charset="UTF-8"'},
            )
        if scheme == "basic":  # which a browser sends by itself, whoever's page asks
            _check_origin(scope["method"], headers)
        return client

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> bytes | None:
        """The whole body; None if the client went away before its end.

        Its bytes are counted as held from their arrival on: by this until it fails, by the caller later.
        """
        length = headers.get("content-length", "")
        too_large = length.isdecimal() and int(length[:20]) > self.max_body
        start, chunks, size, more, full = time.monotonic(), [], 0, True, False
        try:
            while more and not (too_large or full):
                allowed = start + self.grace + size / self.rate - time.monotonic()
                message = await asyncio.wait_for(receive(), max(allowed, 0))
                if message["type"] == "http.disconnect":
                    return None
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                self._held += len(chunks[-1])
                more, too_large = message.get("more_body", False), size > self.max_body
                full = self._held > BODIES * self.max_body
            if not (too_large or full):
                body, size = b"".join(chunks), 0  # which counts for the caller now
                return body
        except TimeoutError:
            raise ServiceError(
                "the body arrives too slowly",
                status=408,
                code="request_timeout",
                headers={"Connection": "close"},
            ) from None
        finally:
            self._held -= size
            chunks.clear()
        if more and "expect" not in headers:
            await self._drop(receive)
        if not too_large:
            raise _busy("too many large requests are open")
        most = f"{self.max_body / 2**20:.4g} MiB"
        error = LimitExceeded(f"the body is larger than {most}, the most that this service takes", status=413)
        error.headers["Connection"] = "close"
        raise error

    async def _drop(self, receive: Receive) -> None:
        """Read on for a moment: a connection that is closed on unread data loses the answer, too."""
        size, more = 0, True
        try:
            async with asyncio.timeout(LINGER):
                while more and size <= self.max_body:
                    message = await receive()
                    size += len(message.get("body", b""))
                    more = message.get("more_body", False)
        except TimeoutError:
            pass


def _credentials(headers: Mapping[str, str]) -> tuple[str, str | None]:
    """How a token was sent, and the token: as a bearer's, as HTTP Basic's password, or as Azure's api-key."""
    scheme, _, value = headers.get("authorization", "").strip().partition(" ")
    scheme, value = scheme.lower(), value.strip()
    if scheme == "bearer":
        return scheme, value
    if scheme == "basic":
        try:
            text = base64.b64decode(value, validate=True).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError):
            return scheme, None
        return scheme, text.partition(":")[2]
    return "api-key", headers.get("api-key")


def _busy(message: str) -> ServiceError:
    headers = {"Retry-After": str(RETRY_SECONDS), "Connection": "close"}
    return ServiceError(
        f"{message}; try again in {RETRY_SECONDS} s", status=503, code="busy", headers=headers
    )


def _check_host(host: str) -> None:
    """ServiceError for a name that is not this machine's: a page of that name was pointed at it.

    Against DNS rebinding, by which pages elsewhere would reach a service that asks for no token.
    """
    if not host:  # HTTP/1.0
        return
    name = (urlsplit(f"//{host}").hostname if _is_sound(host) else None) or ""
    if name in ("localhost", socket.gethostname().lower()) or name.endswith(".localhost"):
        return
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        raise ServiceError(
            "without --token_file this service answers to addresses, localhost and this machine's name only",
            status=421,
            code="wrong_host",
        ) from None


def _check_origin(method: str, headers: Mapping[str, str]) -> None:
    """ServiceError for what a page of another site sends: a browser would do so without a question."""
    if method in ("GET", "HEAD", "OPTIONS"):
        return
    if is_foreign(headers.get("origin"), headers.get("host", "")):
        raise ServiceError(
            "pages of other sites may not use this service", status=403, code="cross_site_request"
        )


def is_foreign(origin: str | None, host: str) -> bool:
    """Whether a request's Origin header names another site than the one of its Host header."""
    if origin is None:
        return False
    return not _is_sound(origin) or urlsplit(origin).netloc.lower() != host.lower()


def _is_sound(address: str) -> bool:
    try:
        urlsplit(address if "//" in address else f"//{address}").hostname  # noqa: B018
    except ValueError:
        return False
    return True


def _with_security_headers(send: Send) -> Send:
    """Adds to each response those security headers that it does not have."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            present = {name.lower() for name, _ in headers}
            if dict(headers).get(b"content-type", b"").startswith(b"text/html"):
                present.add(b"content-security-policy")  # a page says itself what it may load
            for name, value in SECURITY_HEADERS.items():
                if name.encode() not in present:
                    headers.append((name.encode(), value.encode()))
            message = {**message, "headers": headers}
        await send(message)

    return sending


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the body that has been read, then what the connection has to say further."""
    given = False

    async def receiving() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving
