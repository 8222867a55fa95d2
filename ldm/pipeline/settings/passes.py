"""A second pass at a larger size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ldm.errors import FieldError
from ldm.fields import setting

PASSES = ("hires", "hires_strength", "hires_steps", "hires_upscaler")
LATENT, LANCZOS = "latent", "lanczos"
A1111_NAMES = {LATENT: "Latent", LANCZOS: "Lanczos"}
STRENGTH = 0.5


def a1111_second_pass(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a second pass has another name or value in the web UI's text."""
    upscaler, strength = settings["hires_upscaler"], settings.get("strength")
    return {
        "Denoising strength": settings["hires_strength"] if strength is None else strength,
        "Hires upscaler": A1111_NAMES.get(upscaler) or PurePath(upscaler).stem,
    }


def second_pass(settings: Mapping[str, Any], strength: float | None, resize: str) -> dict[str, Any]:
    """The settings of a second pass by those that the web UI's text gives directly, its strength and the
    size that it has in place of a factor, "1024x768" or "".
    """
    ours, upscaler = {name: value for value, name in A1111_NAMES.items()}, settings.get("hires_upscaler")
    hires = settings.get("hires")
    if hires is None:
        hires = _factor((settings.get("width"), settings.get("height")), resize)
    found = {"hires": hires, "hires_strength": strength, "hires_upscaler": ours.get(upscaler, upscaler)}
    return {name: value for name, value in found.items() if value is not None}


def _factor(size: tuple[int | None, int | None], resize: str) -> float | None:
    """By what a size is to be multiplied to become "1024x768", where a side of 0 follows the other one.

    None if no factor does that, or nothing is known of a size.
    """
    found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", resize)
    if found is None:
        return None
    sides = [(int(wanted), side) for wanted, side in zip(found.groups(), size, strict=True) if int(wanted)]
    if not sides or not all(side for _, side in sides):
        return None
    factor = sides[0][0] / sides[0][1]
    # sizes are rounded to multiples of 8, so that less is no difference
    return factor if all(abs(factor * side - wanted) < 8 for wanted, side in sides) else None


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class PassSettings:
    """A second pass at a larger size."""

    hires: float | None = setting(
        None,
        "draw the image first, then once more over its enlargement by this factor, 2 for instance",
        low=1,
        high=16,
        metavar="FACTOR",
        group="size",
        a1111="Hires upscale",
        recorded=False,
    )
    hires_strength: float | None = setting(
        None,
        "with --hires: share of the steps that run in the second pass",
        low=0,
        high=1,
        group="size",
        default_text=str(STRENGTH),
        recorded=False,
    )
    hires_steps: int | None = setting(
        None,
        "with --hires: steps of which the second pass runs its share",
        low=1,
        high=1000,
        metavar="N",
        group="size",
        default_text="as many as the first pass",
        a1111="Hires steps",
        recorded=False,
    )
    hires_upscaler: str | None = setting(
        None,
        "with --hires: what enlarges: latent (bilinear, the latents), lanczos (the pixels), or the FILE of a "
        "pixel upscaler such as ESRGAN",
        metavar="NAME",
        group="size",
        default_text=LATENT,
        a1111="Hires upscaler",
        recorded=False,
    )

    def check_passes(self: Any) -> None:
        """FieldError for values that do not go together; sets the defaults of a second pass."""
        if self.hires is None:
            for name in PASSES:
                if (value := getattr(self, name)) is not None:
                    raise FieldError("{" + name + "} {value} without {hires}", value=value)
            return
        if self.hires <= 1:
            raise FieldError(
                "{hires} {factor:g}: the second pass is for a larger image; give a factor above 1",
                factor=self.hires,
            )
        for name in ("mask", "outpaint", "noise_level"):
            if getattr(self, name) is not None:
                advice = "; {crop_to_mask} works at a larger size than the image's" * (name == "mask")
                raise FieldError("{hires} with {" + name + "}: such an image has one pass" + advice)
        if self.rng == "compvis":
            raise FieldError("{hires} is for {rng} image: the original had no second pass")
        if self.hires_upscaler == "":
            raise FieldError("{hires_upscaler} is empty: give latent, lanczos or a file")
        if self.hires_steps is not None and (self.timesteps or self.sigmas):
            listed = "timesteps" if self.timesteps else "sigmas"
            raise FieldError(
                "{hires_steps} {steps} with {" + listed + "}, which both passes follow; leave one out",
                steps=self.hires_steps,
            )
        if self.hires_strength is None:
            object.__setattr__(self, "hires_strength", STRENGTH)
        if self.hires_upscaler is None:
            object.__setattr__(self, "hires_upscaler", LATENT)

    @property
    def second_steps(self: Any) -> int:
        """The steps that the second pass runs: hires_strength x hires_steps, rounded down; 0 without one."""
        if self.hires is None:
            return 0
        return int(round(self.hires_strength * (self.hires_steps or self.steps), 6))
