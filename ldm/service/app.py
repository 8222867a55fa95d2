"""The web application: what all contracts share, and the contracts on it."""

from __future__ import annotations

import asyncio
import html
import re
import time
import traceback
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from ldm import __version__
from ldm.errors import InputError
from ldm.log import one_line
from ldm.service import a1111, native, openai, score
from ldm.service.errors import (
    BadRequest,
    DeadlinePassed,
    Refused,
    ServiceError,
    about_image,
    from_input_error,
)
from ldm.service.guards import App, Guards, Message, Receive, Scope, Send, Tokens
from ldm.service.inputs import shortened
from ldm.service.jobs import Job
from ldm.service.limits import check_limits
from ldm.service.logs import JsonLog
from ldm.service.metrics import Metrics
from ldm.service.moderation import Moderation, prompts_of
from ldm.service.outputs import Signer, encoded

if TYPE_CHECKING:
    from ldm.pipeline.generated import GeneratedImage
    from ldm.pipeline.request import ImageRequest
    from ldm.service.engine import Engine
    from ldm.service.options import ServiceOptions

# The contracts by the paths that begin with theirs; all other paths are the native one's.
CONTRACTS: dict[str, ModuleType] = {"/score": score, "/v1": openai, "/sdapi": a1111}
METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH")
UNLOGGED = ("/health", "/ready", "/metrics")  # asked every few seconds; only their failures are logged
FLAG = re.compile(r"(?<!\S)--([A-Za-z]\w*)")
LONGEST = 500  # characters of an error's message
READ_AT_A_TIME = 8  # requests whose images are decoded and not counted yet; one has tens of MB
GRACE = 0.5  # seconds after a job's deadline in which the engine itself may end it


@dataclass(frozen=True)
class OutputFile:
    """A finished image as a file. Without `data` the `error` says why: it was refused, or is NaN."""

    image: GeneratedImage
    data: bytes | None
    error: ServiceError | None = None

    @property
    def refused(self) -> bool:
        return isinstance(self.error, Refused)

    @property
    def flagged(self) -> bool:
        """Whether unwanted content was found in it, by the safety checker or by moderation."""
        return bool(self.image.nsfw) or self.refused


