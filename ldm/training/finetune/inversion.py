"""Textual inversion: vectors for a new word, learned while the model stays as it is (Gal et al. 2022,
https://arxiv.org/abs/2208.01618).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder, TextEncoder, Tokens
from ldm.pipeline.prompts import PromptReader, name_pattern
from ldm.pipeline.settings.text import Reading
from ldm.training.config import TrainingConfig
from ldm.training.files import whole, write_tensors
from ldm.training.finetune import methods
from ldm.training.finetune.methods import Inversion, Sampling, Setup, readable_captions
from ldm.training.tasks import Batch, LatentDiffusionTask
from ldm.util import instantiate_from_config
from ldm.weights.embedding import Embedding
from ldm.weights.loading import ModelFiles

VECTORS = "new_word.vectors"
EXAMPLE = "--token <vase> --init_word vase"
TEMPLATES = (  # captions of images that come without any
    "a photo of a {}",
    "an image of a {}",
    "a picture of a {}",
    "a close-up of a {}",
    "a clear view of a {}",
    "a rendering of a {}",
    "the {}",
    "one {} on its own",
)


class NewWord(nn.Module):
    """A word and its vectors [n, width], which take the place of n tokens."""

    def __init__(self, word: str, vectors: Tensor):
        super().__init__()
        self.word = word
        self.vectors = nn.Parameter(vectors.detach().float().clone())


class WordReader(PromptReader):
    """Reads captions in which a new word may be, as prompts are read with an embedding's file."""

    def __init__(self, encoder: TextEncoder, new: NewWord):
        super().__init__(lambda: encoder)
        self.new = new

    def embeddings(self, reading: Reading) -> list[Embedding]:
        return [Embedding(Path(self.new.word), (self.new.word,), self.new.vectors)]

    def tokens(self, captions: Sequence[str]) -> Tokens:
        """The captions as the text encoder takes them, with the vectors themselves, not copies."""
        layouts = [self.layout(caption, Reading()) for caption in captions]
        vectors = [(row, at, v) for row, each in enumerate(layouts) for _, at, v in each.vectors]
        return Tokens(torch.cat([each.ids for each in layouts]), vectors)


def check_words(encoder: nn.Module, word: str, init_word: str) -> None:
    """InputError for words that no vectors can be learned for, or begin as.

    The model has a text encoder that is none of CLIP's; `word` is several words, or one that the model has
    already; `init_word` is none or several tokens.
    """
    if not isinstance(encoder, FrozenCLIPEmbedder | FrozenOpenCLIPEmbedder):
        raise InputError(
            f"textual inversion needs one of CLIP's text encoders; this model's is a {type(encoder).__name__}"
        )
    tokenizer = encoder.tokenizer
    if not any(map(str.isalnum, word)) or len(word.split()) != 1:
        raise InputError(f"--token {word!r} is not one word; choose one such as <dice>")
    if len(tokenizer.encode(word)) == 1:
        raise InputError(
            f"--token {word}: the model has this word already; choose one that it lacks, such as <{word}>"
        )
    pieces = tokenizer.encode(init_word)
    if len(pieces) != 1:
        names = ", ".join(repr(tokenizer.bpe.id_to_token(each).removesuffix("</w>")) for each in pieces)
        why = f"is {len(pieces)} tokens ({names})" if pieces else "is no token"
        raise InputError(f"--init_word {init_word!r} {why}; choose a word of one token, such as 'dog'")


def new_word(encoder: nn.Module, word: str, init_word: str, count: int = 1) -> NewWord:
    """A word whose `count` vectors begin as that of `init_word`. InputError as `check_words`."""
    check_words(encoder, word, init_word)
    (row,) = encoder.tokenizer.encode(init_word)
    return NewWord(word, token_embedding(encoder).weight[row].expand(count, -1))


def token_embedding(encoder: FrozenCLIPEmbedder | FrozenOpenCLIPEmbedder) -> nn.Embedding:
    """A text encoder's vectors of all tokens."""
    if isinstance(encoder, FrozenCLIPEmbedder):
        return encoder.transformer.text_model.embeddings.token_embedding
    return encoder.model.token_embedding


def check_captions(word: str, captions: Iterable[str]) -> None:
    """InputError for a caption that does not name the new word; an empty one is replaced by a template."""
    named = name_pattern([word])  # as captions are read: no letter goes on from the word
    for caption in captions:
        if caption.strip() and not named.search(caption):
            raise InputError(
                f"the caption {caption!r} does not name {word}: write it where the subject is named, or "
                "leave the captions out"
            )


