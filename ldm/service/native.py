"""The service's own contract: an ImageRequest as JSON, jobs to be watched and cancelled, models, health.

POST /generate  {"prompt": "a red cube", "seed": 7, "steps": 30, "sampler": "Euler a"}
{"id": "…", "state": "finished", "images": [{"seed": 7, "image": "<base64 PNG>", …}], …}
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from ldm.pipeline.infotext import without_folders
from ldm.service.answers import base64_of, json_answer
from ldm.service.errors import BadRequest, LimitExceeded, ServiceError
from ldm.service.inputs import json_object, text_of
from ldm.service.jobs import Job
from ldm.service.limits import check_format
from ldm.service.metrics import CONTENT_TYPE
from ldm.service.schema import number_of, request_of, request_schema, series

if TYPE_CHECKING:
    from ldm.service.app import OutputFile, Service

MEDIA_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
BEAT = 15.0  # seconds after which a stream without events shows that it is alive


def error_body(error: ServiceError) -> dict[str, Any]:
    """An error in this contract's form."""
    return {"error": {"code": error.code, "message": error.message}}


@dataclass(frozen=True)
class Asked:
    """What a client says beside an image's settings."""

    model: str | None
    timeout: float | None
    wait: bool
    preview: bool
    count: int
    format: str

    @classmethod
    def of(cls, content: dict[str, Any], service: Service) -> Asked:
        """Takes its own values out of a request's content. ServiceError."""
        options = service.options
        model, timeout = content.pop("model", None), content.pop("timeout", None)
        count, format = content.pop("count", 1), content.pop("format", "png")
        switches = {"wait": content.pop("wait", True), "preview": content.pop("preview", False)}
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise BadRequest(f"{name}: it is neither true nor false")
        number_of(count, "count", 1, 1_000_000, whole=True)
        if count > options.max_images:
            raise LimitExceeded(f"count: {count} is more than this service's {options.max_images} images")
        return cls(
            model=None if model is None else text_of(model, "model"),
            timeout=None if timeout is None else number_of(timeout, "timeout", 0.001, 86_400),
            count=count,
            format=format_of(format),
            **switches,
        )


def format_of(format: Any) -> str:
    """The format of a file by its name. BadRequest."""
    found = "jpg" if format == "jpeg" else format
    if not isinstance(found, str) or found not in MEDIA_TYPES:
        raise BadRequest(f"format: choose from {', '.join(MEDIA_TYPES)}")
    return found


