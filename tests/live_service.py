"""A service on the miniature of tiny.py behind a real uvicorn on a free port of this machine."""

import base64
import io
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tiny_service
from PIL import Image

from ldm.service.app import Service
from ldm.service.engine import Engine
from ldm.service.server import Server, listen, url_of


@contextmanager
def live(
    model: tuple[Path, Path], names: Sequence[str] = ("tiny",), **options: Any
) -> Iterator[tuple[str, Engine]]:
    """(address, engine) of a running service, which ends with the block."""
    with (
        tiny_service.running(model, names, **options) as engine,
        serving(Service(engine, engine.options)) as (_, address),
    ):
        yield address, engine


@contextmanager
def serving(service: Service) -> Iterator[tuple[Server, str]]:
    """(server, address) of a service whose engine runs."""
    with listen("127.0.0.1", 0) as socket:
        server = Server(service)
        thread = threading.Thread(target=server.run, args=([socket],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        try:
            yield server, url_of(socket)
        finally:
            server.should_exit = True
            thread.join()


def base64_png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))


def pixels(text: str) -> np.ndarray:
    return np.asarray(decoded(text).convert("RGB")).astype(int)