def check_room(encoder: nn.Module, word: str, count: int, captions: Iterable[str]) -> None:
    """InputError for a caption with no room for the word's `count` vectors, to which it teaches nothing."""
    with torch.device("meta"):
        new = NewWord(word, torch.zeros(count, 1))
    reader = WordReader(encoder, new)
    for caption in captions:
        if caption.strip() and not reader.layout(caption, Reading()).vectors:
            room = encoder.max_length - 2
            raise InputError(
                f"the caption {caption!r} names {word} too late: its {count} tokens (--vectors {count}) do "
                f"not fit into the {room} that the model reads; name it earlier, or give fewer vectors"
            )


def check(setup: Setup, options: Inversion) -> None:
    """InputError for words that cannot be, and captions without the new one, or with it behind the end."""
    for name in ("token", "init_word"):
        if getattr(options, name) is None:
            raise InputError(f"--{name} is missing: give {EXAMPLE}")
    if setup.config.strategy == "fsdp":
        raise InputError("training: strategy fsdp: a word's vectors are too small to be shared; take ddp")
    if share := setup.config.prompt_dropout:
        raise InputError(
            f"training: prompt_dropout {share:g}: an empty caption teaches a new word nothing; leave the key "
            "out"
        )
    with torch.device("meta"):
        encoder = instantiate_from_config(setup.section["params"]["cond_stage_config"])
    check_words(encoder, options.token, options.init_word)
    captions = list(readable_captions(setup))
    check_captions(options.token, captions)
    if not all(caption.strip() for caption in captions):
        captions += [template.format(options.token) for template in TEMPLATES]
    check_room(encoder, options.token, options.vectors, captions)


def train_source(
    folder: str, prompt: str | None, size: int, options: Inversion, files: ModelFiles
) -> dict[str, Any]:
    """The images of a folder; those that have no caption are captioned by `prompt`, or by templates."""
    return methods.train_source(folder, prompt or "")


def new_task(model: LatentDiffusion, setup: Setup, options: Inversion) -> InversionTask:
    new = new_word(model.cond_stage_model, options.token, options.init_word, options.vectors)
    return InversionTask(model, setup.config, setup.data, new=new)


def sampling(files: Sequence[Path], setup: Setup, options: Inversion) -> Sampling:
    prompts = () if setup.prompt else (TEMPLATES[0].format(options.token),)
    return Sampling(fields={"embedding": (str(files[0]),)}, prompts=prompts)


class InversionTask(LatentDiffusionTask):
    """Learns the vectors of the model's new word, `model.new_word`; all else stays as it is, bit for bit."""

    whole = False

    def __init__(self, model: LatentDiffusion, config: TrainingConfig, data: Any = None, *, new: NewWord):
        model.new_word = new
        super().__init__(model, config, data)
        self.reader = WordReader(model.cond_stage_model, new)

    def trained(self) -> dict[str, nn.Parameter]:
        return {VECTORS: self.model.new_word.vectors}

    def captions(self, batch: Batch) -> list[str]:
        """All of them: the empty caption would teach the word nothing."""
        return self.whole_captions(batch)

    def whole_captions(self, batch: Batch) -> list[str]:
        """The captions, and templates that name the word in the place of empty ones."""
        drawn = (self.uniform(batch, "template") * len(TEMPLATES)).long().tolist()
        word = self.model.new_word.word
        return [
            text if text.strip() else TEMPLATES[k].format(word)
            for text, k in zip(batch["caption"], drawn, strict=True)
        ]

    def embed(self, captions: list[str]) -> Tensor:
        return self.model.cond_stage_model.encode(self.reader.tokens(captions))

    def export(self, folder: Path) -> list[Path]:
        """The vectors as diffusers and our `--embedding` read them, and as AUTOMATIC1111 does."""
        vectors = self.exported_state()[VECTORS]
        return write_embedding(self.model.new_word.word, vectors, folder, self.config.steps)


def write_embedding(word: str, vectors: Tensor, folder: Path, steps: int = 0) -> list[Path]:
    """Write vectors [n, width] as <name>.safetensors in diffusers' layout, <name>.pt in AUTOMATIC1111's.

    The name is the word without what no file name should have.
    """
    vectors = vectors.detach().float().cpu().contiguous()
    name = "".join(letter for letter in word if letter.isalnum() or letter in "-_")
    single, pickled = folder / f"{name}.safetensors", folder / f"{name}.pt"
    write_tensors({word: vectors}, single)
    content = {
        "string_to_token": {"*": 265},  # the token of "*", which stood for every new word in the original
        "string_to_param": {"*": vectors},
        "name": name,
        "step": steps,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    with whole(pickled) as path:
        torch.save(content, path)
    return [single, pickled]
