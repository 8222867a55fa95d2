"""The LAION-400M model's text encoder: golden embeddings, and word pieces against transformers'."""

from pathlib import Path

import pytest
import torch
from golden_files import case, manifest, pseudo_state_dict
from networks import shapes

from ldm.errors import InputError
from ldm.modules.encoders import tokenizer as tokenizer_module
from ldm.modules.encoders.modules import BERTEmbedder
from ldm.modules.encoders.tokenizer import BERT_VOCABULARY, BERTTokenizer

MINIATURE = {"n_embed": 32, "n_layer": 2, "vocab_size": 40}
PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "cube",
    "##s",
    "on",
    "the",
    "un",
    "##believ",
]
PIECES += ["\u2028", "##able", ",", "!", "cafe", "猫", "犬", "'", "b", "##c", "-", "[", "]", "cls"]
TEXTS = {
    "empty": "",
    "plain": "a red cube on the red cubes",
    "accents and case": "A RÉD Café,  the CAFÉ!",
    "pieces": "unbelievable unbelievablec bcc",
    "unknown": "a zebra \U0001f600 red",
    "chinese": "red猫犬 猫a",
    "control": "a\x00b\x01 red\u200b\ufeffcube\tthe\nred",
    "special": "[CLS] a [SEP] [cls] [MASK] red",
    "punctuation": "the-cube's red!!! a,b",
    "long word": "un" + "believ" * 40,
    "long": "a red cube, " * 40,
}


@pytest.fixture
def vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small vocabulary where the user puts the real one, in the working folder."""
    file = tmp_path / BERT_VOCABULARY
    file.parent.mkdir(parents=True)
    file.write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return file


def test_ids_are_transformers(vocabulary):
    from transformers import BertTokenizer

    theirs = BertTokenizer(str(vocabulary))
    for text in TEXTS.values():
        expected = theirs(text, truncation=True, max_length=77, padding="max_length")["input_ids"]
        assert BERTTokenizer()([text]).tolist() == [expected], text


def test_what_is_cut_off(vocabulary):
    tokenizer = BERTTokenizer(max_length=8)
    assert tokenizer.cut_off("a red cube on the Cube") == ""
    assert tokenizer.cut_off("a red cube on the Cube  the Red, cube!") == "the Red, cube!"
    assert tokenizer.cut_off("a red cube on the unbelievable") == "believable"
    (row,) = tokenizer(["a red cube on the cube the red"])
    assert row[0] == PIECES.index("[CLS]")
    assert row[-1] == PIECES.index("[SEP]")


def test_texts_and_tokens_give_the_same(vocabulary):
    torch.manual_seed(0)
    model = BERTEmbedder(**MINIATURE).eval()
    assert "tokenizer" not in vars(model)  # it is read at the first text
    tokens = BERTEmbedder(**MINIATURE, use_tokenizer=False).eval()
    tokens.load_state_dict(model.state_dict())
    with torch.no_grad():
        embeddings = model.encode(["a red cube", "the cat"])
        torch.testing.assert_close(tokens.encode(model.tokenizer(["a red cube", "the cat"])), embeddings)
        torch.testing.assert_close(model("a red cube"), embeddings[:1])
        changed = dict(model.named_parameters())
        for name in model.transformer.unused_weights:
            changed[f"transformer.{name}"] += 1.0
        torch.testing.assert_close(model("a red cube"), embeddings[:1])
    assert embeddings.shape == (2, 77, 32)
    shorter = BERTEmbedder(**MINIATURE, max_seq_len=10)
    assert shorter("a").shape == (1, 10, 32)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_dropout_of_embeddings_is_for_training(vocabulary, dropout):
    model = BERTEmbedder(**MINIATURE, embedding_dropout=dropout)
    with torch.no_grad():
        assert torch.equal(model("a"), model("a")) == (dropout == 0.0)
        model.eval()
        assert torch.equal(model("a"), model("a"))


def test_a_missing_vocabulary_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizer_module, "ROOT", tmp_path)
    with pytest.raises(
        InputError,
        match=r"models/ldm/text2img-large/vocab\.txt is missing: .* vocab\.txt of bert-base-uncased",
    ):
        BERTEmbedder(**MINIATURE)("a red cube")


def test_the_repositorys_vocabulary_is_found_from_elsewhere(vocabulary, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(tokenizer_module, "ROOT", tmp_path)
    assert BERTTokenizer().encode("a red cube") == [5, 6, 7]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\n", r"it lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\]"),
        (
            "\n".join([*PIECES, *map(str, range(40))]).encode(),
            r"vocabulary of 40 word pieces: it has 67 lines",
        ),
        (b"[PAD]\n\xff\xfe", "is not text in UTF-8"),
    ],
)
def test_a_file_that_is_another(vocabulary, content, message):
    vocabulary.write_bytes(content)
    with pytest.raises(InputError, match=message):
        BERTEmbedder(**MINIATURE)("a")


@pytest.mark.slow
def test_golden_embeddings():
    """Token ids are the record's: they are random, so that the vocabulary is not needed."""
    prefix = "cond_stage_model."
    listed = {
        name: entry for name, entry in manifest("ldm-text2img-large").items() if name.startswith(prefix)
    }
    with torch.device("meta"):
        model = BERTEmbedder(n_embed=1280, n_layer=32)
    assert shapes(model) == {name.removeprefix(prefix): shape for name, (_, shape) in listed.items()}
    state = {name.removeprefix(prefix): value for name, value in pseudo_state_dict(listed).items()}
    model.load_state_dict(state, assign=True)
    tensors = case("components_ldm-text2img-large")[0]
    with torch.no_grad():
        embeddings = model.eval().forward_tokens(tensors["token_ids"])
    torch.testing.assert_close(embeddings, tensors["text_embeddings"], rtol=0, atol=1e-4)
