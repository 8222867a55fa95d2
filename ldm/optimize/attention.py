"""Self-attention on a CPU, a head and some of its rows at a time, over oneDNN's matrix products.

torch's fused kernel splits the matrix into small squares, on which products run at a third of a processor's
speed in bfloat16. Long rows need more memory, `ROWS` of them at once, and no second pass over the output.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import CrossAttention

ROWS = 1024  # of the attention matrix at once
SHORTEST = 512  # a row of fewer keys is left to torch
SAMPLED = 17  # one of so many keys is looked at for a row's shift; no divisor of an image's width
NO_ACTIVATION = ("none", [], "")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_in_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q [b, heads, n, d], k and v [b, heads, m, d], float32 or bfloat16."""
    b, heads, n, d = q.shape
    logits = shifted_logits if q.dtype == torch.bfloat16 else plain_logits
    out = q.new_empty(b, n, heads, d).transpose(1, 2)
    for i in range(b):
        for j in range(heads):
            rows_of = logits(q[i, j].contiguous(), k[i, j].contiguous())
            values = v[i, j].t().contiguous()  # [d, m]
            for start in range(0, n, ROWS):
                rows = slice(start, start + ROWS)
                out[i, j, rows] = product(torch.softmax(rows_of(rows), -1), values)
    return out


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T by oneDNN, [n, k] and [m, k] -> [n, m]; torch would give float32 to MKL.

    Strided inputs would be very slow.
    """
    return torch.ops.mkldnn._linear_pointwise(a, b, None, *NO_ACTIVATION)


def plain_logits(q: Tensor, k: Tensor) -> Callable[[slice], Tensor]:
    """Rows of q k^T / sqrt(d) by their slice, for q [n, d] and k [m, d]."""
    q = q * q.shape[1] ** -0.5
    return lambda rows: product(q[rows], k)


def shifted_logits(q: Tensor, k: Tensor) -> Callable[[slice], Tensor]:
    """Rows of q k^T / sqrt(d) in 16 bits by their slice, each shifted to be near zero where it is largest.

    A softmax does not change with a shift of its row, but a rounded logit's error grows with its size: up to
    3 % of a weight at a logit of 8. So the largest logit of some of a row's keys, and of the pixel's own, is
    subtracted within the product, as one more column. The weights that count are then nearly as exact as
    those of logits in float32.
    """
    scale, unused = q.shape[1] ** -0.5, q.new_empty(1)
    largest = torch.mm(q, k[::SAMPLED].t()).amax(-1, keepdim=True)
    if len(q) == len(k):
        largest = torch.maximum(largest, (q * k).sum(-1, keepdim=True))
    q, keys = torch.cat([q, -largest], 1), torch.cat([k, k.new_ones(len(k), 1)], 1).t()
    return lambda rows: torch.addmm(unused, q[rows], keys, beta=0, alpha=scale)


def long_rows_apart(plain: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in rows where they are long; by `plain` else, or for a type that has no such kernel."""
    if min(q.shape[2], k.shape[2]) < SHORTEST or q.dtype not in (torch.float32, torch.bfloat16):
        return plain(q, k, v)
    return attention_in_rows(q, k, v)


def use_attention_in_rows(model: LatentDiffusion) -> None:
    """Let the self-attention of `model`'s UNet work in rows, but where it is in slices already."""
    for module in model.model.diffusion_model.modules():
        if isinstance(module, CrossAttention) and "attend" not in vars(module):
            module.attend = partial(long_rows_apart, module.attend)


def attention_kernels(width: int, keys: int, dtype: torch.dtype) -> Mapping[str, Callable[[], object]]:
    """Calls of one head's attention by torch and in rows: up to `ROWS` queries, heads of `width`."""
    q = torch.ones(1, 1, min(keys, ROWS), width, dtype=dtype)
    k = torch.ones(1, 1, keys, width, dtype=dtype)
    return {
        "torch": partial(CrossAttention.attend, q, k, k),
        "rows": partial(attention_in_rows, q, k, k),
    }
