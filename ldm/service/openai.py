"""OpenAI's images API: generations and edits, whole or streamed, and the list of models.

Source: https://platform.openai.com/docs/api-reference/images, and the types of its Python client. Besides
OpenAI's fields a request takes those of ImageRequest: `seed`, `steps`, `sampler`, … What decides nothing
here, such as `quality` or `user`, is accepted and has no effect.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from ldm.fields import Setting
from ldm.pipeline.request import ImageRequest
from ldm.service.answers import base64_of, json_answer
from ldm.service.errors import BadRequest, ServiceError, in_names, reworded
from ldm.service.inputs import decoded, json_object, text_of
from ldm.service.limits import check_format
from ldm.service.schema import known_names, request_of, request_schema, series

if TYPE_CHECKING:
    from PIL import Image

    from ldm.service.app import OutputFile, Service
    from ldm.service.jobs import Job

FORMATS = {"png": "png", "jpeg": "jpg", "webp": "webp"}  # OpenAI's names, and ours
WITHOUT_EFFECT = (
    *("quality", "style", "user", "safety_identifier", "moderation", "output_compression", "input_fidelity"),
    "complexity",
)
MOST_PARTIAL = 3
SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
# How messages about an image's size begin: "height 63 is …", "width: 0 is …", "9992x9992 are …".
ABOUT_SIZE = re.compile(r"(height|width):? (?=[0-9])|(?=[0-9]+x[0-9]+ are )")
Names = Callable[[], AbstractContextManager[None]]  # inside, errors name the fields of OpenAI's
Read = Callable[[Mapping[str, Any], "Service"], "Order"]
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Order:
    """A request, read: `requests` of one image each, and in which form they are answered."""

    requests: tuple[ImageRequest, ...]
    model: str | None
    format: str  # of `FORMATS`
    as_url: bool
    stream: bool
    partial: int  # previews that the stream may show


def routes(service: Service) -> APIRouter:
    """The routes of the contract for a `Service`."""
    router = APIRouter(tags=["OpenAI"])

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The models of this service."""
        return {"object": "list", "data": [_model(name) for name in service.engine.models.names]}

    @router.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> dict[str, Any]:
        """A model of this service."""
        service.engine.models.reader(model)
        return _model(model)

    async def make(http: Request, values: dict[str, Any], what: str, read: Read, **ours: str) -> Any:
        """The answer to a request of these values; `ours` has its fields' names by ours, for errors."""
        names = partial(_their_names, values, **ours)
        with names():
            async with service.room(http):
                order = await run_in_threadpool(read, values, service)
                preview = order.partial > 0
                job = await service.submit(order.requests, http, model=order.model, preview=preview)
            return await _answer(service, order, job, http, what, names)

    body = {"application/json": {"schema": generation_schema(service)}}

    @router.post("/v1/images/generations", openapi_extra={"requestBody": {"required": True, "content": body}})
    async def create_image(http: Request) -> Any:
        """Images of a prompt."""
        values = await json_object(http)
        for name in ("image", "mask"):
            if values.get(name) is not None and values.get("init_img") is None:
                raise BadRequest(f"{name}: images are given to /v1/images/edits")
        return await make(http, values, "image_generation", read_order)

    form = {"multipart/form-data": {"schema": edit_schema(service)}}

    @router.post("/v1/images/edits", openapi_extra={"requestBody": {"required": True, "content": form}})
    async def edit_image(http: Request) -> Any:
        """Images that start from an image; with a mask, only where that is transparent."""
        return await make(http, await form_values(http), "image_edit", read_edit, init_img="image")

    return router


# Reading


@contextmanager
def _their_names(values: Mapping[str, Any], **names: str) -> Iterator[None]:
    """Inside, errors name the fields of OpenAI's that a request has: `names` has them by ours, and `size`
    stands for height and width.
    """
    try:
        with in_names({"format": "output_format", **names}):
            yield
    except ServiceError as error:
        match = ABOUT_SIZE.match(error.message)
        if values.get("size") in (None, "auto") or match is None:
            raise
        side = f"{match[1]} " if match[1] else ""
        raise reworded(error, f"size: {side}{error.message[match.end() :]}") from error


