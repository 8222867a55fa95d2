"""POST /score: AzureML's online contract, of which `ldm.service.table` has the tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from ldm.errors import InputError
from ldm.images.metadata import encode_image
from ldm.pipeline.request import ImageRequest
from ldm.service.answers import base64_of, json_answer
from ldm.service.errors import BadRequest, LimitExceeded, ServiceError, about_image, renamed, reworded
from ldm.service.inputs import json_object
from ldm.service.schema import request_of
from ldm.service.table import COLUMNS, THEIRS, Table, answer, in_words

SCALAR = {"type": ["string", "number", "boolean", "null"]}
SCHEMA = {
    "type": "object",
    "required": ["input_data"],
    "properties": {
        "input_data": {
            "type": "object",
            "required": ["columns", "data"],
            "properties": {
                "columns": {"type": "array", "items": {"type": "string"}, "examples": [list(COLUMNS)]},
                "data": {
                    "type": "array",
                    "items": {"anyOf": [{"type": "string"}, {"type": "array"}, {"type": "object"}]},
                    "description": "a text for each line where there is one column, else a list of values",
                },
                "index": {"type": ["array", "null"], "items": {"type": ["string", "number"]}},
                "parameters": {
                    "type": ["object", "null"],
                    "description": "num_inference_steps, guidance_scale (guidance only above 1), settings",
                    "examples": [{"num_inference_steps": 50, "guidance_scale": 7.5}],
                },
            },
            "additionalProperties": False,
        },
        "params": {"type": ["object", "null"], "maxProperties": 0, "description": "MLflow's; empty here"},
    },
    "additionalProperties": False,
    "example": {
        "input_data": {
            "columns": ["prompt"],
            "data": ["a red cube"],
            "index": [0],
            "parameters": {"num_inference_steps": 20, "guidance_scale": 7.5},
        }
    },
}
JSON_BODY = {"application/json": {"schema": SCHEMA}}
ANSWERS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["prompt", "generated_image", "nsfw_content_detected"],
        "properties": {
            "prompt": {"type": "string"},
            "generated_image": {"type": "string", "contentEncoding": "base64"},
            "nsfw_content_detected": {"type": "boolean"},
        },
    },
}


def routes(service: Any) -> APIRouter:
    """The routes of the contract for a `Service`."""
    router = APIRouter(tags=["AzureML"])

    @router.post(
        "/score",
        openapi_extra={"requestBody": {"required": True, "content": JSON_BODY}},
        responses={200: {"content": {"application/json": {"schema": ANSWERS}}}},
    )
    async def score(http: Request, model: str | None = None) -> Response:
        """An image for each line of a table of prompts, as AzureML's endpoints answer."""
        content = await json_object(http)
        async with service.room(http):
            table, requests = await run_in_threadpool(requests_of, content, service, model)
            with in_lines():
                job = await service.submit(requests, http, model=model)
        with in_lines():
            await service.finish(job, http)
        files = await service.files(job)
        return await json_answer(answers_of, table, requests, files)

    return router


def answers_of(table: Table, requests: list[ImageRequest], files: Any) -> list[dict[str, Any]]:
    """The reply: the part of each line with its image. ServiceError that names the line."""
    found = []
    for k, (request, file) in enumerate(zip(requests, files, strict=True)):
        with in_lines(), about_image(k):
            found.append(answer(request.prompt, base64_of(png_of(file)), file.flagged, table.label(k)))
    return found


def requests_of(content: Any, service: Any, model: str | None) -> tuple[Table, list[ImageRequest]]:
    """The table that a body has, and the request of each of its lines. ServiceError that names the line."""
    try:
        table = Table.of(content)
    except InputError as error:
        raise BadRequest(in_words(error)) from error
    if not len(table):
        raise BadRequest("data has no lines")
    most = service.options.max_images
    if len(table) > most:
        raise LimitExceeded(f"{len(table)} lines: a request may have {most} at most")
    task = service.engine.models.task(model or service.engine.models.default)
    return table, [_request(table, k, service.options, task) for k in range(len(table))]


def _request(table: Table, k: int, options: Any, task: str) -> ImageRequest:
    with in_lines(), about_image(k):
        try:
            return request_of(table.values(k), options, task=task)
        except InputError as error:
            raise BadRequest(in_words(error)) from error


@contextmanager
def in_lines() -> Iterator[None]:
    """Inside, errors name settings as the contract does, and the table's line where they are about one."""
    try:
        yield
    except ServiceError as error:
        found = renamed(error, THEIRS)
        if error.number is not None:
            found = reworded(found, f"data[{error.number}]: {found.message}")
        raise found from error


def png_of(file: Any) -> bytes:
    """The contract's image of an `OutputFile`: a black one where unwanted content was found. ServiceError."""
    pixels = file.image.pixels
    if file.flagged and (file.refused or pixels.any()):  # else the safety checker has made it black
        return encode_image(pixels * 0, None)
    if file.error:
        raise file.error
    return file.data


def error_body(error: ServiceError) -> dict[str, Any]:
    """An error as MLflow's scoring server, which AzureML runs, has it."""
    return {"error_code": error.code.upper(), "message": error.message}
