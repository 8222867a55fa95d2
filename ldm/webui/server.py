"""The page over HTTP: gradio's application with what keeps it, and its users, on this machine."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import InputError
from ldm.service.guards import is_foreign
from ldm.service.models import NamedModel, bundled_models, name_of
from ldm.service.options import ServiceOptions, is_loopback
from ldm.webui.files import BUNDLED_LORAS, LORA_FOLDER, Files, bundled
from ldm.webui.options import PageOptions, password_check, read_users
from ldm.weights.loading import ABLE, choose_model, find

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ldm.pipeline.options import RuntimeOptions
    from ldm.service.engine import Engine
    from ldm.service.outputs import Signer

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]

# The browser asks nobody but this server, whatever the page holds.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
# Routes of gradio that the page does without: they ask other servers, or run calls by name.
CLOSED = (
    *("proxy=", "file=http", "file/http", "deep_link", "run/", "api/", "call/", "vibe", "undo-vibe", "dev/"),
    *("run-history", "runs", "process_recording", "info", "openapi.json", "custom_component", "stream/"),
)
BESIDE_FILE = 2**20  # bytes of a request beside a file: the form around it, or what the page's controls hold
ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_MCP_SERVER": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


class Guard:
    """ASGI: security headers on every answer, closed routes, no requests of other sites' pages, only the
    names of this machine as a host, and no body of more than `max_body` bytes.

    The names keep away pages of other sites whose name is made to stand for this machine's address. Bodies
    are limited here because most routes hold theirs in memory before they ask who sends it.
    """

    def __init__(self, app: App, hosts: Sequence[str] | None, max_body: int):
        self.app, self.hosts, self.max_body = app, hosts, max_body

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if not self._is_open(scope):
            return await _refuse(send, 403)
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self.max_body:  # int() refuses thousands of digits
            return await _refuse(send, 413)
        size = 0

        async def counted() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body:
                from starlette.exceptions import HTTPException

                raise HTTPException(413)  # which the routes that read a body make an answer of
            return message

        async def with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        return await self.app(scope, counted, with_headers)

    def _is_open(self, scope: Scope) -> bool:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if is_foreign(headers.get(b"origin"), host):
            return False
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.hosts is not None and name.strip("[]") not in self.hosts:
            return False
        path = scope["path"].lstrip("/").removeprefix("gradio_api/")
        return not any(path.startswith(closed) for closed in CLOSED)


async def _refuse(send: Any, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for uploads and results that only this user can read, and that is gone afterwards.

    gradio reads its settings from the environment when it is imported: that folder, and to ask no other
    server. SIGTERM ends the process by an exception meanwhile, so that the folder does not stay.
    """
    folder = Path(tempfile.mkdtemp(prefix="page-"))
    os.environ.update(ENVIRONMENT, GRADIO_TEMP_DIR=str(folder))
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield folder
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(folder, ignore_errors=True)


def page_models(named: Sequence[NamedModel | str]) -> list[NamedModel | str]:
    """The models of a page: those that are named, or else for each task the linked or bundled one, and then
    all others that came with this repository.
    """
    if named:
        return list(named)
    chosen = [choose_model(None, None, task) for task in ABLE]
    found = {
        name_of(files): NamedModel(name_of(files), str(files.weights), str(files.config)) for files in chosen
    }
    return list({**{one.name: one for one in bundled_models()}, **found}.values())


def open_engine(
    named: Sequence[NamedModel | str], options: ServiceOptions, runtime: RuntimeOptions, **choices: Any
) -> tuple[Engine, Files]:
    """The engine of a page, which is not started, and the files that it offers. InputError."""
    from ldm.service.engine import Engine

    files = Files.found(options.lora_folder, options.embedding_folder, options.control_folder)
    folder = options.lora_folder
    if folder is None and find(LORA_FOLDER).is_dir():
        folder = LORA_FOLDER
    options = replace(options, lora_folder=folder, offered=files.paths)
    # prompts name them as they name those of the folder
    engine = Engine.open(page_models(named), options, runtime, loras=bundled(BUNDLED_LORAS), **choices)
    return engine, files