def routes(service: Service) -> APIRouter:
    router = APIRouter(responses=ERRORS)

    @router.post(
        "/generate",
        tags=["native"],
        openapi_extra={"requestBody": _body_schema(service)},
        responses=_answers("The finished job, or the image itself where an Accept header asks for it.")
        | {202: {"description": "With wait false: the job, which is still to be made.", **_content(JOB)}},
    )
    async def generate(http: Request) -> Response:
        """Make images of a request's settings, and answer with them; with wait false, with a job's id."""
        content = await json_object(http)
        asked = Asked.of(content, service)
        task = service.engine.models.task(asked.model or service.engine.models.default)
        async with service.room(http, asked.count, asked.timeout):
            request = await run_in_threadpool(request_of, content, service.options, task=task)
            check_format(request, asked.format)
            job = await service.submit(
                series(request, asked.count),
                http,
                model=asked.model,
                timeout=asked.timeout,
                preview=asked.preview,
            )
        if not asked.wait:
            job.to_fetch = set(range(asked.count))
            headers = {"Location": f"/jobs/{job.id}"}
            return JSONResponse(_state(job), status_code=202, headers=headers)
        await service.finish(job, http)
        files = await service.files(job, asked.format)
        media = MEDIA_TYPES[asked.format]
        if len(files) == 1 and files[0].error:  # of several, each has an error of its own
            raise files[0].error
        if len(files) == 1 and http.headers.get("accept", "").split(",")[0].strip() == media:
            return Response(files[0].data, media_type=media, headers={"X-Seed": str(files[0].image.seed)})
        return await json_answer(_finished, job, files, asked.format)

    @router.get("/jobs/{id}", tags=["native"], responses=_answers("The job.", JOB))
    async def job(id: str, http: Request, format: str = "png") -> Response:
        """How far a job is; once it has finished, with its images."""
        found, format = service.job(id, http), format_of(format)
        if found.state != "finished":
            return JSONResponse(_seen(found))
        answer = await json_answer(_finished, found, await service.files(found, format), format)
        found.to_fetch.clear()
        return answer

    @router.delete("/jobs/{id}", tags=["native"], responses=_answers("The job as it is now.", JOB))
    async def cancel(id: str, http: Request) -> Response:
        """Cancel a job; one that is over stays as it is."""
        found = service.job(id, http)
        await run_in_threadpool(found.cancel)
        return JSONResponse(_seen(found))

    @router.get(
        "/jobs/{id}/images/{number}",
        tags=["native"],
        response_class=Response,
        responses={
            200: {"description": "The file.", "content": {media: {} for media in MEDIA_TYPES.values()}}
        },
    )
    async def image(id: str, number: int, http: Request, format: str = "png") -> Response:
        """One finished image of a job, from 0, as a file."""
        found, format = service.job(id, http), format_of(format)
        if found.error:
            found.to_fetch.clear()
            raise found.error
        if not 0 <= number < len(found.images):
            raise _nothing(f"the job has no image {number} yet; it is {found.state}", "no_image")
        file = (await service.files(found, format))[number]
        found.to_fetch.discard(number)
        if file.error:
            raise file.error
        return Response(file.data, media_type=MEDIA_TYPES[format])

    @router.get(
        "/jobs/{id}/preview",
        tags=["native"],
        response_class=Response,
        responses={200: {"description": "A PNG file.", "content": {"image/png": {}}}},
    )
    async def preview(id: str, http: Request) -> Response:
        """What a job's images look like so far."""
        found = service.job(id, http)
        if found.preview is None:
            raise _nothing("there is no preview now: running jobs have one, if asked for", "no_preview")
        return Response(found.preview, media_type="image/png")

    @router.get(
        "/jobs/{id}/events",
        tags=["native"],
        response_class=StreamingResponse,
        responses={200: {"description": "Server-sent events.", "content": {"text/event-stream": {}}}},
    )
    async def events(id: str, http: Request) -> Response:
        """A job's progress, previews and end as server-sent events; "end" is the last."""
        return StreamingResponse(_events(service.job(id, http)), media_type="text/event-stream")

    @router.get("/models", tags=["native"], responses=_answers("The models, the default one first."))
    async def models() -> Response:
        """The models by name: which is in memory, and what each does."""
        return JSONResponse({"models": _models(service)})

    @router.get("/health", tags=["operation"], responses=_answers("Images can be made."))
    async def health() -> Response:
        """Whether images can be made at all."""
        if not service.engine.healthy:
            raise ServiceError("the service cannot make images any more", status=503, code="broken")
        return JSONResponse({"status": "ok"})

    @router.get("/ready", tags=["operation"], responses=_answers("Requests are taken."))
    async def ready() -> Response:
        """Whether requests are taken: not while the service ends."""
        if not service.engine.ready:
            raise ServiceError("the service takes no requests now", status=503, code="not_ready")
        return JSONResponse({"status": "ready"})

    for path, route in (("/health", health), ("/ready", ready)):  # some load balancers ask by HEAD
        router.add_api_route(path, route, methods=["HEAD"], include_in_schema=False)

    @router.get(
        "/metrics",
        tags=["operation"],
        response_class=Response,
        responses={200: {"description": "Prometheus' text format.", "content": {"text/plain": {}}}},
    )
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(await run_in_threadpool(service.metrics.text), media_type=CONTENT_TYPE)

    return router


def _state(job: Job) -> dict[str, Any]:
    """A job without its images."""
    found = {
        "id": job.id,
        "model": job.model,
        "state": job.state,
        "progress": round(job.progress, 4),
        "position": job.position,
        "seconds": round(job.seconds, 3),
        "images": [],
    }
    return found | (error_body(job.error) if job.error else {})


def _seen(job: Job) -> dict[str, Any]:
    """A job without its images, for its client, who has to come for nothing more where it has failed."""
    found = _state(job)
    if "error" in found:
        job.to_fetch.clear()
    return found


