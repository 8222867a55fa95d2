"""The web server: uvicorn, with slow connections cut off, and an end that waits for jobs to finish."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ldm.errors import FieldError
from ldm.log import notice
from ldm.service.app import Service, create_app
from ldm.service.jobs import Job

HEAD_SECONDS = 10.0  # in which the request line and the headers have to arrive
WRITE_SECONDS = 60.0  # in which a client has to read on
BACKLOG = 1000  # connections that may wait to be accepted
LAST_ANSWERS = 10  # seconds in which answers may be sent once all jobs are over
# in which clients may then come for jobs of `wait: false` that ended since the signal, or as long before it
FETCH_SECONDS = 5.0


class Connection(H11Protocol):
    """Closes a connection whose request head trickles in, or whose client does not read its answer.

    uvicorn has neither limit: each such connection would stay for ever.
    """

    _head: asyncio.TimerHandle | None = None
    _write: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        # An answer is two writes, and the second would wait up to 40 ms for the client to confirm the first:
        # asyncio does this by itself only for sockets that name their protocol, which create_server's do not.
        connection = transport.get_extra_info("socket")
        if connection.family != getattr(socket, "AF_UNIX", None):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._head)
        _stop(self._write)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        _stop(self._write)
        super().resume_writing()

    def _watch_head(self) -> None:
        """The time runs from the first byte on, however many follow, until there is a request."""
        if self.cycle is not None and not self.cycle.response_complete:
            _stop(self._head)
            self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._cut_off)

    def _cut_off(self) -> None:
        self._head = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class Server(uvicorn.Server):
    """Serves until a signal comes. The first one ends it once the jobs that are there have finished, or after
    `drain` seconds, and once clients have come for those of `wait: false`, or had a moment to do so; new ones
    are answered with 503 meanwhile. A second signal ends the process at once.
    """

    def __init__(self, service: Service):
        config = uvicorn.Config(
            create_app(service),
            http=Connection,
            ws="none",
            log_config=None,
            log_level="critical",  # the log of requests is our own
            access_log=False,
            proxy_headers=False,  # any client could give itself another's address by them
            server_header=False,
            timeout_graceful_shutdown=LAST_ANSWERS,
        )
        super().__init__(config)
        self.service = service
        self._ending = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        names = ", ".join(self.service.engine.models.names)
        notice(f"serving {names} on {url_of(sockets[0])} (its routes: /docs)")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._ending:
            os._exit(128 + sig)
        self._ending = True
        threading.Thread(
            target=self._drain, args=(signal.Signals(sig).name,), name="drain", daemon=True
        ).start()

    def _drain(self, name: str) -> None:
        seconds = self.service.options.drain
        notice(f"{name}: jobs may finish within {seconds:g} s; a second signal ends the service at once")
        since = time.monotonic() - FETCH_SECONDS
        lost = self.service.engine.drain(seconds)
        left = self._await_clients(since)
        self.service.log.write(
            "drained",
            unfinished_jobs=len(lost),
            unfinished=[job.id for job in lost] or None,
            not_fetched=[job.id for job in left] or None,
        )
        self.should_exit = True

    def _await_clients(self, since: float) -> list[Job]:
        """Wait a moment for clients to come for jobs that ended after `since`. Returns those left over."""
        left, until = self.service.engine.jobs.to_fetch(since), time.monotonic() + FETCH_SECONDS
        while left and time.monotonic() < until:
            time.sleep(0.05)
            left = [job for job in left if job.to_fetch]
        return left


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; clients that connect wait until the server runs. FieldError if there is none."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        why = error.strerror or str(error)
        raise FieldError(
            "{host} {host_given} {port} {port_given}: {why}", host_given=host, port_given=port, why=why
        ) from error


def url_of(listening: socket.socket) -> str:
    """The address of a socket as clients write it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(service: Service, listening: socket.socket) -> int:
    """Serve until the end; the service's engine has been started. Returns the exit code."""
    try:
        Server(service).run(sockets=[listening])
    finally:
        service.log.close()
    return 0
