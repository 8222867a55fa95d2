"""Which model a file is, by the names and shapes of its weights."""

import golden_files
import pytest
import torch
from checkpoints import UNET_INPUT, meta, save

from ldm.weights.checkpoint import pick_weights
from ldm.weights.families import (
    FAMILIES,
    Shapes,
    family_of,
    identify,
    in_words,
    recognise,
    shapes_of,
    variants,
)
from ldm.weights.header import read_header
from ldm.weights.loading import ROOT

SHAPES = [
    (4, 768, "Stable Diffusion v1"),
    (9, 768, "Stable Diffusion v1 inpainting"),
    (8, 768, "InstructPix2Pix"),
    (4, 1024, "Stable Diffusion v2"),
    (9, 1024, "Stable Diffusion v2 inpainting"),
    (5, 1024, "Stable Diffusion v2 depth"),
    (7, 1024, "the Stable Diffusion x4 upscaler"),
    (4, 1280, "LAION-400M text2img-large"),
    (4, 64, "the bundled model"),
    (9, 64, "the bundled inpainting model"),
    (5, 64, "the bundled depth model"),
    (7, 64, "the bundled x4 upscaler"),
    (4, 2048, "Stable Diffusion XL"),
    (4, 640, "a latent diffusion model of an unlisted kind"),
    (3, 512, "a latent diffusion model of an unlisted kind"),
]


def averaged(state):
    """The averages of a state dict's UNet, as training names them."""
    unet = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
    numbers = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    return {"model_ema." + name.replace(".", ""): t for name, t in unet.items()} | numbers


FORMS = {
    "plain": lambda state: state,
    "with averages": lambda state: averaged(state) | state,
    "averages alone": lambda state: averaged(state) | {n: t for n, t in state.items() if n[:6] != "model."},
    # NovelAI's, and those of transformers from 5.6
    "without text_model": lambda state: {name.replace("text_model.", ""): t for name, t in state.items()},
    "UNet alone": lambda state: {name: t for name, t in state.items() if name.startswith("model.")},
}


