"""What is recorded of a run: all that its files depend on, compared when it is taken up again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.images.watermark import NO_WATERMARK
from ldm.pipeline import control, passes
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import ImageRequest
from ldm.runs.options import RunOptions
from ldm.weights.hashes import quick_hash
from ldm.weights.vae import vae_file

PROMPTS = 20_000  # characters of a grid's prompts: in ASCII both of its texts fit into a JPEG file


def recorded_settings(
    pipeline: Pipeline, first: ImageRequest, options: RunOptions, facts: dict[str, Any]
) -> dict[str, Any]:
    """All that the files of a run depend on, but for what its other lines have of their own.

    The checkpoint goes by its quick hash: the whole file's may not be known yet.
    """
    names = ("n_iter", "no_metadata", "format", "quality", "filename")
    return {
        **{name: getattr(options, name) for name in names},
        **({"save_depth": True} if options.save_depth else {}),
        **({"save_control": True} if options.save_control else {}),
        **line_settings(first, pipeline),
        **facts,
        "config": str(pipeline.files.config),
        "checkpoint": str(pipeline.files.weights),
        "config content": content_hash(pipeline.config),
        "model_hash": quick_hash(pipeline.files.weights),
        "checkpoint size": pipeline.files.weights.stat().st_size,
        "weights": pipeline.weights,
        "vae": pipeline.vae,
        "vae_hash": pipeline.vae and quick_hash(vae_file(pipeline.vae)),
        "precision": pipeline.precision,
        "safety": pipeline.safety_mode,
        **pipeline.options.recorded(),
    }


def content_hash(config: Mapping[str, Any]) -> str:
    """Sixteen hex digits that distinguish the content of a model's configs, wherever they lie."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


def line_settings(request: ImageRequest, pipeline: Pipeline) -> dict[str, Any]:
    """What an image depends on, the content of its init image, mask, depth map and ControlNets among it."""
    images = pipeline.init_pixels
    loras = pipeline.adapters.digests(request) if request.loras else {}
    files = control.digests(images, request) | passes.digests(request)
    inversions = pipeline.prompts.digests(request.reading) if request.embedding else {}
    return request.settings() | images.digests(request) | files | loras | inversions


def recorded_lines(pipeline: Pipeline, requests: Sequence[ImageRequest]) -> list[dict[str, Any]]:
    """What each line of a round has otherwise than the first one; None for what it lacks.

    The first one's own seed is beside the run's, which `recorded_settings` has.
    """
    first = requests[0]
    before = line_settings(first, pipeline)
    lines = [{} if first.seed is None else {"seed": first.seed}]
    for request in requests[1:]:
        own = line_settings(request, pipeline)
        names = dict.fromkeys([*before, *own])
        lines.append({name: own.get(name) for name in names if own.get(name) != before.get(name)})
    return lines


def grid_settings(
    pipeline: Pipeline, requests: Sequence[ImageRequest], facts: dict[str, Any], seed: int
) -> dict[str, Any]:
    """The settings of a grid of these images: the first one's, under all prompts, with the first watermark.

    The images record their own prompts, so that longer ones than `PROMPTS` in all are cut off.
    """
    prompts = "\n".join(dict.fromkeys(request.prompt for request in requests))
    if len(prompts) > PROMPTS:
        prompts = prompts[: PROMPTS - 1] + "…"
    marks = [request.watermark for request in requests if request.watermark != NO_WATERMARK]
    own = {"seed": seed, "prompt": prompts, "watermark": marks[0] if marks else NO_WATERMARK}
    return facts | pipeline.facts | requests[0].settings() | own
