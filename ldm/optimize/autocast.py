"""Under autocast: the 16-bit weights of the UNet, cast once instead of at every call.

Autocast keeps what it casts until its own end, which a recorded graph outlives, so a recording has to cast
all weights anew in every replay: 5 GB to read and write for the v1 UNet. The copies kept here have the same
bits; they take the memory that autocast's own would.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize.graph import autocast_state
from ldm.optimize.replaced import after_replacing


def cast_once(layer: nn.Linear | nn.Conv2d) -> Callable[[Tensor], Tensor]:
    """The layer's forward, which under autocast, and without gradients, reads copies of its weights."""
    plain = layer.forward
    copies: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    def refresh() -> None:  # in place: recordings read the copies
        for weight, _ in copies.values():
            weight.copy_(layer.weight)

    after_replacing(layer, refresh)

    def forward(x: Tensor) -> Tensor:
        enabled, dtype = autocast_state(x.device.type)
        if not enabled or torch.is_grad_enabled():
            return plain(x)
        if dtype not in copies:
            with torch.inference_mode(False), torch.no_grad():  # they outlive the caller's mode
                bias = None if layer.bias is None else layer.bias.to(dtype)
                copies[dtype] = layer.weight.to(dtype), bias
        weight, bias = copies[dtype]
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    return forward


def keep_casts(model: LatentDiffusion) -> None:
    """Cast the float32 weights of `model`'s UNet once for each type that autocast computes in.

    The result is the plain one, bit for bit. The weights must not change any more. Apply this before what
    gives a layer another forward: such layers are left alone.
    """
    for layer in model.model.diffusion_model.modules():
        # a subclass may do more in its forward than the layer does
        usual = type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.padding_mode == "zeros")
        if usual and layer.weight.dtype == torch.float32 and "forward" not in vars(layer):
            layer.forward = cast_once(layer)
