"""From a diffusion model to `denoise(x, sigma) -> x0`: parameterization, guidance, conditioning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ldm.sampling.schedule import Discretization

# what a UNet is given besides latents and timesteps; a mapping has c_crossattn, c_concat (lists) and c_adm
Conditioning = Tensor | Sequence[Tensor] | Mapping[str, Sequence[Tensor] | Tensor]


class DiffusionModel(Protocol):
    """What sampling needs of a model, such as `LatentDiffusion`."""

    parameterization: str  # "eps" or "v"
    alphas_cumprod: Tensor  # [timesteps]

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The noise or v [b, c, h, w] in latents x_noisy [b, c, h, w] at timesteps t [b]."""


def same_length(contexts: Sequence[Tensor]) -> list[Tensor]:
    """Contexts [b, n_i, d] of cross-attention, each repeated along its tokens to n, their n_i's least common
    multiple: [b, n, d].

    That is exact, unlike padding: softmax gives the r copies of a key a share of 1 / r of its weight each, so
    attention's average over the tokens stays what it was.
    """
    length = math.lcm(*(context.shape[1] for context in contexts))
    return [c if c.shape[1] == length else c.repeat(1, length // c.shape[1], 1) for c in contexts]


def stack(uncond: Conditioning, cond: Conditioning) -> Conditioning:
    """Unconditional and conditional inputs as one batch of twice the size; tensors, lists and dicts alike.

    Contexts [b, n, d] may differ in their number of tokens. A single row of `uncond` serves all of `cond`.
    """
    if isinstance(cond, Mapping):
        return {name: stack(uncond[name], cond[name]) for name in cond}
    if not isinstance(cond, Tensor):
        pairs = list(zip(uncond, cond, strict=True))
        if len(pairs) > 1 and any(c.ndim == 3 and u.shape[1] != c.shape[1] for u, c in pairs):
            pairs = [(torch.cat(list(uncond), dim=1), torch.cat(list(cond), dim=1))]  # as the UNet reads them
        return [stack(u, c) for u, c in pairs]
    if cond.ndim == 3:
        uncond, cond = same_length([uncond, cond])
    return torch.cat([uncond.expand_as(cond), cond])


@lru_cache(maxsize=4096)
def timesteps(timestep: float, count: int, device: torch.device) -> Tensor:
    """`timestep`, [count] times, not to be written to.

    The same object for the same arguments, so that what is computed from it can be kept (`keep_timesteps`).
    """
    with torch.inference_mode(False):  # it outlives the caller's mode
        return torch.full((count,), timestep, device=device)


def rescale_guidance(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """`guided` with, to the share phi, the standard deviation of `cond`: large scales no longer overexpose.

    Both are model outputs [b, c, h, w]. Lin et al. 2023, https://arxiv.org/abs/2305.08891, eq. 15-16.
    """
    ratio = cond.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    return guided * (phi * ratio + (1.0 - phi))


class Denoiser:
    """Predicts clean latents with classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598).

    `cond` and `uncond` go to `model.apply_model`, in one batch. `scale` is one for all images, or a sequence
    of one for each; where all are exactly 1 `uncond` is left out, as it is at sigmas outside `interval`,
    (above, up to) (Kynkäänniemi et al. 2024, https://arxiv.org/abs/2404.07724). `rescale` is
    `rescale_guidance`'s phi. `discretization` replaces the model's own schedule.
    """

    def __init__(
        self,
        model: DiffusionModel,
        cond: Conditioning,
        uncond: Conditioning | None,
        scale: float | Sequence[float],
        *,
        rescale: float = 0.0,
        interval: tuple[float, float] = (-math.inf, math.inf),
        discretization: Discretization | None = None,
    ):
        scales = set(scale) if isinstance(scale, Sequence) else {scale}
        self.model = model
        self.guided = uncond is not None and scales != {1.0}
        self.cond = cond
        self.both = stack(uncond, cond) if self.guided else None  # one object: what is made of it can be kept
        if len(scales) == 1:
            self.scale = scales.pop()
        else:
            self.scale = torch.tensor(scale, device=model.alphas_cumprod.device)[:, None, None, None]
        self.rescale = rescale
        self.interval = interval
        self.discretization = discretization or Discretization(model.alphas_cumprod.cpu().numpy())

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """x0 [b, c, h, w] for latents x = x0 + sigma eps."""
        c_in = (1.0 + sigma**2) ** -0.5  # sqrt(alpha): back to the model's variance-preserving form
        x_in = x * c_in
        guided = self.guided and self.interval[0] < sigma <= self.interval[1]
        x_model = torch.cat([x_in, x_in]) if guided else x_in
        t = timesteps(self.discretization.timestep(sigma), len(x_model), x.device)
        output = self.model.apply_model(x_model, t, self.both if guided else self.cond).float()
        if guided:
            uncond, cond = output.chunk(2)
            output = uncond + self.scale * (cond - uncond)
            if self.rescale:
                output = rescale_guidance(output, cond, self.rescale)
        if self.model.parameterization == "v":
            return (x_in - sigma * output) * c_in
        return x - sigma * output
