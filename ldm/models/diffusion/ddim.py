"""DDIMSampler as the original's notebooks call it.

Plain sampling runs on `ldm.sampling`, as the commands do. What only notebooks ask for (masks, score
correctors, tempered noise, image to image in two calls) has a loop of its own here, in the original's terms:
alphas instead of sigmas, and a draw of noise in every step, which eta 0 multiplies by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.sampling import Denoiser, default_trajectory, sample
from ldm.sampling.denoiser import stack
from ldm.sampling.noise import CompvisNoise
from ldm.sampling.schedule import leading_timesteps

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.sampling.denoiser import Conditioning

MODEL_SCHEDULE = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"),
    *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"),
    *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
)

Intermediates = dict[str, list[Tensor]]


class ScoreCorrector(Protocol):
    """Changes the predicted noise eps [b, c, h, w], for instance by a classifier's gradient."""

    def modify_score(
        self, model: LatentDiffusion, eps: Tensor, x: Tensor, t: Tensor, c: Conditioning, **kwargs: Any
    ) -> Tensor: ...


class GlobalNoise(CompvisNoise):
    """Draws from the generator that `torch.manual_seed` seeds for a device, whatever device that is."""

    def __init__(self, shape: Sequence[int], device: torch.device, start: Tensor | None):
        super().__init__(None, shape, start)
        self.device = device

    def draw(self) -> Tensor:
        return torch.randn(self.shape, device=self.device)


