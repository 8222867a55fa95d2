"""Where results that can be computed again are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`stable-diffusion-toolkit` in $XDG_CACHE_HOME, by default in ~/.cache. It need not be there yet.

    RuntimeError where there is neither the variable nor a home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "stable-diffusion-toolkit"
