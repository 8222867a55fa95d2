"""Attention on a CPU as a few large matrix products over oneDNN, with an exponential between them.

torch's fused kernel splits the matrix into small squares, on which products run at a third of a processor's
speed in bfloat16. Whole rows need more memory, `ROWS` of them at once, and no second pass over the output.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import CrossAttention

ROWS = 512  # of the attention matrix at once, where they are long
SHORTEST = 512  # keys of a long row
SAMPLED = 17  # one of so many keys is looked at for a long row's shift; no divisor of an image's width
NO_ACTIVATION = ("none", [], "")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_in_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q [b, heads, n, d], k and v [b, heads, m, d], float32 or bfloat16.

    A softmax does not change when its row is shifted, so any shift that keeps the exponentials finite will do
    in place of the row's maximum, which would take a pass over the matrix. The shift is subtracted within the
    first product, as one more column of q and k; the row's sum comes from the second one, as one more column
    of v. Between them the matrix is read and written once, by the exponential. Short rows, such as those over
    a prompt's tokens, are computed for all heads of an image at once.
    """
    b, heads, n, d = q.shape
    at_once, rows_at_once = (heads, n) if k.shape[2] < SHORTEST and q.dtype == torch.bfloat16 else (1, ROWS)
    q, k, ones = q.contiguous(), k.contiguous(), k.new_ones(b, heads, k.shape[2], 1)
    q = torch.cat([q, -shifts(q, k).unsqueeze(-1)], -1)
    k = torch.cat([k, ones], -1)
    values = torch.cat([v, ones], -1).transpose(-1, -2).contiguous()  # [b, heads, d + 1, m]
    sums = q.new_empty(b, heads, n, d + 1)
    for i in range(b):
        for first in range(0, heads, at_once):
            some = slice(first, first + at_once)
            for start in range(0, n, rows_at_once):
                rows = slice(start, start + rows_at_once)
                weights = product(q[i, some, rows], k[i, some], d**-0.5 / math.log(2)).exp2_()
                sums[i, some, rows] = product(weights, values[i, some])
                if not torch.isfinite(sums[i, some, rows, d].sum()):  # a logit exceeds its row's shift by 88
                    weights = torch.softmax(product(q[i, some, rows], k[i, some], d**-0.5), -1)
                    sums[i, some, rows] = product(weights, values[i, some])
    out = q.new_empty(b, n, heads, d).transpose(1, 2)
    return torch.div(sums[..., :d], sums[..., d:], out=out)


def shifts(q: Tensor, k: Tensor) -> Tensor:
    """A lower bound of each row's largest logit times sqrt(d), mostly close to it: [b, heads, n].

    It is the largest one of some keys and of the pixel's own, in a short row of all. The closer it is the
    better in 16 bits, where a rounded logit's error grows with its size: up to 3 % of a weight at a distance
    of 8 from the shift.
    """
    every = SAMPLED if k.shape[2] >= SHORTEST else 1
    images = zip(k[:, :, ::every], q, strict=True)  # one at a time, as over all keys it is the whole matrix
    largest = torch.stack([torch.matmul(keys, rows.transpose(-1, -2)).amax(-2) for keys, rows in images])
    own = every > 1 and q.shape[2] == k.shape[2]
    return torch.maximum(largest, (q * k).sum(-1)) if own else largest


def product(a: Tensor, b: Tensor, scale: float = 1) -> Tensor:
    """scale a b^T by oneDNN, [heads, n, k] and [heads, m, k] -> [heads, n, m]; one head in float32.

    torch would give float32 to MKL. Strided inputs would be very slow.
    """
    if a.dtype == torch.bfloat16:  # scaled before the result is rounded
        return torch.baddbmm(a.new_empty(1), a, b.transpose(-1, -2), beta=0, alpha=scale)
    a = a[0] if scale == 1 else a[0] * scale
    return torch.ops.mkldnn._linear_pointwise(a, b[0], None, *NO_ACTIVATION)[None]


def rows_or(plain: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in rows where that is faster: in bfloat16, in float32 where they are long; else `plain`."""
    long = min(q.shape[2], k.shape[2]) >= SHORTEST
    if q.dtype == torch.bfloat16 or (q.dtype == torch.float32 and long):
        return attention_in_rows(q, k, v)
    return plain(q, k, v)


def use_attention_in_rows(model: LatentDiffusion) -> None:
    """Let the attention of `model`'s UNet work in rows, but where it is in slices already."""
    for module in model.model.diffusion_model.modules():
        if isinstance(module, CrossAttention) and "attend" not in vars(module):
            module.attend = partial(rows_or, module.attend)


def attention_kernels(width: int, keys: int, dtype: torch.dtype) -> Mapping[str, Callable[[], object]]:
    """Calls of one head's attention by torch and in rows: up to `ROWS` queries, heads of `width`."""
    q = torch.ones(1, 1, min(keys, ROWS), width, dtype=dtype)
    k = torch.ones(1, 1, keys, width, dtype=dtype)
    return {
        "torch": partial(CrossAttention.attend, q, k, k),
        "rows": partial(attention_in_rows, q, k, k),
    }
