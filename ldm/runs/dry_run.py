"""`--dry_run`: the images that a run would make, printed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ldm.log import one_line, printable
from ldm.runs.plan import Plan

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline


def print_plan(pipeline: Pipeline, plan: Plan, as_json: bool) -> None:
    """Number, seed, size and texts of each image, a line each, or all of its settings as JSON."""
    for k, request in enumerate(plan.requests):
        height, width = pipeline.image_size(request)
        if as_json:
            print(json.dumps({"image": k} | request.settings() | {"height": height, "width": width}))
            continue
        texts = one_line(request.prompt)
        if request.negative_prompt:
            texts += f"  negative: {one_line(request.negative_prompt)}"
        print(f"{k}  seed {request.seed}  {width}x{height}  {printable(texts)}")
