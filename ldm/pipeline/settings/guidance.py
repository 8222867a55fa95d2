"""Guidance beyond the classifier-free one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ldm.errors import FieldError
from ldm.fields import setting, settings_of

GROUP = "further guidance"
CFG_PP_SAMPLERS = ("ddim", "ddpm", "euler", "euler_ancestral")  # whose steps are Euler's
CFG_PP_SCALE = 0.6  # the paper's for what is 7.5 without it


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class GuidanceSettings:
    """Guidance beyond the classifier-free one."""

    cfg_pp: bool = setting(
        False,
        "CFG++: --scale is 0 to 1, the default 0.6, and noise is taken from the unconditional prediction",
        group=GROUP,
        recorded=False,
    )
    apg_eta: float = setting(
        1.0,
        "adaptive projected guidance: the share that is left of what oversaturates; 0 for large scales",
        low=0,
        high=1,
        group=GROUP,
        recorded=False,
    )
    apg_norm: float = setting(
        0.0,
        "adaptive projected guidance: longest difference of the two predictions; longer ones are shortened, "
        "0: no limit",
        low=0,
        high=1e6,
        group=GROUP,
        recorded=False,
    )
    apg_momentum: float = setting(
        0.0,
        "adaptive projected guidance: weight of the steps before, negative as a rule",
        low=-0.99,
        high=0.99,
        group=GROUP,
        recorded=False,
    )
    mimic_scale: float | None = setting(
        None,
        "dynamic thresholding: keep the range that latents have at this guidance scale",
        low=0,
        high=1e4,
        group=GROUP,
        recorded=False,
    )
    threshold_percentile: float = setting(
        1.0,
        "dynamic thresholding: cut off what lies beyond this share of the latents",
        low=0.5,
        high=1,
        group=GROUP,
        recorded=False,
    )

    @property
    def projects(self) -> bool:
        """Whether adaptive projected guidance changes anything."""
        return (self.apg_eta, self.apg_norm, self.apg_momentum) != (1.0, 0.0, 0.0)

    @property
    def guides_further(self) -> bool:
        """Whether predictions are combined otherwise than by classifier-free guidance."""
        return self.projects or self.mimic_scale is not None

    @property
    def guided(self: Any) -> bool:
        """Whether there is an unconditional prediction; `scale` has to be known."""
        return self.scale != 1.0 or self.cfg_pp

    def check_further_guidance(self: Any) -> None:
        """FieldError for values that do not go together."""
        if self.threshold_percentile != 1.0 and self.mimic_scale is None:
            raise FieldError("{threshold_percentile} is for {mimic_scale}; give that, too")
        if self.parts and (self.guides_further or self.cfg_pp):
            names = ("apg_eta", "apg_norm", "apg_momentum", "mimic_scale", "cfg_pp")
            defaults = settings_of(type(self))
            given = [name for name in names if getattr(self, name) != defaults[name].default]
            raise FieldError("{" + given[0] + "} with a prompt of several parts (AND): leave one of them out")
        if self.cfg_pp and self.sampler not in CFG_PP_SAMPLERS:
            raise FieldError(
                "{cfg_pp} with {which}: CFG++ is for samplers that take Euler's steps: {choices}",
                which=self.sampler,
                choices=", ".join(CFG_PP_SAMPLERS),
            )
        if self.cfg_pp and self.s_churn:
            raise FieldError("{cfg_pp} with {s_churn}: its scales are for steps that add no noise")
        if self.cfg_pp and self.scale is not None and not 0 <= self.scale <= 2:
            raise FieldError(
                "{cfg_pp} with {scale} {value:g}: its scale is 0 to 1, at most 2; 0.6 is like 7.5 without it",
                value=self.scale,
            )
