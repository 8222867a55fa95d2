"""The first stage against the original's recorded outputs."""

import pytest
import torch
from networks import (
    MINI_KL,
    RECORDED,
    SCALE_FACTORS,
    golden,
    load,
    random_tensors,
)

from ldm.errors import InputError
from ldm.models.autoencoder import AutoencoderKL


@pytest.mark.parametrize("family", [*RECORDED, pytest.param("sd-v2", marks=pytest.mark.slow)])
def test_first_stage(family):
    tensors = golden(family)
    model = load(family, "first_stage_model")
    with torch.no_grad():
        posterior = model.encode(tensors["image"])
        decoded = model.decode(tensors["latents"] / SCALE_FACTORS.get(family, 0.18215))
    moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
    torch.testing.assert_close(moments, tensors["moments"], rtol=0, atol=1e-4)
    torch.testing.assert_close(decoded, tensors["decoded"], rtol=0, atol=1e-4)


def test_an_unknown_key_of_the_first_stage():
    with pytest.raises(InputError, match=r"'attn_resolution'.*'attn_resolutions'"):
        AutoencoderKL(4, {**MINI_KL, "attn_resolution": []})


def test_forward_without_noise():
    """The original draws by itself, on the CPU's generator, or takes the mode; the noise had to be given."""
    model = AutoencoderKL(4, {**MINI_KL, "ch_mult": [1, 1]}).eval()
    (x,) = random_tensors((1, 3, 8, 8))
    with torch.no_grad():
        posterior = model.encode(x)
        torch.manual_seed(6)
        noise = torch.randn(posterior.mean.shape)
        torch.manual_seed(6)
        assert torch.equal(model(x)[0], model(x, noise)[0])
        mode, again = model(x, sample_posterior=False)
    assert torch.equal(mode, model.decode(posterior.mode()))
    assert torch.equal(again.parameters, posterior.parameters)