def read_order(values: Mapping[str, Any], service: Service) -> Order:
    """What a request's fields ask for. ServiceError."""
    values = {name: value for name, value in values.items() if name not in WITHOUT_EFFECT}
    if values.get("prompt") is None:
        raise BadRequest("prompt: it is missing")
    model = _optional_text(values.pop("model", None), "model")
    count = _whole(values.pop("n", None), "n", 1, service.options.max_images, 1)
    form = _choice(values.pop("response_format", None), "response_format", ("b64_json", "url"))
    format = _choice(values.pop("output_format", None), "output_format", tuple(FORMATS))
    stream = _switch(values.pop("stream", None), "stream")
    partial = _whole(values.pop("partial_images", None), "partial_images", 0, MOST_PARTIAL, 0)
    if partial and not stream:
        raise BadRequest("partial_images: they are for stream true")
    if partial and count > 1:
        raise BadRequest("partial_images: they are for n 1")
    if values.get("background") in ("auto", "opaque", None):  # else the colour behind an init image
        values.pop("background", None)
    elif values["background"] == "transparent":
        raise BadRequest("background: transparent images cannot be made here")
    values |= _size(values.pop("size", None), values)
    model_name = model or service.engine.models.default
    first = request_of(values, service.options, task=service.engine.models.task(model_name))
    check_format(first, FORMATS[format])
    return Order(tuple(series(first, count)), model, format, form == "url", stream, partial)


def read_edit(values: Mapping[str, Any], service: Service) -> Order:
    """What the fields of an edit ask for. ServiceError."""
    return read_order(with_images(values, service.options.max_pixels), service)


def _size(size: Any, values: Mapping[str, Any]) -> dict[str, int]:
    """Height and width that OpenAI's `size` stands for; none for "auto"."""
    if size in (None, "auto"):
        return {}
    match = SIZE.fullmatch(size) if isinstance(size, str) else None
    if not match:
        raise BadRequest('size: give "WIDTHxHEIGHT" in pixels, such as "512x512", or "auto"')
    if any(values.get(name) is not None for name in ("height", "width", "H", "W")):
        raise BadRequest("size: height and width are given, too; give one of them")
    return {"width": int(match[1]), "height": int(match[2])}


async def form_values(http: Request) -> dict[str, Any]:
    """The fields of a multipart body: texts, and the bytes of files. ServiceError.

    A field that is given several times is a list; OpenAI's clients call it `name[]` then.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        message = "the body is no multipart/form-data, in which image and mask are files"
        raise ServiceError(message, status=415, code="unsupported_media_type")
    found: dict[str, list[Any]] = {}
    async with http.form(max_files=32, max_fields=1000) as form:
        for name, value in form.multi_items():
            read = await value.read() if isinstance(value, UploadFile) else value
            found.setdefault(name.removesuffix("[]"), []).append(read)
    known = known_names()
    return {name: _form_value(name, known.get(name), given) for name, given in found.items()}


def _form_value(name: str, each: Setting | None, given: list[Any]) -> Any:
    """The value of a field that is given so often; `each` is the setting of this name. BadRequest."""
    if name == "image":  # whose files `with_images` counts
        return given
    kind = each.kind if each else str
    if len(given) == 1:
        return _switch(given[0], name) if kind is bool else given[0]
    if kind not in (list, tuple):
        raise BadRequest(f"{name[:80]}: it is given {len(given)} times")
    return given


def with_images(values: Mapping[str, Any], max_pixels: int) -> dict[str, Any]:
    """The fields of an edit with its image and mask as ImageRequest has them. ServiceError.

    OpenAI's mask is transparent where the image is to be painted anew, ours is white there. Without a mask,
    what is transparent in the image itself is painted anew.
    """
    from ldm.images.init_image import turn_upright

    values = dict(values)
    files = values.pop("image", [])
    if len(files) != 1:
        raise BadRequest(f"image: give one file, not {len(files)}")
    image = _opened(files[0], "image", max_pixels)
    turn_upright(image)
    given = values.pop("mask", None)
    if given is None:
        mask = _transparent(image)
    else:
        opened = _opened(given, "mask", max_pixels)
        if opened.size != image.size:
            sizes = [f"{one.width}x{one.height}" for one in (opened, image)]
            raise BadRequest(
                f"mask: its size is {sizes[0]} and the image's is {sizes[1]}; they have to agree"
            )
        mask = _transparent(opened)
        if mask is None:
            raise BadRequest("mask: no pixel of it is transparent; what is transparent is painted anew")
    values["init_img"] = _base64_png(image.convert("RGB") if mask is not None else image)
    return values if mask is None else values | {"mask": _base64_png(mask)}


def _opened(data: Any, field: str, max_pixels: int) -> Image.Image:
    if not isinstance(data, bytes):
        raise BadRequest(f"{field}: it is no file")
    return decoded(data, field, max_pixels)


def _transparent(image: Image.Image) -> Image.Image | None:
    """White where an image is wholly transparent; None if it is nowhere."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return alpha.point(lambda value: 255 * (value == 0)) if alpha.getextrema()[0] == 0 else None


