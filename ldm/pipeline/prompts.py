"""From a prompt to what the UNet reads of it: tokens in chunks, their weights, learned vectors among them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.errors import FieldError
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder, Tokens
from ldm.pipeline.settings.text import PLAIN, EmbeddingFile, Reading
from ldm.prompts import syntax
from ldm.weights.embedding import Embedding, check_width, read_embedding
from ldm.weights.hashes import quick_hash

if TYPE_CHECKING:
    from ldm.modules.encoders.clip import Vectors
    from ldm.modules.encoders.tokenizer import CLIPTokenizer

COMMA_REACH = 20  # tokens that may move into the next chunk with the text behind a comma, as in the web UI
Encoder = FrozenCLIPEmbedder | FrozenOpenCLIPEmbedder


@dataclass
class Unit:
    """What stays together in a chunk: a token, or the vectors of a textual inversion."""

    token: int | Embedding
    weight: float

    @property
    def length(self) -> int:
        return 1 if isinstance(self.token, int) else len(self.token.vectors)


@dataclass
class Chunk:
    """What the text encoder reads at a time, without start and end."""

    units: list[Unit] = field(default_factory=list)
    length: int = 0  # tokens
    comma: tuple[int, int] | None = None  # the last one: its place among the units, and among the tokens

    def after_comma(self) -> list[Unit]:
        """Takes out what follows the last comma."""
        place, position = self.comma
        self.units, moved = self.units[: place + 1], self.units[place + 1 :]
        self.length = position + 1
        return moved

    def add(self, unit: Unit, is_comma: bool) -> None:
        if is_comma:
            self.comma = len(self.units), self.length
        self.units.append(unit)
        self.length += unit.length


def chunks_of(units: Sequence[Unit], room: int, comma: int) -> list[Chunk]:
    """Units in chunks of at most `room` tokens.

    Where a chunk is full, what follows a comma (a token's id) in its last 20 tokens goes into the next chunk
    as a whole: AUTOMATIC1111's default, in modules/sd_hijack_clip.py.
    """
    chunks = [Chunk()]
    for unit in units:
        last = chunks[-1]
        is_comma = unit.token == comma
        full = last.length == room and last.comma is not None
        if full and not is_comma and room - last.comma[1] <= COMMA_REACH:
            moved = last.after_comma()
            chunks.append(Chunk(moved, sum(each.length for each in moved)))
        if chunks[-1].length + unit.length > room:
            chunks.append(Chunk())
        chunks[-1].add(unit, is_comma)
    return chunks


@dataclass(frozen=True)
class Layout:
    """A prompt as the text encoder reads it."""

    ids: Tensor  # int64 [chunks, n]
    weights: Tensor  # [chunks, n]
    vectors: Vectors
    cut_off: tuple[str, ...]  # the texts that no chunk has room for


class PromptReader:
    """Reads prompts for one text encoder.

    `encoder` gives it, with weights or without: only its tokenizer and its sizes are used here.
    """

    def __init__(self, encoder: Callable[[], torch.nn.Module]):
        self._encoder = encoder
        self._files: dict[str, Embedding] = {}

    def check(self, reading: Reading) -> None:
        """InputError for what the text encoder cannot do, and for textual inversions that it cannot read."""
        if reading == Reading():
            return
        encoder = self._encoder()
        if not isinstance(encoder, Encoder):
            given = {
                "prompt_syntax": reading.syntax != PLAIN,
                "long_prompts": reading.long,
                "clip_skip": reading.clip_skip is not None,
                "embedding": bool(reading.embedding),
            }
            name = next(name for name, is_given in given.items() if is_given)
            raise FieldError(
                "{" + name + "}: this model's text encoder, {type}, is none of CLIP's; leave it out",
                type=type(encoder).__name__,
            )
        if reading.clip_skip is not None and reading.clip_skip > len(encoder.layers):
            raise FieldError(
                "{clip_skip} {given}: this model's text encoder has {layers} layers",
                given=reading.clip_skip,
                layers=len(encoder.layers),
            )
        for embedding in self.embeddings(reading):
            check_width(embedding, encoder.width)
            room = encoder.max_length - 2
            if len(embedding.vectors) > room:
                raise FieldError(
                    "{embedding} {file}: its {count} vectors do not fit into the {room} tokens of a chunk",
                    file=embedding.path,
                    count=len(embedding.vectors),
                    room=room,
                )

    def embeddings(self, reading: Reading) -> list[Embedding]:
        """The textual inversions of a request. InputError for files that are none."""
        for text in reading.embedding:
            if text not in self._files:
                self._files[text] = read_embedding(*EmbeddingFile.parse(text))
        return [self._files[text] for text in reading.embedding]

    def digests(self, reading: Reading) -> dict[str, str]:
        """Hashes of the content of textual inversions, by which a run is taken up again."""
        hashes = [quick_hash(each.path) for each in self.embeddings(reading)]
        return {"embedding content": ", ".join(hashes)} if hashes else {}

    def forget(self) -> None:
        """Read files anew from now on."""
        self._files.clear()

    def embed(self, encode: Callable[[Tokens], Tensor], prompt: str, reading: Reading) -> Tensor:
        """The embedding of a prompt without schedules, [1, chunks x n, d].

        `encode` is the text encoder. Where tokens have weights, the states of a chunk are multiplied by them
        and then by what gives them their mean back, as in AUTOMATIC1111 (modules/sd_emphasis.py).
        """
        layout = self.layout(prompt, reading)
        states = encode(Tokens(layout.ids, layout.vectors, reading.clip_skip))
        rows = [
            states[k] if bool((weights == 1.0).all()) else weigh(states[k], weights)
            for k, weights in enumerate(layout.weights)
        ]
        return torch.cat(rows)[None]

    def layout(self, prompt: str, reading: Reading) -> Layout:
        """The chunks of a prompt without schedules. PromptError for weights that are none."""
        encoder = self._encoder()
        tokenizer: CLIPTokenizer = encoder.tokenizer
        room = encoder.max_length - 2
        (comma,) = tokenizer.encode(",")
        sections = (((prompt, 1.0),),) if reading.syntax == PLAIN else syntax.weighted(prompt)
        chunks: list[Chunk] = []
        lost: list[str] = []
        for k, section in enumerate(sections):
            units = list(self._units(section, tokenizer, reading))
            if not units and 0 < k == len(sections) - 1:
                break  # nothing follows the last BREAK
            if reading.long:
                chunks += chunks_of(units, room, comma)
                continue
            kept = fitting(units, room)
            chunks.append(Chunk(units[:kept]))
            if kept < len(units):
                text = "".join(part for part, _ in section)
                tokens = len(tokenizer.encode(text))
                lost.append(tokenizer.cut_off(text, max(0, tokens - (len(units) - kept))))
        return _layout(chunks, tokenizer, tuple(lost))

    def _units(
        self, section: Sequence[tuple[str, float]], tokenizer: CLIPTokenizer, reading: Reading
    ) -> Iterator[Unit]:
        known = {name.lower(): each for each in self.embeddings(reading) for name in each.names}
        names = name_pattern(known)
        for text, weight in section:
            pieces = names.split(text) if known else [text]
            for k, piece in enumerate(pieces):  # in turn text and name
                if k % 2:
                    yield Unit(known[piece.lower()], weight)
                else:
                    yield from (Unit(token, weight) for token in tokenizer.encode(piece))

    def unused(self, texts: Sequence[str], reading: Reading) -> list[Embedding]:
        """The textual inversions whose name is in none of the texts."""
        return [
            each
            for each in self.embeddings(reading)
            if not any(name_pattern(each.names).search(text) for text in texts)
        ]


def weigh(states: Tensor, weights: Tensor) -> Tensor:
    """The states [n, d] of a chunk times the weights [n] of its tokens, with the mean that they had."""
    plain = states.float()
    weighted = plain * weights.to(plain)[:, None]
    return (weighted * (plain.mean() / weighted.mean())).to(states.dtype)


def fitting(units: Sequence[Unit], room: int) -> int:
    """How many of the units fit into one chunk, from the first."""
    length = 0
    for k, unit in enumerate(units):
        length += unit.length
        if length > room:
            return k
    return len(units)


def name_pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Finds names in a text, longer ones first, where no letter or digit goes on from theirs."""

    def bounded(name: str) -> str:
        before = r"(?<![^\W_])" if name[0].isalnum() else ""
        after = r"(?![^\W_])" if name[-1].isalnum() else ""
        return before + re.escape(name) + after

    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("(" + "|".join(map(bounded, longest_first)) + ")", re.IGNORECASE)


def _layout(chunks: Sequence[Chunk], tokenizer: CLIPTokenizer, cut_off: tuple[str, ...]) -> Layout:
    ids = torch.full((len(chunks), tokenizer.max_length), tokenizer.pad_id)
    weights = torch.ones(ids.shape)
    vectors: list[tuple[int, int, Tensor]] = []
    for row, chunk in enumerate(chunks):
        at = 1
        ids[row, 0] = tokenizer.start_id
        for unit in chunk.units:
            if isinstance(unit.token, int):
                ids[row, at] = unit.token
            else:
                vectors.append((row, at, unit.token.vectors))
            weights[row, at : at + unit.length] = unit.weight
            at += unit.length
        ids[row, at] = tokenizer.end_id
    return Layout(ids, weights, tuple(vectors), cut_off)
