import re

import pytest
from diffusers_pipelines import tiny_config, tiny_pipeline
from lora_files import kohya

from ldm.pipeline.adapters import changeable
from ldm.util import instantiate_from_config
from ldm.weights.lora_names import PartsError, change_shape, context_width, family, flat, layers_of, targets

BLOCK = "unet_mid_block_attentions_0_transformer_blocks_0"
DOTS = "mid_block.attentions.0.transformer_blocks.0"
TEXT = "te_encoder_layers_3_self_attn_q_proj"
TEXT_2 = "te2_text_model_encoder_layers_3"
LOHA = {"hada_w1_a": [12, 3], "hada_w1_b": [3, 8], "hada_w2_a": [12, 3], "hada_w2_b": [3, 8]}
LOHA_CORES = {f"hada_w{i}_{x}": [3, 12 if x == "a" else 8] for i in "12" for x in "ab"}
LOHA_CORES |= {"hada_t1": [3, 3, 3, 3], "hada_t2": [3, 3, 3, 3]}
TEXT_DOTS = "text_model.encoder.layers.3.self_attn"


@pytest.mark.parametrize(
    ("key", "layer", "part"),
    [
        (f"lora_{BLOCK}_attn1_to_q.lora_down.weight", f"{BLOCK}_attn1_to_q", "down"),
        (f"lora_{BLOCK}_attn1_to_q.alpha", f"{BLOCK}_attn1_to_q", "alpha"),
        (f"lora_{BLOCK}_ff_net_0_proj.dora_scale", f"{BLOCK}_ff_net_0_proj", "dora_scale"),
        ("lora_unet_mid_block_resnets_0_conv1.lora_mid.weight", "unet_mid_block_resnets_0_conv1", "mid"),
        (f"lora_{BLOCK}_attn1_to_q.hada_w1_a", f"{BLOCK}_attn1_to_q", "hada_w1_a"),
        (f"lycoris_{BLOCK.removeprefix('unet_')}_attn1_to_q.lokr_w2_b", f"{BLOCK}_attn1_to_q", "lokr_w2_b"),
        (f"unet.{DOTS}.attn1.to_q.lora_A.weight", f"{BLOCK}_attn1_to_q", "down"),
        (f"unet.{DOTS}.attn1.to_q.lora_B.default.weight", f"{BLOCK}_attn1_to_q", "up"),
        (f"unet.{DOTS}.attn1.to_out.0.lora.up.weight", f"{BLOCK}_attn1_to_out_0", "up"),
        (f"unet.{DOTS}.attn1.processor.to_out_lora.up.weight", f"{BLOCK}_attn1_to_out_0", "up"),
        (f"{DOTS}.attn2.processor.to_k_lora.down.weight", f"{BLOCK}_attn2_to_k", "down"),
        (f"base_model.model.{DOTS}.attn2.to_k.lora_A.weight", f"{BLOCK}_attn2_to_k", "down"),
        (f"unet.{DOTS}.attn2.to_k.lora_magnitude_vector", f"{BLOCK}_attn2_to_k", "magnitude"),
        (f"{DOTS}.attn2.to_k.lora_magnitude_vector.default.weight", f"{BLOCK}_attn2_to_k", "magnitude"),
        ("diffusion_model.middle_block.1.proj_in.lora_up.weight", "unet_middle_block_1_proj_in", "up"),
        ("lora_te_text_model_encoder_layers_3_self_attn_q_proj.lora_up.weight", TEXT, "up"),
        ("lora_te1_text_model_encoder_layers_3_self_attn_q_proj.lora_up.weight", TEXT, "up"),
        (f"text_encoder.{TEXT_DOTS}.q_proj.lora_linear_layer.down.weight", TEXT, "down"),
        (f"text_encoders.clip_l.transformer.{TEXT_DOTS}.q_proj.lora_up.weight", TEXT, "up"),  # ComfyUI's
        (f"text_encoders.clip_h.transformer.{TEXT_DOTS}.q_proj.alpha", TEXT, "alpha"),
        (f"text_encoder.{TEXT_DOTS}.to_q_lora.down.weight", TEXT, "down"),
        (f"base_model.model.{TEXT_DOTS}.q_proj.lora_B.weight", TEXT, "up"),
        (f"lora_{TEXT_2}_mlp_fc1.alpha", f"{TEXT_2}_mlp_fc1", "alpha"),
    ],
)  # fmt: skip
def test_spellings(key: str, layer: str, part: str) -> None:
    assert layers_of([key]) == ({layer: {part: key}}, [])


