"""OpenCLIP's text transformer (Cherti et al. 2022, https://arxiv.org/abs/2212.07143), used by v2.

It is CLIP's with the exact GELU; its checkpoints name the weights otherwise and keep q, k and v in one.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ldm.errors import InputError
from ldm.modules.encoders.clip import Vectors, causal_attention, check_heads, put_vectors

LAYERS = ("last", "penultimate")


class SelfAttention(nn.Module):
    """Causal multi-head attention, [b, n, width] -> [b, n, width]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        in_proj = nn.Linear(width, 3 * width)
        self.in_proj_weight, self.in_proj_bias = in_proj.weight, in_proj.bias
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(causal_attention(q, k, v, self.heads))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))


class OpenCLIPTextTransformer(nn.Module):
    """Token ids int64 [b, n] -> the states of the `layer` "last" or "penultimate", normalised, [b, n, width].

    Padding is attended to, as Stable Diffusion was trained. Defaults are ViT-H/14's. Checkpoints also carry
    what only CLIP's comparison of texts with images needs: `unused_weights` names it.
    """

    def __init__(
        self,
        width: int = 1024,
        layers: int = 24,
        heads: int = 16,
        layer: str = "penultimate",
        vocab_size: int = 49408,
        context_length: int = 77,
    ):
        super().__init__()
        check_heads(width, heads)
        if layer not in LAYERS:
            raise InputError(f"layer {layer!r} of the text encoder is not one of {', '.join(LAYERS)}")
        self.read = layers - LAYERS.index(layer)  # blocks
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.text_projection = nn.Parameter(torch.empty(width, width))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.transformer = Transformer(width, layers, heads)
        self.token_embedding = nn.Embedding.from_pretrained(torch.empty(vocab_size, width), freeze=False)
        self.ln_final = nn.LayerNorm(width)
        if not self.text_projection.is_meta:  # normal_ there would import torch's compiler: seconds
            nn.init.normal_(self.positional_embedding, std=0.01)
            nn.init.normal_(self.text_projection, std=width**-0.5)
            nn.init.normal_(self.token_embedding.weight, std=0.02)

    @property
    def unused_weights(self) -> Iterator[str]:
        """The weights that `forward` does not read."""
        unread = tuple(
            f"transformer.resblocks.{i}." for i in range(self.read, len(self.transformer.resblocks))
        )
        names = (name for name, _ in self.named_parameters())
        return (n for n in names if n in ("text_projection", "logit_scale") or n.startswith(unread))

    def forward(self, ids: torch.Tensor, vectors: Vectors = (), clip_skip: int | None = None) -> torch.Tensor:
        """`vectors` take the place of tokens; the block `clip_skip` from the end is read, by default
        `layer`'s. InputError for one whose weights the checkpoint lacks."""
        blocks = self.transformer.resblocks
        read = self.read if clip_skip is None else len(blocks) - clip_skip + 1
        if read > self.read and not blocks[read - 1].ln_1.weight.any():
            raise InputError(
                f"--clip_skip {clip_skip}: the checkpoint lacks the weights of that layer, which the model "
                "does not read; take a larger number"
            )
        x = put_vectors(self.token_embedding(ids), vectors) + self.positional_embedding[: ids.shape[1]]
        for block in blocks[:read]:
            x = block(x)
        return self.ln_final(x)
