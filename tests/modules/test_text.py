"""The tokenizer against open_clip's, the text transformer against transformers and the golden embeddings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_files import case, manifest, pseudo_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.errors import InputError
from ldm.modules.encoders import tokenizer as tokenizer_module
from ldm.modules.encoders.clip import CLIPTextTransformer
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizer import CLIPTokenizer

ROOT = Path(__file__).parents[2]
MINIATURE = {"width": 64, "layers": 4, "heads": 4}
PROMPTS = {
    "empty": "",
    "white space": " \n\t ",
    "accents": "CAFÉ  terrace at night, résumé, naïve ÀÉÎÕÜ ß ﬁ İstanbul ſ",
    "combining": "e\u0301 o\u0308 a\u0345 x\u0336y\u0336",
    "emoji": "👍🏽 👩‍👩‍👧 🇩🇪 ☕️",
    "punctuation": "wow!!! (a:1.2), [b|c] --ar 16:9 “quoted” ‘it’s’ don't we'LL I'M ... '' ~`@#$%^&*_+=",
    "apostrophes": "'s 'ſ 't're've it's's",
    "entities": "&lt;b&gt; &amp;amp;lt; &eacute; &#233; &#x1c; &nbsp; &notanentity;",
    "entities beside a bracket": "< &amp;lt; &amp;amp;lt; &eacute;",  # ftfy leaves these to html.unescape
    "lines": "one\ntwo\r\nthree\tfour\x0bfive\u2028six\u00a0seven\u3000eight",
    "control": "a\x00b\x01c\x1cd\x1fe\x7ff\x85g\u200bh\ufeffi",
    "mojibake": "âœ” sÃ© naÃ¯ve",
    "chinese": "一只猫坐在桌子上，漢字かなカナ 한국어",
    "other scripts": "привет мир שלום مرحبا नमस्ते ไทย",
    "numbers": "1234567890 8k ½ ² ٣ Ⅷ",
    "unassigned": "a\u0378b \U0003fffd",
    "lone surrogate": "a\ud800b",
    "special": "<start_of_text>a<end_of_text> <END_OF_TEXT> !<end_of_text>",
    "special in the original": "a <|startoftext|> b <|endoftext|> c <|endoftext|",
    "long word": "x" * 500,
    "200 words": "lion holding hunted deer in grass fields, " * 30,
}


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer()


@pytest.fixture(scope="module")
def reference():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


# --- Tokenizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", PROMPTS.values(), ids=PROMPTS)
def test_ids_are_open_clips(tokenizer, reference, text):
    assert tokenizer.encode(text) == reference.encode(text)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_ids_of_any_text_are_open_clips(tokenizer, reference, text):
    """The word patterns of the `tokenizers` library know fewer letters, so `regex` finds the words."""
    assert tokenizer.encode(text) == reference.encode(text)


def test_rows_padded_with_zeros_are_open_clips(reference):
    texts = list(PROMPTS.values())
    assert torch.equal(CLIPTokenizer(pad_id=0)(texts), reference(texts))
    assert torch.equal(CLIPTokenizer(16, pad_id=0)(texts), reference(texts, context_length=16))


def test_rows_are_padded_with_the_end_token(tokenizer):
    """As the original's; open_clip's zeros put v1 off."""
    rows = tokenizer(["", "a cat"])
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[49406] + [49407] * 76, [49406, 320, 2368] + [49407] * 74]


def test_a_long_text_still_ends_with_the_end_token(tokenizer):
    (row,) = tokenizer(["cat " * 100])
    assert row.tolist() == [49406] + [2368] * 75 + [49407]


@pytest.mark.parametrize("family", ["mini-v1", "sd-v1"])
def test_golden_ids(tokenizer, family):
    tensors, metadata = case(f"components_{family}")
    assert torch.equal(tokenizer(json.loads(metadata["prompts"])), tensors["token_ids"])


def test_nothing_is_cut_off_where_all_fits(tokenizer):
    assert tokenizer.cut_off("") == ""
    assert tokenizer.cut_off("cat " * 75) == ""


def test_cut_off_is_what_the_encoder_does_not_read(tokenizer):
    assert tokenizer.cut_off("cat " * 75 + " Two   <b>&amp;</b>\n\tDOGS!") == "two <b>&</b> dogs!"


def test_cut_off_within_a_word(tokenizer):
    """`unbelievableness` is three tokens; the first still fits."""
    assert tokenizer.cut_off("cat " * 74 + "unbelievableness, wow") == "ableness, wow"
    assert tokenizer.cut_off("猫 " * 24 + "猫漢字") == "漢字"


def test_a_character_that_is_read_in_part_counts_as_cut_off(tokenizer):
    """`猫` is three tokens, of which two still fit."""
    assert tokenizer.cut_off("猫 " * 24 + "cat 猫漢字") == "猫漢字"


@pytest.mark.parametrize("text", PROMPTS.values(), ids=PROMPTS)
def test_cut_off_holds_the_dropped_tokens(text):
    """Decided on the ids: nothing for a text that fits, else a tail of the cleaned text."""
    short = CLIPTokenizer(5)
    lost, ids = short.cut_off(text), short.encode(text)
    assert bool(lost) == (len(ids) > 3)
    assert tokenizer_module.clean(text).endswith(lost)


def test_open_clip_is_never_imported():
    """Importing it takes seconds; only its vocabulary file is read, and ftfy only when a text is cleaned."""
    code = (
        "import sys\n"
        "from ldm.modules.encoders.tokenizer import CLIPTokenizer\n"
        "assert 'ftfy' not in sys.modules\n"
        "CLIPTokenizer()(['a cat'])\n"
        "print({'open_clip', 'transformers', 'torchvision', 'timm'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_a_missing_vocabulary_is_explained(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install open_clip_torch"):
        CLIPTokenizer()


# --- Transformer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_same_function_as_transformers(activation):
    """transformers 5.6 dropped `text_model.` from its keys; either spelling will do."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "max_position_embeddings": 20, "hidden_size": 32, "intermediate_size": 128}
    config = CLIPTextConfig(num_hidden_layers=3, num_attention_heads=4, hidden_act=activation, **sizes)
    theirs = CLIPTextModel(config).eval()
    ours = CLIPTextTransformer(
        width=32, layers=3, heads=4, vocab_size=100, context_length=20, activation=activation
    )
    state = {
        name.removeprefix("text_model."): torch.randn_like(tensor) * 0.2
        for name, tensor in theirs.state_dict().items()
        if "position_ids" not in name
    }
    ours.load_state_dict(state)
    getattr(theirs, "text_model", theirs).load_state_dict(state, strict=False)
    ids = torch.randint(0, 99, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).last_hidden_state, rtol=0, atol=1e-5)


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


def test_an_unknown_activation_is_refused():
    with pytest.raises(InputError, match=r"'relu' .* quick_gelu, gelu"):
        CLIPTextTransformer(activation="relu")