def _base64_png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=0)
    return base64_of(file.getvalue())


def _optional_text(value: Any, field: str) -> str | None:
    return None if value is None else text_of(value, field)


def _whole(value: Any, field: str, low: int, high: int, default: int) -> int:
    """A whole number in a range; a form has it as text."""
    if isinstance(value, str) and re.fullmatch("-?[0-9]{1,9}", value):
        value = int(value)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadRequest(f"{field}: it is no whole number in {low} … {high}")
    return value


def _choice(value: Any, field: str, choices: tuple[str, ...]) -> str:
    """One of the choices, by default the first."""
    if value is None:
        return choices[0]
    if value not in choices:
        raise BadRequest(f"{field}: choose from {', '.join(choices)}")
    return value


def _switch(value: Any, field: str) -> bool:
    known = {None: False, "true": True, "True": True, "false": False, "False": False}
    if isinstance(value, bool):
        return value
    if not (value is None or isinstance(value, str)) or value not in known:
        raise BadRequest(f"{field}: it is neither true nor false")
    return known[value]


# Answering


async def _answer(service: Service, order: Order, job: Job, http: Request, what: str, names: Names) -> Any:
    """The images of an order, or with `stream` a stream of events that are named after `what`.

    The stream goes on after this has returned, with the `names` that errors have in this contract.
    """
    if order.stream:
        stream = _events(service, order, job, http, what, names)
        return StreamingResponse(stream, media_type="text/event-stream", headers=NOT_KEPT)
    await service.finish(job, http)
    files = await service.files(job, FORMATS[order.format])
    return await json_answer(_images, order, files)


def _images(order: Order, files: tuple[OutputFile, ...]) -> dict[str, Any]:
    images = [_image(file, order) for file in files]
    return {"created": int(time.time()), "data": images, **_facts(order, files), "usage": USAGE}


NOT_KEPT = {"cache-control": "no-store", "x-accel-buffering": "no"}
# A count of tokens that nobody pays for.
USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


def _image(file: OutputFile, order: Order) -> dict[str, Any]:
    if file.error:
        raise file.error
    text = base64_of(file.data)
    form = {"url": f"data:image/{order.format};base64,{text}"} if order.as_url else {"b64_json": text}
    return form | {"revised_prompt": file.image.request.prompt, "seed": file.image.seed}


def _facts(order: Order, files: tuple[OutputFile, ...]) -> dict[str, str]:
    height, width = files[0].image.pixels.shape[:2]
    return {"size": f"{width}x{height}", "output_format": order.format, "background": "opaque"}


