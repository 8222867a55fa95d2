"""Attention in half precision, whose logits a float16 cannot hold."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.model import AttnBlock, AutoencoderShape
from ldm.optimize.slicing import sliced_attention

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def large_queries_and_keys(dim: int, device: str) -> tuple[torch.Tensor, ...]:
    """q, k, v [1, 2, 40, dim] whose logits reach some 10^5; a float16 ends at 65,504."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, dim, generator=generator) for _ in range(3))
    return tuple(t.half().to(device) for t in (q * 300, k * 300, v))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [64, 40])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_the_attention_of_v2_does_not_overflow(device, dim, backend):
    """Stability computes these logits in float32 (`ATTN_PRECISION`): in float16 its images came out black."""
    q, k, v = large_queries_and_keys(dim, device)
    logits = (q @ k.mT) * dim**-0.5
    assert logits.isinf().any()
    assert (logits.softmax(-1) @ v).isnan().any()
    exact = ((q.double() @ k.double().mT) * dim**-0.5).softmax(-1) @ v.double()
    sliced = partial(sliced_attention, CrossAttention.attend, 7 * 40)
    for attend in (CrossAttention.attend, AttnBlock.attend, sliced):
        with sdpa_kernel(backend):
            torch.testing.assert_close(attend(q, k, v).double(), exact, rtol=0, atol=0.02)


@pytest.mark.parametrize("device", DEVICES)
def test_layers_with_large_queries_are_finite_in_half_precision(device):
    layer = CrossAttention(64, 64, heads=1, dim_head=64)
    block = AttnBlock(32, AutoencoderShape(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=4))
    for weight in (layer.to_q.weight, layer.to_k.weight, block.q.weight, block.k.weight):
        weight.data *= 500
    x = torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(0))
    features = torch.randn(1, 32, 6, 6, generator=torch.Generator().manual_seed(1))
    layer, block = layer.half().to(device), block.half().to(device)
    with torch.no_grad():
        assert layer(x.half().to(device)).isfinite().all()
        assert block(features.half().to(device)).isfinite().all()