def test_keys_of_no_kind_known_here() -> None:
    keys = ["lora_unet_conv_in.oft_blocks", "emb_params"]
    assert layers_of(keys) == ({}, keys)


@pytest.mark.parametrize(
    "keys",
    [
        [f"unet.{DOTS}.attn1.to_q.lora_A.{adapter}.weight" for adapter in ("one", "two")],
        [f"lora_{BLOCK}_attn1_to_q.alpha", f"unet.{DOTS}.attn1.to_q.alpha"],
    ],
)
def test_several_loras_in_one_file(keys: list[str]) -> None:
    """The last of them was merged, and nothing said that the others were not."""
    with pytest.raises(PartsError, match="holds several LoRAs in one") as error:
        layers_of(keys)
    assert all(key in str(error.value) for key in keys)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_every_layer_that_diffusers_names_is_found(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    model = instantiate_from_config(tiny_config(kind))
    known = targets({name: shape for name, (_, _, shape) in changeable(model).items()})
    layers = kohya(pipe.unet, "unet") | kohya(pipe.text_encoder, "te")
    assert len(layers) > 60
    for layer, shape in layers.items():
        found = known[flat(layer)].shape
        assert change_shape({"diff": found}) == change_shape({"diff": shape})


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            {"up": [96, 4], "down": [8, 96]},
            "has lora_up [96, 4] and lora_down [8, 96], whose ranks 4 and 8 differ",
        ),
        ({"up": [96], "down": [4, 96]}, "has lora_up [96], which is no matrix"),
        ({"up": [96, 4], "down": []}, "has lora_down [], which is no matrix"),
        ({"up": [96, 4], "down": [4, 96], "alpha": [2]}, "has alpha [2], which is not one number"),
        ({"up": [96, 4], "down": [4, 96], "alpha": [0]}, "has alpha [0], which is not one number"),
        (
            {"up": [96, 4, 1, 1], "down": [4, 96, 1, 1], "mid": [4, 4]},
            "lora_mid [4, 4], which is to have 4 axes",
        ),
        ({"up": [96, 4, 1, 1], "down": [4, 96, 1, 1], "mid": [3, 4, 3, 3]}, "whose ranks 4 and 3 differ"),
        ({"up": [96, 4, 1, 1], "down": [4, 96, 1, 1], "mid": [4, 3, 3, 3]}, "whose ranks 4 and 3 differ"),
        ({"up": [96, 4]}, "has no lora_down"),
        ({"alpha": []}, "has no lora_up and no lora_down"),
        ({"diff": [96]}, "has diff [96], which is no matrix"),
        (
            {**LOHA, "hada_w1_a": [12, 3], "hada_w1_b": [5, 8]},
            "hada_w1_a [12, 3] and hada_w1_b [5, 8], whose",
        ),
        ({**LOHA, "hada_w2_b": [3, 9]}, "has products of its hada factors of 12x8 and 12x9"),
        ({**LOHA, "hada_w2_b": [3, 8, 1]}, "has hada_w2_b [3, 8, 1], which is to have 2 axes"),
        ({**LOHA, "hada_t1": [3, 3]}, "has hada_t1 [3, 3], which is to have 4 axes"),
        ({**LOHA_CORES, "hada_t2": [3, 4, 3, 3]}, "has hada_w2_b [3, 8] and hada_t2 [3, 4, 3, 3]"),
        ({"hada_w1_a": [12, 3], "hada_w1_b": [3, 8], "hada_w2_a": [12, 3]}, "has no hada_w2_b"),
        ({"lokr_w1": [4, 4], "lokr_w2_a": [3, 2], "lokr_w2_b": [5, 2]}, "whose ranks 2 and 5 differ"),
        ({"lokr_w1": [4], "lokr_w2": [3, 2]}, "has lokr_w1 [4], which is no matrix"),
        ({"lokr_w1": [4, 4]}, "has no lokr_w2_a and no lokr_w2_b"),
        ({"lokr_w1": [4, 4], "lokr_w2_a": [2, 3], "lokr_w2_b": [2, 2], "lokr_t2": [2, 2]}, "to have 4 axes"),
    ],
)
def test_parts_that_do_not_go_together(parts: dict, words: str) -> None:
    """Only the outer sides were looked at: torch failed at the product, once the model had been loaded."""
    with pytest.raises(PartsError, match=re.escape(words)) as error:
        change_shape(parts)
    assert error.value.incomplete == words.startswith("has no ")


