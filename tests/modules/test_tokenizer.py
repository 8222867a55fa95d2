"""The tokenizer against open_clip's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_files import case
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.errors import InputError
from ldm.modules.encoders import tokenizer as tokenizer_module
from ldm.modules.encoders.tokenizer import CLIPTokenizer

ROOT = Path(__file__).parents[2]
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
