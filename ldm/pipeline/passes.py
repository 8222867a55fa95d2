"""A second pass: an image is drawn, enlarged, and drawn over at the larger size.

The second pass is image to image. Its noise has a seed of its own, which `second_seed` makes of the image's,
so that it does not depend on how many numbers the first pass drew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.errors import FieldError, InputError
from ldm.fields import settings_of
from ldm.images.init_image import fit
from ldm.images.pixels import finite_images, to_uint8
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.pixel_upscaler import PixelUpscaler
from ldm.pipeline.request import ImageRequest
from ldm.pipeline.seams import cropped, extended
from ldm.pipeline.settings.passes import LANCZOS, LATENT, PASSES
from ldm.sampling.noise import place_seed
from ldm.weights.hashes import quick_hash

Start = Tensor | Sequence[np.ndarray | Tensor]  # of a second pass: latents, or an image each
SEEDS = ("seed", "start_seed", "variation_seed")
MARGIN = 32  # pixels of the opposite edge that a pixel upscaler sees of a seamless image


def second_seed(seed: int) -> int:
    """The seed of an image's second pass: `img2img.py` with it has the same noise."""
    return place_seed(seed, b"second pass")


def final_size(request: ImageRequest, factor: int) -> tuple[int, int]:
    """Height and width of a sized request's image, the nearest multiples of the model's factor."""
    if request.hires is None:
        return request.height, request.width
    return tuple(round(request.hires * side / factor) * factor for side in (request.height, request.width))


def second_pass(request: ImageRequest, factor: int) -> ImageRequest:
    """A resolved request as its second pass sees it; the request itself, if it has none."""
    if request.hires is None:
        return request
    height, width = final_size(request, factor)
    seeds = {name: getattr(request, name) for name in SEEDS}
    return request.twin(
        height=height,
        width=width,
        strength=request.hires_strength,
        steps=request.hires_steps or request.steps,
        **dict.fromkeys(PASSES),
        **{name: None if seed is None else second_seed(seed) for name, seed in seeds.items()},
    )


@contextmanager
def naming_hires_steps(one: ImageRequest, request: ImageRequest) -> Iterator[None]:
    """In errors about `one` pass of a request its steps have the name of the option that gave them."""
    try:
        yield
    except FieldError as error:
        if one is request or request.hires_steps is None:
            raise
        raise FieldError(error.template.replace("{steps}", "{hires_steps}"), **error.values) from error


def check_second_pass(request: ImageRequest, factor: int, max_pixels: int, upscalers: PixelUpscalers) -> None:
    """InputError for a second pass of a sized request that cannot be."""
    height, width = final_size(request, factor)
    size, most = f"{width}x{height}", settings_of(ImageRequest)["height"].high
    if (height, width) == (request.height, request.width):
        raise FieldError("{hires} {times:g}: of {size} it makes {size} again", times=request.hires, size=size)
    if max(height, width) > most:
        raise FieldError(
            "{hires} {times:g}: {size} is beyond {most}", times=request.hires, size=size, most=most
        )
    if height * width > max_pixels:
        raise FieldError(
            "{hires} {times:g}: the image would become {size}, more than {max_pixels} {most:,}",
            times=request.hires,
            size=size,
            most=max_pixels,
        )
    upscalers.of(request)


def digests(request: ImageRequest) -> dict[str, str]:
    """What distinguishes the content of the file that enlarges for a request's second pass."""
    name = request.hires_upscaler
    return {} if name in (None, LATENT, LANCZOS) else {"hires upscaler": quick_hash(Path(name))}


def file_stamp(name: str) -> tuple:
    """What changes when a file does."""
    try:
        status = Path(name).stat()
    except OSError:  # reading it will say why
        return (name,)
    return name, status.st_mtime_ns, status.st_size


class PixelUpscalers:
    """The pixel upscalers that second passes name; the last one is kept, until its file changes."""

    def __init__(self, options: RuntimeOptions):
        self.options = RuntimeOptions(device=options.device, precision=options.precision)
        self._kept: tuple[tuple, PixelUpscaler] | None = None

    def of(self, request: ImageRequest) -> PixelUpscaler | None:
        """The one of a request's file, whose network is read; None without one. InputError."""
        name = request.hires_upscaler
        if name in (None, LATENT, LANCZOS):
            return None
        stamp = file_stamp(name)
        if self._kept is None or self._kept[0] != stamp:
            try:
                upscaler = PixelUpscaler(name, self.options, option="{hires_upscaler}")
                upscaler.network  # noqa: B018
            except InputError as error:
                raise FieldError(f"{error}; there are {LATENT}, {LANCZOS} and files") from error
            self._kept = stamp, upscaler
        return self._kept[1]


def enlarged_latents(latents: Tensor, size: tuple[int, int], dims: Sequence[int] = ()) -> Tensor:
    """Latents [b, c, h, w] in a larger size, bilinear; along `dims` they continue."""

    def bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(x, size, mode="bilinear")

    return _resized_around(bilinear, latents.float(), size, dims)


def enlarged_images(
    decoded: Tensor, size: tuple[int, int], dims: Sequence[int] = (), upscaler: PixelUpscaler | None = None
) -> list[np.ndarray | Tensor]:
    """Decoded images [b, 3, h, w], about [-1, 1], in a larger size: uint8 [H, W, 3] each.

    By LANCZOS, or by a network and LANCZOS from its size on; along `dims` they continue. One that is NaN, or
    that the network makes NaN of, comes as a tensor of it, [3, H, W].
    """
    lost = torch.full((3, *size), torch.nan)
    pairs = zip(to_uint8(decoded), finite_images(decoded), strict=True)
    larger = [enlarged_pixels(pixels, size, dims, upscaler) if finite else None for pixels, finite in pairs]
    return [lost if pixels is None else pixels for pixels in larger]


def enlarged_pixels(
    pixels: np.ndarray, size: tuple[int, int], dims: Sequence[int] = (), upscaler: PixelUpscaler | None = None
) -> np.ndarray | None:
    """One image uint8 [h, w, 3] in a larger size; None if the network yields NaN."""
    x = _to_tensor(pixels)
    if upscaler is not None:
        margin = MARGIN if dims else 0
        larger = upscaler.enlarged(_to_array(extended(x, margin, dims)))
        if larger is None:
            return None
        x = cropped(_to_tensor(larger), margin * upscaler.factor, dims)

    def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
        return _to_tensor(np.array(fit(Image.fromarray(_to_array(x)), *size, "stretch")))

    return _to_array(_resized_around(resized, x, size, dims))


def _to_tensor(pixels: np.ndarray) -> Tensor:
    """An image [h, w, 3] as [1, 3, h, w], whose dimensions are those of latents."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _to_array(x: Tensor) -> np.ndarray:
    return x[0].permute(1, 2, 0).contiguous().numpy()


def _resized_around(
    resize: Callable[[Tensor, tuple[int, int]], Tensor], x: Tensor, size: tuple[int, int], dims: Sequence[int]
) -> Tensor:
    """`resize(x, size)` of x [b, c, h, w] that continues along `dims`: of three turns the middle one."""
    turns = [3 if dim in dims else 1 for dim in (2, 3)]
    for dim in dims:
        x = extended(x, x.shape[dim], (dim,))
    larger = resize(x, tuple(side * n for side, n in zip(size, turns, strict=True)))
    for dim in dims:
        larger = cropped(larger, size[dim - 2], (dim,))
    return larger