@pytest.mark.parametrize(
    ("parts", "shape"),
    [
        ({"up": [12, 3], "down": [3, 8], "alpha": []}, (12, 8)),
        ({"up": [12, 3], "down": [3, 8], "alpha": [1]}, (12, 8)),
        ({"up": [12, 3, 1, 1], "down": [3, 8, 3, 3]}, (12, 72)),  # kohya's and peft's of a convolution
        ({"up": [12, 3, 1, 1], "down": [3, 8, 1, 1], "mid": [3, 3, 3, 3]}, (12, 72)),
        ({"up": [12, 3], "down": [4, 8], "mid": [3, 4, 3, 3]}, (12, 72)),  # a core between other ranks
        ({"up": [12, 3, 1, 1], "down": [3, 8], "dora_scale": [12, 1]}, (12, 8)),
        ({"diff": [12, 8, 3, 3]}, (12, 72)),
        (LOHA, (12, 8)),
        ({**LOHA, "hada_w2_a": [12, 5], "hada_w2_b": [5, 8]}, (12, 8)),
        (LOHA_CORES, (12, 72)),
        ({"lokr_w1": [4, 2], "lokr_w2": [3, 4, 3, 3], "alpha": []}, (12, 72)),
        ({"lokr_w1": [4, 2, 1, 1], "lokr_w2": [3, 4, 3, 3]}, (12, 72)),
        ({"lokr_w1_a": [4, 9], "lokr_w1_b": [9, 2], "lokr_w2_a": [3, 2], "lokr_w2_b": [2, 36]}, (12, 72)),
        ({"lokr_w1": [4, 2], "lokr_w2_a": [5, 3], "lokr_w2_b": [5, 4], "lokr_t2": [5, 5, 3, 3]}, (12, 72)),
    ],
)
def test_shapes_of_what_trainers_write(parts: dict, shape: tuple[int, int]) -> None:
    assert change_shape(parts) == shape


def test_families() -> None:
    def keys(width: int) -> dict:
        return {f"{BLOCK}_attn2_to_k": (1280, width)}

    assert context_width(keys(2048)) == 2048
    assert [family(keys(width)) for width in (768, 1024, 2048, 5)] == [
        *("Stable Diffusion v1", "Stable Diffusion v2", "Stable Diffusion XL", "")
    ]
    assert family({flat("lora_te2_text_model_encoder_layers_3_mlp_fc1"): None}) == "Stable Diffusion XL"
    assert family({flat("lora_unet_double_blocks_0_img_attn_proj"): None}) == "FLUX"
    assert family({flat("transformer.single_transformer_blocks.3.attn.to_q"): None}) == "FLUX"
    assert family({flat("lora_unet_joint_blocks_0_x_block_mlp_fc1"): None}) == "Stable Diffusion 3"
