"""Text encoders as a config names them."""

from functools import cached_property

import torch
from torch import nn

from ldm.errors import InputError
from ldm.modules.encoders.clip import CLIPTextTransformer
from ldm.modules.encoders.tokenizer import CLIPTokenizer

VIT_L_14 = "openai/clip-vit-large-patch14"
CONTEXT_LENGTH = 77  # tokens that the position embedding covers


class CLIPTextModel(nn.Module):
    """Holds the transformer under the name that checkpoints know it by."""

    def __init__(self, text_model: CLIPTextTransformer):
        super().__init__()
        self.text_model = text_model


class FrozenCLIPEmbedder(nn.Module):
    """The text encoder of Stable Diffusion v1: texts -> the last hidden states of CLIP ViT-L/14.

    Its weights come from the checkpoint, nothing is downloaded. `device` is accepted and ignored: the model
    is moved as a whole. `width`, `layers` and `heads` make a miniature; `freeze` is left to the owner.
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
        super().__init__()
        if version != VIT_L_14:
            raise InputError(f"FrozenCLIPEmbedder version {version!r} is not known; known: {VIT_L_14}")
        if not 2 <= max_length <= CONTEXT_LENGTH:
            raise InputError(f"FrozenCLIPEmbedder max_length {max_length} is not in 2 … {CONTEXT_LENGTH}")
        self.max_length = max_length
        self.transformer = CLIPTextModel(CLIPTextTransformer(width, layers, heads))

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer(self.max_length)

    @property
    def device(self) -> torch.device:
        return self.transformer.text_model.final_layer_norm.weight.device

    @device.setter
    def device(self, device: str | torch.device) -> None:
        """Accepted without effect, for notebooks that set it: tokens go to where the weights are."""

    def freeze(self) -> None:
        self.eval().requires_grad_(False)

    def forward_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [b, n, width] of token ids [b, n], n up to 77."""
        return self.transformer.text_model(ids)

    def forward(self, texts: str | list[str]) -> torch.Tensor:
        """Embeddings [b, max_length, width]; longer texts are cut, `tokenizer.cut_off` gives the rest."""
        texts = [texts] if isinstance(texts, str) else texts
        return self.forward_tokens(self.tokenizer(texts).to(self.device))

    encode = forward
