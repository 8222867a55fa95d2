"""LatentDiffusion: autoencoder, UNet and text encoder under one roof (Rombach et al. 2022)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm.errors import InputError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.modules.diffusionmodules.util import make_beta_schedule, schedule_buffers
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.sampling.denoiser import Conditioning
from ldm.util import instantiate_from_config

PARAMETERIZATIONS = ("eps", "v")


class DiffusionWrapper(nn.Module):
    """The UNet with its conditions: concatenated to x, read by cross-attention, added as a class label."""

    def __init__(self, diffusion_model: nn.Module, conditioning_key: str = "crossattn"):
        super().__init__()
        self.diffusion_model = diffusion_model
        self.conditioning_key = conditioning_key

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
            "force_null_conditioning",
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
        self.channels = channels
        self.image_size = image_size  # side of the latents the model was made for
        self.first_stage_key = first_stage_key
        self.cond_stage_key = cond_stage_key
        self.cond_stage_trainable = cond_stage_trainable
        self.betas_config = (beta_schedule, timesteps, linear_start, linear_end, cosine_s)

        unet = instantiate_from_config(unet_config, allow_target)
        self.model = DiffusionWrapper(unet, conditioning_key or "crossattn")
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
        """Compute the float32 buffers [timesteps] that checkpoints carry."""
        for name, values in schedule_buffers(make_beta_schedule(*self.betas_config)).items():
            self.register_buffer(name, values)

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    @property
    def conditioning_key(self) -> str:
        return self.model.conditioning_key

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

    def apply_model(
        self, x_noisy: torch.Tensor, t: torch.Tensor, cond: Conditioning, return_ids: bool = False
    ) -> torch.Tensor:
        """The UNet's output for latents x_noisy [b, c, h, w] at timesteps t [b] (fractions allowed).

        `cond` is the embedding [b, n, d], a list of them, or a dict of c_crossattn, c_concat (lists), c_adm.
        `return_ids` is accepted and ignored.
        """
        if not isinstance(cond, Mapping):
            cond = {f"c_{self.conditioning_key}": cond if isinstance(cond, Sequence) else [cond]}
        return self.model(like_weights(x_noisy, self.model), t, **like_weights(cond, self.model))

    def get_learned_conditioning(self, prompts: list[str]) -> torch.Tensor:
        """Text embeddings of prompts, [b, 77, d]."""
        return self.cond_stage_model.encode(prompts)

    def first_stage_to(self, dtype: torch.dtype) -> None:
        """Cast the first stage's weights, for instance to float32 where a lower precision overflows."""
        self.first_stage_model.to(dtype)

    def encode_first_stage(self, x: torch.Tensor) -> DiagonalGaussianDistribution:
        """The posterior over latents of images [b, 3, h, w] in [-1, 1]."""
        return self.first_stage_model.encode(like_weights(x, self.first_stage_model))

    def get_first_stage_encoding(
        self, posterior: DiagonalGaussianDistribution | torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scaled latents [b, c, h/8, w/8]: a sample of the posterior, drawn with `noise` if given."""
        sample = posterior if isinstance(posterior, torch.Tensor) else posterior.sample(noise)
        return self.scale_factor * sample

    def decode_first_stage(
        self, z: torch.Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> torch.Tensor:
        """Images [b, 3, 8 h, 8 w], about [-1, 1], of scaled latents z [b, c, h, w].

        The other two are for a first stage with a codebook: without one `predict_cids` is a ValueError.
        """
        if predict_cids:
            name = type(self.first_stage_model).__name__
            raise ValueError(f"predict_cids: the first stage, {name}, has no codebook")
        return self.first_stage_model.decode(like_weights(z / self.scale_factor, self.first_stage_model))

    def differentiable_decode_first_stage(
        self, z: torch.Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> torch.Tensor:
        """`decode_first_stage`, which keeps gradients, too, unless the caller turns them off."""
        if predict_cids or force_not_quantize:
            return self.decode_first_stage(z, predict_cids, force_not_quantize)
        return self.decode_first_stage(z)

    def q_sample(
        self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Latents x_start [b, c, h, w] noised to timesteps t int64 [b] (Ho et al. 2020, eq. 4).

        Without `noise` it is drawn from the global generator of the latents' device.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        a, b = self._roots(t)
        return a * x_start + b * noise

    def get_v(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What a v-model is to predict for x0 = x and `noise` (Salimans & Ho 2022, appendix D)."""
        a, b = self._roots(t)
        return a * noise - b * x

    def predict_start_from_z_and_v(self, x_t: torch.Tensor, t: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """x0 by the v that was predicted for latents x_t."""
        a, b = self._roots(t)
        return a * x_t - b * v

    def predict_eps_from_z_and_v(self, x_t: torch.Tensor, t: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The noise by the v that was predicted for latents x_t."""
        a, b = self._roots(t)
        return a * v + b * x_t

    def predict_start_from_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """x0 by the noise that was predicted for latents x_t."""
        a, b = (self._at(name, t) for name in ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"))
        return a * x_t - b * noise

    def predict_start(self, x_t: torch.Tensor, t: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """x0 by the model's output for latents x_t at timesteps t int64 [b], whether that is noise or v."""
        if self.parameterization == "eps":
            return self.predict_start_from_noise(x_t, t, output)
        return self.predict_start_from_z_and_v(x_t, t, output)

    def q_posterior(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean, variance and clipped log-variance of the latents one timestep below x_t.

        Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 6-7.
        """
        a, b = (self._at(f"posterior_mean_coef{i}", t) for i in (1, 2))
        variance, logvar = (
            self._at(name, t) for name in ("posterior_variance", "posterior_log_variance_clipped")
        )
        return a * x_start + b * x_t, variance, logvar

    def p_mean_variance(
        self,
        x: torch.Tensor,
        c: Conditioning,
        t: torch.Tensor,
        clip_denoised: bool = False,
        *,
        return_x0: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """`q_posterior` with the model's prediction for x0, which `return_x0` adds to the result.

        `clip_denoised` keeps that prediction in [-1, 1], which is meant for models of pixels.
        """
        x0 = self.predict_start(x, t, self.apply_model(x, t, c).float())
        if clip_denoised:
            x0 = x0.clamp(-1.0, 1.0)
        posterior = self.q_posterior(x0, x, t)
        return (*posterior, x0) if return_x0 else posterior

    @torch.no_grad()
    def p_sample(
        self,
        x: torch.Tensor,
        c: Conditioning,
        t: torch.Tensor,
        clip_denoised: bool = False,
        *,
        return_x0: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Latents one timestep below x [b, c, h, w], by DDPM (Ho et al. 2020, algorithm 2).

        The noise is the global generator's; at timestep 0 none is added. With `return_x0` the prediction for
        x0 comes second.
        """
        mean, _, logvar, x0 = self.p_mean_variance(x, c, t, clip_denoised, return_x0=True)
        noise = torch.randn_like(x) * temperature
        if noise_dropout > 0.0:
            noise = F.dropout(noise, noise_dropout)
        x = mean + (t > 0)[:, None, None, None] * (0.5 * logvar).exp() * noise
        return (x, x0) if return_x0 else x

    def p_losses(
        self,
        x_start: torch.Tensor,
        cond: Conditioning,
        t: torch.Tensor,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The training loss of each sample, [b]: mean squared error of the predicted noise, or v."""
        noise = torch.randn_like(x_start) if noise is None else noise
        target = noise if self.parameterization == "eps" else self.get_v(x_start, noise, t)
        output = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        return F.mse_loss(output.float(), target, reduction="none").mean(dim=(1, 2, 3))

    @torch.no_grad()
    def get_input(
        self,
        batch: Mapping[str, Any],
        k: str,
        return_first_stage_outputs: bool = False,
        force_c_encode: bool = False,
        cond_key: str | None = None,
        return_original_cond: bool = False,
        bs: int | None = None,
    ) -> list[Any]:
        """[latents, conditioning] of the first `bs` images `batch[k]`, [b, h, w, 3] in [-1, 1].

        The conditioning are the embeddings of the captions `batch[cond_key or cond_stage_key]`, or, where the
        text encoder is trained and unless `force_c_encode`, the captions. `return_first_stage_outputs` adds
        the images [b, 3, h, w] and their reconstructions, `return_original_cond` the captions.
        """
        x = batch[k][:bs].float()
        x = x[..., None] if x.ndim == 3 else x
        x = x.permute(0, 3, 1, 2).contiguous().to(self.device)
        z = self.get_first_stage_encoding(self.encode_first_stage(x))
        captions = batch[cond_key or self.cond_stage_key][:bs]
        encode = force_c_encode or not self.cond_stage_trainable
        out = [z, self.get_learned_conditioning(captions) if encode else captions]
        if return_first_stage_outputs:
            out += [x, self.decode_first_stage(z)]
        return [*out, captions] if return_original_cond else out

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Any],
        N: int = 8,
        n_row: int = 4,
        sample: bool = True,
        ddim_steps: int = 200,
        ddim_eta: float = 1.0,
        return_keys: Iterable[str] | None = None,
        **other_plots: Any,
    ) -> dict[str, torch.Tensor]:
        """The first N "inputs" of a batch, their "reconstruction", and "samples" of their captions.

        All are [n, 3, h, w], about [-1, 1]. The samples are DDIM's, on averaged weights if there are any. The
        names of the original's other plots, and `n_row`, are accepted and ignored.
        """
        z, cond, x, reconstruction = self.get_input(
            batch, self.first_stage_key, return_first_stage_outputs=True, force_c_encode=True, bs=N
        )
        images = {"inputs": x, "reconstruction": reconstruction}
        if sample:
            with self.ema_scope():
                latents, _ = DDIMSampler(self).sample(ddim_steps, len(z), z.shape[1:], cond, eta=ddim_eta)
            images["samples"] = self.decode_first_stage(latents)
        wanted = images.keys() & set(return_keys or ())
        return {name: image for name, image in images.items() if not wanted or name in wanted}

    def _roots(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The shares of x0 and of noise in latents at timesteps t [b], each [b, 1, 1, 1]."""
        return self._at("sqrt_alphas_cumprod", t), self._at("sqrt_one_minus_alphas_cumprod", t)

    def _at(self, name: str, t: torch.Tensor) -> torch.Tensor:
        return getattr(self, name)[t][:, None, None, None]


# what Stability's training code grows the UNet's first convolution by; the model itself does not need it
FINETUNING_PARAMS = {"finetune_keys", "keep_finetune_dims", "c_concat_log_start", "c_concat_log_end"}


class LatentInpaintDiffusion(LatentDiffusion):
    """Repaints a masked region: its UNet also sees the mask and the latents of the image without it.

    `concat_keys` is their order behind the noisy latents; `masked_image_key` names the masked image there.
    """

    training_params = LatentDiffusion.training_params | FINETUNING_PARAMS

    def __init__(
        self,
        concat_keys: Sequence[str] = ("mask", "masked_image"),
        masked_image_key: str = "masked_image",
        **params: Any,
    ):
        super().__init__(**params)
        self.concat_keys = tuple(concat_keys)
        self.masked_image_key = masked_image_key
        if sorted(self.concat_keys) != sorted(("mask", masked_image_key)):
            raise InputError(f"concat_keys {list(concat_keys)} are not 'mask' and {masked_image_key!r}")

    def concat_channels(
        self, mask: torch.Tensor, image: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The UNet's further channels, [b, 1 + c, h/8, w/8].

        mask: [b, 1, h, w] of 0 and 1, where 1 is to be repainted; image: [b, 3, h, w] in [-1, 1]. The
        latents of the masked image are a sample of the posterior, drawn with `noise` [b, c, h/8, w/8] or else
        from torch's global CPU generator.
        """
        latents = self.get_first_stage_encoding(self.encode_first_stage(image * (mask < 0.5)), noise)
        return self.mask_channels(mask, latents)

    def mask_channels(self, mask: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """`concat_channels` where the latents of the masked image are known, [b, c, h/8, w/8]."""
        small = F.interpolate(mask.to(latents), size=latents.shape[-2:])
        channels = {"mask": small, self.masked_image_key: latents}
        return torch.cat([channels[key] for key in self.concat_keys], dim=1)


class LatentDepth2ImageDiffusion(LatentDiffusion):
    """Keeps the layout of a depth map, which its UNet sees as one more channel.

    `depth_model` estimates the map of an image (MiDaS, Ranftl et al. 2021, https://arxiv.org/abs/2103.13413);
    without a `depth_stage_config` there is none, and maps have to be given.
    """

    training_params = LatentDiffusion.training_params | FINETUNING_PARAMS

    def __init__(
        self,
        depth_stage_config: Mapping[str, Any] | None = None,
        concat_keys: Sequence[str] = ("midas_in",),
        allow_target: Iterable[str] = (),
        **params: Any,
    ):
        super().__init__(allow_target=allow_target, **params)
        self.concat_keys = tuple(concat_keys)
        if len(self.concat_keys) != 1:
            raise InputError(f"concat_keys {list(concat_keys)} are not the one key of the depth map")
        if depth_stage_config is not None:
            self.depth_model = instantiate_from_config(depth_stage_config, allow_target)
            self.depth_model.eval().requires_grad_(False)

    def estimate_depth(self, image: torch.Tensor) -> torch.Tensor:
        """Relative inverse depth of images [b, 3, h, w] in [-1, 1]: float32 [b, 1, h, w], larger is near."""
        side = self.depth_model.image_size
        height, width = image.shape[-2:]
        # like MiDaS: the side that needs the smaller change becomes `side`, both are multiples of 32
        scale = min(side / height, side / width, key=lambda scale: abs(1 - scale))
        size = [max(32, round(scale * n / 32) * 32) for n in (height, width)]
        resized = F.interpolate(image.float(), size=size, mode="bicubic", align_corners=False)
        depth = self.depth_model(like_weights(resized, self.depth_model)).float()
        return F.interpolate(depth, size=(height, width), mode="bicubic", align_corners=False)

    def depth_channel(self, depth: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The UNet's further channel, [b, 1, h, w] in [-1, 1] with (h, w) = `size`, of depth [b, 1, H, W]."""
        depth = depth - depth.amin(dim=(1, 2, 3), keepdim=True)  # of a flat map nothing is left to round
        depth = F.interpolate(depth, size=size, mode="bicubic", align_corners=False)
        low, high = depth.amin(dim=(1, 2, 3), keepdim=True), depth.amax(dim=(1, 2, 3), keepdim=True)
        return 2.0 * (depth - low) / (high - low + 0.001) - 1.0  # 0.001: a flat map is no division by 0


class LatentUpscaleDiffusion(LatentDiffusion):
    """Enlarges an image four times: its UNet also sees the image, noised, and how much (its class label)."""

    training_params = LatentDiffusion.training_params | {"low_scale_key", "noise_level_key"}

    def __init__(self, low_scale_config: Mapping[str, Any], allow_target: Iterable[str] = (), **params: Any):
        super().__init__(allow_target=allow_target, **params)
        self.low_scale_model = instantiate_from_config(low_scale_config, allow_target)

    def register_schedule(self) -> None:
        super().register_schedule()
        if hasattr(self, "low_scale_model"):  # it is built, with its own schedule, after the rest
            self.low_scale_model.register_schedule()
