"""The engine: requests for images, a pipeline that makes them. No argparse, no output folders, no stdout.

torch is imported when `Pipeline` is first asked for, so that requests can be checked without it.
"""

from importlib import import_module
from typing import Any

_PLACES = {
    "Control": "settings.control",
    "GeneratedImage": "generated",
    "ImageRequest": "request",
    "Pipeline": "pipeline",
    "RuntimeOptions": "options",
}

__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"ldm.pipeline.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
