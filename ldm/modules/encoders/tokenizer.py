"""The tokenizers, offline: CLIP's byte pairs are in a file that open_clip carries, BERT's word pieces in one
that the user puts in its place.
"""

import gzip
import html
import importlib.util
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel

from ldm.errors import InputError

START, END = "<start_of_text>", "<end_of_text>"
MERGES = 49152 - 256 - 2  # lines of the vocabulary file that CLIP uses
BERT_VOCABULARY = "models/ldm/text2img-large/vocab.txt"  # in the working folder, or else in the repository
ROOT = Path(__file__).resolve().parents[3]
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


def mended(text: str) -> str:
    """A text whose broken encodings are mended and whose HTML entities are undone (as open_clip)."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def clean(text: str) -> str:
    """A mended text with its white space folded and its case lowered (as open_clip)."""
    return " ".join(mended(text).split()).lower()


def rows_of(texts: list[list[int]], tokenizer: "CLIPTokenizer | BERTTokenizer") -> torch.Tensor:
    """The ids of texts as int64 [b, max_length], each between the start and the end token, then padded."""
    rows = torch.full((len(texts), tokenizer.max_length), tokenizer.pad_id)
    for row, text in zip(rows, texts, strict=True):
        ids = [tokenizer.start_id, *text[: tokenizer.max_length - 2], tokenizer.end_id]
        row[: len(ids)] = torch.tensor(ids)
    return rows


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
        return rows_of([self.encode(text) for text in texts], self)

    def cut_off(self, text: str, kept: int | None = None) -> str:
        """The part of the text that does not fit, in its cleaned form; "" if all of it does.

        `kept` tokens of it fit, by default all but two of `max_length`.
        """
        text = clean(text)
        words = list(self.words.finditer(text))
        found = self.bpe.encode([word.group() for word in words], is_pretokenized=True)
        kept = self.max_length - 2 if kept is None else kept
        if len(found.ids) <= kept:
            return ""
        return text[words[found.word_ids[kept]].start() + found.offsets[kept][0] :]


def bert_vocabulary_file() -> Path:
    """Where the word pieces of bert-base-uncased are. InputError, which says what to put where."""
    for path in (Path(BERT_VOCABULARY), ROOT / BERT_VOCABULARY):
        if path.is_file():
            return path
    raise InputError(
        f"{BERT_VOCABULARY} is missing: put the file vocab.txt of bert-base-uncased there "
        "(30,522 lines, one word piece each), by which the LAION-400M model reads text"
    )


class BERTTokenizer:
    """Prompts -> token ids, equal to transformers' bert-base-uncased tokenizer.

    [CLS] and [SEP] around at most `max_length - 2` word pieces, then [PAD].
    """

    def __init__(self, max_length: int = 77, vocab_size: int = 30522):
        path = bert_vocabulary_file()
        try:
            pieces = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not text in UTF-8: {error.reason}") from error
        ids = {piece: i for i, piece in enumerate(pieces)}
        lacking = [special for special in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if special not in ids]
        if lacking or len(pieces) > vocab_size:
            why = f"it lacks {', '.join(lacking)}" if lacking else f"it has {len(pieces):,} lines"
            raise InputError(f"{path} is not the model's vocabulary of {vocab_size:,} word pieces: {why}")
        self.word_pieces = Tokenizer(WordPiece(ids, unk_token="[UNK]"))
        self.word_pieces.normalizer = BertNormalizer()
        self.word_pieces.pre_tokenizer = BertPreTokenizer()
        specials = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
        self.word_pieces.add_special_tokens([piece for piece in specials if piece in ids])
        self.start_id, self.end_id, self.pad_id = ids["[CLS]"], ids["[SEP]"], ids["[PAD]"]
        self.max_length = max_length

    def encode(self, text: str) -> list[int]:
        """The ids of the text alone."""
        return self.word_pieces.encode(text, add_special_tokens=False).ids

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """int64 [b, max_length]; longer texts are cut so that the end token is last."""
        return rows_of([self.encode(text) for text in texts], self)

    def cut_off(self, text: str) -> str:
        """The part of the text that does not fit; "" if all of it does."""
        found = self.word_pieces.encode(text, add_special_tokens=False)
        kept = self.max_length - 2
        return text[found.offsets[kept][0] :] if len(found.ids) > kept else ""