class Service:
    """An engine with what stands around it, for the routes of every contract."""

    def __init__(
        self,
        engine: Engine,
        options: ServiceOptions,
        *,
        moderation: Moderation | None = None,
        signer: Signer | None = None,
        log: JsonLog | None = None,
        debug: bool = False,
    ):
        self.engine, self.options, self.signer, self.debug = engine, options, signer, debug
        self.moderation = moderation or Moderation.of(options)
        self.log = log or JsonLog(options.log_file, prompts=options.log_prompts)
        self.tokens = Tokens.read(options.token_file) if options.token_file else None
        self.metrics = Metrics(engine, self.moderation)
        self._files: WeakKeyDictionary[Job, dict[str, asyncio.Task]] = WeakKeyDictionary()
        self.loop: asyncio.AbstractEventLoop | None = None  # that of the application, once it runs
        self.reading = asyncio.Semaphore(READ_AT_A_TIME)  # for whoever decodes what a client sent
        if self.moderation.enabled:
            engine.to_keep = self.let_pass

    def client(self, http: Request) -> str:
        """Who asks: the name of the token, or without tokens the address."""
        return http.state.client

    def job(self, id: str, http: Request) -> Job:
        """A job of the client who asks. UnknownJob for any other."""
        return self.engine.job(id, self.client(http))

    @asynccontextmanager
    async def room(self, http: Request, images: int = 1, timeout: float | None = None) -> AsyncIterator[None]:
        """Inside, a request for so many images, or more, is read and submitted, few requests at a time.

        A file of a few KB may be an image of many MB: where there is no room, or no time left, none is
        decoded. ServiceError. While `submit` asks moderation, another request has the place.
        """
        async with self.reading:
            self._check_room(http, images, timeout)
            yield

    def _check_room(self, http: Request, images: int, timeout: float | None) -> None:
        """ServiceError if a request for so many images has no time left, or the engine would refuse it."""
        most = min(timeout or self.options.deadline, self.options.deadline)
        if _arrived(http) + most < time.monotonic():
            raise DeadlinePassed(most)
        self.engine.check_room(self.client(http), images)

    async def submit(
        self,
        requests: Sequence[ImageRequest],
        http: Request,
        *,
        model: str | None = None,
        timeout: float | None = None,
        preview: bool = False,
    ) -> Job:
        """The job of these requests, once moderation has let their prompts pass. It is called inside `room`.

        ServiceError.
        """
        try:
            if self.moderation.enabled:
                await self._moderate(requests, http, timeout)
            job = await run_in_threadpool(
                self.engine.submit,
                tuple(requests),
                client=self.client(http),
                model=model,
                timeout=timeout,
                preview=preview,
                arrived=_arrived(http),
            )
        except InputError as error:
            raise from_input_error(error, self.engine.folders) from error
        prompts = self.log.texts(request.prompt for request in requests)
        http.state.facts = {"job": job.id, "model": job.model, "images": len(requests), "prompts": prompts}
        return job

    async def _moderate(self, requests: Sequence[ImageRequest], http: Request, timeout: float | None) -> None:
        """Returns once moderation has let the prompts pass. ServiceError.

        An answer may take seconds, in which others are read: what these requests start from is counted by
        its bytes meanwhile, and no longer by their place. Nothing is asked for requests that would be refused
        by now.
        """

        def still_useful() -> None:
            self._check_room(http, len(requests), timeout)

        texts = await run_in_threadpool(self._texts, requests)
        with self.engine.holding(requests):
            self.reading.release()
            try:
                verdict = await self.moderation.check_prompt(texts, still_useful)
            finally:
                await self.reading.acquire()
        if verdict.error:
            raise verdict.error

    def _texts(self, requests: Sequence[ImageRequest]) -> list[str]:
        """What moderation is asked about. LimitExceeded for what would be refused anyway."""
        for k, request in enumerate(requests):
            with about_image(k):
                check_limits(request, self.options, self.options.max_pixels)
        return prompts_of(requests)

    async def finish(self, job: Job, http: Request) -> Job:
        """The job once it is finished. No thread waits for it; it is cancelled if its client goes away.

        ServiceError: the job's own, if it failed, was cancelled or is past its deadline.
        """
        loop, over = asyncio.get_running_loop(), asyncio.Event()

        def changed(job: Job) -> None:
            if job.over:
                with suppress(RuntimeError):  # the event loop has ended before the job
                    loop.call_soon_threadsafe(over.set)

        end = job.listen(changed)
        waiting, leaving = asyncio.ensure_future(over.wait()), asyncio.ensure_future(_gone(http))
        try:
            left = max(job.deadline - time.monotonic(), 0) + GRACE
            await asyncio.wait((waiting, leaving), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not leaving.done():
                job.expire()
        finally:
            end()
            waiting.cancel()
            leaving.cancel()
            if not job.over:
                job.cancel()
        if job.error:
            raise job.error
        return job

    async def files(self, job: Job, format: str = "png") -> tuple[OutputFile, ...]:
        """The finished job's images as files of a format ("png", "jpg" or "webp"), after moderation.

        They are made once, however often they are asked for, unless something failed that may pass.
        """
        made = self._files.setdefault(job, {})
        if format not in made:
            made[format] = asyncio.ensure_future(self._made(job, format))
        return await asyncio.shield(made[format])

    async def _made(self, job: Job, format: str) -> tuple[OutputFile, ...]:
        try:
            files = tuple(await asyncio.gather(*(self._file(image, format) for image in job.images)))
        except Exception:
            self._files[job].pop(format)
            raise
        if any(file.error and file.error.status >= 500 for file in files):
            self._files[job].pop(format)  # the next question may be luckier
        else:
            job.held_bytes += sum(len(file.data or b"") for file in files)
        return files

    async def _file(self, image: GeneratedImage, format: str) -> OutputFile:
        try:
            if self.moderation.enabled and image.pixels is not None:
                verdict = await self.moderation.check_image(await run_in_threadpool(encoded, image))
                if verdict.error:
                    return OutputFile(image, None, verdict.error)
            return OutputFile(image, await run_in_threadpool(encoded, image, format, self.signer))
        except ServiceError as error:
            return OutputFile(image, None, error)
        except InputError as error:  # such as settings that do not fit into a JPEG file
            return OutputFile(image, None, from_input_error(error, self.engine.folders))

    def let_pass(self, job: Job) -> list[GeneratedImage]:
        """The images of a finished job that moderation lets pass: neither those that it refuses nor those on
        which it gave no answer. For other threads than the loop's.
        """
        files = asyncio.run_coroutine_threadsafe(self.files(job), self.loop).result()
        return [file.image for file in files if file.error is None]

    def report(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an error that nobody waits for, as asyncio's own handler would print it."""
        error = context.get("exception")
        kind = type(error).__name__ if error else "asyncio"
        self.log.write("error", type=kind, message=one_line(error or context["message"]))


def _arrived(http: Request) -> float:
    """When a request arrived, on the clock of `time.monotonic`."""
    return getattr(http.state, "arrived", time.monotonic())


async def _gone(http: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def create_app(service: Service) -> FastAPI:
    """The application of a service, with the routes of all contracts. Its engine is the caller's to start."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_exception_handler(service.report)
        service.loop = asyncio.get_running_loop()
        yield
        await run_in_threadpool(service.engine.finish_keeping)
        await service.moderation.close()

    app = FastAPI(
        title="Stable Diffusion",
        version=__version__,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        generate_unique_id_function=lambda route: f"{route.name}",
    )
    app.state.service = service
    routers = [contract.routes(service) for contract in (native, *CONTRACTS.values())]
    for router in routers:
        app.include_router(router)
    app.add_api_route("/docs", lambda: HTMLResponse(_page(app), headers=PAGE), include_in_schema=False)
    app.add_api_route("/", lambda: RedirectResponse("/docs"), include_in_schema=False)

    plain = app.openapi

    def page() -> dict[str, Any]:
        found = _with_own_bodies(plain(), routers)
        return _with_token(found) if service.tokens else found

    app.openapi = page

    async def answered(http: Request, error: Exception) -> Response:
        found = _service_error(error, http)
        http.state.facts = {**getattr(http.state, "facts", {}), "error": found.code}
        return answer(http.url.path, found)

    for error in (ServiceError, InputError, HTTPException, RequestValidationError):
        app.add_exception_handler(error, answered)
    app.add_middleware(Guards, answer=answer, tokens=service.tokens, max_body=service.options.max_body_bytes)
    app.add_middleware(_Observed, service=service)  # outermost: what the guards refuse is counted, too
    return app


def _with_own_bodies(page: dict[str, Any], routers: Sequence[APIRouter]) -> dict[str, Any]:
    """The OpenAPI page with the request bodies as the routes have them: fastapi makes all bounds floats."""
    for route in (route for router in routers for route in router.routes):
        body = (route.openapi_extra or {}).get("requestBody")
        for method in route.methods if body else ():
            page["paths"][route.path][method.lower()]["requestBody"] = body
    return page


def _with_token(page: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI page of a service whose clients have tokens."""
    schemes = {"token": {"type": "http", "scheme": "bearer"}}
    components = page.get("components", {}) | {"securitySchemes": schemes}
    return page | {"components": components, "security": [{"token": []}]}


def contract_of(path: str) -> ModuleType:
    """The contract that a path belongs to."""
    found = (each for prefix, each in CONTRACTS.items() if path == prefix or path.startswith(f"{prefix}/"))
    return next(found, native)


def answer(path: str, error: ServiceError) -> JSONResponse:
    """The response of an error, in the form of the path's contract."""
    # A plain one, not a copy: its subclasses are made of other things than their messages.
    message = in_words(error.message)
    error = ServiceError(message, status=error.status, code=error.code, headers=error.headers)
    body = contract_of(path).error_body(error)
    return JSONResponse(body, status_code=error.status, headers=dict(error.headers))


def in_words(message: str) -> str:
    """A message of the engine for a client: without a command line's flags, on one line, not too long."""
    message = message.replace("--list_samplers shows all", "GET /sdapi/v1/samplers lists all")
    message = one_line(FLAG.sub(r"\1", message))
    return message if len(message) <= LONGEST else f"{message[:LONGEST]}…"


def _service_error(error: Exception, http: Request) -> ServiceError:
    """Any error that a route raises on purpose, with a message of one line."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, InputError):
        return from_input_error(error, http.app.state.service.engine.folders)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first.get("loc", ()) if part != "body")
        message = one_line(first.get("msg", "the request is malformed"))
        return BadRequest(f"{place}: {message}" if place else message)
    assert isinstance(error, HTTPException)
    status, path = error.status_code, shortened(http.url.path)
    code, message = {
        404: ("not_found", f"there is no {path}; GET /docs lists what there is"),
        405: ("method_not_allowed", f"{path} takes no {shortened(http.method)}"),
    }.get(status, ("invalid_request" if status < 500 else "internal_error", error.detail))
    return ServiceError(one_line(message), status=status, code=code, headers=error.headers)


class _Observed:
    """ASGI middleware that counts and logs every request, and answers where a route fails by mistake."""

    def __init__(self, app: App, *, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception as error:
            self._report(error)
            if not status:  # else the server closes the connection, as the answer has no end
                failed = ServiceError("an error inside the service; its log says which", status=500)
                await answer(scope["path"], failed)(scope, receive, sending)
        finally:
            self._record(scope, status or 499, time.perf_counter() - start)

    def _report(self, error: Exception) -> None:
        where = traceback.format_exception(error) if self.service.debug else None
        kind, message = type(error).__name__, one_line(error)
        self.service.log.write("error", type=kind, message=message, traceback=where)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "other"
        method = scope["method"] if scope["method"] in METHODS else "other"
        self.service.metrics.count(method, route, status, seconds)
        if scope["path"] in UNLOGGED and status < 400:
            return
        state = scope.get("state", {})
        self.service.log.write(
            "request",
            client=state.get("client") or (scope.get("client") or ("local",))[0],
            method=method,
            path=scope["path"],
            status=status,
            seconds=seconds,
            **state.get("facts", {}),
        )


PAGE = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
STYLE = """body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } td, th { padding: .3rem .6rem; text-align: left;
vertical-align: top; border-bottom: 1px solid #ccc } code { font-size: 90% }
@media (prefers-color-scheme: dark) { body { background: #111; color: #eee } a { color: #9cf } }"""


def _page(app: FastAPI) -> str:
    """The routes as a page of its own, which loads nothing from anywhere."""
    rows = [
        f"<tr><td>{method.upper()}<td><code>{html.escape(path)}</code>"
        f"<td>{html.escape(operation.get('description') or operation.get('summary') or '')}"
        for path, operations in app.openapi()["paths"].items()
        for method, operation in operations.items()
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{html.escape(app.title)}: routes</title>"
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>{html.escape(app.title)}</h1>"
        '<p>All details, for programs: <a href="/openapi.json">openapi.json</a>.'
        f"<table><tr><th>Method<th>Path<th>What it does{''.join(rows)}</table>"
    )
