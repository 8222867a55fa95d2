"""Answers with images in them: megabytes of base64, made in a thread so that no other request waits."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def json_answer(content: Callable[..., Any], *given: Any) -> Response:
    """The JSON response of what `content` returns for what is given; a thread calls it, and writes the text.

    The text is in ASCII, which has a form for whatever a client's text may be, and has no NaN.
    """
    text = await run_in_threadpool(lambda: json.dumps(content(*given), allow_nan=False).encode())
    return Response(text, media_type="application/json")
