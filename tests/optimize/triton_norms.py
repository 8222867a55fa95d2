"""Triton's GroupNorm on a CPU, against torch's in float64; run by test_norm.py with TRITON_INTERPRET=1."""

import sys

import torch
import torch.nn.functional as F
from tiny_sampling import normal, relative_difference, tiny_model

from ldm.optimize.norm import can_fuse, fuse_norms
from ldm.optimize.norm_kernels import group_norm

CASES = [  # batch, channels, height, width, groups, with an offset for each image, for all, or None
    (2, 320, 9, 7, 32, 2),
    (2, 640, 5, 5, 32, 1),
    (1, 64, 11, 13, 32, None),  # several tiles, the last one shorter
    (2, 1920, 3, 1, 32, 2),
    (1, 2560, 2, 2, 32, None),
    (3, 16, 1, 1, 8, 3),
    (3, 8, 1, 1, 8, 3),  # a group is one element, of no variance
    (1, 4096, 2, 1, 2, None),  # a group wider than a block usually is
]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def kernels() -> None:
    for number, (b, c, h, w, groups, offsets) in enumerate(CASES):
        for dtype, tolerance in TOLERANCE.items():
            silu = number != 1
            x = (normal(b, c, h, w, seed=number) * 3 + 20).to(dtype)
            weight, bias = (normal(c, seed=seed).to(dtype) for seed in (1, 2))
            offset = None if offsets is None else normal(offsets, c, seed=3).to(dtype)
            result = group_norm(x, offset, groups, weight, bias, 1e-5, silu)
            exact = x.double() if offset is None else x.double() + offset.double()[:, :, None, None]
            exact = F.group_norm(exact, groups, weight.double(), bias.double(), 1e-5)
            exact = F.silu(exact) if silu else exact
            assert result.dtype == dtype
            assert result.is_contiguous(memory_format=torch.channels_last)
            difference = relative_difference(result, exact)
            assert difference < tolerance, (b, c, h, w, groups, offsets, dtype, silu, difference)


def model() -> None:
    x, context, t = normal(2, 4, 4, 2), normal(2, 5, 32), torch.tensor([3.0, 500.0])
    plain, fused = tiny_model(), tiny_model()
    reported = []
    assert fuse_norms(fused, reported.append)
    assert reported == []
    with torch.inference_mode():
        for call in (lambda m: m.apply_model(x, t, context), lambda m: m.decode_first_stage(x[:1, :, :2])):
            result, expected = call(fused), call(plain)
            assert not torch.equal(result, expected)  # the kernel was called
            assert relative_difference(result, expected) < 2e-6


if __name__ == "__main__":
    assert can_fuse(torch.device("cpu"), torch.bfloat16)
    {"kernels": kernels, "model": model}[sys.argv[1]]()