def _finished(job: Job, files: tuple[OutputFile, ...], format: str) -> dict[str, Any]:
    return _state(job) | {"images": [_image(file, format) for file in files]}


def _image(file: OutputFile, format: str) -> dict[str, Any]:
    """A finished image. What is recorded in its file about the service's files stays there."""
    settings = without_folders(file.image.request.settings())
    found = {
        "seed": file.image.seed,
        "nsfw_content_detected": file.flagged,
        "format": format,
        "image": None if file.data is None else base64_of(file.data),
        "settings": settings,
    }
    return found | (error_body(file.error) if file.error else {})


def _nothing(message: str, code: str) -> ServiceError:
    return ServiceError(message, status=404, code=code)


def _models(service: Service) -> list[dict[str, Any]]:
    models = service.engine.models
    loaded = models.loaded
    return [
        {
            "name": name,
            "default": name == models.default,
            "loaded": name in loaded,
            "task": models.task(name),
            "size": models.reader(name).described.native_size,
        }
        for name in models.names
    ]


async def _events(job: Job) -> AsyncIterator[str]:
    """Server-sent events of a job: the newest state whenever it has changed, until its end."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def on_change(_: Job) -> None:
        with suppress(RuntimeError):  # the event loop has ended before the job
            loop.call_soon_threadsafe(changed.set)

    end, shown = job.listen(on_change), None
    try:
        while True:
            changed.clear()
            over, preview = job.over, job.preview
            yield _event("end" if over else "progress", _seen(job))
            if over:
                return
            if preview is not None and preview is not shown:
                shown = preview
                yield _event("preview", {"image": base64_of(preview)})
            while not changed.is_set():
                try:
                    await asyncio.wait_for(changed.wait(), BEAT)
                except TimeoutError:
                    yield ": waiting\n\n"
    finally:
        end()


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


# What the OpenAPI page says

ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"code": {"type": "string"}, "message": {"type": "string"}},
            "required": ["code", "message"],
        }
    },
    "required": ["error"],
}
IMAGE = {
    "type": "object",
    "properties": {
        "seed": {"type": "integer"},
        "nsfw_content_detected": {"type": "boolean"},
        "format": {"enum": list(MEDIA_TYPES)},
        "image": {"type": ["string", "null"], "contentEncoding": "base64"},
        "settings": {"type": "object"},
        **ERROR["properties"],
    },
}
JOB = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "model": {"type": "string"},
        "state": {"enum": ["queued", "running", "finished", "failed", "cancelled"]},
        "progress": {"type": "number", "minimum": 0, "maximum": 1},
        "position": {"type": "integer", "description": "images that are ahead of it, about"},
        "seconds": {"type": "number"},
        "images": {"type": "array", "items": IMAGE},
        **ERROR["properties"],
    },
    "required": ["id", "model", "state", "progress", "position", "images"],
}


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "A request that cannot be served, and why.", **_content(ERROR)},
    "5XX": {"description": "A service that cannot serve it now, and why.", **_content(ERROR)},
}


def _answers(description: str, schema: dict[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": description, **_content(schema or {"type": "object"})}}


def _body_schema(service: Service) -> dict[str, Any]:
    """The request body of POST /generate: a request's settings, and what concerns the job."""
    schema, options = request_schema(service.options), service.options
    schema["properties"] |= {
        "model": {
            "type": "string",
            "enum": list(service.engine.models.names),
            "description": "the model by its name",
            "default": service.engine.models.default,
        },
        "timeout": {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 86_400,
            "description": f"seconds after which the request is given up; at most {options.deadline:g}",
        },
        "wait": {
            "type": "boolean",
            "default": True,
            "description": "answer with the images; false: at once, with the id of a job",
        },
        "preview": {"type": "boolean", "default": False, "description": "have previews drawn"},
        "count": {
            "type": "integer",
            "minimum": 1,
            "maximum": options.max_images,
            "default": 1,
            "description": "images to make; image k, from 0, has the seed and the variation seed plus k",
        },
        "format": {"type": "string", "enum": list(MEDIA_TYPES), "default": "png"},
    }
    schema["required"] = ["prompt"]
    return {"required": True, "content": {"application/json": {"schema": schema}}}
