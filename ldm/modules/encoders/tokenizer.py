"""CLIP's byte-pair tokenizer, offline: the vocabulary is the file that open_clip carries."""

import gzip
import html
import importlib.util
import re
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from ldm.errors import InputError

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2  # lines of the vocabulary file that CLIP uses
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # of CLIP's code
)


def vocabulary_file() -> Path:
    """Where the open_clip_torch package keeps CLIP's merges; found without importing it."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        raise InputError("CLIP's vocabulary is missing: run `pip install open_clip_torch`")
    return Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")


def byte_symbols() -> list[str]:
    """The printable characters that stand for the 256 bytes, in the order of CLIP's vocabulary (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def clean(text: str) -> str:
    """Mend broken encodings, undo HTML entities, fold white space, lower the case (as CLIP's code does)."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip().lower()


class CLIPTokenizer:
    """Prompts -> token ids; start and end tokens around at most `max_length - 2` others, then padding."""

    def __init__(self, max_length: int = 77, pad_id: int | None = None):
        lines = gzip.decompress(vocabulary_file().read_bytes()).decode().split("\n")[1 : MERGES + 1]
        merges = [tuple(line.split()) for line in lines]
        symbols = byte_symbols()
        words = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges), START, END]
        self.ids = {word: i for i, word in enumerate(words)}
        self.tokenizer = Tokenizer(BPE(self.ids, merges, end_of_word_suffix="</w>"))
        self.tokenizer.pre_tokenizer = Sequence(
            [Split(Regex(WORDS), "removed", invert=True), ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        self.max_length = max_length
        self.pad_id = self.ids[END] if pad_id is None else pad_id

    def encode(self, text: str) -> list[int]:
        """The ids of the text alone."""
        return self.tokenizer.encode(clean(text)).ids

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """int64 [b, max_length]; longer texts are cut so that the end token is last."""
        rows = torch.full((len(texts), self.max_length), self.pad_id)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.ids[START], *self.encode(text)[: self.max_length - 2], self.ids[END]]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def cut_off(self, text: str) -> str:
        """The part of the text that does not fit, cleaned; "" if all of it does."""
        text = clean(text)
        offsets = self.tokenizer.encode(text).offsets[self.max_length - 2 :]
        return text[offsets[0][0] :] if offsets else ""
