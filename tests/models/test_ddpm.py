"""LatentDiffusion against the original's records, and its smaller methods against their formulae."""

import importlib.util
import sys
import types

import pytest
import tiny
import torch
from golden_files import case, manifest, pseudo_state_dict
from networks import IDENTITY, MINI_YAML, V1_YAML, golden, latent_diffusion, random_tensors, types_and_shapes
from omegaconf import OmegaConf
from torch import nn

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.sampling import SAMPLERS, Denoiser
from ldm.util import instantiate_from_config


@pytest.fixture(scope="module")
def mini_v1() -> LatentDiffusion:
    """mini-v1 with its stand-in weights, but for the text encoder."""
    config = OmegaConf.load(MINI_YAML).model
    config.params.cond_stage_config = IDENTITY
    model = instantiate_from_config(config)
    listed = {k: v for k, v in manifest("mini-v1").items() if not k.startswith("cond_stage_model.")}
    model.load_state_dict(pseudo_state_dict(listed))
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("family", "yaml", "use_ema"),
    [("sd-v1", V1_YAML, False), ("mini-v1", MINI_YAML, False), ("mini-v1-ema", MINI_YAML, True)],
)
def test_the_whole_state_dict(family, yaml, use_ema):
    """Names, types and shapes. `position_ids` is free: checkpoints made with newer libraries lack it."""
    config = OmegaConf.load(yaml).model
    config.params.use_ema = use_ema
    with torch.device("meta"):
        model = instantiate_from_config(config)
    expected = manifest(family)
    optional = {name for name in expected if name.endswith("position_ids")}
    actual = types_and_shapes(model)
    assert {k: v for k, v in actual.items() if k not in optional} == {
        k: v for k, v in expected.items() if k not in optional
    }


def test_schedule_buffers_hold_the_originals_values():
    listed = {name: entry for name, entry in manifest("mini-v1").items() if "." not in name}
    assert len(listed) == 12
    config = OmegaConf.load(MINI_YAML).model.params
    model = latent_diffusion(linear_start=config.linear_start, linear_end=config.linear_end)
    for name, expected in pseudo_state_dict(listed).items():
        torch.testing.assert_close(getattr(model, name), expected, rtol=1e-6, atol=0)


def test_latent_diffusion_calls_its_parts(mini_v1):
    tensors = golden("mini-v1")
    cond = tensors["text_embeddings"][:2]
    with torch.no_grad():
        out = mini_v1.apply_model(tensors["unet_x"], tensors["unet_t"], cond)
        posterior = mini_v1.encode_first_stage(tensors["image"])
        decoded = mini_v1.decode_first_stage(tensors["latents"])
    torch.testing.assert_close(out, tensors["unet_out"], rtol=0, atol=1e-4)
    torch.testing.assert_close(decoded, tensors["decoded"], rtol=0, atol=1e-4)
    mean, logvar = tensors["moments"].chunk(2, dim=1)
    (noise,) = random_tensors(mean.shape)
    expected = 0.18215 * (mean + torch.exp(0.5 * logvar) * noise)
    torch.testing.assert_close(
        mini_v1.get_first_stage_encoding(posterior, noise), expected, rtol=0, atol=1e-4
    )
    torch.testing.assert_close(mini_v1.get_first_stage_encoding(mean), 0.18215 * mean)


def test_ema_weights_and_back():
    """The whole of a checkpoint with averages goes in, and `ema_scope` swaps them in for its body only."""
    config = OmegaConf.load(MINI_YAML).model
    config.params.use_ema = True
    config.params.cond_stage_config = IDENTITY
    model = instantiate_from_config(config)
    listed = {k: v for k, v in manifest("mini-v1-ema").items() if not k.startswith("cond_stage_model.")}
    model.load_state_dict(pseudo_state_dict(listed))

    inputs = golden("mini-v1")
    call = (inputs["unet_x"], inputs["unet_t"], inputs["text_embeddings"][:2])
    averaged = golden("mini-v1-ema")["unet_out"]
    assert (averaged - inputs["unet_out"]).abs().max() > 0.1
    with torch.no_grad():
        with model.ema_scope():
            torch.testing.assert_close(model.apply_model(*call), averaged, rtol=0, atol=1e-4)
        torch.testing.assert_close(model.apply_model(*call), inputs["unet_out"], rtol=0, atol=1e-4)


