"""The original's sampler classes, called as notebooks call them."""

import pytest
import torch
from golden_files import case, golden_file, manifest, pseudo_state_dict

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.sampling.noise import CompvisNoise
from ldm.util import instantiate_from_config
from ldm.weights.loading import read_config

SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm": DPMSolverSampler}


@pytest.fixture(scope="module")
def golden():
    return case("samplers_mini-v1")[0]


@pytest.fixture(scope="module")
def model():
    """mini-v1 without its text encoder, on stand-in weights."""
    config = read_config(golden_file("configs/mini-v1.yaml"))
    config["params"]["cond_stage_config"] = {"target": "torch.nn.Identity"}
    model = instantiate_from_config(config)
    keys = {
        key: value for key, value in manifest("mini-v1").items() if not key.startswith("cond_stage_model.")
    }
    model.load_state_dict(pseudo_state_dict(keys))
    return model.eval()


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("name", SAMPLERS)
def test_sample_gives_the_originals_latents(golden, model, name: str, steps: int) -> None:
    seen = []
    latents, intermediates = SAMPLERS[name](model).sample(
        S=steps,
        batch_size=1,
        shape=[4, 16, 16],
        conditioning=golden["cond"],
        x_T=golden[f"{name}_{steps}_xT"],
        unconditional_guidance_scale=7.5,
        unconditional_conditioning=golden["uncond"],
        verbose=False,
        callback=seen.append,
    )
    expected = golden[f"{name}_{steps}_out"]
    assert (latents - expected).abs().max() < 1e-3 * expected.std()
    assert seen == list(range(steps))
    assert intermediates["pred_x0"][-1].shape == expected.shape


def test_encode_and_decode_give_the_originals_img2img(golden, model) -> None:
    sampler = DDIMSampler(model)
    sampler.make_schedule(ddim_num_steps=20, ddim_eta=0.0, verbose=False)
    z = sampler.stochastic_encode(golden["img2img_x0"], torch.tensor([12]), noise=golden["img2img_noise"])
    assert (z - golden["img2img_z12"]).abs().max() < 1e-5
    out = sampler.decode(
        z, golden["cond"], 12, unconditional_guidance_scale=5.0, unconditional_conditioning=golden["uncond"]
    )
    expected = golden["img2img_out"]
    assert (out - expected).abs().max() < 1e-3 * expected.std()


def test_noise_is_the_global_generators(golden, model) -> None:
    """A notebook that seeds everything gets the original's stream: the start, then a draw a step."""
    arguments = {"batch_size": 1, "shape": [4, 8, 8], "conditioning": golden["cond"]}
    torch.manual_seed(3)
    first, _ = DDIMSampler(model).sample(2, **arguments)
    after = torch.randn(1)

    stream = CompvisNoise(torch.Generator().manual_seed(3), (1, 4, 8, 8))
    start = stream.start()
    stream.finish(2)
    assert torch.randn(1, generator=stream.generator) == after
    again, _ = DDIMSampler(model).sample(2, **arguments, x_T=start)
    torch.testing.assert_close(again, first)


def test_plms_refuses_eta(model) -> None:
    with pytest.raises(ValueError, match="it must be 0"):
        PLMSSampler(model).make_schedule(10, ddim_eta=0.5)
