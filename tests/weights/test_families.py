"""Which model a file is, by the names and shapes of its weights."""

import golden_files
import pytest
import torch
from checkpoints import FORMS, meta, save, small_state

from ldm.weights.checkpoint import pick_weights, read_state_dict
from ldm.weights.families import identify, prediction_markers


@pytest.mark.parametrize(
    ("channels", "context", "name"),
    [
        (4, 768, "Stable Diffusion v1"),
        (9, 768, "Stable Diffusion v1 inpainting"),
        (8, 768, "InstructPix2Pix"),
        (4, 1024, "Stable Diffusion v2"),
        (9, 1024, "Stable Diffusion v2 inpainting"),
        (5, 1024, "Stable Diffusion v2 depth"),
        (7, 1024, "the Stable Diffusion x4 upscaler"),
        (4, 1280, "LAION-400M text2img-large"),
        (4, 2048, "Stable Diffusion XL"),
        (3, 512, "a latent diffusion model of an unlisted kind"),
    ],
)
def test_identify_by_shapes(channels, context, name):
    assert identify(meta(channels=channels, context=context).state_dict()) == name


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "Stable Diffusion XL"),
        ("down_blocks.0.resnets.0.conv1.weight", "a diffusers UNet"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("emb_params", "a textual inversion"),
        ("control_model.input_hint_block.0.bias", "a ControlNet"),
        ("encoder.conv_in.weight", "an autoencoder alone"),
        ("first_stage_model.decoder.conv_in.weight", "an autoencoder alone"),
        ("text_model.encoder.layers.0.mlp.fc1.bias", "a text encoder alone"),
        ("model_ema.diffusion_modelout0bias", "a latent diffusion model of an unlisted kind"),
        ("layer.0.weight", "an unknown model"),
    ],
)
def test_identify_by_names(key, name):
    assert identify({key: torch.empty(4, 4, device="meta")}) == name


def test_identify_unclip():
    state = meta(context=1024).state_dict()
    state["model.diffusion_model.label_emb.0.0.weight"] = torch.empty(1280, 2048, device="meta")
    assert identify(state) == "Stable unCLIP"


@pytest.mark.parametrize(
    ("manifest", "name"),
    [
        ("sd-v1", "Stable Diffusion v1"),
        ("mini-v1-ema", "Stable Diffusion v1"),
        ("sd-v1-inpainting", "Stable Diffusion v1 inpainting"),
        ("sd-v2", "Stable Diffusion v2"),
        ("sd-v2-inpainting", "Stable Diffusion v2 inpainting"),
        ("sd-v2-depth", "Stable Diffusion v2 depth"),
        ("x4-upscaler", "the Stable Diffusion x4 upscaler"),
        ("ldm-text2img-large", "LAION-400M text2img-large"),
    ],
)
def test_identify_published_layouts(manifest, name):
    layout = golden_files.manifest(manifest)
    state = {key: torch.empty(shape, device="meta") for key, (_, shape) in layout.items()}
    assert identify(state) == name
    if "ema" in manifest:
        pick_weights(state, "ema", path="f")


@pytest.mark.parametrize("names", [(), ("v_pred",), ("ztsnr",), ("v_pred", "ztsnr")])
@pytest.mark.parametrize("form", FORMS)
def test_prediction_markers(tmp_path, form, names):
    """Their tensors are empty or hold anything: only the names count."""
    state = small_state() | {name: torch.tensor([]) for name in names}
    found = prediction_markers(read_state_dict(save(state, tmp_path / "w", form)))
    assert found == ("v_pred" in names, "ztsnr" in names)
