"""Images that continue at their edges, and images wider than the model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ldm.errors import FieldError
from ldm.fields import setting

AXES = {"none": "", "x": "x", "y": "y", "both": "xy"}


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class SeamSettings:
    """Images that continue at their edges, and images wider than the model's."""

    tiling: str = setting(
        "none",
        "seamless images: x continues from the right edge to the left one, y from the bottom to the top",
        choices=tuple(AXES),
        group="size",
        recorded=False,
    )
    panorama: bool = setting(
        False,
        "draw a large image in overlapping windows of the model's own size, averaged at each step",
        group="size",
        recorded=False,
    )

    def check_seams(self: Any) -> None:
        """FieldError for values that do not go together."""
        for name, given in (("tiling", self.tiling != "none"), ("panorama", self.panorama)):
            if given and self.noise_level is not None:
                raise FieldError("{" + name + "} with {noise_level}: an image is enlarged as it is")
        for name in ("crop_to_mask", "outpaint"):
            if self.tiling != "none" and getattr(self, name) is not None:
                raise FieldError("{tiling} with {" + name + "}: what is drawn has other edges than the image")
