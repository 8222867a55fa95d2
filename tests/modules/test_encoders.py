"""The text encoders against the golden embeddings and the checkpoints' keys."""

import json

import pytest
import torch
from golden_files import case, manifest, pseudo_state_dict

from ldm.errors import InputError
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder

MINIATURE = {"width": 64, "layers": 4, "heads": 4}


@pytest.mark.parametrize("family", ["mini-v1", "sd-v1"])
def test_keys_and_shapes_are_the_checkpoints(family):
    with torch.device("meta"):
        model = FrozenCLIPEmbedder()
    expected = {
        name.removeprefix("cond_stage_model."): shape
        for name, (_, shape) in manifest(family).items()
        if name.startswith("cond_stage_model.") and not name.endswith("position_ids")
    }
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected


@pytest.mark.slow
def test_golden_embeddings():
    tensors, metadata = case("components_mini-v1")
    listed = {
        name.removeprefix("cond_stage_model."): name
        for name in manifest("mini-v1")
        if name.startswith("cond_stage_model.") and not name.endswith("position_ids")
    }
    weights = pseudo_state_dict({name: manifest("mini-v1")[name] for name in listed.values()})
    with torch.device("meta"):
        model = FrozenCLIPEmbedder()
    model.load_state_dict({ours: weights[name] for ours, name in listed.items()}, assign=True)
    with torch.no_grad():
        embeddings = model(json.loads(metadata["prompts"]))
    torch.testing.assert_close(embeddings, tensors["text_embeddings"], rtol=0, atol=1e-4)


def test_a_token_sees_only_those_before_it():
    model = FrozenCLIPEmbedder(**MINIATURE)
    ids = torch.randint(0, 49408, (1, 77))
    changed = ids.clone()
    changed[:, 40:] += 1
    with torch.no_grad():
        before, after = model.forward_tokens(ids), model.forward_tokens(changed % 49408)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert (before[:, 40:] - after[:, 40:]).abs().amax(-1).min() > 1e-3


def test_texts_and_tokens_give_the_same():
    model = FrozenCLIPEmbedder(**MINIATURE)
    with torch.no_grad():
        both = model.encode(["a cat", "a dog"])
        one = model("a dog")
        tokens = model.forward_tokens(model.tokenizer(["a dog"]))
    assert both.shape == (2, 77, 64)
    assert one.shape == (1, 77, 64)
    torch.testing.assert_close(both[1:], one)
    torch.testing.assert_close(tokens, one)


def test_max_length_shortens_the_context_not_the_weights():
    model = FrozenCLIPEmbedder(max_length=16, **MINIATURE)
    assert model("a cat").shape == (1, 16, 64)
    assert model.transformer.text_model.embeddings.position_embedding.weight.shape == (77, 64)


def test_a_miniature_trains_in_bfloat16():
    model = FrozenCLIPEmbedder(**MINIATURE)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(["a red cube", "a blue sphere"]).square().mean() + model("").mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    assert model.transformer.text_model.embeddings.token_embedding.weight.grad.any()


def test_it_is_trainable_until_frozen():
    model = FrozenCLIPEmbedder(**MINIATURE)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.freeze()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_meta_build_holds_no_memory():
    with torch.device("meta"):
        model = FrozenCLIPEmbedder()
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert not list(model.buffers())  # a buffer computed when built would stay empty
    assert "tokenizer" not in vars(model)


def test_the_original_params_are_accepted():
    with torch.device("meta"):
        FrozenCLIPEmbedder(version="openai/clip-vit-large-patch14", device="cuda", max_length=77)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"version": "openai/clip-vit-base-patch32"},
            r"'openai/clip-vit-base-patch32' .*clip-vit-large-patch14",
        ),
        ({"max_length": 78}, r"78 .* 77"),
        ({"width": 100, "heads": 12}, r"100 .* 12"),
    ],
)
def test_params_that_cannot_be(params, message):
    with pytest.raises(InputError, match=message):
        FrozenCLIPEmbedder(**params)


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


# --- Stable Diffusion v2's encoder


def test_v2_pads_with_zeros_and_ends_a_cut_text_with_the_end_token():
    import open_clip

    model = FrozenOpenCLIPEmbedder(**MINIATURE)
    texts = ["", "a cat", "cat " * 100]
    rows = model.tokenizer(texts)
    assert torch.equal(rows, open_clip.tokenize(texts))
    assert rows[1].tolist() == [49406, 320, 2368, 49407] + [0] * 73
    assert rows[2].tolist() == [49406] + [2368] * 75 + [49407]
    with torch.no_grad():
        assert torch.equal(model.encode(texts), model.forward_tokens(rows))
        assert model("a cat").shape == (1, 77, 64)
    assert FrozenOpenCLIPEmbedder(max_length=16, **MINIATURE)("a cat").shape == (1, 16, 64)


def test_v2s_encoder_is_frozen_unless_the_config_says_otherwise():
    frozen = FrozenOpenCLIPEmbedder(**MINIATURE, layer="penultimate")
    assert not any(weight.requires_grad for weight in frozen.parameters())
    free = FrozenOpenCLIPEmbedder(**MINIATURE, layer="penultimate", freeze=False)
    free(["a red cube"]).square().mean().backward()
    without = {name for name, weight in free.named_parameters() if weight.grad is None}
    assert without == {f"model.{name}" for name in free.model.unused_weights}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"arch": "ViT-bigG-14"}, r"'ViT-bigG-14' .*ViT-H-14"),
        ({"layer": "first"}, r"'first' .* last, penultimate"),
        ({"max_length": 78}, r"FrozenOpenCLIPEmbedder max_length 78 .* 77"),
    ],
)
def test_params_of_v2s_encoder_that_cannot_be(params, message):
    with pytest.raises(InputError, match=message):
        FrozenOpenCLIPEmbedder(**{**MINIATURE, **params})