def test_ema_scope_restores_after_an_error():
    model = latent_diffusion(use_ema=True)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    inside = {}

    def interrupted():
        with model.ema_scope():
            inside.update({name: value.clone() for name, value in model.model.state_dict().items()})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not all(torch.equal(inside[name], value) for name, value in before.items())
    assert all(torch.equal(model.model.state_dict()[name], value) for name, value in before.items())


def test_no_averages_without_use_ema():
    model = latent_diffusion()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with model.ema_scope():
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_training_loss(mini_v1):
    tensors = case("loss_mini-v1")[0]
    with torch.no_grad():
        loss = mini_v1.p_losses(tensors["x0"], tensors["cond"], tensors["t"], tensors["noise"])
    assert loss.shape == (4,)
    torch.testing.assert_close(loss.mean(), tensors["loss"].squeeze(), rtol=0, atol=1e-5)


def test_training_loss_of_v():
    """The target is sqrt(a) noise - sqrt(1 - a) x0: with these a model that predicts 0 has this loss."""
    model = latent_diffusion(parameterization="v")
    nn.init.zeros_(model.model.diffusion_model.out[2].weight)
    nn.init.zeros_(model.model.diffusion_model.out[2].bias)
    x0, noise, cond = random_tensors((2, 4, 6, 6), (2, 4, 6, 6), (2, 5, 6))
    t = torch.tensor([10, 700])
    a = model.alphas_cumprod[t][:, None, None, None]
    expected = (a.sqrt() * noise - (1 - a).sqrt() * x0).square().mean(dim=(1, 2, 3))
    with torch.no_grad():
        torch.testing.assert_close(model.p_losses(x0, cond, t, noise), expected)


@pytest.mark.parametrize("size", [(5, 9), (1, 1), (3, 16), (7, 8), (13, 2)])
def test_any_size_of_latents(mini_v1, size):
    """The original doubled blindly on the way up: sizes not divisible by 8 failed at a skip connection."""
    x, cond = random_tensors((2, 4, *size), (2, 77, 768))
    with torch.no_grad():
        out = mini_v1.apply_model(x, torch.tensor([1, 981]), cond)
    assert out.shape == x.shape
    assert out.isfinite().all()


def test_conditioning_as_tensor_list_or_dict():
    model = latent_diffusion()
    x, first, second = random_tensors((2, 4, 6, 6), (2, 3, 6), (2, 2, 6))
    t = torch.tensor([3, 500])
    with torch.no_grad():
        expected = model.model.diffusion_model(x, t, torch.cat([first, second], dim=1))
        for cond in (
            torch.cat([first, second], dim=1),
            [first, second],
            {"c_crossattn": [first, second]},
            {"c_concat": [], "c_crossattn": [torch.cat([first, second], dim=1)]},
        ):
            assert torch.equal(model.apply_model(x, t, cond), expected)


def test_conditioning_by_concatenation_and_label():
    model = latent_diffusion(unet={"in_channels": 7, "num_classes": 10}, conditioning_key="hybrid-adm")
    x, mask, image, context = random_tensors((2, 4, 6, 6), (2, 1, 6, 6), (2, 2, 6, 6), (2, 3, 6))
    t, label = torch.tensor([3, 500]), torch.tensor([0, 9])
    cond = {"c_concat": [mask, image], "c_crossattn": [context], "c_adm": label}
    with torch.no_grad():
        expected = model.model.diffusion_model(torch.cat([x, mask, image], dim=1), t, context, label)
        assert torch.equal(model.apply_model(x, t, cond), expected)


@pytest.mark.parametrize("parameterization", ["x0", "V", ""])
def test_an_unknown_parameterization(parameterization):
    with pytest.raises(InputError, match=f"parameterization '{parameterization}' is not one of eps, v"):
        latent_diffusion(parameterization=parameterization)


