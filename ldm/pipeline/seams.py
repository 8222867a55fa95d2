"""Seamless images: convolutions that see the opposite edge where an image ends, in UNet and autoencoder.

A convolution pads its input with zeros. Here the input is first continued around, by as much as the padding
reaches, and what comes of the margins is cut off: the layer itself stays as it is, be it torch's, one on
reordered weights or one with upsampling folded in. All else in the networks (attention, norms) does not know
where a pixel is, so that they draw the same image, rolled, from latents that are rolled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.errors import FieldError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules import model as first_stage
from ldm.modules.diffusionmodules import openaimodel as unet
from ldm.optimize.compile import uncompiled
from ldm.optimize.graph import free_recordings
from ldm.optimize.tiling import TILE, overlap_of
from ldm.pipeline.first_stage import FirstStage
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.request import ImageRequest
from ldm.pipeline.settings.seams import AXES

Forward = Callable[..., Tensor]
DIMS = {"x": 3, "y": 2}  # of tensors [b, c, h, w]


def dims_of(tiling: str) -> tuple[int, ...]:
    """The dimensions of [b, c, h, w] along which an image continues, by the setting's value."""
    return tuple(DIMS[axis] for axis in AXES[tiling])


def extended(x: Tensor, margin: int, dims: Sequence[int]) -> Tensor:
    """x [b, c, h, w] continued around by `margin` on both sides along `dims`; its order in memory stays."""
    for dim in dims:
        turns = torch.cat([x] * -(-margin // x.shape[dim]), dim) if margin > x.shape[dim] else x
        before = turns.narrow(dim, turns.shape[dim] - margin, margin)
        x = torch.cat([before, x, turns.narrow(dim, 0, margin)], dim)
    return x


def cropped(x: Tensor, margin: int, dims: Sequence[int]) -> Tensor:
    """x [b, c, h, w] without `margin` on both sides along `dims`."""
    for dim in dims:
        x = x.narrow(dim, margin, x.shape[dim] - 2 * margin)
    return x


def around(plain: Forward, margin: int, cut: int, dims: Sequence[int]) -> Forward:
    """`plain` of an input that continues by `margin`, without the `cut` of its output that comes of that."""
    return lambda x, *rest: cropped(plain(extended(x, margin, dims), *rest), cut, dims)


def around_upsampling(plain: Forward, dims: Sequence[int]) -> Forward:
    """The same for upsampling by two with the convolution after it folded in."""

    def forward(x: Tensor, size: torch.Size | None = None) -> Tensor:
        if size not in (None, (2 * x.shape[2], 2 * x.shape[3])):
            return plain(x, size)  # cut to an odd size it is not folded: the convolution itself continues
        larger = extended(x, 1, dims)
        sizes = () if size is None else (torch.Size(2 * side for side in larger.shape[2:]),)
        return cropped(plain(larger, *sizes), 2, dims)

    return forward


def replacements(network: nn.Module, dims: Sequence[int]) -> Iterator[tuple[nn.Module, str, Forward]]:
    """Each layer of a network that pads, the name of a method of it, and what that is to be."""
    for module in network.modules():
        match module:
            case nn.Conv2d(padding=(int(pad), _), stride=(stride, _)) if pad:
                # a multiple of the stride: its steps meet the same pixels
                margin = -(-pad // stride) * stride
                # what holds a packed copy of the weight computes in `forward`; others call this one, too
                name = "forward" if module.weight is None else "_conv_forward"
                yield module, name, around(getattr(module, name), margin, margin // stride, dims)
            case first_stage.Downsample():  # pads by itself, on the right and below
                yield module, "forward", around(module.forward, 2, 1, dims)
            case first_stage.Upsample() | unet.Upsample() if "forward" in vars(module):
                yield module, "forward", around_upsampling(module.forward, dims)


@contextmanager
def padded_around(networks: Iterable[tuple[nn.Module, Sequence[int]]]) -> Iterator[None]:
    """Inside, images of each network continue along its dims."""
    found = [each for network, dims in networks if dims for each in replacements(network, dims)]
    before = [vars(module).get(name) for module, name, _ in found]
    try:
        for module, name, forward in found:
            setattr(module, name, forward)
        yield
    finally:
        for (module, name, _), own in zip(found, before, strict=True):
            if own is None:
                delattr(module, name)  # uncovers the method of the class
            else:
                setattr(module, name, own)


@contextmanager
def seamless(
    model: LatentDiffusion,
    unet_dims: Sequence[int],
    first_stage_dims: Sequence[int],
    further: Iterable[nn.Module] = (),
) -> Iterator[None]:
    """Inside, images of `model`'s networks continue along their dims, uncompiled and recorded anew.

    `further` networks work on what the UNet does.
    """
    if not unet_dims and not first_stage_dims:
        yield
        return
    networks = [(network, unet_dims) for network in (model.model.diffusion_model, *further)]
    free_recordings(model)
    try:
        with uncompiled(), padded_around([*networks, (model.first_stage_model, first_stage_dims)]):
            yield
    finally:
        free_recordings(model)


def decode(
    first_stage: FirstStage, latents: Tensor, tile: int, dims: Sequence[int], in_tiles: bool
) -> Tensor:
    """`first_stage.decode(latents, tile)` of latents that continue along `dims`.

    Where it works `in_tiles` by itself, these end somewhere in the image: what is decoded goes on beyond the
    edges by what tiles share, and the rest is cut off.
    """
    if in_tiles:
        margin, factor = overlap_of(TILE) if dims else 0, first_stage.model.first_stage_model.factor
        return cropped(first_stage.decode(extended(latents, margin, dims), tile), margin * factor, dims)
    with seamless(first_stage.model, (), dims):
        return first_stage.decode(latents, tile)


def check_seams(request: ImageRequest, options: RuntimeOptions, device: torch.device) -> None:
    """FieldError for a seamless image, or one of windows, beside options that cannot draw it."""
    if request.tiling != "none" and options.compile and device.type == "cpu":
        raise FieldError(
            "{tiling} {axes} with {compile} on a CPU: what OpenVINO has compiled pads with zeros; leave one "
            "of them out",
            axes=request.tiling,
        )
    if request.panorama and options.deepcache > 1:
        raise FieldError(
            "{panorama} with {deepcache} {calls}: kept features belong to one window; leave one of them out",
            calls=options.deepcache,
        )
