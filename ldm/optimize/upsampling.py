"""Nearest upsampling and the convolution after it in one, for CPUs: 4 / 9 of the multiplications."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules import model as first_stage
from ldm.modules.diffusionmodules import openaimodel as unet
from ldm.optimize.replaced import Made
from ldm.weights.header import let_go

Forward = Callable[[Tensor], Tensor]


def quarter_kernels(weight: Tensor) -> list[Tensor]:
    """The 3x3 kernels [o, i, 3, 3] after nearest upsampling by two, as 2x2 ones on the small image.

    One for each of the pixels (0, 0), (0, 1), (1, 0), (1, 1) of the square that one pixel becomes. Two of
    three taps in a row meet the same pixel, so they are added up.
    """

    def halves(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        a, b, c = w.unbind(dim)
        return torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)

    return [kernel.contiguous() for rows in halves(weight, 2) for kernel in halves(rows, 3)]


def folded(conv: nn.Conv2d, make: Callable[[nn.Conv2d], Forward] = lambda conv: conv) -> Forward:
    """The 3x3 convolution of x [b, c, h, w] upsampled to twice its size: [b, o, 2 h, 2 w].

    `make` gives each of its four small convolutions the kernel that it runs on.
    """

    def in_quarters(weight: Tensor) -> list[Forward]:
        quarters = []
        for kernel in quarter_kernels(weight.float()):
            quarter = nn.Conv2d(*kernel.shape[1::-1], 2, device="meta")
            quarter.weight = nn.Parameter(kernel.to(weight.dtype), requires_grad=False)
            quarter.bias = conv.bias
            quarters.append(make(quarter))
        return quarters

    made = Made(conv, in_quarters)
    places = [(i, j) for i in (0, 1) for j in (0, 1)]

    def forward(x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        out = torch.empty(
            b, conv.out_channels, 2 * h, 2 * w, dtype=x.dtype, device=x.device, memory_format=layout
        )
        padded = F.pad(x, (1, 1, 1, 1))
        for (i, j), quarter in zip(places, made.value, strict=True):
            out[:, :, i::2, j::2] = quarter(padded[:, :, i : i + h + 1, j : j + w + 1])
        return out

    return forward


def fold_upsampling(model: nn.Module, make: Callable[[nn.Conv2d], Forward] = lambda conv: conv) -> None:
    """Upsample and convolve in one, in every network of `model`.

    The result equals the plain one to rounding (https://arxiv.org/abs/1609.07009). Where the upsampled image
    is cut to an odd size, or has another type than the weights had, the plain forward is called.
    """
    for module in model.modules():
        if not isinstance(module, unet.Upsample | first_stage.Upsample) or "forward" in vars(module):
            continue
        if module.conv.weight is not None and not module.conv.weight.is_meta:
            fold = folded(module.conv, make)
            let_go(module.conv.weight.detach())  # only odd sizes and another type are computed with it
            module.forward = partial(_upsample, module.conv.weight.dtype, fold, module.forward)


def _upsample(
    dtype: torch.dtype, fold: Forward, plain: Callable[..., Tensor], x: Tensor, size: torch.Size | None = None
) -> Tensor:
    if x.dtype != dtype or size not in (None, (2 * x.shape[2], 2 * x.shape[3])):
        return plain(x) if size is None else plain(x, size)
    return fold(x)
