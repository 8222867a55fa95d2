"""Convolutions and linear layers on a CPU, by the kernels that are fastest there.

torch's own calls keep activations with channels first, reorder the weights of a convolution for oneDNN at
every call, and give float32 products to MKL. The others here are the operators of torch's compiler on CPUs:
oneDNN with channels last and weights reordered once
(https://uxlfoundation.github.io/oneDNN/, "Memory Format Propagation"). They are private to torch, so they are
tried first, and a torch without them leaves a model plain. Results equal the plain ones to rounding.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.log import notice
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import GEGLU, BasicTransformerBlock, CrossAttention
from ldm.modules.diffusionmodules.model import Decoder, Encoder, Upsample
from ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel
from ldm.optimize.attention import NO_ACTIVATION, SHORTEST, attention_kernels, use_attention_in_rows
from ldm.optimize.kernels import choose, fingerprint_of_layers
from ldm.optimize.packed import (
    dense,
    dense_halves,
    halves_plus_product,
    pack,
    pack_conv,
    pack_halves,
    plus_product,
)
from ldm.optimize.replaced import Made
from ldm.optimize.upsampling import fold_upsampling, folded
from ldm.optimize.winograd import MOST, MOST_IN_LARGE_TILES, takes_winograd, winograd_conv
from ldm.weights.header import let_go

GELU = ("gelu", [], "none")  # the exact one, by the error function
MOST_CHANNELS, MOST_PIXELS = 640, 16 * 16  # of a layer that is measured: more of them change no ratio
MOST_PIXELS_OF_CONV = 32 * 16  # of a 3x3 convolution; fewer would not fill Winograd's tiles
# Squared channels times latents, over the residual blocks of a UNet that is measured as a whole. The bundled
# models have a twentieth to a fifth of it, v1 a hundred times as much.
SMALL_WORK = 2e7
TOKENS = 77  # of a prompt
SMALL_WEIGHT = 2**16  # bytes

Forward = Callable[[Tensor], Tensor]
Shape = tuple[int, int, int]  # channels, height, width


class Kernels(NamedTuple):
    """What a model's layers run on, each one of the names below."""

    convolutions: str
    upsampling: str
    linears: str
    attention: str


UPSAMPLINGS = ("torch", "folded")  # folded: in one with the convolution after it
LINEARS = ("torch", "onednn", "packed")  # packed: oneDNN's with weights reordered once
ATTENTIONS = ("torch", "rows")
KERNELS = {  # for --kernels
    "torch": Kernels("torch", "torch", "torch", "torch"),
    "onednn": Kernels("onednn", "folded", "packed", "rows"),
    "winograd": Kernels("winograd", "folded", "packed", "rows"),
}
FOLDED = KERNELS["torch"]._replace(upsampling="folded")  # in float32 it is the faster one everywhere


def packed_conv(conv: nn.Conv2d) -> Forward:
    """The convolution [b, c_in, h, w] -> [b, c_out, h, w] with a reordered copy of its weight."""
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1:
        return packed_pointwise(conv)
    padding, stride, dilation = list(conv.padding), list(conv.stride), list(conv.dilation)
    geometry = (padding, stride, dilation, conv.groups)
    made = Made(conv, partial(pack_conv, geometry=geometry), dense)

    def forward(x: Tensor) -> Tensor:
        packed = made.value
        if x.dtype != packed.dtype:  # an autoencoder that yielded NaN continues in float32
            weight = packed.to_dense().to(x.dtype)
            return F.conv2d(x, weight, conv.bias, stride, padding, dilation, conv.groups)
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(x, packed, conv.bias, *geometry, *NO_ACTIVATION)

    return forward


def fewest_products(conv: nn.Conv2d, most: int = MOST) -> Forward:
    """Winograd's convolution for the layers that it is worth its memory for, else `packed_conv`."""
    return winograd_conv(conv) if takes_winograd(conv, most) else packed_conv(conv)


# a name to what gives a layer its forward; all but torch's have channels last, and weights reordered once
CONVOLUTIONS: dict[str, Callable[[nn.Conv2d], Forward]] = {
    "torch": lambda conv: conv.forward,
    "onednn": packed_conv,
    "winograd": fewest_products,  # differs from "onednn" in float32 only
}


def packed_linear(layer: nn.Linear | nn.Conv2d) -> Forward:
    """The linear layer [..., n_in] -> [..., n_out], or a 1x1 convolution on rows, with a reordered weight."""
    made = Made(layer, pack, dense, plus_product)

    def forward(x: Tensor) -> Tensor:
        packed = made.value
        if x.dtype != packed.dtype:
            return F.linear(x, packed.to_dense().to(x.dtype), layer.bias)
        return torch.ops.mkldnn._linear_pointwise(x, packed, layer.bias, *NO_ACTIVATION)

    return forward


