"""Every published config: its state dict, v2's golden records, and what the further classes add."""

import json

import pytest
import tiny
import torch
import torch.nn.functional as F
from golden_files import case, manifest, pseudo_state_dict
from networks import IDENTITY, ROOT, TINY_UNET, YAMLS, golden, load, random_tensors, types_and_shapes
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.modules import FrozenOpenCLIPEmbedder
from ldm.util import instantiate_from_config
from ldm.weights.checkpoint import load_weights, unused_weights

V2 = ("sd-v2", "sd-v2-inpainting", "sd-v2-depth")  # one UNet but for its first convolution


def section(yaml: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/{yaml}.yaml").model)


def meta_model(yaml: str) -> LatentDiffusion:
    with torch.device("meta"):
        return instantiate_from_config(section(yaml))


@pytest.mark.parametrize(("family", "yaml"), [(family, yaml) for family in YAMLS for yaml in YAMLS[family]])
def test_the_whole_state_dict(family, yaml):
    """Names, types and shapes; `position_ids` are in old v1 files only."""
    model = meta_model(yaml)
    listed = {name: entry for name, entry in manifest(family).items() if "position_ids" not in name}
    assert types_and_shapes(model) == listed
    assert model.parameterization == ("v" if yaml.endswith(("-v", "x4-upscaling")) else "eps")
    assert model.model_ema is None


@pytest.mark.parametrize(
    ("yaml", "changes"),
    [
        ("stable-diffusion/v2-inference-v", {"ucg_training": {}, "force_null_conditioning": False}),
        ("stable-diffusion/v2-inpainting-inference", {"masked_image_key": "masked_image"}),
        ("stable-diffusion/v2-inpainting-inference", {"concat_keys": ["mask", "masked_image"]}),
        ("stable-diffusion/v1-inpainting-inference", {"keep_finetune_dims": 4, "c_concat_log_start": 1}),
        ("stable-diffusion/v2-midas-inference", {"concat_keys": ["midas_in"], "c_concat_log_end": 5}),
        ("stable-diffusion/x4-upscaling", {"noise_level_key": None, "low_scale_key": "lr"}),
    ],
)
def test_further_keys_of_the_published_configs(yaml, changes):
    config = section(yaml)
    config["params"] |= changes
    config["params"]["unet_config"]["params"] |= {"use_fp16": True, "use_bf16": False}
    config["params"]["first_stage_config"]["params"]["ddconfig"]["attn_type"] = "vanilla-xformers"
    config["params"]["first_stage_config"]["params"] |= {"monitor": "val/rec_loss", "ckpt_path": None}
    if "depth_stage_config" in config["params"]:
        config["params"]["depth_stage_config"] = IDENTITY
    with torch.device("meta"):
        instantiate_from_config(config)


@pytest.mark.parametrize(
    ("yaml", "name", "message"),
    [
        ("stable-diffusion/v2-midas-inference", "depth_stage_confg", "'depth_stage_config'"),
        ("stable-diffusion/x4-upscaling", "scale_facter", "'scale_factor'"),
        ("stable-diffusion/v2-inpainting-inference", "concat_key", "'concat_keys'"),
    ],
)
def test_an_unknown_key_is_named(yaml, name, message):
    """Of the base class, too, to which the further classes hand their other parameters."""
    config = section(yaml)
    config["params"][name] = 1
    with pytest.raises(InputError, match=rf"'{name}'; did you mean {message}"):
        instantiate_from_config(config)


# --- v2's golden records


@pytest.fixture(scope="module")
def v2_unet() -> UNetModel:
    """3.5 GB of stand-in weights."""
    return load("sd-v2", "model.diffusion_model")


def with_inputs_of(unet: UNetModel, family: str) -> UNetModel:
    """The UNet with the first convolution of another member of its family."""
    name = "model.diffusion_model.input_blocks.0.0.weight"
    (weight,) = pseudo_state_dict({name: manifest(family)[name]}).values()
    first = unet.input_blocks[0][0]
    first.weight, first.in_channels = nn.Parameter(weight, requires_grad=False), weight.shape[1]
    return unet


@pytest.mark.slow
@pytest.mark.parametrize("family", V2)
def test_unets_of_v2(v2_unet, family):
    tensors = golden(family)
    x = torch.cat([tensors["unet_x"], *([tensors["c_concat"]] if "c_concat" in tensors else [])], dim=1)
    with torch.no_grad():
        out = with_inputs_of(v2_unet, family)(x, tensors["unet_t"], tensors["text_embeddings"])
    torch.testing.assert_close(out, tensors["unet_out"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_ddim_with_v_prediction(v2_unet):
    """Ten steps of v2-inference-v.yaml at scale 9, from the recorded start."""
    tensors = golden("sd-v2")
    config = section("stable-diffusion/v2-inference-v")
    config["params"] |= {
        "unet_config": IDENTITY,
        "first_stage_config": IDENTITY,
        "cond_stage_config": IDENTITY,
    }
    model = instantiate_from_config(config)
    model.model.diffusion_model = with_inputs_of(v2_unet, "sd-v2")
    out, _ = DDIMSampler(model).sample(
        10,
        1,
        (4, 16, 16),
        tensors["text_embeddings"][:1],
        x_T=tensors["ddim_10_xT"],
        unconditional_guidance_scale=9.0,
        unconditional_conditioning=tensors["uncond"],
    )
    expected = tensors["ddim_10_out"]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-3 * expected.std().item())


@pytest.mark.slow
def test_text_embeddings_of_v2():
    """The encoder, its stand-in weights and the prompts are those of four records."""
    prefix = "cond_stage_model."
    listed = {name: entry for name, entry in manifest("sd-v2").items() if name.startswith(prefix)}
    with torch.device("meta"):
        encoder = FrozenOpenCLIPEmbedder(freeze=True, layer="penultimate")
    state = {name.removeprefix(prefix): value for name, value in pseudo_state_dict(listed).items()}
    encoder.load_state_dict(state, assign=True)
    records = [case(f"components_{family}") for family in (*V2, "x4-upscaler")]
    prompts = json.loads(records[0][1]["prompts"])
    with torch.no_grad():
        *embeddings, uncond = encoder.encode([*prompts, ""])
    torch.testing.assert_close(uncond[None], records[0][0]["uncond"], rtol=0, atol=1e-4)
    for tensors, facts in records:
        assert json.loads(facts["prompts"]) == prompts
        assert torch.equal(encoder.tokenizer(prompts), tensors["token_ids"])
        torch.testing.assert_close(torch.stack(embeddings), tensors["text_embeddings"], rtol=0, atol=1e-4)


# --- what the further classes add


def miniature(target: str, in_channels: int, **params) -> LatentDiffusion:
    """tiny.py's model as another class, with random weights."""
    config = tiny.model_section({"unet_config.params.in_channels": in_channels, "conditioning_key": "hybrid"})
    config["target"] = f"ldm.models.diffusion.ddpm.{target}"
    config["params"] |= params
    model = instantiate_from_config(config).eval().requires_grad_(False)
    listed = {name: ["float32", list(t.shape)] for name, t in model.state_dict().items()}
    model.load_state_dict(pseudo_state_dict(listed))
    return model


MINIATURE_MIDAS = {
    "target": "ldm.modules.midas.api.MiDaSInference",
    "params": {
        "image_size": 64,
        "width": 32,
        "layers": 2,
        "heads": 2,
        "backbone_width": 8,
        "backbone_depths": [1, 1, 1],
        "groups": 8,
        "features": 16,
        "classes": 0,
    },
}


def test_channels_of_inpainting():
    """Noise, mask, masked image: 1 is what is repainted, and the image below it is never seen."""
    model = miniature("LatentInpaintDiffusion", 9)
    assert model.concat_keys == ("mask", "masked_image")
    image, noise = random_tensors((2, 3, 32, 48), (2, 4, 4, 6))
    image = image.clamp(-1, 1)
    mask = torch.zeros(2, 1, 32, 48)
    mask[:, :, 8:, 16:32] = 1.0
    channels = model.concat_channels(mask, image, noise)
    assert channels.shape == (2, 5, 4, 6)
    expected = torch.zeros(2, 1, 4, 6)
    expected[:, :, 1:, 2:4] = 1.0
    assert torch.equal(channels[:, :1], expected)
    posterior = model.encode_first_stage(torch.where(mask > 0, 0.0, image))
    assert torch.equal(channels[:, 1:], 0.18215 * posterior.sample(noise))
    assert not torch.equal(channels[:, 1:], 0.18215 * posterior.mode())
    unseen = torch.where(mask > 0, -image, image)
    assert torch.equal(model.concat_channels(mask, unseen, noise), channels)

    context = torch.zeros(2, 77, 32)
    cond = {"c_concat": [channels], "c_crossattn": [context]}
    x, t = random_tensors((2, 4, 4, 6))[0], torch.tensor([3, 500])
    out = model.model.diffusion_model(torch.cat([x, channels], dim=1), t, context)
    assert torch.equal(model.apply_model(x, t, cond), out)


def test_the_order_of_concat_keys_is_the_configs():
    model = miniature("LatentInpaintDiffusion", 9, concat_keys=["hole", "mask"], masked_image_key="hole")
    image, noise = random_tensors((1, 3, 16, 16), (1, 4, 2, 2))
    channels = model.concat_channels(torch.ones(1, 1, 16, 16), image, noise)
    assert torch.equal(channels[:, 4:], torch.ones(1, 1, 2, 2))
    with pytest.raises(InputError, match=r"\['mask', 'image'\] are not 'mask' and 'masked_image'"):
        miniature("LatentInpaintDiffusion", 9, concat_keys=["mask", "image"])


@pytest.fixture(scope="module")
def depth_model() -> LatentDiffusion:
    return miniature("LatentDepth2ImageDiffusion", 5, depth_stage_config=MINIATURE_MIDAS)


@pytest.mark.parametrize(
    ("size", "seen"),
    [((64, 64), (64, 64)), ((96, 200), (64, 128)), ((40, 100), (32, 64)), ((640, 8), (64, 32))],
)
def test_depth_of_an_image(size, seen):
    """Estimated near the size that suits MiDaS, in multiples of 32, and given back at the image's."""
    sizes = []

    class Estimator(nn.Module):
        image_size = 64

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros((), dtype=torch.bfloat16))

        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.bfloat16
            sizes.append(tuple(x.shape[-2:]))
            return x.mean(dim=1, keepdim=True)

    model = miniature("LatentDepth2ImageDiffusion", 5, depth_stage_config=IDENTITY)
    model.depth_model = Estimator()
    image = torch.linspace(-1, 1, size[1]).expand(2, 3, *size)
    depth = model.estimate_depth(image)
    assert depth.shape == (2, 1, *size)
    assert depth.dtype == torch.float32
    assert sizes == [seen]
    if size[1] >= 32:
        torch.testing.assert_close(depth, image[:, :1], rtol=0, atol=0.05)


def test_depth_of_the_models_own_estimator(depth_model):
    image = random_tensors((1, 3, 64, 64))[0].clamp(-1, 1)
    depth = depth_model.depth_model(image)
    torch.testing.assert_close(depth_model.estimate_depth(image), depth, rtol=0, atol=1e-5)


def test_the_depth_channel_is_each_maps_own_range(depth_model):
    """A flat one is black: the original divided 0 by 0."""
    depth = torch.stack([torch.linspace(0, 4000, 64), torch.linspace(5, 6, 64), torch.full((64,), 3e3 / 7)])
    depth = depth[:, None, None].expand(3, 1, 64, 64)
    channel = depth_model.depth_channel(depth, (8, 12))
    assert channel.shape == (3, 1, 8, 12)
    assert channel.isfinite().all()
    assert channel.amin(dim=(1, 2, 3)).tolist() == [-1.0, -1.0, -1.0]
    assert channel[0].max().item() == pytest.approx(1.0, abs=1e-5)
    assert channel[1].max().item() == pytest.approx(1.0, abs=3e-3)
    assert torch.equal(channel[2], torch.full((1, 8, 12), -1.0))
    small = F.interpolate(depth[:1], size=(8, 12), mode="bicubic")
    expected = 2 * (small - small.min()) / (small.max() - small.min()) - 1
    torch.testing.assert_close(channel[:1], expected, rtol=0, atol=1e-5)


def test_the_noise_of_the_upscalers_image():
    model = meta_model("stable-diffusion/x4-upscaling")
    assert model.low_scale_model.max_noise_level == 350
    assert {buffer.device.type for buffer in model.low_scale_model.buffers()} == {"meta"}
    model.register_schedule()  # as the loader does
    tensors = golden("x4-upscaler")
    level = torch.tensor([20])
    noised, label = model.low_scale_model(tensors["low_res"], level, tensors["low_res_noise"])
    assert torch.equal(label, level)
    torch.testing.assert_close(noised, tensors["low_res_noised_20"], rtol=0, atol=1e-6)


def test_an_image_that_is_not_noised():
    """It took one argument where the upscaler gives three: a TypeError at the first image."""
    low_scale = {"target": "ldm.modules.diffusionmodules.upscaling.SimpleImageConcat"}
    unet = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": TINY_UNET}
    config = {"unet_config": unet, "first_stage_config": IDENTITY, "cond_stage_config": IDENTITY}
    model = instantiate_from_config(
        {
            "target": "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion",
            "params": config | {"low_scale_config": low_scale, "use_ema": False},
        }
    )
    model.register_schedule()
    (image,) = random_tensors((2, 3, 8, 8))
    same, level = model.low_scale_model(image, torch.zeros(2, dtype=torch.int64), torch.randn_like(image))
    assert torch.equal(same, image)
    assert level.tolist() == [0, 0]
    assert len(model.state_dict()) == 12 + len(model.model.state_dict())


def test_weights_that_are_never_read_may_be_missing(depth_model):
    """Files converted from diffusers' layout lack them; they take no memory then."""
    encoder = {
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
        "params": {"width": 32, "layers": 2, "heads": 2, "layer": "penultimate"},
    }
    config = tiny.model_section({"cond_stage_config": encoder})
    full = instantiate_from_config(config)
    unused = unused_weights(full)
    assert {name.removeprefix("cond_stage_model.model.").split(".")[0] for name in unused} == {
        "logit_scale",
        "text_projection",
        "transformer",
    }
    state = {name: value for name, value in full.state_dict().items() if name not in unused}
    with torch.device("meta"):
        model = instantiate_from_config(config)
    model.register_schedule()
    load_weights(model, state, path="converted.safetensors", dtype=torch.bfloat16)
    last = model.cond_stage_model.model.transformer.resblocks[1].mlp.c_fc.weight
    assert (last.shape, last.dtype, last.untyped_storage().nbytes()) == ((128, 32), torch.bfloat16, 2)
    assert model.get_learned_conditioning(["a cat"]).isfinite().all()

    del state["cond_stage_model.model.ln_final.bias"]
    with torch.device("meta"):
        model = instantiate_from_config(config)
    with pytest.raises(
        InputError, match=r"1 of \d+ weights are missing \(first cond_stage_model.model.ln_final.bias"
    ):
        load_weights(model, state, path="converted.safetensors")
