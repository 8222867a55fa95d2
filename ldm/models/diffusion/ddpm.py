"""LatentDiffusion: autoencoder, UNet and text encoder under one roof (Rombach et al. 2022)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ldm.errors import InputError
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.sampling.schedule import make_beta_schedule
from ldm.util import instantiate_from_config

Conditioning = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, Sequence[torch.Tensor]]

PARAMETERIZATIONS = ("eps", "v")


class DiffusionWrapper(nn.Module):
    """The UNet with its conditions: concatenated to x, read by cross-attention, added as a class label."""

    def __init__(self, diffusion_model: nn.Module):
        super().__init__()
        self.diffusion_model = diffusion_model

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: Sequence[torch.Tensor] = (),
        c_crossattn: Sequence[torch.Tensor] = (),
        c_adm: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = torch.cat([x, *c_concat], dim=1)
        context = None
        if len(c_crossattn):  # a single one is not copied: from step to step it is the same object
            context = c_crossattn[0] if len(c_crossattn) == 1 else torch.cat(list(c_crossattn), dim=1)
        return self.diffusion_model(x, t, context=context, y=c_adm)


def like_weights(x: Any, module: nn.Module) -> Any:
    """A tensor, or those in lists and mappings, in the precision of a module's weights."""
    if isinstance(x, Mapping):
        return {name: like_weights(value, module) for name, value in x.items()}
    if isinstance(x, Sequence):
        return [like_weights(value, module) for value in x]
    return x.to(next(module.parameters()).dtype) if x.is_floating_point() else x


