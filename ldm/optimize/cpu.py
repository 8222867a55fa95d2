"""Speed on a CPU: weights in the layout that oneDNN's kernels read.

torch keeps weights in plain order and lets oneDNN reorder them in every call. Reordered once, when the model
is built, the same numbers are read in place (https://uxlfoundation.github.io/oneDNN/, "Memory Format
Propagation"). The operators are those of torch's own compiler on CPUs; they are private, so each type is
tried on tiny layers first, and a torch without them leaves the model plain.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from ldm.optimize.override import Undo, override, undo_all

NO_ACTIVATION = ("none", [], "")  # oneDNN could fuse one into the layer


def packed_conv(conv: nn.Conv2d) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The reordered weight, and the convolution [b, c_in, h, w] -> [b, c_out, h, w] that reads it."""
    geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(conv.weight.detach().to_mkldnn(), *geometry)

    def forward(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, packed, conv.bias, *geometry, *NO_ACTIVATION)

    return packed, forward


def packed_linear(linear: nn.Linear) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The reordered weight, and the layer [..., in] -> [..., out] that reads it."""
    packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, linear.bias, *NO_ACTIVATION)

    return packed, forward


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this torch and processor run prepacked layers of the type, and run them right."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.ones(1, 16, 2, 2, dtype=dtype)
    conv, linear = nn.Conv2d(16, 16, 1, dtype=dtype), nn.Linear(16, 16, dtype=dtype)
    try:
        with torch.no_grad():
            same = torch.allclose(packed_conv(conv)[1](x), conv(x), rtol=1e-2, atol=1e-2)
            row = x[:, :, 0, 0]
            return same and torch.allclose(packed_linear(linear)[1](row), linear(row), rtol=1e-2, atol=1e-2)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def prepack(model: nn.Module) -> Undo:
    """Reorder the weights of every convolution and linear layer in `model`, once; returns the undo.

    For inference, on a CPU, with the weights in their final type: until the undo the layers' `weight` is None
    and `state_dict` lacks it, so that no weight is held twice. The undo reorders it back, bit for bit.
    The result equals the plain one to rounding. Layers that oneDNN cannot take stay plain.
    """
    usable = cache(can_prepack)
    steps: list[Undo] = []
    for module in model.modules():
        # a subclass may do more in its forward than the layer does
        if (
            type(module) is nn.Conv2d
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        ):
            pack = packed_conv
        elif type(module) is nn.Linear:
            pack = packed_linear
        else:
            continue
        weight = module.weight
        if weight is None or weight.device.type != "cpu" or "forward" in vars(module):
            continue  # packed already, elsewhere, or under another optimisation
        if usable(weight.dtype):
            packed, forward = pack(module)
            module.weight = None
            steps += [partial(give_back, module, packed), override(module, "forward", forward)]
    return undo_all(steps)


def give_back(module: nn.Module, packed: Tensor) -> None:
    """Give a layer its weight in plain order again."""
    module.weight = nn.Parameter(packed.to_dense(), requires_grad=False)
