"""What a request asks for beside classifier-free guidance, as a denoiser takes it for one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ldm.sampling import Trajectory, catalogue
from ldm.sampling.guidance import AdaptiveProjection, FurtherGuidance, plus_plus

if TYPE_CHECKING:
    from ldm.pipeline.request import ImageRequest


def further(request: ImageRequest) -> FurtherGuidance | None:
    """A new one for each run; None if the request asks for none."""
    if not request.guides_further:
        return None
    projection = None
    if request.projects:
        projection = AdaptiveProjection(request.apg_eta, request.apg_norm, request.apg_momentum)
    return FurtherGuidance(projection, request.mimic_scale, request.threshold_percentile)


def scale_factor(request: ImageRequest, run: Trajectory) -> Callable[[float], float] | None:
    """The factor on the guidance scale by sigma, for CFG++."""
    if not request.cfg_pp:
        return None
    eta = 1.0 if request.sampler == "ddpm" else catalogue.SAMPLERS[request.sampler].options.get("eta", 0.0)
    return plus_plus(run.sigmas, request.options.get("eta", eta))
