"""Speed on a CPU: memory is kept, upsampling folded into convolutions, 16-bit weights in oneDNN's layout.

`benchmarks/benchmark.py --only ideas` measures the gain of each. All of it is for inference: the weights that
these functions read must not change any more, but for their dtype.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules import model as first_stage
from ldm.modules.diffusionmodules import openaimodel as unet

NO_ACTIVATION = ("none", [], "")  # oneDNN could fuse one into the layer

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

# sizes from which on giving memory back is worth its time
LARGE_IMAGE = 64 * 64  # latents
LARGE_TENSOR = 64 * 2**20  # bytes


def glibc() -> ctypes.CDLL | None:
    """The C library of this process, where it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def keep_memory() -> bool:
    """Keep the memory of freed tensors for the next ones; False where this process cannot be set so.

    glibc gives large blocks back to the system at once, and takes them anew, page by page and zeroed: a
    quarter of the time of a decoder's call. The process then keeps what its largest call needs (mallopt(3)).
    """
    libc = glibc()
    return libc is not None and bool(
        libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1) and libc.mallopt(M_TRIM_THRESHOLD, -1)
    )


def return_memory(model: nn.Module) -> None:
    """Give memory that is kept, but free, back around a large decode and within it.

    A decoder's tensors grow from level to level and fit no hole that smaller ones left: without this a
    process of the v1 layout grows to 7.5 GB in float32, with it to 6.3, and a decode takes 1.15x the time.
    Does nothing where `keep_memory` does not.
    """
    libc = glibc()
    if libc is None:
        return

    def around(decoder: nn.Module, inputs: tuple[Tensor], *output: Tensor | None) -> None:
        z = inputs[0]
        if z.numel() // z.shape[1] >= LARGE_IMAGE:
            libc.malloc_trim(0)

    def within(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        if inputs[0].nbytes >= LARGE_TENSOR:
            libc.malloc_trim(0)

    for decoder in model.modules():
        if not isinstance(decoder, first_stage.Decoder):
            continue
        decoder.register_forward_pre_hook(around)
        decoder.register_forward_hook(around, always_call=True)
        for layer in decoder.modules():
            if isinstance(layer, first_stage.ResnetBlock | first_stage.Upsample):
                layer.register_forward_pre_hook(within)


def quarter_kernels(weight: Tensor) -> list[Tensor]:
    """The 3x3 kernels [o, i, 3, 3] after nearest upsampling by two, as 2x2 ones on the small image.

    One for each of the pixels (0, 0), (0, 1), (1, 0), (1, 1) of the square that one pixel becomes. Two of
    three taps in a row meet the same pixel, so they are added up.
    """

    def halves(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        a, b, c = w.unbind(dim)
        return torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)

    return [kernel.contiguous() for rows in halves(weight, 2) for kernel in halves(rows, 3)]


def upsampled_conv(kernels: list[Tensor], bias: Tensor | None, x: Tensor) -> Tensor:
    """The 3x3 convolution of x [b, c, h, w] upsampled to twice its size: [b, o, 2 h, 2 w]."""
    b, _, h, w = x.shape
    out = x.new_empty(b, len(kernels[0]), 2 * h, 2 * w)
    padded = F.pad(x, (1, 1, 1, 1))
    places = ((i, j) for i in (0, 1) for j in (0, 1))
    for (i, j), kernel in zip(places, kernels, strict=True):
        out[:, :, i::2, j::2] = F.conv2d(padded[:, :, i : i + h + 1, j : j + w + 1], kernel, bias)
    return out


def fold_upsampling(model: nn.Module) -> None:
    """Upsample and convolve in one, with 4 / 9 of the multiplications.

    Only float32 weights: with 16-bit ones oneDNN is slower on the four small kernels than on the large one.
    The result equals the plain one to rounding (https://arxiv.org/abs/1609.07009). Where the upsampled image
    is cut to an odd size the plain forward is called.
    """
    for module in model.modules():
        ours = isinstance(module, unet.Upsample | first_stage.Upsample)
        if ours and module.conv.weight is not None and module.conv.weight.dtype == torch.float32:
            kernels = quarter_kernels(module.conv.weight.detach())
            module.forward = partial(_upsample, module, kernels, module.forward)


def _upsample(
    module: nn.Module,
    kernels: list[Tensor],
    plain: Callable[..., Tensor],
    x: Tensor,
    size: torch.Size | None = None,
) -> Tensor:
    if x.dtype != kernels[0].dtype or size not in (None, (2 * x.shape[2], 2 * x.shape[3])):
        return plain(x) if size is None else plain(x, size)
    return upsampled_conv(kernels, module.conv.bias, x)


def packed_conv(conv: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    """The convolution [b, c_in, h, w] -> [b, c_out, h, w] with a reordered copy of its weight."""
    padding, stride, dilation = list(conv.padding), list(conv.stride), list(conv.dilation)
    geometry = (padding, stride, dilation, conv.groups)
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(conv.weight.detach().to_mkldnn(), *geometry)

    def forward(x: Tensor) -> Tensor:
        if x.dtype != packed.dtype:  # an autoencoder that yielded NaN continues in float32
            weight = packed.to_dense().to(x.dtype)
            return F.conv2d(x, weight, conv.bias, stride, padding, dilation, conv.groups)
        return torch.ops.mkldnn._convolution_pointwise(x, packed, conv.bias, *geometry, *NO_ACTIVATION)

    return forward


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this torch and processor run prepacked convolutions of the type, with the right result."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, conv = torch.ones(1, 16, 2, 2, dtype=dtype), nn.Conv2d(16, 16, 1, dtype=dtype)
    try:
        with torch.no_grad():
            return torch.allclose(packed_conv(conv)(x), conv(x), rtol=1e-2, atol=1e-2)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def prepack(model: nn.Module) -> None:
    """Reorder the 16-bit weights of every convolution in `model`, once.

    torch keeps weights in plain order and lets oneDNN reorder them in every call. Reordered ones are read in
    place (https://uxlfoundation.github.io/oneDNN/, "Memory Format Propagation"). Linear layers and float32
    gain nothing and stay plain. The operators are those of torch's own compiler on CPUs; they
    are private, so they are tried first, and a torch without them leaves the model plain.

    The layers' `weight` becomes None and `state_dict` lacks it, so that no weight is held twice. The result
    equals the plain one to rounding.
    """
    usable = cache(can_prepack)
    for module in model.modules():
        # a subclass may do more in its forward than the layer does
        if (
            type(module) is not nn.Conv2d
            or module.padding_mode != "zeros"
            or isinstance(module.padding, str)
            or "forward" in vars(module)  # packed already, or under another optimisation
        ):
            continue
        device, dtype = module.weight.device.type, module.weight.dtype
        if device == "cpu" and dtype in (torch.bfloat16, torch.float16) and usable(dtype):
            module.forward = packed_conv(module)
            module.weight = None
