"""PLMSSampler as the original's notebooks call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler, ScoreCorrector

if TYPE_CHECKING:
    from ldm.sampling.denoiser import Conditioning

# of eps, newest first; as if steps were even (Liu et al. 2022, https://arxiv.org/abs/2202.09778, eq. 9)
WEIGHTS = ((), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class PLMSSampler(DDIMSampler):
    """DDIMSampler's calls with the PLMS update; eta must be 0."""

    name = "plms"
    plms_sampling = DDIMSampler.ddim_sampling

    def _step(
        self,
        x: Tensor,
        cond: Conditioning,
        t: Tensor,
        index: int,
        t_next: Tensor,
        history: list[Tensor],
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        x, pred_x0, eps = self.p_sample_plms(x, cond, t, index, old_eps=history, t_next=t_next, **options)
        history[:] = [*history, eps][-3:]
        return x, pred_x0

    @torch.no_grad()
    def p_sample_plms(
        self,
        x: Tensor,
        c: Conditioning,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning | None = None,
        old_eps: Sequence[Tensor] | None = None,
        t_next: Tensor | None = None,
        dynamic_threshold: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step from timestep t: (the next latents, the prediction of x0, this step's eps).

        `old_eps` are those of the up to three steps before, oldest first. Without them the step is Heun's,
        and the model is called a second time, at `t_next`.
        """
        predict = partial(
            self._predict_eps,
            cond=c,
            uncond=unconditional_conditioning,
            scale=unconditional_guidance_scale,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
        )
        follow = partial(
            self._follow,
            index=index,
            repeat_noise=repeat_noise,
            use_original_steps=use_original_steps,
            quantize_denoised=quantize_denoised,
            temperature=temperature,
            noise_dropout=noise_dropout,
            dynamic_threshold=dynamic_threshold,
        )
        eps = predict(x, t)
        if not old_eps:
            x_next, _ = follow(x, eps)
            along = (eps + predict(x_next, t_next)) / 2
        else:
            newest_first = [eps, *reversed(old_eps[-3:])]
            weights = WEIGHTS[len(newest_first) - 1]
            along = sum(weight * e for weight, e in zip(weights, newest_first, strict=True))
        return *follow(x, along), eps
