"""Upsampling folded into convolutions, against the two one after the other."""

import torch
from tiny_sampling import relative_difference
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize.upsampling import fold_upsampling, folded


@torch.inference_mode()
def test_upsampling_in_the_convolution_is_upsampling_before_it() -> None:
    torch.manual_seed(0)
    for size in ((1, 1), (5, 4)):
        conv, x = nn.Conv2d(8, 6, 3, padding=1), torch.randn(2, 8, *size)
        large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert relative_difference(folded(conv)(x), conv(large)) < 1e-6
        last = folded(conv)(x.contiguous(memory_format=torch.channels_last))
        assert relative_difference(last, conv(large)) < 1e-6


@torch.inference_mode()
def test_unet_and_decoder_with_folded_upsampling(model: LatentDiffusion) -> None:
    """Odd sizes too, where the UNet cuts off a row or column of its upsampled features."""
    torch.manual_seed(0)
    cases = [(torch.randn(2, 4, *size), torch.randn(2, 5, 32)) for size in ((8, 8), (7, 9), (6, 5))]

    def outputs() -> list[Tensor]:
        return [model.apply_model(x, torch.tensor([500.0, 3.0]), context) for x, context in cases] + [
            model.decode_first_stage(x) for x, _ in cases
        ]

    plain = outputs()
    fold_upsampling(model)
    after = outputs()
    assert not torch.equal(after[0], plain[0])  # another order of sums
    assert not torch.equal(after[-1], plain[-1])
    assert max(relative_difference(a, b) for a, b in zip(after, plain, strict=True)) < 2e-6
