"""CLIP's byte-pair tokenizer, offline: the vocabulary is the file that open_clip carries."""

import gzip
import html
import importlib.util
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from ldm.errors import InputError

START, END = "<start_of_text>", "<end_of_text>"
MERGES = 49152 - 256 - 2  # lines of the vocabulary file that CLIP uses
WORDS = rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"  # open_clip's


def vocabulary_file() -> Path:
    """Where the open_clip_torch package keeps CLIP's merges; found without importing it."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        raise InputError("CLIP's vocabulary is missing: run `pip install open_clip_torch`")
    return Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")


def byte_symbols() -> list[str]:
    """The printable characters that stand for the 256 bytes, in the order of CLIP's vocabulary (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def clean(text: str) -> str:
    """Mend broken encodings, undo HTML entities, fold white space, lower the case (as open_clip)."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class CLIPTokenizer:
    """Prompts -> token ids, equal to open_clip's SimpleTokenizer.

    Start and end tokens around at most `max_length - 2` others, then `pad_id`: by default the end token,
    which Stable Diffusion v1 was trained with; v2 pads with 0.
    """

    def __init__(self, max_length: int = 77, pad_id: int | None = None):
        import regex

        lines = gzip.decompress(vocabulary_file().read_bytes()).decode().split("\n")[1 : MERGES + 1]
        merges = [tuple(line.split()) for line in lines]
        symbols = byte_symbols()
        vocabulary = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges), START, END]
        ids = {token: i for i, token in enumerate(vocabulary)}
        self.words = regex.compile(WORDS, regex.IGNORECASE)
        self.bpe = Tokenizer(BPE(ids, merges, end_of_word_suffix="</w>"))
        self.bpe.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
        self.bpe.add_special_tokens([START, END])
        self.start_id, self.end_id = ids[START], ids[END]
        self.max_length = max_length
        self.pad_id = self.end_id if pad_id is None else pad_id

    def encode(self, text: str) -> list[int]:
        """The ids of the text alone."""
        return self.bpe.encode(self.words.findall(clean(text)), is_pretokenized=True).ids

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """int64 [b, max_length]; longer texts are cut so that the end token is last."""
        rows = torch.full((len(texts), self.max_length), self.pad_id)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.start_id, *self.encode(text)[: self.max_length - 2], self.end_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def cut_off(self, text: str) -> str:
        """The part of the text that does not fit, in its cleaned form; "" if all of it does."""
        text = clean(text)
        words = list(self.words.finditer(text))
        found = self.bpe.encode([word.group() for word in words], is_pretokenized=True)
        kept = self.max_length - 2
        if len(found.ids) <= kept:
            return ""
        return text[words[found.word_ids[kept]].start() + found.offsets[kept][0] :]
