"""The text transformer of the LAION-400M model: a BERT-like encoder (Devlin et al. 2018, arXiv:1810.04805).

It was trained together with its UNet, and with the names of the x-transformers library. Normalisation comes
before each layer, every token sees all others, and padding is attended to.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

HEADS, DIM_HEAD = 8, 64


class Attention(nn.Module):
    """Multi-head self-attention, [b, n, width] -> [b, n, width]."""

    def __init__(self, width: int):
        super().__init__()
        self.to_q = nn.Linear(width, HEADS * DIM_HEAD, bias=False)
        self.to_k = nn.Linear(width, HEADS * DIM_HEAD, bias=False)
        self.to_v = nn.Linear(width, HEADS * DIM_HEAD, bias=False)
        self.to_out = nn.Linear(HEADS * DIM_HEAD, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projections = self.to_q(x), self.to_k(x), self.to_v(x)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=HEADS) for t in projections)
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        widen = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
        self.net = nn.Sequential(widen, nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Encoder(nn.Module):
    """Attention and feed-forward in turn; each is normalised first and added to its input."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        pairs = [layer(width) for _ in range(layers) for layer in (Attention, FeedForward)]
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(width), layer]) for layer in pairs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in self.layers:
            x = x + layer(norm(x))
        return x


class PositionEmbedding(nn.Module):
    def __init__(self, width: int, context_length: int):
        super().__init__()
        self.emb = embedding(context_length, width)


def embedding(entries: int, width: int) -> nn.Embedding:
    made = nn.Embedding.from_pretrained(torch.empty(entries, width), freeze=False)
    if not made.weight.is_meta:  # normal_ there would import torch's compiler: seconds
        nn.init.normal_(made.weight, std=0.02)
    return made


class BERTTextTransformer(nn.Module):
    """Token ids int64 [b, n] -> the last layer's states after the final normalisation, [b, n, width]."""

    def __init__(self, width: int, layers: int, vocab_size: int, context_length: int, dropout: float = 0.0):
        super().__init__()
        self.token_emb = embedding(vocab_size, width)
        self.pos_emb = PositionEmbedding(width, context_length)
        self.dropout = nn.Dropout(dropout)
        self.attn_layers = Encoder(width, layers)
        self.norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, vocab_size)  # carried by checkpoints

    @property
    def unused_weights(self) -> Iterator[str]:
        """The weights that `forward` does not read."""
        return (f"to_logits.{name}" for name, _ in self.to_logits.named_parameters())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.token_emb(ids) + self.pos_emb.emb.weight[: ids.shape[1]]
        return self.norm(self.attn_layers(self.dropout(x)))