def packed_geglu(layer: GEGLU) -> Forward:
    """The gated layer as two products: the gate's ends in its GELU, the other's output is gated at once."""
    biases = layer.proj.bias.detach().chunk(2)
    made = Made(layer.proj, pack_halves, dense_halves, halves_plus_product)

    def forward(x: Tensor) -> Tensor:
        value, gate = made.value
        gates = torch.ops.mkldnn._linear_pointwise(x, gate, biases[1], *GELU)
        return torch.ops.mkldnn._linear_pointwise.binary(x, gates, value, biases[0], "mul")

    return forward


def packed_pointwise(conv: nn.Conv2d) -> Forward:
    """A 1x1 convolution as a linear layer over the pixels, which with channels last lie in rows.

    oneDNN's own 1x1 convolution runs at a fifth of the speed on a map of 16x16 pixels.
    """
    linear = packed_linear(conv)

    def forward(x: Tensor) -> Tensor:
        rows = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return linear(rows).permute(0, 3, 1, 2)

    return forward


def onednn_linear(layer: nn.Linear) -> Forward:
    """The linear layer through oneDNN, with the weight that it has."""
    plain = layer.forward

    def forward(x: Tensor) -> Tensor:
        weight = layer.weight
        if x.dtype != weight.dtype:
            return plain(x)
        return torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, *NO_ACTIVATION)

    return forward


@cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this torch and processor run oneDNN's operators on the type, with the right result."""
    if not torch.backends.mkldnn.is_available():
        return False
    conv = layer_of_ones(nn.Conv2d, 16, 16, 3, padding=1, dtype=dtype)
    linear = layer_of_ones(nn.Linear, 16, 16, dtype=dtype)
    image, rows = torch.ones(1, 16, 2, 2, dtype=dtype), torch.ones(1, 4, 16, dtype=dtype)
    close = partial(torch.allclose, rtol=1e-2, atol=1e-2)
    try:
        with torch.no_grad():
            makes = (packed_conv, winograd_conv) if dtype == torch.float32 else (packed_conv,)
            return all(close(make(conv)(image), conv(image)) for make in makes) and all(
                close(make(linear)(rows), linear(rows)) for make in (packed_linear, onednn_linear)
            )
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def feature_maps(unet: UNetModel, side: int) -> Iterator[tuple[int, int]]:
    """The widths of a UNet's residual blocks and the sides of what they work on, from latents of `side`."""
    for block in unet.input_blocks:
        for layer in block:
            if isinstance(layer, Downsample):
                side = (side + 1) // 2
            if isinstance(layer, ResBlock):
                yield layer.out_layers[-1].out_channels, side