@pytest.mark.parametrize(("channels", "context", "name"), SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_identify_by_shapes(channels, context, name, form):
    state = FORMS[form](meta(channels=channels, context=context).state_dict())
    assert identify(state) == name
    assert shapes_of(state)[:2] == (channels, context)


@pytest.mark.parametrize(("channels", "context", "name"), SHAPES[::3])
@pytest.mark.parametrize("form", ["safetensors", "zip wrapped", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_identify_files(tmp_path, channels, context, name, form, dtype):
    """In each format and precision, from the header alone."""
    state = {
        key: torch.zeros(t.shape, dtype=dtype)
        for key, t in meta(channels=channels, context=context).state_dict().items()
    }
    path = save(state, tmp_path / "w", form)
    assert identify(read_header(path).tensors) == name


def test_attention_in_the_middle_alone():
    """The upscaler in miniature attends to the prompt at its coarsest level only."""
    state = {
        UNET_INPUT: torch.empty(8, 7, 3, 3, device="meta"),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.empty(8, 64),
    }
    assert identify(state) == "the bundled x4 upscaler"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "Stable Diffusion XL"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "FLUX"),
        ("model.diffusion_model.input_blocks.1.1.time_stack.0.norm1.weight", "Stable Video Diffusion"),
        ("first_stage_model.quantize.embedding.weight", "a latent diffusion model with a VQ autoencoder"),
        ("noise_augmentor.data_mean", "Stable unCLIP"),
        ("down_blocks.0.resnets.0.conv1.weight", "a diffusers UNet"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.processor.to_q_lora.down.weight", "a LoRA"),
        ("unet.up_blocks.0.attentions.0.to_q.lora_A.weight", "a LoRA"),
        ("emb_params", "a textual inversion"),
        ("string_to_param.*", "a textual inversion"),
        ("control_model.input_hint_block.0.bias", "a ControlNet"),
        ("model.1.sub.0.RDB1.conv1.0.weight", "a pixel upscaler"),
        ("params_ema.body.0.rdb1.conv1.weight", "a pixel upscaler"),
        ("encoder.conv_in.weight", "an autoencoder alone"),
        ("first_stage_model.decoder.conv_in.weight", "an autoencoder alone"),
        ("text_model.encoder.layers.0.mlp.fc1.bias", "a text encoder alone"),
        ("embeddings.token_embedding.weight", "a text encoder alone"),  # as transformers >= 5.6 names it
        ("model_ema.diffusion_modelout0bias", "a latent diffusion model of an unlisted kind"),
        ("layer.0.weight", "an unknown model"),
    ],
)
def test_identify_by_names(key, name):
    assert identify({key: torch.empty(4, 4, device="meta")}) == name


def test_a_model_with_more_in_its_file_is_that_model():
    """Checkpoints of ControlNet's authors hold a whole Stable Diffusion v1, which runs."""
    state = meta().state_dict() | {"control_model.input_hint_block.0.bias": torch.empty(4)}
    assert identify(state) == "Stable Diffusion v1"


def test_identify_unclip():
    state = meta(context=1024).state_dict()
    state["model.diffusion_model.label_emb.0.0.weight"] = torch.empty(1280, 2048, device="meta")
    assert identify(state) == "Stable unCLIP"


@pytest.mark.parametrize(
    ("manifest", "name", "factor"),
    [
        ("sd-v1", "Stable Diffusion v1", 8),
        ("mini-v1-ema", "Stable Diffusion v1", 8),
        ("sd-v1-inpainting", "Stable Diffusion v1 inpainting", 8),
        ("sd-v2", "Stable Diffusion v2", 8),
        ("sd-v2-inpainting", "Stable Diffusion v2 inpainting", 8),
        ("sd-v2-depth", "Stable Diffusion v2 depth", 8),
        ("x4-upscaler", "the Stable Diffusion x4 upscaler", 4),
        ("ldm-text2img-large", "LAION-400M text2img-large", 8),
    ],
)
def test_identify_published_layouts(manifest, name, factor):
    layout = golden_files.manifest(manifest)
    state = {key: torch.empty(shape, device="meta") for key, (_, shape) in layout.items()}
    assert identify(state) == name
    assert shapes_of(state).factor == factor
    if "ema" in manifest:
        pick_weights(state, "ema", path="f")
        averages = {key: t for key, t in state.items() if not key.startswith("model.")}
        assert identify(averages) == name


def test_every_family_that_can_be_run_has_what_it_needs():
    rows = [family for family in FAMILIES if family.config]
    assert len(rows) == 16
    for family in rows:
        assert (ROOT / family.config).is_file(), family.config
        assert family.task in ("text", "inpaint", "depth", "upscale")
        assert bool(family.folder and family.download) != bool(family.bundled)
    for names in ([f.folder for f in rows if f.folder], [f.config for f in rows]):
        assert len(set(names)) == len(names)


def test_what_shapes_cannot_tell_apart():
    assert [row.predicts for row in variants(family_of(meta(context=1024).state_dict()))] == ["eps", "v"]
    bundled = variants(family_of(meta(context=64).state_dict()))
    assert [(row.size, row.predicts) for row in bundled] == [(128, "eps"), (64, "eps"), (64, "v")]
    assert variants(bundled[0], 64) == bundled[1:]
    assert variants(bundled[0], 512) == bundled
    assert len(variants(family_of(meta().state_dict()))) == 1


def test_in_words():
    assert in_words(recognise(Shapes(4, 1024))) == (
        "Stable Diffusion v2 (its config is v2-inference.yaml or v2-inference-v.yaml)"
    )
    assert in_words(recognise(Shapes(4, 2048))) == "Stable Diffusion XL (no config here fits it)"


def test_the_page_about_models_names_every_family():
    page = (ROOT / "docs/models.md").read_text()
    for family in FAMILIES:
        if family.folder:
            assert f"| `{family.folder}` | `{family.config}` |" in page
