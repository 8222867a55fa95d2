"""What the page can make: each task is one of the commands, with its inputs and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.pipeline.request import DEPTH, INIT, MASK, UPSCALE
from ldm.pipeline.settings.control import CONTROL
from ldm.pipeline.settings.passes import PASSES


@dataclass(frozen=True)
class Task:
    """A way to make an image.

    `does` is what its model has to be able to do, a key of `ldm.weights.loading.ABLE`. `groups` are the
    groups of settings that it has besides text to image's, `lacks` the groups of those that it does not
    have, `leave_out` single settings that it lacks, and `defaults` what the command sets where nothing is
    given.
    """

    name: str
    title: str
    command: str
    does: str = "text"
    groups: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


TEXT = Task("text", "Text to image", "txt2img.py")
IMAGE = Task("image", "Image to image", "img2img.py", groups=(INIT,), defaults={"strength": 0.75})
PAINT = Task("inpaint", "Inpaint", "inpaint.py", "inpaint", (INIT, MASK), defaults={"strength": 1.0})
OVER_DEPTH = Task(
    "depth", "Depth to image", "depth2img.py", "depth", (INIT, DEPTH), defaults={"strength": 0.9}
)
ENLARGE = Task(
    "upscale",
    "Upscale",
    "upscale.py",
    "upscale",
    (INIT, UPSCALE),
    (CONTROL,),
    # an image is enlarged from pure noise, and in tiles where that needs them
    ("strength", "tiling", "panorama", *PASSES),
    {"noise_level": 20, "prompt": "a high quality professional photograph"},
)
TASKS = {task.name: task for task in (TEXT, IMAGE, PAINT, OVER_DEPTH, ENLARGE)}
EXTRA_GROUPS = (INIT, MASK, DEPTH, UPSCALE)  # which some tasks add to those of text to image