class LatentDiffusion(nn.Module):
    """A latent diffusion model as a YAML file describes it.

    Parameter names are the original's. `scale_factor` brings latents to about unit variance;
    `parameterization` says whether the UNet predicts the noise ("eps") or v (Salimans & Ho 2022,
    https://arxiv.org/abs/2202.00512).
    """

    training_params = frozenset(
        {
            "base_learning_rate",
            "ckpt_path",
            "clip_denoised",
            "concat_mode",
            "cond_stage_forward",
            "finetune_keys",
            "first_stage_trainable",
            "given_betas",
            "ignore_keys",
            "keep_num_ema_updates",
            "l_simple_weight",
            "learn_logvar",
            "load_only_unet",
            "log_every_t",
            "logvar_init",
            "loss_type",
            "make_it_fit",
            "monitor",
            "num_timesteps_cond",
            "original_elbo_weight",
            "reset_ema",
            "reset_num_ema_updates",
            "scheduler_config",
            "ucg_training",
            "unconditional_guidance_scale",
            "use_positional_encodings",
            "v_posterior",
        }
    )

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        channels: int = 3,
        image_size: int = 256,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        parameterization: str = "eps",
        conditioning_key: str | None = None,
        first_stage_key: str = "image",
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        use_ema: bool = True,
        allow_target: Iterable[str] = (),
    ):
        super().__init__()
        if parameterization not in PARAMETERIZATIONS:
            raise InputError(
                f"parameterization {parameterization!r} is not one of {', '.join(PARAMETERIZATIONS)}"
            )
        self.parameterization = parameterization
        self.conditioning_key = conditioning_key or "crossattn"
        self.channels = channels
        self.image_size = image_size  # side of the latents the model was made for
        self.first_stage_key = first_stage_key
        self.cond_stage_key = cond_stage_key
        self.betas_config = (beta_schedule, timesteps, linear_start, linear_end, cosine_s)

        self.model = DiffusionWrapper(instantiate_from_config(unet_config, allow_target))
        self.first_stage_model = instantiate_from_config(first_stage_config, allow_target)
        self.cond_stage_model = instantiate_from_config(cond_stage_config, allow_target)
        self.first_stage_model.eval().requires_grad_(False)
        if not cond_stage_trainable:
            self.cond_stage_model.eval().requires_grad_(False)
        self.model_ema = LitEma(self.model) if use_ema else None
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor)))
        else:
            self.scale_factor = scale_factor
        self.register_schedule()

    def register_schedule(self) -> None:
        """Compute the twelve float32 buffers [timesteps] that checkpoints carry (Ho et al. 2020, eq. 4-7)."""
        betas = make_beta_schedule(*self.betas_config)
        alphas = 1.0 - betas
        ac = np.cumprod(alphas)
        ac_prev = np.append(1.0, ac[:-1])
        variance = betas * (1.0 - ac_prev) / (1.0 - ac)
        buffers = {
            "betas": betas,
            "alphas_cumprod": ac,
            "alphas_cumprod_prev": ac_prev,
            "sqrt_alphas_cumprod": np.sqrt(ac),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - ac),
            "log_one_minus_alphas_cumprod": np.log(1.0 - ac),
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / ac),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / ac - 1.0),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
            "posterior_mean_coef1": betas * np.sqrt(ac_prev) / (1.0 - ac),
            "posterior_mean_coef2": (1.0 - ac_prev) * np.sqrt(alphas) / (1.0 - ac),
        }
        for name, values in buffers.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    @property
    def device(self) -> torch.device:
        return self.betas.device

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Inside, the UNet has its EMA weights, if the model keeps any (`use_ema`)."""
        if self.model_ema is None:
            yield
            return
        self.model_ema.store(self.model)
        self.model_ema.copy_to(self.model)
        try:
            yield
        finally:
            self.model_ema.restore(self.model)

    def apply_model(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """The UNet's output for latents x [b, c, h, w] at timesteps t [b] (fractions allowed).

        `cond` is the embedding [b, n, d], a list of them, or a dict of c_crossattn, c_concat (lists), c_adm.
        """
        if not isinstance(cond, Mapping):
            cond = {f"c_{self.conditioning_key}": cond if isinstance(cond, Sequence) else [cond]}
        return self.model(like_weights(x, self.model), t, **like_weights(cond, self.model))

    def get_learned_conditioning(self, prompts: list[str]) -> torch.Tensor:
        """Text embeddings of prompts, [b, 77, d]."""
        return self.cond_stage_model.encode(prompts)

    def encode_first_stage(self, x: torch.Tensor) -> DiagonalGaussianDistribution:
        """The posterior over latents of images [b, 3, h, w] in [-1, 1]."""
        return self.first_stage_model.encode(like_weights(x, self.first_stage_model))

    def get_first_stage_encoding(
        self, posterior: DiagonalGaussianDistribution | torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scaled latents [b, c, h/8, w/8]: a sample of the posterior, drawn with `noise` if given."""
        sample = posterior if isinstance(posterior, torch.Tensor) else posterior.sample(noise)
        return self.scale_factor * sample

    def decode_first_stage(self, z: torch.Tensor) -> torch.Tensor:
        """Images [b, 3, 8 h, 8 w], about [-1, 1], of scaled latents z [b, c, h, w]."""
        return self.first_stage_model.decode(like_weights(z / self.scale_factor, self.first_stage_model))

    def q_sample(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Latents x0 [b, c, h, w] noised to timesteps t int64 [b] (Ho et al. 2020, eq. 4)."""
        a, b = (self._at(name, t) for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"))
        return a * x0 + b * noise

    def p_losses(
        self, x0: torch.Tensor, cond: Conditioning, t: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """The training loss of each sample, [b]: mean squared error of the predicted noise, or v."""
        target = noise
        if self.parameterization == "v":
            a, b = (self._at(name, t) for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"))
            target = a * noise - b * x0
        output = self.apply_model(self.q_sample(x0, t, noise), t, cond)
        return F.mse_loss(output.float(), target, reduction="none").mean(dim=(1, 2, 3))

    def _at(self, name: str, t: torch.Tensor) -> torch.Tensor:
        return getattr(self, name)[t][:, None, None, None]
