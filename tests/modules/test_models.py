"""The networks against the original's recorded outputs, and their state dicts against its checkpoints."""

import json
import sys
from pathlib import Path

import pytest
import torch
from golden_files import SHARED, case, manifest, pseudo_state_dict
from omegaconf import OmegaConf
from torch import nn
from torch.distributions import Normal, kl_divergence

from ldm.errors import InputError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules import model as first_stage
from ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import get_obj_from_str, instantiate_from_config

ROOT = Path(__file__).parents[2]
V1_YAML = ROOT / "configs/stable-diffusion/v1-inference.yaml"
MINI_YAML = ROOT / "tests/golden/configs/mini-v1.yaml"
IDENTITY = {"target": "torch.nn.Identity"}

V1_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "context_dim": 768,
}
V2_UNET = {
    **V1_UNET,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "context_dim": 1024,
}
X4_UNET = {
    **V1_UNET,
    "num_classes": 1000,
    "in_channels": 7,
    "model_channels": 256,
    "attention_resolutions": [2, 4, 8],
    "channel_mult": [1, 2, 2, 4],
    "disable_self_attentions": [True, True, True, False],
    "use_linear_in_transformer": True,
    "context_dim": 1024,
}
KL_F8 = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 4}
KL_F4 = {**KL_F8, "ch_mult": [1, 2, 4]}
MINI_UNET = {
    **V1_UNET,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2, 2, 2],
    "num_heads": 4,
}
MINI_KL = {**KL_F8, "ch": 32, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 1}

FAMILIES = {
    "mini-v1": (MINI_UNET, MINI_KL),
    "mini-v1-ema": (MINI_UNET, MINI_KL),
    "sd-v1": (V1_UNET, KL_F8),
    "sd-v1-inpainting": ({**V1_UNET, "in_channels": 9}, KL_F8),
    "sd-v2": (V2_UNET, KL_F8),
    "sd-v2-inpainting": ({**V2_UNET, "in_channels": 9}, KL_F8),
    "sd-v2-depth": ({**V2_UNET, "in_channels": 5}, KL_F8),
    "x4-upscaler": (X4_UNET, KL_F4),
    "ldm-text2img-large": ({**V1_UNET, "context_dim": 1280}, KL_F8),
}
SCALE_FACTORS = {"x4-upscaler": 0.08333}

TINY_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 8,
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "channel_mult": [1, 2],
    "num_heads": 2,
    "context_dim": 6,
    "num_groups": 4,
}


def build(family: str, part: str) -> nn.Module:
    """The UNet or the first stage of a family, without values."""
    unet, ddconfig = FAMILIES[family]
    with torch.device("meta"):
        return UNetModel(**unet) if part == "model.diffusion_model" else AutoencoderKL(4, ddconfig)


def load(family: str, part: str) -> nn.Module:
    """A part of a family with its stand-in weights."""
    listed = {name: entry for name, entry in manifest(family).items() if name.startswith(f"{part}.")}
    state = {name.removeprefix(f"{part}."): value for name, value in pseudo_state_dict(listed).items()}
    model = build(family, part)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def shapes(module: nn.Module) -> dict[str, list]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def types_and_shapes(module: nn.Module) -> dict[str, list]:
    """In the manifests' form."""
    state = module.state_dict()
    return {name: [str(v.dtype).removeprefix("torch."), list(v.shape)] for name, v in state.items()}


def tiny_unet(**params) -> UNetModel:
    """A UNet with random weights everywhere (some start as zeros, which would hide the rest)."""
    unet = UNetModel(**{**TINY_UNET, **params}).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in unet.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    return unet


def random_tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def latent_diffusion(**params) -> LatentDiffusion:
    """A model around the smallest UNet, without a first stage and a text encoder."""
    target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    unet = {"target": target, "params": {**TINY_UNET, **params.pop("unet", {})}}
    model = LatentDiffusion(unet, IDENTITY, IDENTITY, **{"use_ema": False, **params})
    model.model.diffusion_model.load_state_dict(tiny_unet(**unet["params"]).state_dict())
    return model


@pytest.fixture(scope="module")
def mini_v1() -> LatentDiffusion:
    """mini-v1 with its stand-in weights, but for the text encoder."""
    config = OmegaConf.load(MINI_YAML).model
    config.params.cond_stage_config = IDENTITY
    model = instantiate_from_config(config)
    listed = {k: v for k, v in manifest("mini-v1").items() if not k.startswith("cond_stage_model.")}
    model.load_state_dict(pseudo_state_dict(listed))
    return model.requires_grad_(False)


# --- state dicts


