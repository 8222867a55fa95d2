"""Text encoders as a config names them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from ldm.errors import InputError
from ldm.modules.encoders.bert import BERTTextTransformer
from ldm.modules.encoders.clip import CLIPTextTransformer, Vectors
from ldm.modules.encoders.openclip import OpenCLIPTextTransformer
from ldm.modules.encoders.tokenizer import BERTTokenizer, CLIPTokenizer

VIT_L_14 = "openai/clip-vit-large-patch14"
VIT_H_14 = "ViT-H-14"
CONTEXT_LENGTH = 77  # tokens that the position embedding covers


@dataclass(frozen=True)
class Tokens:
    """Texts that are tokens already, for `encode` of CLIP's encoders."""

    ids: torch.Tensor  # int64 [b, n]
    vectors: Vectors = ()  # in the place of some of them
    clip_skip: int | None = None  # the layer to read, from the end; None: the encoder's own


class TextEncoder(nn.Module):
    """Texts -> embeddings. A subclass has a `tokenizer` and `forward_tokens`.

    The weights come from the checkpoint, nothing is downloaded. A parameter `device` is accepted and ignored:
    the model is moved as a whole.
    """

    def __init__(self, max_length: int):
        super().__init__()
        if not 2 <= max_length <= CONTEXT_LENGTH:
            name = type(self).__name__
            raise InputError(f"{name} max_length {max_length} is not in 2 … {CONTEXT_LENGTH}")
        self.max_length = max_length

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @device.setter
    def device(self, device: str | torch.device) -> None:
        """Accepted without effect, for notebooks that set it: tokens go to where the weights are."""

    def freeze(self) -> None:
        self.eval().requires_grad_(False)

    def forward_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [b, n, width] of token ids [b, n], n up to 77."""
        raise NotImplementedError

    def forward(self, texts: str | list[str] | Tokens) -> torch.Tensor:
        """Embeddings [b, max_length, width]; longer texts are cut, `tokenizer.cut_off` gives the rest."""
        if isinstance(texts, Tokens):
            return self.forward_tokens(texts.ids.to(self.device), texts.vectors, texts.clip_skip)
        texts = [texts] if isinstance(texts, str) else texts
        return self.forward_tokens(self.tokenizer(texts).to(self.device))

    encode = forward


class CLIPTextModel(nn.Module):
    """Holds the transformer under the name that checkpoints know it by."""

    def __init__(self, text_model: CLIPTextTransformer):
        super().__init__()
        self.text_model = text_model


class FrozenCLIPEmbedder(TextEncoder):
    """The text encoder of Stable Diffusion v1: texts -> the last hidden states of CLIP ViT-L/14.

    `width`, `layers` and `heads` make a miniature; `freeze` is left to the owner.
    """

    def __init__(
        self,
        version: str = VIT_L_14,
        device: str = "cuda",
        max_length: int = CONTEXT_LENGTH,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
    ):
        super().__init__(max_length)
        if version != VIT_L_14:
            raise InputError(f"FrozenCLIPEmbedder version {version!r} is not known; known: {VIT_L_14}")
        self.transformer = CLIPTextModel(CLIPTextTransformer(width, layers, heads))

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer(self.max_length)

    @property
    def layers(self) -> nn.ModuleList:
        return self.transformer.text_model.encoder.layers

    @property
    def width(self) -> int:
        return self.transformer.text_model.final_layer_norm.weight.shape[0]

    def forward_tokens(
        self, ids: torch.Tensor, vectors: Vectors = (), clip_skip: int | None = None
    ) -> torch.Tensor:
        """Embeddings [b, n, width] of token ids [b, n], n up to 77, and `Tokens`' further fields."""
        return self.transformer.text_model(ids, vectors, clip_skip or 1)


class FrozenOpenCLIPEmbedder(TextEncoder):
    """The text encoder of Stable Diffusion v2: texts -> hidden states of OpenCLIP ViT-H/14, normalised.

    They are those of the `layer` "last" or "penultimate". `version` names the weights, which come from the
    checkpoint; `width`, `layers` and `heads` make a miniature.
    """

    def __init__(
        self,
        arch: str = VIT_H_14,
        version: str = "laion2b_s32b_b79k",
        device: str = "cuda",
        max_length: int = CONTEXT_LENGTH,
        freeze: bool = True,
        layer: str = "last",
        width: int = 1024,
        layers: int = 24,
        heads: int = 16,
    ):
        super().__init__(max_length)
        if arch != VIT_H_14:
            raise InputError(f"FrozenOpenCLIPEmbedder arch {arch!r} is not known; known: {VIT_H_14}")
        self.model = OpenCLIPTextTransformer(width, layers, heads, layer)
        if freeze:
            self.freeze()

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer(self.max_length, pad_id=0)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.transformer.resblocks

    @property
    def width(self) -> int:
        return self.model.ln_final.weight.shape[0]

    def forward_tokens(
        self, ids: torch.Tensor, vectors: Vectors = (), clip_skip: int | None = None
    ) -> torch.Tensor:
        """Embeddings [b, n, width] of token ids [b, n], n up to 77, and `Tokens`' further fields."""
        return self.model(ids, vectors, clip_skip)


class BERTEmbedder(TextEncoder):
    """The text encoder of the LAION-400M model, trained with it: texts -> its last hidden states.

    With `use_tokenizer` false it is given token ids int64 [b, n] instead of texts.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = CONTEXT_LENGTH,
        device: str = "cuda",
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
    ):
        super().__init__(max_seq_len)
        self.vocab_size = vocab_size
        self.use_tokenizer = use_tokenizer
        self.transformer = BERTTextTransformer(n_embed, n_layer, vocab_size, max_seq_len, embedding_dropout)

    @cached_property
    def tokenizer(self) -> BERTTokenizer:
        return BERTTokenizer(self.max_length, self.vocab_size)

    def forward_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [b, n, n_embed] of token ids [b, n], n up to `max_seq_len`."""
        return self.transformer(ids)

    def forward(self, texts: str | list[str] | torch.Tensor) -> torch.Tensor:
        """Embeddings [b, max_seq_len, n_embed]; longer texts are cut."""
        return super().forward(texts) if self.use_tokenizer else self.forward_tokens(texts.to(self.device))

    encode = forward