def create_app(
    engine: Engine,
    files: Files,
    page: PageOptions,
    folder: Path,
    *,
    signer: Signer | None = None,
    debug: bool = False,
) -> FastAPI:
    """The application of a page, with `folder` of `private_folder`. `signer` signs what the page offers,
    `debug` shows where an error comes from, in the terminal. InputError.
    """
    try:
        import gradio as gr
        from fastapi import FastAPI
        from PIL import Image
        from starlette.routing import Mount
    except ImportError as error:
        raise InputError(f'{error}: the page needs gradio, which pip install -e ".[webui]" brings') from error

    from ldm.webui import page as pages

    _ask_nobody()
    _open_no_uploads()
    users = read_users(page.auth_file) if page.auth_file else None
    # Pillow reads no image beyond this limit: its warning is an error wherever the page opens one.
    Image.MAX_IMAGE_PIXELS = 2 * engine.options.max_pixels
    css = (pages.FOLDER / "page.css").read_text(encoding="utf-8")
    results = folder / "results"
    results.mkdir(mode=0o700, exist_ok=True)
    blocks = pages.Page(engine, files, results, signer=signer, debug=debug).blocks()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=page.host,
        server_port=page.port,
        footer_links=[],
        run_history=False,
        auth=password_check(users) if users else None,
        allowed_paths=[],
        show_error=False,
        max_file_size=engine.options.max_body_bytes,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        theme=theme(),
        css=css,
        head=f"<script>{(pages.FOLDER / 'page.js').read_text(encoding='utf-8')}</script>",
    )
    blocks.has_launched = True  # gradio looks whether an upload's path is one of its own only then
    hosts = ("localhost", "127.0.0.1", "::1", page.host) if is_loopback(page.host) else None
    app.add_middleware(Guard, hosts=hosts, max_body=engine.options.max_body_bytes + BESIDE_FILE)
    pages_app = next(route.app for route in app.routes if isinstance(route, Mount))

    def end() -> None:
        engine.drain(0)
        pages_app.stop_event.set()

    app.state.end = end
    return app


def _ask_nobody() -> None:
    """gradio fetches addresses that a client gives in place of an upload; this server asks no other."""
    from gradio import processing_utils

    async def refuse(*_: Any, **__: Any) -> str:
        raise ValueError("an address is no upload")

    processing_utils.async_ssrf_protected_download = refuse


def _open_no_uploads() -> None:
    """gradio opens uploads before the page's own code runs, and what cannot be read, or is a decompression
    bomb, would end in its traceback: here it hands the files over as they are.
    """
    from gradio import ImageEditor, image_utils

    image_utils.preprocess_image = lambda payload, **_: payload and payload.path
    ImageEditor.convert_and_format_image = lambda _, file, **__: file


def theme() -> Any:
    """gradio's theme in the system's fonts, its letters with a contrast of 4.5 at least."""
    import gradio as gr

    fonts = ("system-ui", "sans-serif")
    return gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=("ui-monospace", "monospace")
    ).set(
        block_info_text_color="*neutral_600",
        block_title_text_color="*neutral_800",
        block_label_text_color="*neutral_700",
        body_text_color_subdued="*neutral_600",
        input_placeholder_color="*neutral_500",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_text_color="white",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color_dark="*neutral_400",
        body_text_color_subdued_dark="*neutral_300",
        button_primary_background_fill_dark="*primary_700",
    )


def serve(app: FastAPI, page: PageOptions, ready: Callable[[str], None]) -> None:
    """Serves the page until SIGINT or SIGTERM; `ready` gets its address. InputError for a port in use."""
    import uvicorn

    from ldm.service.server import listen, url_of

    listening = listen(page.host, page.port)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=3, server_header=False
    )

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """Ends the streams of open tabs first, which would be waited for."""
            app.state.end()
            await super().shutdown(sockets)

    server = Server(config)
    log = logging.getLogger("uvicorn.error")
    log.addFilter(_is_no_cancellation)

    async def run() -> None:
        task = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started and not task.done():
            await asyncio.sleep(0.05)
        if server.started:
            ready(url_of(listening))
        await task

    # uvicorn raises the signal that ended it once more, which must not keep the folder from being removed
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        asyncio.run(run())
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        log.removeFilter(_is_no_cancellation)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """uvicorn cancels the answers that are still being sent when it ends, and logs each with a traceback."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
