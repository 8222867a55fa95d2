"""CLIP's text transformer (Radford et al. 2021, arXiv:2103.00020) with the key names of the checkpoints."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ldm.errors import InputError


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """The approximation that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


Vectors = Sequence[tuple[int, int, torch.Tensor]]  # row, first column, [k, width]


def put_vectors(x: torch.Tensor, vectors: Vectors) -> torch.Tensor:
    """Token embeddings x [b, n, width] with learned vectors in the place of some, in the same memory.

    Textual inversion (Gal et al. 2022, https://arxiv.org/abs/2208.01618).
    """
    for row, column, vector in vectors:
        x[row, column : column + len(vector)] = vector.to(x)
    return x


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Each token's average over those up to it: q, k, v [b, n, width] -> [b, n, width]."""
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=True), "b h n d -> b n (h d)")


def check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise InputError(f"a text encoder's width {width} is not a multiple of its {heads} heads")


class SelfAttention(nn.Module):
    """Causal multi-head attention, [b, n, width] -> [b, n, width]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_proj(causal_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))


class MLP(nn.Module):
    def __init__(self, width: int, activation: str):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, activation: str):
        super().__init__()
        self.self_attn = SelfAttention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """A vector for each token plus one for its position."""

    def __init__(self, vocab_size: int, width: int, context_length: int):
        super().__init__()
        self.token_embedding = nn.Embedding.from_pretrained(torch.empty(vocab_size, width), freeze=False)
        self.position_embedding = nn.Embedding.from_pretrained(
            torch.empty(context_length, width), freeze=False
        )
        if not self.token_embedding.weight.is_meta:  # normal_ there would import torch's compiler: seconds
            nn.init.normal_(self.token_embedding.weight, std=0.02)
            nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids: torch.Tensor, vectors: Vectors = ()) -> torch.Tensor:
        x = put_vectors(self.token_embedding(ids), vectors)
        return x + self.position_embedding.weight[: ids.shape[1]]


class Encoder(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, activation: str):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, activation) for _ in range(layers))

    def forward(self, x: torch.Tensor, skip: int = 0) -> torch.Tensor:
        """The states after all layers but the last `skip`."""
        for layer in self.layers[: len(self.layers) - skip]:
            x = layer(x)
        return x


class CLIPTextTransformer(nn.Module):
    """Token ids int64 [b, n] -> the last layer's states after the final normalisation, [b, n, width].

    No padding mask: padding is attended to, as Stable Diffusion was trained. Defaults are ViT-L/14's.
    """

    def __init__(
        self,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        vocab_size: int = 49408,
        context_length: int = 77,
        activation: str = "quick_gelu",
    ):
        super().__init__()
        check_heads(width, heads)
        if activation not in ACTIVATIONS:
            raise InputError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
        self.embeddings = Embeddings(vocab_size, width, context_length)
        self.encoder = Encoder(width, layers, heads, activation)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, ids: torch.Tensor, vectors: Vectors = (), clip_skip: int = 1) -> torch.Tensor:
        """`vectors` take the place of tokens; the layer `clip_skip` from the end is read, 1 is the last."""
        return self.final_layer_norm(self.encoder(self.embeddings(ids, vectors), clip_skip - 1))