class RecordingDenoiser(Denoiser):
    """Keeps in `levels`, at the model's scale, the latents it was last given at each of those sigmas.

    A sampler's callback is given predictions only.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.levels: dict[float, Tensor | None] = {}

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        if sigma in self.levels:
            self.levels[sigma] = x * (1.0 + sigma**2) ** -0.5
        return super().__call__(x, sigma)


def is_logged(index: int, count: int, log_every_t: int) -> bool:
    """Whether the intermediates have the step whose place in the ascending grid of `count` is `index`."""
    return index % log_every_t == 0 or index == count - 1


class DDIMSampler:
    """Draws from torch's global generator as often as the original: a seeded notebook keeps its noise.

    `schedule`, `verbose` and `normals_sequence` are accepted and have no effect, as in the original. Latents
    are [b, c, h, w], timesteps int64 [b]; an `index` is a place in the ascending `ddim_timesteps`.
    """

    name = "ddim"

    def __init__(self, model: LatentDiffusion, schedule: str = "linear"):
        self.model = model
        self.schedule = schedule
        self.ddpm_num_timesteps = model.num_timesteps

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Set the grid, ascending, as `ddim_timesteps`, `ddim_alphas`, `ddim_alphas_prev`, `ddim_sigmas` and
        `ddim_sqrt_one_minus_alphas`, each [ddim_num_steps], and the model's schedule under its own names.
        """
        if ddim_discretize != "uniform":
            raise ValueError(f"ddim_discretize {ddim_discretize!r} is not known; known: uniform")
        if ddim_eta and self.name == "plms":
            raise ValueError(f"ddim_eta {ddim_eta} with PLMS: it must be 0")
        for name in MODEL_SCHEDULE:
            setattr(self, name, getattr(self.model, name).float())
        self.ddim_timesteps = t = leading_timesteps(ddim_num_steps, self.ddpm_num_timesteps)[::-1].copy()
        every = self.alphas_cumprod.double().cpu().numpy()
        alphas = every[t]
        # as in the original the last step leads to timestep 0 and leaves its little noise
        prev = np.append(every[0] if t[0] > 0 else 1.0, alphas[:-1])
        self.ddim_alphas = self._tensor(alphas)
        self.ddim_alphas_prev = self._tensor(prev)
        self.ddim_sqrt_one_minus_alphas = self._tensor(np.sqrt(1.0 - alphas))
        self.ddim_sigmas = self._tensor(step_noise(alphas, prev, ddim_eta))
        self.ddim_sigmas_for_original_num_steps = self._tensor(
            step_noise(every, np.append(1.0, every[:-1]), ddim_eta)
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.model.device)

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Conditioning | None = None,
        callback: Callable[[int], None] | None = None,
        normals_sequence: Any = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning | None = None,
        dynamic_threshold: float | None = None,
        ucg_schedule: Sequence[float] | None = None,
    ) -> tuple[Tensor, Intermediates]:
        """Latents after S steps from `x_T` or fresh noise, and `{"x_inter": […], "pred_x0": […]}`.

        The intermediates are the start, then latents and predictions after the first step, the last one and
        every `log_every_t`-th before that. After step i, counted from 0, come `callback(i)` and
        `img_callback(pred_x0, i)`.

        mask: 1 where the latents are to stay `x0`, noised for each step, 0 where they are free
        temperature, noise_dropout: factor of each step's noise; the share of its values that become 0
        score_corrector: its `modify_score(model, eps, x, t, conditioning, **corrector_kwargs)` is the new eps
        quantize_x0: take each prediction to the nearest entries of the first stage's codebook
        dynamic_threshold: the most root mean square of a prediction (Stability's PLMS has it)
        ucg_schedule: the guidance scale of each step (Stability)
        """
        self.make_schedule(S, ddim_eta=eta)
        shape = (batch_size, *shape)
        variants = {
            "quantize_x0": quantize_x0,
            "mask": mask is not None,
            "temperature": temperature != 1.0,
            "noise_dropout": noise_dropout != 0.0,
            "score_corrector": score_corrector is not None,
            "dynamic_threshold": dynamic_threshold is not None,
            "ucg_schedule": ucg_schedule is not None,
        }
        given = [name for name, is_given in variants.items() if is_given]
        if given and self.name == "dpmpp_2m":
            raise ValueError(f"{', '.join(given)} with DPM-Solver: only DDIM and PLMS can do that")
        if given:
            return self.ddim_sampling(
                conditioning,
                shape,
                x_T=x_T,
                callback=callback,
                quantize_denoised=quantize_x0,
                mask=mask,
                x0=x0,
                img_callback=img_callback,
                log_every_t=log_every_t,
                temperature=temperature,
                noise_dropout=noise_dropout,
                score_corrector=score_corrector,
                corrector_kwargs=corrector_kwargs,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
                dynamic_threshold=dynamic_threshold,
                ucg_schedule=ucg_schedule,
            )

        start = self._start(shape, x_T)
        predictions = [start]

        def on_step(step: int, pred_x0: Tensor) -> None:
            if is_logged(S - step, S, log_every_t):
                predictions.append(pred_x0)
            if callback:
                callback(step - 1)
            if img_callback:
                img_callback(pred_x0, step - 1)

        denoiser = RecordingDenoiser(
            self.model, conditioning, unconditional_conditioning, unconditional_guidance_scale
        )
        run = default_trajectory(denoiser, self.name, S)
        logged = [step for step in range(1, S) if is_logged(S - step, S, log_every_t)]
        denoiser.levels = {run.sigmas[step]: None for step in logged}
        noise = GlobalNoise(shape, self.model.device, start)
        options = {"eta": eta} if self.name == "ddim" else {}
        latents = sample(denoiser, self.name, run, noise, options=options, callback=on_step)
        return latents, {"x_inter": [start, *denoiser.levels.values(), latents], "pred_x0": predictions}

    def _start(self, shape: Sequence[int], x_T: Tensor | None) -> Tensor:
        return torch.randn(tuple(shape), device=self.model.device) if x_T is None else x_T

    @torch.no_grad()
    def ddim_sampling(
        self,
        cond: Conditioning,
        shape: Sequence[int],
        x_T: Tensor | None = None,
        ddim_use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        log_every_t: int = 100,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning | None = None,
        dynamic_threshold: float | None = None,
        ucg_schedule: Sequence[float] | None = None,
    ) -> tuple[Tensor, Intermediates]:
        """`sample` after a `make_schedule`; with `timesteps` only on the grid's first `timesteps` - 1, as in
        the original.
        """
        grid = self._grid(ddim_use_original_steps)
        if timesteps is not None:
            grid = grid[:timesteps] if ddim_use_original_steps else grid[: min(timesteps, len(grid)) - 1]
        return self._run(
            self._start(shape, x_T),
            cond,
            grid,
            callback=callback,
            img_callback=img_callback,
            mask=mask,
            x0=x0,
            log_every_t=log_every_t,
            scales=ucg_schedule,
            use_original_steps=ddim_use_original_steps,
            quantize_denoised=quantize_denoised,
            temperature=temperature,
            noise_dropout=noise_dropout,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            dynamic_threshold=dynamic_threshold,
        )

    def _grid(self, use_original_steps: bool) -> np.ndarray:
        return np.arange(self.ddpm_num_timesteps) if use_original_steps else self.ddim_timesteps

    def _run(
        self,
        x: Tensor,
        cond: Conditioning,
        grid: np.ndarray,
        *,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        log_every_t: int = 100,
        scales: Sequence[float] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Intermediates]:
        """Down the ascending `grid` of timesteps; `options` are the step's."""
        count = len(grid)
        if mask is not None and x0 is None:
            raise ValueError("mask without x0: the latents that it keeps")
        if scales is not None and len(scales) != count:
            raise ValueError(f"ucg_schedule has {len(scales)} scales for {count} steps")
        intermediates: Intermediates = {"x_inter": [x], "pred_x0": [x]}
        times = [torch.full((len(x),), int(t), device=x.device) for t in grid]
        history: list[Tensor] = []
        for i, index in enumerate(reversed(range(count))):
            t = times[index]
            if mask is not None:
                x = self.model.q_sample(x0, t) * mask + (1.0 - mask) * x
            if scales is not None:
                options["unconditional_guidance_scale"] = scales[i]
            x, pred_x0 = self._step(x, cond, t, index, times[max(index - 1, 0)], history, **options)
            if callback:
                callback(i)
            if img_callback:
                img_callback(pred_x0, i)
            if is_logged(index, count, log_every_t):
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(pred_x0)
        return x, intermediates

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
        """(latents after the step, prediction of x0); a multistep method keeps what it needs in `history`."""
        return self.p_sample_ddim(x, cond, t, index, **options)

    @torch.no_grad()
    def p_sample_ddim(
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
        dynamic_threshold: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step from timestep t: (the next latents, the prediction of x0)."""
        eps = self._predict_eps(
            x,
            t,
            c,
            unconditional_conditioning,
            unconditional_guidance_scale,
            score_corrector,
            corrector_kwargs,
        )
        return self._follow(
            x,
            eps,
            index,
            repeat_noise,
            use_original_steps,
            quantize_denoised,
            temperature,
            noise_dropout,
            dynamic_threshold,
        )

    def _predict_eps(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        uncond: Conditioning | None,
        scale: float,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        if uncond is None or scale == 1.0:
            output = self.model.apply_model(x, t, cond).float()
        else:
            both = self.model.apply_model(torch.cat([x, x]), torch.cat([t, t]), stack(uncond, cond))
            of_uncond, of_cond = both.float().chunk(2)
            output = of_uncond + scale * (of_cond - of_uncond)
        if self.model.parameterization == "v":
            if score_corrector is not None:
                raise ValueError("score_corrector with a model that predicts v: it corrects eps")
            return self.model.predict_eps_from_z_and_v(x, t, output)
        if score_corrector is not None:
            output = score_corrector.modify_score(self.model, output, x, t, cond, **(corrector_kwargs or {}))
        return output

    def _follow(
        self,
        x: Tensor,
        eps: Tensor,
        index: int,
        repeat_noise: bool,
        use_original_steps: bool,
        quantize_denoised: bool,
        temperature: float,
        noise_dropout: float,
        dynamic_threshold: float | None,
    ) -> tuple[Tensor, Tensor]:
        """DDIM's update (Song et al. 2020, https://arxiv.org/abs/2010.02502, eq. 12) along eps."""
        a, a_prev, sigma = (table[index] for table in self._tables(use_original_steps))
        pred_x0 = (x - (1.0 - a).sqrt() * eps) / a.sqrt()
        if quantize_denoised:
            pred_x0, *_ = self._codebook()(pred_x0)
        if dynamic_threshold is not None:
            rms = pred_x0.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
            pred_x0 = pred_x0 * (dynamic_threshold / rms.clamp(min=dynamic_threshold))
        # a repeated draw is one image's, for the whole batch
        noise = torch.randn((1, *x.shape[1:]) if repeat_noise else x.shape, device=x.device).expand_as(x)
        noise = sigma * temperature * noise
        if noise_dropout > 0.0:
            noise = F.dropout(noise, noise_dropout)
        return a_prev.sqrt() * pred_x0 + (1.0 - a_prev - sigma**2).sqrt() * eps + noise, pred_x0

    def _tables(self, use_original_steps: bool) -> tuple[Tensor, Tensor, Tensor]:
        """alphas, those of the next lower level, and the standard deviation of each step's noise."""
        if use_original_steps:
            return self.alphas_cumprod, self.alphas_cumprod_prev, self.ddim_sigmas_for_original_num_steps
        return self.ddim_alphas, self.ddim_alphas_prev, self.ddim_sigmas

    def _codebook(self) -> Callable[[Tensor], tuple[Tensor, ...]]:
        first_stage = self.model.first_stage_model
        if not hasattr(first_stage, "quantize"):
            raise ValueError(f"quantize_x0: the first stage, {type(first_stage).__name__}, has no codebook")
        return first_stage.quantize

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """x0 noised to the grid's steps t int64 [b] (or to those timesteps, with `use_original_steps`)."""
        timesteps = t if use_original_steps else torch.tensor(self.ddim_timesteps).to(t.device)[t]
        return self.model.q_sample(x0, timesteps, noise)

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Conditioning,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning | None = None,
        use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
    ) -> Tensor:
        """The last `t_start` steps of the grid, from latents `x_latent` that `stochastic_encode` made.

        As in the original the first of them takes x_latent for one grid step cleaner than it is.
        """
        latents, _ = self._run(
            x_latent,
            cond,
            self._grid(use_original_steps)[:t_start],
            callback=callback,
            use_original_steps=use_original_steps,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
        )
        return latents

    @torch.no_grad()
    def encode(
        self,
        x0: Tensor,
        c: Conditioning,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning | None = None,
        callback: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """DDIM run upwards: the latents whose `decode` over `t_enc` steps is about x0, and a dict of them.

        With `return_intermediates` the dict has about that many latents of the way, and their steps' numbers.
        """
        grid = self._grid(use_original_steps)
        if not 0 <= t_enc <= len(grid):
            raise ValueError(f"t_enc {t_enc} is not in 0 … {len(grid)}")
        alphas, alphas_prev, _ = self._tables(use_original_steps)
        x, steps, kept = x0, [], []
        every = max(1, t_enc // return_intermediates) if return_intermediates else 0
        for i, step in enumerate(grid[:t_enc]):
            t = torch.full((len(x),), int(step), device=x.device)
            eps = self._predict_eps(x, t, c, unconditional_conditioning, unconditional_guidance_scale)
            pred_x0 = (x - (1.0 - alphas_prev[i]).sqrt() * eps) / alphas_prev[i].sqrt()
            x = alphas[i].sqrt() * pred_x0 + (1.0 - alphas[i]).sqrt() * eps
            if every and (i % every == 0 or i >= t_enc - 2):
                steps.append(i)
                kept.append(x)
            if callback:
                callback(i)
        out = {"x_encoded": x, "intermediate_steps": steps}
        return x, {**out, "intermediates": kept} if return_intermediates else out


def step_noise(alphas: np.ndarray, alphas_prev: np.ndarray, eta: float) -> np.ndarray:
    """Standard deviations of the noise that each step adds (Song et al. 2020, eq. 16)."""
    return eta * np.sqrt((1.0 - alphas_prev) / (1.0 - alphas) * (1.0 - alphas / alphas_prev))