@pytest.mark.parametrize("part", ["model.diffusion_model", "first_stage_model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_shapes_of_every_family(family, part):
    listed = manifest(family).items()
    expected = {k.removeprefix(f"{part}."): shape for k, (_, shape) in listed if k.startswith(f"{part}.")}
    assert shapes(build(family, part)) == expected


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


# --- the recorded outputs

shared = pytest.mark.skipif(not SHARED.exists(), reason="tests/golden has no copy of this case")
RECORDED = [
    "mini-v1",
    pytest.param("sd-v1", marks=pytest.mark.slow),
    pytest.param("sd-v2", marks=[pytest.mark.slow, shared]),
    pytest.param("x4-upscaler", marks=[pytest.mark.slow, shared]),
]


def golden(family: str) -> dict[str, torch.Tensor]:
    return case(f"components_{family}")[0]


@pytest.mark.parametrize("family", RECORDED)
def test_unet(family):
    tensors = golden(family)
    unet = load(family, "model.diffusion_model")
    x, context = tensors["unet_x"], tensors["text_embeddings"][:2]
    if "c_concat" in tensors:
        x = torch.cat([x, tensors["c_concat"]], dim=1)
    with torch.no_grad():
        out = unet(x, tensors["unet_t"], context, tensors.get("noise_level"))
    torch.testing.assert_close(out, tensors["unet_out"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", RECORDED)
def test_first_stage(family):
    tensors = golden(family)
    model = load(family, "first_stage_model")
    with torch.no_grad():
        posterior = model.encode(tensors["image"])
        decoded = model.decode(tensors["latents"] / SCALE_FACTORS.get(family, 0.18215))
    moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
    torch.testing.assert_close(moments, tensors["moments"], rtol=0, atol=1e-4)
    torch.testing.assert_close(decoded, tensors["decoded"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_text_encoder_of_real_size():
    tensors, metadata = case("components_sd-v1")
    prompts = json.loads(metadata["prompts"])
    prefix = "cond_stage_model."
    listed = {k: v for k, v in manifest("sd-v1").items() if k.startswith(prefix) and "position_ids" not in k}
    with torch.device("meta"):
        model = FrozenCLIPEmbedder()
    state = {name.removeprefix(prefix): value for name, value in pseudo_state_dict(listed).items()}
    model.load_state_dict(state, assign=True)
    with torch.no_grad():
        embeddings = model.encode(prompts)
    assert torch.equal(model.tokenizer(prompts), tensors["token_ids"])
    torch.testing.assert_close(embeddings, tensors["text_embeddings"], rtol=0, atol=1e-4)


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


# --- the UNet's inputs


@pytest.mark.parametrize("size", [(5, 9), (1, 1), (3, 16), (7, 8), (13, 2)])
def test_any_size_of_latents(mini_v1, size):
    """The original doubled blindly on the way up: sizes not divisible by 8 failed at a skip connection."""
    x, cond = random_tensors((2, 4, *size), (2, 77, 768))
    with torch.no_grad():
        out = mini_v1.apply_model(x, torch.tensor([1, 981]), cond)
    assert out.shape == x.shape
    assert out.isfinite().all()


def test_fractional_timesteps_lie_between_their_neighbours():
    unet = tiny_unet()
    x, context = random_tensors((1, 4, 6, 6), (1, 5, 6))
    with torch.no_grad():
        low, middle, high = (unet(x, torch.tensor([t]), context) for t in (40.0, 40.5, 41.0))
        assert torch.equal(low, unet(x, torch.tensor([40]), context))
    assert not torch.equal(low, middle)
    torch.testing.assert_close(middle, (low + high) / 2, rtol=0, atol=0.3 * (high - low).abs().max().item())


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


@pytest.mark.parametrize(
    ("params", "label"),
    [
        ({"num_classes": 10}, torch.tensor([1, 9])),
        ({"num_classes": "continuous"}, torch.tensor([[0.5], [2.0]])),
        ({"num_classes": "sequential", "adm_in_channels": 3}, torch.arange(6.0).reshape(2, 3)),
    ],
)
def test_class_labels(params, label):
    unet = tiny_unet(**params)
    x, context = random_tensors((1, 4, 6, 6), (1, 5, 6))
    x, context, t = x.expand(2, -1, -1, -1), context.expand(2, -1, -1), torch.tensor([7, 7])
    with torch.no_grad():
        first, second = unet(x, t, context, label)
        assert not torch.equal(first, second)
        with pytest.raises(ValueError, match="class labels"):
            unet(x, t, context)
        with pytest.raises(ValueError, match="class labels"):
            tiny_unet()(x, t, context, label)


def test_gradient_checkpointing_changes_no_gradient():
    x, context = random_tensors((2, 4, 5, 6), (2, 5, 6))
    gradients = []
    for use_checkpoint in (False, True):
        unet = tiny_unet(use_checkpoint=use_checkpoint)
        inputs = x.clone().requires_grad_(), context.clone().requires_grad_()
        unet(inputs[0], torch.tensor([3, 500]), inputs[1]).square().sum().backward()
        gradients.append([weight.grad for weight in (*inputs, *unet.parameters())])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_the_unet_pads_on_both_sides_and_the_first_stage_below_and_right():
    """A kernel that copies its first value shows where the padding is."""
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    copies = {}
    for module, conv in ((Downsample(1), "op"), (first_stage.Downsample(1), "conv")):
        layer = getattr(module, conv)
        layer.weight.data = torch.zeros(1, 1, 3, 3)
        layer.weight.data[..., 0, 0] = 1.0
        layer.bias.data.zero_()
        copies[conv] = module(x).squeeze().tolist()
    assert copies == {"op": [[0, 0], [0, 5]], "conv": [[0, 2], [8, 10]]}


def test_epsilons_of_the_normalisations():
    """Too small to show on stand-in weights: 1e-6 in the first stage and before attention, 1e-5 elsewhere."""
    for family in FAMILIES:
        for name, module in build(family, "model.diffusion_model").named_modules():
            if isinstance(module, nn.GroupNorm):
                assert module.eps == (1e-6 if name.endswith(".norm") else 1e-5), name
        norms = [m for m in build(family, "first_stage_model").modules() if isinstance(m, nn.GroupNorm)]
        assert {norm.eps for norm in norms} == {1e-6}


# --- the posterior


def test_posterior_divergence_is_that_of_normals():
    (moments,) = random_tensors((3, 8, 5, 2))
    posterior = DiagonalGaussianDistribution(moments)
    mean, logvar = moments.chunk(2, dim=1)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.kl(), expected)
    assert DiagonalGaussianDistribution(torch.zeros(2, 8, 5, 2)).kl().tolist() == [0, 0]


def test_posterior_samples():
    moments, noise = random_tensors((3, 8, 5, 2), (3, 4, 5, 2))
    posterior = DiagonalGaussianDistribution(moments)
    mean, logvar = moments.chunk(2, dim=1)
    assert torch.equal(posterior.mode(), mean)
    torch.testing.assert_close(posterior.sample(noise), mean + (0.5 * logvar).exp() * noise)
    torch.manual_seed(3)
    drawn = posterior.sample()
    assert torch.equal(drawn, posterior.sample(torch.randn(3, 4, 5, 2, generator=torch.manual_seed(3))))


def test_posterior_log_variances_are_clamped():
    logvar = torch.tensor([-1e9, -31.0, 0.0, 21.0, 1e9]).reshape(1, 1, 1, 5)
    posterior = DiagonalGaussianDistribution(torch.cat([torch.zeros_like(logvar), logvar], dim=1))
    assert posterior.logvar.flatten().tolist() == [-30, -30, 0, 20, 20]
    assert posterior.sample(torch.ones(1, 1, 1, 5)).isfinite().all()


# --- averages


class Nested(nn.Module):
    """Two trainable weights and a frozen one."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.blocks[1].requires_grad_(False)


def test_ema_names_have_no_dots():
    assert list(dict(LitEma(Nested()).named_buffers())) == ["decay", "num_updates", "gain", "blocks0weight"]


def test_ema_names_of_a_checkpoint():
    unet = [name for name in manifest("mini-v1-ema") if name.startswith("model.")]
    mangled = {f"model_ema.{name.removeprefix('model.').replace('.', '')}" for name in unet}
    assert len(mangled) == len(unet)
    averages = {name for name in manifest("mini-v1-ema") if name.startswith("model_ema.")}
    assert averages - mangled == {"model_ema.decay", "model_ema.num_updates"}


def test_ema_decay_warms_up():
    model = Nested()
    model.gain.data.fill_(0.0)
    ema = LitEma(model, decay=0.25)
    model.gain.data.fill_(1.0)
    expected = 0.0
    for n in range(1, 5):
        ema(model)
        decay = min(0.25, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay)
        assert ema.gain.item() == pytest.approx(expected, rel=1e-6)
        assert ema.num_updates.item() == n
    assert (1 + 1) / (10 + 1) < 0.25 < (1 + 4) / (10 + 4)


def test_ema_copy_store_restore():
    model = Nested()
    ema = LitEma(model)
    averages = [model.blocks[0].weight.item(), model.gain.item()]
    frozen = model.blocks[1].weight.item()
    model.blocks[0].weight.data.fill_(5.0)
    model.gain.data.fill_(6.0)
    ema.store(model)
    ema.copy_to(model)
    assert [model.blocks[0].weight.item(), model.gain.item()] == averages
    ema.restore(model)
    assert [model.blocks[0].weight.item(), model.gain.item()] == [5, 6]
    assert model.blocks[1].weight.item() == frozen


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


# --- configs


def test_an_unknown_key_is_an_error_that_names_the_nearest():
    """The original's answer was Python's TypeError; some classes swallowed unknown keys in **kwargs."""
    config = OmegaConf.load(V1_YAML).model
    config.params.unet_config.params.modle_channels = 320
    with pytest.raises(InputError, match=r"UNetModel has no parameter 'modle_channels'.*'model_channels'"):
        instantiate_from_config(config)


def test_an_unknown_key_of_the_first_stage():
    with pytest.raises(InputError, match=r"'attn_resolution'.*'attn_resolutions'"):
        AutoencoderKL(4, {**MINI_KL, "attn_resolution": []})


def test_keys_of_the_published_x4_upscaler():
    """x4-upscaling.yaml says so explicitly."""
    with torch.device("meta"):
        unet = UNetModel(**X4_UNET, disable_middle_self_attn=False)
    assert shapes(unet) == shapes(build("x4-upscaler", "model.diffusion_model"))


@pytest.mark.parametrize("parameterization", ["x0", "V", ""])
def test_an_unknown_parameterization(parameterization):
    with pytest.raises(InputError, match=f"parameterization '{parameterization}' is not one of eps, v"):
        latent_diffusion(parameterization=parameterization)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"num_classes": "many"}, "'many'"),
        ({"num_heads": -1}, "num_heads or num_head_channels"),
        ({"context_dim": None}, "context_dim"),
    ],
)
def test_unets_that_cannot_be_built(params, message):
    with pytest.raises(InputError, match=message):
        tiny_unet(**params)


@pytest.fixture
def foreign_module(tmp_path, monkeypatch) -> str:
    """The name of an importable module outside `ldm`, not yet imported."""
    (tmp_path / "foreign_package.py").write_text("def make(**params): return params\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "foreign_package"
    sys.modules.pop("foreign_package", None)


@pytest.mark.parametrize(
    "target", ["{}.make", "ldm.{}.make", "ldmx.{}.make", "os.system", "torch.nn.Linear", "os", ""]
)
def test_a_forbidden_target_is_refused_and_not_imported(foreign_module, target):
    """A config came from the net with the checkpoint, and the original imported whatever it named."""
    with pytest.raises(InputError, match="config target"):
        instantiate_from_config({"target": target.format(foreign_module)})
    assert foreign_module not in sys.modules


def test_a_forbidden_target_deeper_in_a_config(foreign_module):
    config = OmegaConf.load(MINI_YAML).model
    config.params.first_stage_config = {"target": f"{foreign_module}.make"}
    with pytest.raises(InputError, match="is not allowed"):
        instantiate_from_config(config)
    assert foreign_module not in sys.modules


def test_a_config_cannot_allow_itself(foreign_module):
    inner = {"target": f"{foreign_module}.make"}
    params = {"config": inner, "allow_target": [foreign_module]}
    with pytest.raises(InputError, match="config target"):
        instantiate_from_config({"target": "ldm.util.instantiate_from_config", "params": params})
    assert foreign_module not in sys.modules


@pytest.mark.parametrize("name", ["get_obj_from_str", "check_params", "importlib", "Mapping"])
def test_only_classes_of_ldm_are_called(foreign_module, name):
    """A module's helpers and imports are no models: one of them imports what it is told to."""
    params = {"target": f"{foreign_module}.make", "allow": [foreign_module]}
    with pytest.raises(InputError, match="config target"):
        instantiate_from_config({"target": f"ldm.util.{name}", "params": params})
    assert foreign_module not in sys.modules


def test_a_prefix_that_the_user_allows(foreign_module):
    config = {"target": f"{foreign_module}.make", "params": {"a": 1}}
    assert instantiate_from_config(config, allow_target=[foreign_module]) == {"a": 1}
    assert instantiate_from_config({"target": "torch.nn.Identity"}).training
    with pytest.raises(InputError, match="does not exist"):
        get_obj_from_str(f"{foreign_module}.absent", [foreign_module])


@pytest.mark.parametrize("config", [None, "__is_first_stage__", {}, {"params": {}}])
def test_a_section_without_a_target(config):
    with pytest.raises(InputError, match="needs a 'target'"):
        instantiate_from_config(config)