async def _events(
    service: Service, order: Order, job: Job, http: Request, what: str, names: Names
) -> AsyncIterator[str]:
    """Previews as they come, at most `order.partial` of them and evenly, then the finished images."""
    loop = asyncio.get_running_loop()
    previews: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue()
    last: bytes | None = None

    def changed(job: Job) -> None:
        nonlocal last
        if job.preview is not None and job.preview is not last:
            last = job.preview
            with suppress(RuntimeError):  # the event loop has ended before the job
                loop.call_soon_threadsafe(previews.put_nowait, (job.progress, job.preview))

    end = job.listen(changed)
    finishing = asyncio.ensure_future(service.finish(job, http))
    finishing.add_done_callback(lambda _: previews.put_nowait(None))
    shown = 0
    try:
        while (found := await previews.get()) is not None:
            progress, png = found
            if shown < order.partial and progress >= shown / order.partial:
                facts = {"size": "auto", "output_format": "png", "background": "opaque"}
                yield _event(f"{what}.partial_image", png, {"partial_image_index": shown, **facts})
                shown += 1
        with names():
            await finishing
            files = await service.files(job, FORMATS[order.format])
            for file in files:  # one that is refused fails the whole request, as it does without a stream
                if file.error:
                    raise file.error
        for file in files:
            facts = _facts(order, files) | {"usage": USAGE, "seed": file.image.seed}
            yield await run_in_threadpool(_event, f"{what}.completed", file.data, facts)
    except ServiceError as error:
        yield f"event: error\ndata: {json.dumps({'type': 'error', **error_body(error)})}\n\n"
    finally:
        end()
        finishing.cancel()


def _event(name: str, image: bytes, facts: Mapping[str, Any]) -> str:
    content = {
        "type": name,
        "b64_json": base64_of(image),
        "created_at": int(time.time()),
        "quality": "auto",
        **facts,
    }
    return f"event: {name}\ndata: {json.dumps(content)}\n\n"


def error_body(error: ServiceError) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    code = {"unknown_model": "model_not_found", "content_policy": "content_policy_violation"}
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": _param(error),
            "code": code.get(error.code, error.code),
        }
    }


def _param(error: ServiceError) -> str | None:
    """The field that an error is about: it is what the message begins with."""
    if error.code == "unknown_model":
        return "model"
    match = re.match(r"(?:'(.{1,80}?)'|([\w.\[\]-]{1,80}))(:?) ", error.message)
    if error.status >= 500 or match is None:
        return None
    quoted, name, colon = match.groups()
    return quoted or (name if colon or name == "image" or name in known_names() else None)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "local"}


# The schema


def generation_schema(service: Service) -> dict[str, Any]:
    """The JSON schema of a generation: OpenAI's fields, and those of ImageRequest."""
    own = request_schema(service.options)["properties"]
    ignored = {name: {"description": "accepted, without effect"} for name in WITHOUT_EFFECT}
    size = {"type": ["string", "null"], "description": '"WIDTHxHEIGHT" or "auto"', "examples": ["512x512"]}
    theirs = {
        "model": {"type": ["string", "null"]},
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": service.options.max_images, "default": 1},
        "size": size,
        "response_format": {"enum": ["b64_json", "url", None], "default": "b64_json"},
        "output_format": {"enum": [*FORMATS, None], "default": "png"},
        "stream": {"type": ["boolean", "null"], "default": False},
        "partial_images": {"type": ["integer", "null"], "minimum": 0, "maximum": MOST_PARTIAL},
        "background": {"type": ["string", "null"], "description": "auto or opaque"},
    }
    return {"type": "object", "required": ["prompt"], "properties": {**ignored, **own, **theirs}}


def edit_schema(service: Service) -> dict[str, Any]:
    """The schema of an edit's form."""
    known = generation_schema(service)
    texts = {name: {"type": "string"} for name in known["properties"] if name not in ("init_img", "control")}
    file = {"type": "string", "format": "binary"}
    return known | {"required": ["prompt", "image"], "properties": {**texts, "image": file, "mask": file}}
