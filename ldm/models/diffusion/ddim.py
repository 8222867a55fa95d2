"""DDIMSampler as the original's notebooks call it, on the samplers of `ldm.sampling`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.sampling import SAMPLERS, Denoiser, Discretization, default_trajectory, sample
from ldm.sampling.noise import CompvisNoise
from ldm.sampling.schedule import leading_timesteps

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import Conditioning, LatentDiffusion


def global_generator(device: torch.device) -> torch.Generator:
    """The generator of a device that `torch.manual_seed` seeds."""
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


class DDIMSampler:
    """Draws from torch's global generator as often as the original: a seeded notebook keeps its noise.

    `schedule`, `verbose` and `log_every_t` are accepted and have no effect. Latents are [b, c, h, w].
    """

    name = "ddim"

    def __init__(self, model: "LatentDiffusion", schedule: str = "linear"):
        self.model = model
        self.discretization = Discretization(model.alphas_cumprod.cpu().numpy())

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Sets the grid that `stochastic_encode` and `decode` index: `ddim_timesteps`, ascending."""
        if ddim_discretize != "uniform":
            raise ValueError(f"ddim_discretize {ddim_discretize!r} is not known; known: uniform")
        if ddim_eta and self.name == "plms":
            raise ValueError(f"ddim_eta {ddim_eta} with PLMS: it must be 0")
        self.ddim_timesteps = leading_timesteps(ddim_num_steps, self.model.num_timesteps)[::-1]
        self.ddim_eta = ddim_eta

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: "Conditioning | None" = None,
        *,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        eta: float = 0.0,
        x_T: Tensor | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: "Conditioning | None" = None,
        verbose: bool = True,
        log_every_t: int = 100,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Latents after S steps from `x_T` or fresh noise, and `{"pred_x0": [every step's prediction]}`.

        `callback(i)` and `img_callback(pred_x0, i)` are called after step i, from 0.
        """
        self.make_schedule(S, ddim_eta=eta)
        predictions: list[Tensor] = []

        def on_step(step: int, x0: Tensor) -> None:
            predictions.append(x0)
            if callback:
                callback(step - 1)
            if img_callback:
                img_callback(x0, step - 1)

        noise = CompvisNoise(global_generator(self.model.device), (batch_size, *shape), x_T)
        denoiser = Denoiser(
            self.model, conditioning, unconditional_conditioning, unconditional_guidance_scale
        )
        run = default_trajectory(denoiser, self.name, S)
        options = {"eta": eta} if self.name == "ddim" else {}
        latents = sample(denoiser, self.name, run, noise, options=options, callback=on_step)
        return latents, {"pred_x0": predictions}

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """x0 noised to the grid's steps t int64 [b] (or to those timesteps, with `use_original_steps`)."""
        if noise is None:
            noise = torch.randn_like(x0)
        timesteps = t if use_original_steps else torch.tensor(self.ddim_timesteps.copy()).to(t.device)[t]
        return self.model.q_sample(x0, timesteps, noise)

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: "Conditioning",
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: "Conditioning | None" = None,
        use_original_steps: bool = False,
    ) -> Tensor:
        """The last `t_start` steps of the grid, from latents `x_latent` that `stochastic_encode` made.

        As in the original the first of them takes x_latent for one grid step cleaner than it is.
        """
        timesteps = range(self.model.num_timesteps) if use_original_steps else self.ddim_timesteps
        sigmas = [self.discretization.sigma(t) for t in (*reversed(timesteps[:t_start]), 0)]
        denoiser = Denoiser(self.model, cond, unconditional_conditioning, unconditional_guidance_scale)
        options = {"eta": self.ddim_eta} if self.name == "ddim" else {}
        noise = CompvisNoise(global_generator(self.model.device), x_latent.shape)
        x = x_latent * (1.0 + sigmas[0] ** 2) ** 0.5
        x = SAMPLERS[self.name](denoiser, x, sigmas, noise=noise, **options)
        return x * (1.0 + sigmas[-1] ** 2) ** -0.5