# --- what notebooks and forks call


@pytest.fixture
def tiny_model() -> LatentDiffusion:
    model = instantiate_from_config(tiny.MODEL)
    model.load_state_dict(tiny.state_dict())
    return model.eval().requires_grad_(False)


def schedule(model: LatentDiffusion, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha at t and at the timestep below, [b, 1, 1, 1]."""
    ac = model.alphas_cumprod.double()
    prev = torch.cat([torch.ones(1), ac[:-1]])
    return ac[t][:, None, None, None], prev[t][:, None, None, None]


def test_the_originals_names_of_arguments(tiny_model):
    """`x_noisy` and `x_start` were other names, and the noise had to be given."""
    x, noise, cond = random_tensors((2, 4, 4, 4), (2, 4, 4, 4), (2, 5, 32))
    t = torch.tensor([3, 500])
    a, _ = schedule(tiny_model, t)
    expected = (a.sqrt() * x + (1 - a).sqrt() * noise).float()
    torch.testing.assert_close(tiny_model.q_sample(x_start=x, t=t, noise=noise), expected)
    plain = tiny_model.apply_model(x, t, cond)
    assert torch.equal(tiny_model.apply_model(x_noisy=x, t=t, cond=cond, return_ids=False), plain)
    for call in (
        lambda noise: tiny_model.q_sample(x_start=x, t=t, noise=noise),
        lambda noise: tiny_model.p_losses(x_start=x, cond=cond, t=t, noise=noise),
    ):
        torch.manual_seed(5)
        drawn = torch.randn_like(x)
        torch.manual_seed(5)
        assert torch.equal(call(None), call(drawn))


def test_predictions_of_noise_and_of_v(tiny_model):
    x0, noise = random_tensors((2, 4, 4, 4), (2, 4, 4, 4))
    t = torch.tensor([3, 900])
    x = tiny_model.q_sample(x0, t, noise)
    v = tiny_model.get_v(x0, noise, t)
    torch.testing.assert_close(tiny_model.predict_start_from_noise(x, t, noise), x0, rtol=0, atol=1e-4)
    torch.testing.assert_close(tiny_model.predict_start_from_z_and_v(x, t, v), x0, rtol=0, atol=1e-5)
    torch.testing.assert_close(tiny_model.predict_eps_from_z_and_v(x, t, v), noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_a_ddpm_step(tiny_model, parameterization):
    """Ho et al.'s algorithm 2 from its formulae; without noise at timestep 0."""
    tiny_model.parameterization = parameterization
    x, cond = random_tensors((2, 4, 4, 4), (2, 5, 32))
    t = torch.tensor([0, 500])
    a, prev = schedule(tiny_model, t)
    output = tiny_model.apply_model(x, t, cond)
    if parameterization == "eps":
        x0 = (x - (1 - a).sqrt() * output) / a.sqrt()
    else:
        x0 = a.sqrt() * x - (1 - a).sqrt() * output
    beta = 1 - a / prev
    mean = (prev.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - prev) * x) / (1 - a)
    variance = beta * (1 - prev) / (1 - a)
    torch.manual_seed(1)
    noise = torch.randn_like(x)
    torch.manual_seed(1)
    ours, predicted = tiny_model.p_sample(x, cond, t, return_x0=True, temperature=0.5)
    torch.testing.assert_close(predicted, x0.float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(ours, (mean + variance.sqrt() * 0.5 * noise).float(), rtol=0, atol=1e-4)
    clipped = tiny_model.p_mean_variance(x, cond, t, clip_denoised=True, return_x0=True)[-1]
    torch.testing.assert_close(clipped, predicted.clamp(-1, 1))


def test_get_input_and_log_images(tiny_model):
    """[b, h, w, 3] images and captions of a batch, as the original's data sets give them."""
    (images,) = random_tensors((3, 64, 64, 3))
    batch = {"image": images.clamp(-1, 1), "caption": ["a red cube", "a dog", ""]}
    tiny_model.cond_stage_key = "caption"
    torch.manual_seed(2)
    z, cond, x, reconstruction, captions = tiny_model.get_input(
        batch, "image", return_first_stage_outputs=True, return_original_cond=True, bs=2
    )
    torch.manual_seed(2)
    expected = tiny_model.get_first_stage_encoding(tiny_model.encode_first_stage(x))
    assert torch.equal(x, batch["image"][:2].movedim(-1, 1))
    assert torch.equal(z, expected)
    assert captions == ["a red cube", "a dog"]
    assert torch.equal(cond, tiny_model.get_learned_conditioning(captions))
    assert torch.equal(reconstruction, tiny_model.decode_first_stage(z))
    tiny_model.cond_stage_trainable = True
    assert tiny_model.get_input(batch, "image")[1] == batch["caption"]

    logged = tiny_model.log_images(batch, N=2, ddim_steps=2, split="train", plot_diffusion_rows=False)
    assert {name: image.shape for name, image in logged.items()} == dict.fromkeys(
        ["inputs", "reconstruction", "samples"], (2, 3, 64, 64)
    )
    assert torch.equal(logged["inputs"], x)
    assert list(tiny_model.log_images(batch, sample=False, return_keys=["inputs"])) == ["inputs"]


def test_decoding_as_notebooks_call_it(tiny_model):
    (z,) = random_tensors((1, 4, 2, 2))
    plain = tiny_model.decode_first_stage(z)
    assert torch.equal(tiny_model.decode_first_stage(z, predict_cids=False, force_not_quantize=True), plain)
    z.requires_grad_()
    decoded = tiny_model.differentiable_decode_first_stage(z)
    assert torch.equal(decoded, plain)
    decoded.sum().backward()
    assert z.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"predict_cids: the first stage, AutoencoderKL, has no codebook"):
        tiny_model.decode_first_stage(z, predict_cids=True)


