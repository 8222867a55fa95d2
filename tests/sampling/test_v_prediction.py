"""A v-model is sampled as the eps-model that says the same (Salimans & Ho 2022, appendix D)."""

import pytest
import tiny
import torch
from closed_form import V1, V1_ALPHAS, image_noise
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.sampling import SAMPLERS, Denoiser, catalogue, default_trajectory, sample
from ldm.util import instantiate_from_config

SHAPE = (4, 8, 8)


class Curved:
    """Predicts eps, not linear in x and different for every timestep and condition."""

    parameterization = "eps"
    alphas_cumprod = torch.tensor(V1_ALPHAS, dtype=torch.float32)

    def apply_model(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        t = t[:, None, None, None].double() / 1000
        return x.double() * (0.5 + 0.5 * t) + 0.2 * torch.sin(3 * x.double() + cond) * (1 - 0.5 * t)


class AsV:
    """The same model, which predicts v instead."""

    parameterization = "v"

    def __init__(self, model: Curved | LatentDiffusion):
        self.model = model
        self.alphas_cumprod = model.alphas_cumprod

    def apply_model(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        eps = self.model.apply_model(x, t, cond).double()
        sigma = torch.tensor(V1.sigma(t.double().numpy()))[:, None, None, None]
        alpha = 1.0 / (1.0 + sigma**2)
        # v = a eps - b x0 and x = a x0 + b eps, where a^2 + b^2 = 1
        return (eps - (1.0 - alpha).sqrt() * x.double()) / alpha.sqrt()


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_the_same_trajectory(sampler, scale):
    cond, uncond = torch.full((2, 1, 1, 1), 0.7), torch.full((2, 1, 1, 1), -0.4)
    trajectories = []
    for model in (Curved(), AsV(Curved())):
        denoiser = Denoiser(model, cond, uncond, scale)
        noise = image_noise(1, 2, shape=SHAPE, brownian=catalogue.SAMPLERS[sampler].noise == "brownian")
        predictions = []
        run = default_trajectory(denoiser, sampler, 12)
        end = sample(denoiser, sampler, run, noise, callback=lambda _, x0, to=predictions: to.append(x0))
        trajectories.append([*predictions, end])
    eps, v = trajectories
    assert (eps[0] - eps[-2]).std() > 0.05 * eps[-1].std()
    # the adaptive steps go by tiny differences
    tolerance = 1e-2 if catalogue.SAMPLERS[sampler].adaptive else 1e-3
    for ours, same in zip(v, eps, strict=True):
        torch.testing.assert_close(ours, same, rtol=0, atol=tolerance * same.std().item())


@pytest.mark.parametrize(
    ("sampler", "masked"),
    [
        (DDIMSampler, False),
        (DDIMSampler, True),
        (PLMSSampler, False),
        (PLMSSampler, True),
        (DPMSolverSampler, False),
    ],
)
def test_the_notebooks_samplers_take_the_same_trajectory(sampler, masked):
    """Stability's PLMS had no branch for v. A mask takes DDIM and PLMS through a loop of their own."""
    eps_model = instantiate_from_config(tiny.MODEL)
    eps_model.load_state_dict(tiny.state_dict())
    eps_model.model.diffusion_model.out[2].weight.data *= 0.3  # else rounding grows a thousandfold
    eps_model.eval().requires_grad_(False)
    v_model = instantiate_from_config(tiny.model_section({"parameterization": "v"})).eval()
    v_model.apply_model = AsV(eps_model).apply_model

    x, cond, uncond, x0 = (
        torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
        for seed, shape in enumerate([SHAPE, (5, 32), (5, 32), SHAPE])
    )
    extra = {"mask": (x0[:, :1] > 0).float(), "x0": x0} if masked else {}
    results = []
    for model in (eps_model, v_model):
        torch.manual_seed(3)
        results.append(
            sampler(model).sample(
                10,
                2,
                SHAPE,
                cond,
                x_T=x,
                log_every_t=1,
                unconditional_guidance_scale=3.0,
                unconditional_conditioning=uncond,
                **extra,
            )
        )
    (end, states), (v_end, v_states) = results
    torch.testing.assert_close(v_end, end, rtol=0, atol=1e-3 * end.std().item())
    for kind in ("x_inter", "pred_x0"):
        for ours, same in zip(v_states[kind], states[kind], strict=True):
            torch.testing.assert_close(ours, same, rtol=0, atol=1e-3 * same.std().item())
