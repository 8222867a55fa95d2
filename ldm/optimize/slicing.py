"""`--attention_slicing`: attention over a few queries at a time, for devices that hold the whole matrix.

The rows of softmax(q k^T) do not depend on each other, so attention over a slice of the queries gives that
slice of the result (Rabe & Staats 2021, https://arxiv.org/abs/2112.05682, who slice the keys as well).
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.model import AttnBlock

LIMIT = 2**25  # elements of the attention matrix at once: 128 MiB in float32

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sliced_attention(attend: Attend, limit: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` for q [b, heads, n, d], k and v [b, heads, m, d], at most `limit` pairs of q and k a call.

    One query of every head and sample is the least; a matrix within the limit is one call.
    """
    batch, heads, n, _ = q.shape
    rows = max(1, limit // (batch * heads * k.shape[2]))
    if rows >= n:
        return attend(q, k, v)
    out = q.new_empty(batch, heads, n, v.shape[3])
    for start in range(0, n, rows):
        out[:, :, start : start + rows] = attend(q[:, :, start : start + rows], k, v)
    return out


def slice_attention(model: nn.Module, limit: int = LIMIT) -> None:
    """Let every attention of the UNet and of the autoencoder in `model` work in slices.

    Up to `limit` elements of the attention matrix are held at once, and as many for the softmax, where torch
    has no fused kernel for the device, the type or the layout; fused kernels never hold it.
    The result equals the plain one to rounding. A `limit` below 1 is a ValueError.
    """
    if limit < 1:
        raise ValueError(f"an attention slice of {limit} elements; at least 1")
    for module in model.modules():
        if isinstance(module, CrossAttention | AttnBlock):
            module.attend = partial(sliced_attention, module.attend, limit)