def test_the_first_stage_in_another_precision(tiny_model):
    tiny_model.to(torch.bfloat16)
    tiny_model.first_stage_to(torch.float32)
    assert {weight.dtype for weight in tiny_model.first_stage_model.parameters()} == {torch.float32}
    assert tiny_model.model.diffusion_model.dtype == torch.bfloat16


def test_attributes_that_notebooks_read(tiny_model):
    unet = tiny_model.model.diffusion_model
    assert tiny_model.model.conditioning_key == tiny_model.conditioning_key == "crossattn"
    assert (unet.in_channels, unet.out_channels, unet.num_classes) == (4, 4, None)
    assert unet.dtype == torch.float32
    assert tiny_model.first_stage_model.embed_dim == 4
    assert tiny_model.cond_stage_model.device == torch.device("cpu")
    tiny_model.cond_stage_model.device = "cuda"  # some notebooks set it; tokens go where the weights are
    assert tiny_model.get_learned_conditioning(["a cat"]).device.type == "cpu"


@pytest.fixture(scope="module")
def k_diffusion() -> types.ModuleType:
    """k-diffusion without its `__init__`, which imports its training code and all that this needs."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion is not installed")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "k_diffusion", package)
        package.external = pytest.importorskip("k_diffusion.external", exc_type=ImportError)
        yield package
    for name in [name for name in sys.modules if name.startswith("k_diffusion.")]:
        del sys.modules[name]


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_k_diffusion_runs_on_the_model(k_diffusion, tiny_model, parameterization):
    """Its samplers are what most notebooks use; they give what ours give on the same sigmas."""
    tiny_model.parameterization = parameterization
    wrapper = "CompVisDenoiser" if parameterization == "eps" else "CompVisVDenoiser"
    wrapped = getattr(k_diffusion.external, wrapper)(tiny_model)
    x, cond = random_tensors((2, 4, 4, 4), (2, 5, 32))
    sigmas = wrapped.get_sigmas(6)
    x = x * sigmas[0]
    theirs = k_diffusion.external.sampling.sample_euler(
        wrapped, x, sigmas, extra_args={"cond": cond}, disable=True
    )
    ours = SAMPLERS["euler"](Denoiser(tiny_model, cond, None, 1.0), x, sigmas.double().tolist())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3 * theirs.std().item())
