"""From a diffusion model to `denoise(x, sigma) -> x0`: parameterization, guidance, conditioning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ldm.sampling.schedule import Discretization

if TYPE_CHECKING:
    from ldm.sampling.guidance import FurtherGuidance

# what a UNet is given besides latents and timesteps; a mapping has c_crossattn, c_concat (lists) and c_adm
Conditioning = Tensor | Sequence[Tensor] | Mapping[str, Sequence[Tensor] | Tensor]


class DiffusionModel(Protocol):
    """What sampling needs of a model, such as `LatentDiffusion`."""

    parameterization: str  # "eps" or "v"
    alphas_cumprod: Tensor  # [timesteps]
    # A model may also have `denoise_step(x, t, cond, c_in, sigma, scale, rescale)`, which does all that lies
    # between a `Denoiser`'s latents and its x0 in its own way (`ldm.optimize.graph`).

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
def timesteps(timestep: float, count: int, device: torch.device, equal_halves: bool = False) -> Tensor:
    """`timestep`, [count] times, not to be written to.

    The same object for the same arguments, so that what is computed from it can be kept (`keep_timesteps`).
    It carries what the host knows about the model call that it is for, which to read from a GPU would mean to
    wait for it: `timestep_of` and `has_equal_halves`.
    """
    with torch.inference_mode(False):  # it outlives the caller's mode
        times = torch.full((count,), timestep, device=device)
        times.on_host = torch.tensor(timestep, dtype=times.dtype).item(), equal_halves
    return times


def timestep_of(times: Tensor) -> float:
    """The largest of timesteps [b]; where `timesteps` made them no device is asked for it."""
    return times.on_host[0] if hasattr(times, "on_host") else times.max().item()


def has_equal_halves(times: Tensor) -> bool:
    """Whether a model call's batch is known to be the same twice, but for what cross-attention reads.

    `times` are the call's timesteps, of `timesteps`; of others nothing is known.
    """
    return hasattr(times, "on_host") and times.on_host[1]


def equal_but_for_context(uncond: Conditioning, cond: Conditioning, conditioning_key: str) -> bool:
    """Whether two conditions differ only in what cross-attention reads.

    `conditioning_key` says what a condition is that is no mapping: "crossattn", "concat" or "adm".
    """

    def equal(a: Tensor, b: Tensor) -> bool:
        return a is b or torch.equal(a.expand_as(b), b)

    if not isinstance(cond, Mapping):
        return conditioning_key == "crossattn"
    for name in cond.keys() - {"c_crossattn"}:
        a, b = uncond[name], cond[name]
        pairs = [(a, b)] if isinstance(b, Tensor) else zip(a, b, strict=True)
        if not all(equal(*pair) for pair in pairs):
            return False
    return True


def rescale_guidance(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """`guided` with, to the share phi, the standard deviation of `cond`: large scales no longer overexpose.

    Both are model outputs [b, c, h, w]. Lin et al. 2023, https://arxiv.org/abs/2305.08891, eq. 15-16.
    """
    ratio = cond.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
    return guided * (phi * ratio + (1.0 - phi))


def model_input(x: Tensor, c_in: float | Tensor, guided: bool) -> Tensor:
    """Latents x = x0 + sigma eps [b, …] in the model's variance-preserving form; guided: twice, [2 b, …]."""
    x_in = x * c_in
    return torch.cat([x_in, x_in]) if guided else x_in


def to_x0(
    parameterization: str,
    x: Tensor,
    x_model: Tensor,
    output: Tensor,
    c_in: float | Tensor,
    sigma: float | Tensor,
    scale: float | Tensor | None,
    rescale: float,
) -> Tensor:
    """x0 [b, c, h, w] by the model's `output` for x_model = `model_input(x, c_in, scale is not None)`.

    `scale` guides, one for all or [b, 1, 1, 1]; None where there is no guidance. `c_in`, `sigma` and `scale`
    may also be tensors without dimensions: the bits are the same.
    """
    output = output.float()
    if scale is not None:
        uncond, cond = output.chunk(2)
        output = uncond + scale * (cond - uncond)
        if rescale:
            output = rescale_guidance(output, cond, rescale)
    if parameterization == "v":
        return (x_model[: len(x)] - sigma * output) * c_in
    return x - sigma * output


class Denoiser:
    """Predicts clean latents with classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598).

    `cond` and `uncond` go to `model.apply_model`, in one batch. `scale` is one for all images, or a sequence
    of one for each; where all are exactly 1 `uncond` is left out, as it is at sigmas outside `interval`,
    (above, up to) (Kynkäänniemi et al. 2024, https://arxiv.org/abs/2404.07724). `rescale` is
    `rescale_guidance`'s phi. `discretization` replaces the model's own schedule. `factor` is one on the scale
    by sigma (`guidance.plus_plus`), and `further` what else guides.
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
        factor: Callable[[float], float] | None = None,
        further: FurtherGuidance | None = None,
    ):
        scales = set(scale) if isinstance(scale, Sequence) else {scale}
        self.model = model
        self.guided = uncond is not None and (scales != {1.0} or factor is not None)
        self.cond = cond
        self.both = stack(uncond, cond) if self.guided else None  # one object: what is made of it can be kept
        key = getattr(model, "conditioning_key", "crossattn")
        self.equal_halves = self.guided and equal_but_for_context(uncond, cond, key)
        if len(scales) == 1:
            self.scale = scales.pop()
        else:
            self.scale = torch.tensor(scale, device=model.alphas_cumprod.device)[:, None, None, None]
        self.rescale, self.factor, self.further = rescale, factor, further
        self.interval = interval
        self.discretization = discretization or Discretization(model.alphas_cumprod.cpu().numpy())

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """x0 [b, c, h, w] for latents x = x0 + sigma eps."""
        c_in = (1.0 + sigma**2) ** -0.5  # sqrt(alpha)
        guided = self.guided and self.interval[0] < sigma <= self.interval[1]
        cond, scale = (self.both, self.scale) if guided else (self.cond, None)
        if guided and self.factor is not None:
            scale = scale * self.factor(sigma)
        rows, equal_halves = (2 * len(x), self.equal_halves) if guided else (len(x), False)
        t = timesteps(self.discretization.timestep(sigma), rows, x.device, equal_halves)
        if guided and self.further is not None:
            return self._guide_further(x, t, c_in, sigma, scale)
        if whole_step := getattr(self.model, "denoise_step", None):
            return whole_step(x, t, cond, c_in, sigma, scale, self.rescale)
        x_model = model_input(x, c_in, guided)
        output = self.model.apply_model(x_model, t, cond)
        return to_x0(self.model.parameterization, x, x_model, output, c_in, sigma, scale, self.rescale)

    def _guide_further(
        self, x: Tensor, t: Tensor, c_in: float, sigma: float, scale: float | Tensor
    ) -> Tensor:
        """x0 as `further` combines the predictions of the two halves."""

        def x0(output: Tensor) -> Tensor:
            return to_x0(self.model.parameterization, x, x_model[: len(x)], output, c_in, sigma, None, 0.0)

        x_model = model_input(x, c_in, guided=True)
        uncond, cond = self.model.apply_model(x_model, t, self.both).float().chunk(2)
        guided = self.further.combine(x0(uncond), x0(cond), scale)
        if not self.rescale:
            return guided
        v = self.model.parameterization == "v"
        of_guided = (x_model[: len(x)] - guided / c_in) / sigma if v else (x - guided) / sigma
        return x0(rescale_guidance(of_guided, cond, self.rescale))