def measured(unet: UNetModel, side: int, pixels: int = MOST_PIXELS) -> list[Shape]:
    """The shapes of what each level works on, cut down to a part of so many pixels, which says as much."""
    found = set()
    for channels, size in feature_maps(unet, side):
        height = min(size, max(1, pixels // size))
        found.add((min(channels, MOST_CHANNELS), height, size))
    return sorted(found)


def convolutions_for(dtype: torch.dtype) -> tuple[str, ...]:
    """The names of convolutions that differ for weights of this type."""
    return tuple(name for name in CONVOLUTIONS if name != "winograd" or dtype == torch.float32)


def conv_kernels(shapes: list[Shape], dtype: torch.dtype) -> Mapping[str, Callable[[], object]]:
    """Calls of a 3x3 convolution of each shape: torch's, and the others with channels last."""
    runs = {name: [] for name in convolutions_for(dtype)}
    for channels, height, width in shapes:
        conv = layer_of_ones(nn.Conv2d, channels, channels, 3, padding=1, dtype=dtype)
        x = torch.ones(2, channels, height, width, dtype=dtype)
        last = x.contiguous(memory_format=torch.channels_last)
        for name, calls in runs.items():
            calls.append(partial(CONVOLUTIONS[name](conv), x if name == "torch" else last))
    return {name: partial(_call_all, calls) for name, calls in runs.items()}


def upsampling_kernels(
    shapes: list[Shape], dtype: torch.dtype, convolutions: str
) -> Mapping[str, Callable[[], object]]:
    """Calls of a 3x3 convolution after upsampling a quarter of each shape, one after the other and in one."""
    runs = {name: [] for name in UPSAMPLINGS}
    for channels, height, width in shapes:
        with torch.device("meta"):
            layer = Upsample(channels)
        layer.conv = layer_of_ones(nn.Conv2d, channels, channels, 3, padding=1, dtype=dtype)
        x = torch.ones(2, channels, -(-height // 4), width, dtype=dtype)
        if convolutions != "torch":
            x = x.contiguous(memory_format=torch.channels_last)
        runs["folded"].append(partial(folded(layer.conv, CONVOLUTIONS[convolutions]), x))
        layer.conv.forward = CONVOLUTIONS[convolutions](layer.conv)
        runs["torch"].append(partial(layer, x))
    return {name: partial(_call_all, calls) for name, calls in runs.items()}


def linear_kernels(shapes: list[Shape], dtype: torch.dtype) -> Mapping[str, Callable[[], object]]:
    """Calls of a linear layer over the pixels of each shape, to four times as many channels."""
    runs = {name: [] for name in LINEARS}
    for channels, height, width in shapes:
        layer = layer_of_ones(nn.Linear, channels, 4 * channels, dtype=dtype)
        x = torch.ones(2, height * width, channels, dtype=dtype)
        forwards = {"torch": layer, "onednn": onednn_linear(layer), "packed": packed_linear(layer)}
        for name, forward in forwards.items():
            runs[name].append(partial(forward, x))
    return {name: partial(_call_all, calls) for name, calls in runs.items()}


def layer_of_ones(kind: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """A layer whose parameters are 1; torch's own initialisation would draw from its global generator.

    Not by `skip_init`, which imports torch's symbolic shapes: a third of a second at every start.
    """
    layer = kind(*args, device="meta", **kwargs)
    for name, unset in list(layer.named_parameters()):
        ones = torch.ones(unset.shape, dtype=unset.dtype)
        setattr(layer, name, nn.Parameter(ones, requires_grad=False))
    return layer


def _call_all(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()


@torch.inference_mode()
def choose_kernels(model: LatentDiffusion) -> Kernels:
    """The kernels that are fastest here at the size of latents that `model` was made for."""
    unet = model.model.diffusion_model
    dtype = unet.dtype
    if not has_onednn(dtype):
        return FOLDED if dtype == torch.float32 else KERNELS["torch"]
    shapes = measured(unet, model.image_size)
    kind = str(dtype).removeprefix("torch.")
    levels = ", ".join([kind, *("x".join(map(str, shape)) for shape in shapes)])
    attention = "torch"
    keys, width = model.image_size**2, head_width(unet)
    if width and keys >= SHORTEST and dtype in (torch.float32, torch.bfloat16):
        work = f"attention, {kind}, {keys}x{width}"
        attention = choose(work, ATTENTIONS, partial(attention_kernels, width, keys, dtype))
    names = convolutions_for(dtype)
    larger = measured(unet, model.image_size, MOST_PIXELS_OF_CONV)
    work = f"convolutions by {', '.join(names)}, {levels}"
    convolutions = choose(work, names, partial(conv_kernels, larger, dtype))
    small = [shape for shape in shapes if shape[2] < model.image_size] or shapes  # than the latents
    upsampling = partial(upsampling_kernels, small, dtype, convolutions)
    found = Kernels(
        convolutions,
        choose(f"upsampling by {convolutions}, {levels}", UPSAMPLINGS, upsampling),
        choose(f"linear layers, {levels}", LINEARS, partial(linear_kernels, shapes, dtype)),
        attention,
    )
    work = sum(channels**2 * size**2 for channels, size in feature_maps(unet, model.image_size))
    compiled = "forward" in vars(unet)  # by another library
    if work > SMALL_WORK or compiled or unet.num_classes is not None:
        return found
    sets = [found, found._replace(convolutions="torch", upsampling="torch"), KERNELS["torch"]]
    if found.convolutions == "winograd":
        sets.insert(1, found._replace(convolutions="onednn"))
    named = {"+".join(kernels): kernels for kernels in sets}
    if len(named) == 1:
        return found
    whole = partial(whole_calls, unet, model.image_size, named)
    work = f"whole calls, {'+'.join(found)}, {levels}, layers {fingerprint_of_layers(unet)}"
    return named[choose(work, tuple(named), whole)]


def whole_calls(
    unet: UNetModel, side: int, named: Mapping[str, Kernels]
) -> Mapping[str, Callable[[], object]]:
    """Guided calls of copies of a small UNet, on each set of kernels.

    There what is between the layers decides: the kernels that were the fastest ones by themselves made the
    calls of `scenes-64` take twice as long as torch's.
    """
    width = next(m.attn2.to_k.in_features for m in unet.modules() if isinstance(m, BasicTransformerBlock))
    x = torch.zeros(2, unet.in_channels, side, side, dtype=unet.dtype)
    timesteps, context = torch.zeros(2), torch.zeros(2, TOKENS, width, dtype=unet.dtype)
    runs = {}
    for name, kernels in named.items():
        own = copy.deepcopy(unet)
        use_kernels(alone(own), kernels)
        runs[name] = partial(own, x, timesteps, context)
    return runs


def alone(network: nn.Module) -> nn.Module:
    """A model with nothing but a network in the place of its UNet, for functions that change layers."""
    model = nn.Module()
    model.model, model.first_stage_model = nn.Module(), nn.Module()
    model.model.diffusion_model = network
    return model


def head_width(unet: UNetModel) -> int:
    """Channels of a head in the UNet's first attention; 0 without any."""
    attentions = (module for module in unet.modules() if isinstance(module, CrossAttention))
    return next((module.to_q.out_features // module.heads for module in attentions), 0)


def use_kernels(model: LatentDiffusion, kernels: Kernels) -> None:
    """Let `model` run on `kernels`, which it then has as an attribute.

    It is for inference only then: its weights must not change any more. A notice, and torch's own, where this
    processor or torch cannot run them on the model's type.
    """
    dtype = model.model.diffusion_model.dtype
    if kernels not in (KERNELS["torch"], FOLDED) and not has_onednn(dtype):
        name = str(dtype).removeprefix("torch.")
        notice(f"--kernels: oneDNN does not run {name} on this processor; torch's own are used")
        kernels = KERNELS["torch"]
    model.kernels = kernels
    if kernels.convolutions != "torch" or kernels.linears == "packed":
        copy_small_weights(model)
    if kernels.upsampling == "folded":
        fold_upsampling(model, CONVOLUTIONS[kernels.convolutions])
    if kernels.convolutions != "torch":
        use_packed_convolutions(model, kernels.convolutions)
    if kernels.linears != "torch":
        use_onednn_linears(model, packed=kernels.linears == "packed")
    if kernels.attention == "rows":
        use_attention_in_rows(model)


def copy_small_weights(model: LatentDiffusion) -> None:
    """Give biases, norms and other small weights of `model`'s networks memory of their own.

    In a mapped file they lie between weights that are packed. To read them there would bring pages of those
    back into memory, up to 2 MB around each: 0.3 GB of v1.
    """
    for network in networks(model):
        for parameter in network.parameters():
            if parameter.nbytes <= SMALL_WEIGHT:
                parameter.data = parameter.data.clone()


def use_packed_convolutions(model: LatentDiffusion, name: str) -> None:
    """Let the `networks` of `model` compute with channels last, on weights that are packed.

    The convolutions' `weight` becomes None and `state_dict` lacks it, so that none is held twice. One that
    upsampling is folded into keeps its weight: odd sizes still use it, and an autoencoder that has changed
    to float32.
    """
    for network in networks(model):
        make = CONVOLUTIONS[name]
        if name == "winograd" and isinstance(network, Decoder):  # it works once where a UNet has many steps
            make = partial(fewest_products, most=MOST_IN_LARGE_TILES)
        for module in network.modules():
            if type(module) is nn.Conv2d and _is_plain(module):
                module.forward = make(module)
                _drop_weight(module)
        network.register_forward_hook(_channels_first)


def use_onednn_linears(model: LatentDiffusion, packed: bool) -> None:
    """Let the linear layers of `model`'s UNet run on oneDNN; `packed` ones have no `weight` any more."""
    for module in model.model.diffusion_model.modules():
        if packed and isinstance(module, GEGLU) and _is_plain(module.proj):
            module.forward = packed_geglu(module)
            _drop_weight(module.proj)
        if type(module) is nn.Linear and _is_plain(module):
            module.forward = packed_linear(module) if packed else onednn_linear(module)
            if packed:
                _drop_weight(module)


def networks(model: LatentDiffusion) -> Iterator[nn.Module]:
    """The parts of `model` that work on feature maps.

    An encoder in float32 is left out: most commands call none, and packing would bring its weights into
    memory, 137 MB for v1. Unpacked, its call takes 1.08 times as long.
    """
    yield model.model.diffusion_model
    for module in model.first_stage_model.modules():
        unused = isinstance(module, Encoder) and next(module.parameters()).dtype == torch.float32
        if isinstance(module, Encoder | Decoder) and not unused:
            yield module


def _is_plain(layer: nn.Conv2d | nn.Linear) -> bool:
    """Whether nothing else has changed the layer, and oneDNN's operators compute what it does."""
    if "forward" in vars(layer) or layer.weight is None or layer.weight.device.type != "cpu":
        return False
    if "made_of_weight" in vars(layer):  # upsampling is folded in
        return False
    padded = isinstance(layer, nn.Conv2d) and (
        layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    )
    return not padded and has_onednn(layer.weight.dtype)


def _drop_weight(layer: nn.Conv2d | nn.Linear) -> None:
    """Free what a packed copy replaces; pages of a mapped file are given back."""
    let_go(layer.weight.detach())
    layer.weight = None


def _channels_first(network: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output.contiguous()
