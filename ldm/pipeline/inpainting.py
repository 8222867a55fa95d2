"""Painting a part of an image anew: what is sampled, what is kept, and how the result is pasted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import FieldError, InputError
from ldm.images.init_image import target_size
from ldm.images.masks import (
    Box,
    Sides,
    bounding_box,
    cut,
    extended,
    fit_mask,
    paste,
    paste_alpha,
    resize,
    surrounded,
    to_aspect,
)
from ldm.images.pixels import to_float
from ldm.log import notice
from ldm.models.diffusion.ddpm import LatentInpaintDiffusion
from ldm.pipeline.first_stage import FirstStage
from ldm.pipeline.init_images import MOST, InitImages, evict
from ldm.pipeline.request import ImageRequest, image_name
from ldm.sampling.known import KnownRegion, joining_levels
from ldm.sampling.noise import NoiseSource
from ldm.sampling.trajectory import Trajectory
from ldm.weights.description import Description


@dataclass(frozen=True, eq=False)
class Canvas:
    """What is sampled for a request with a mask or margins, and where the result goes.

    image: uint8 [H, W, 3], the part of the whole image that is sampled, in the size in which it is
    mask: float32 [H, W], 1 where it is painted anew and 0 where it is known; with `soft`, strengths between
    whole: uint8 [h, w, 3], what the result is pasted into: the init image and its margins
    box: the part of the whole image that is sampled; it may reach beyond its edges
    alpha: float32 [h, w], how much of the result shows in each pixel
    """

    image: np.ndarray
    mask: np.ndarray
    whole: np.ndarray
    box: Box
    alpha: np.ndarray

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in (self.image, self.mask, self.whole, self.alpha))

    def paste(self, pixels: np.ndarray) -> np.ndarray:
        """The whole image, uint8 [h, w, 3], with the result, uint8 [H, W, 3], where the mask is."""
        return paste(self.whole, pixels, self.box, self.alpha)


class Canvases:
    """Makes the canvases of requests; those used last are kept. A notice comes once for each mask."""

    def __init__(self, images: InitImages):
        self.images = images
        self._kept: OrderedDict[tuple, tuple[ImageRequest, Canvas]] = OrderedDict()
        self._noticed: set[str] = set()

    def size(self, request: ImageRequest, described: Description) -> tuple[int, int]:
        """Height and width that are sampled, multiples of the model's factor. InputError.

        With `crop_to_mask` they are the request's, or what the model was made for. Otherwise they are those
        of the init image with its margins, filled up; a request's own are taken for that, margins included.
        """
        height, width = self._size(request, described)
        # whatever is wrong with the files comes up here
        self(request.twin(height=height, width=width), described)
        return height, width

    def _size(self, request: ImageRequest, described: Description) -> tuple[int, int]:
        height, width, factor = request.height, request.width, described.factor or 8
        if request.crop_to_mask is not None:
            return height or described.native_size, width or described.native_size
        own, sides = self.images.whole(request).shape[:2], _sides(request)
        if height is None and width is None:
            return tuple(-(-side // factor) * factor for side in sides.added_to(*own))
        if height is None or width is None:
            more_height, more_width = sides.added_to(0, 0)
            inner = (
                height and self._inside("height", height, more_height),
                width and self._inside("width", width, more_width),
            )
            fitted_width, fitted_height = target_size(own[::-1], *inner)
            height = height or _nearest(fitted_height + more_height, factor, more_height)
            width = width or _nearest(fitted_width + more_width, factor, more_width)
        return height, width

    def __call__(self, request: ImageRequest, described: Description) -> Canvas:
        """The canvas of a request whose height and width are those of `size`. InputError."""
        key = (
            *(one if isinstance(one, str) else id(one) for one in (request.init_img, request.mask)),
            *(request.height, request.width, request.resize, request.background, request.invert_mask),
            *(request.mask_blur, request.crop_to_mask, request.outpaint, request.soft, described.factor),
        )
        if key not in self._kept:
            # the request keeps image objects, so that no other has the same id
            self._kept[key] = request, self._make(request, described.factor or 8)
            evict(self._kept, MOST, lambda kept: kept[1].nbytes)
        self._kept.move_to_end(key)
        return self._kept[key][1]

    def forget(self) -> None:
        """Read all files anew from now on."""
        self._kept.clear()

    def _make(self, request: ImageRequest, factor: int) -> Canvas:
        sides, image = _sides(request), self._fitted(request, factor)
        height, width = sides.added_to(*image.shape[:2])
        if height * width > self.images.max_pixels:
            name, most = image_name(request.init_img), self.images.max_pixels
            raise InputError(f"{name} would become {width}x{height}: more than --max_pixels {most:,}")
        whole = extended(image, sides)
        mask = surrounded(self._mask(request, *image.shape[:2]), sides, 1.0)
        inside = mask > 0
        margins = surrounded(np.zeros(image.shape[:2], bool), sides, True)
        alpha = paste_alpha(inside, margins, request.mask_blur)
        if not alpha.any():
            name, blur = image_name(request.mask), request.mask_blur
            why = f"a blur of {blur:g} leaves nothing of" if inside.any() else "nothing is white in"
            self._notice_once(f"{why} the mask {name}: the image comes back as it is")
        if request.crop_to_mask is None:
            box = Box(0, 0, request.height, request.width)
            return Canvas(cut(whole, box), cut(mask, box), whole, box, alpha)
        box = Box(0, 0, height, width)
        if inside.any():
            box = bounding_box(inside).grown(request.crop_to_mask)
            box = box.joined(bounding_box(inside | (alpha > 0)))
            box = box.within(height, width)
        box = to_aspect(box, (height, width), request.height, request.width)
        part = fit_mask(cut(mask, box), request.height, request.width)
        if not request.soft:
            part = (part > 0).astype(np.float32)
        image = resize(cut(whole, box), request.height, request.width)
        return Canvas(image, part, whole, box, alpha)

    def _fitted(self, request: ImageRequest, factor: int) -> np.ndarray:
        """The init image in its own size if that is what is sampled, or fitted to it."""
        own, sides = self.images.whole(request), _sides(request)
        filled_up = tuple(-(-side // factor) * factor for side in sides.added_to(*own.shape[:2]))
        if request.crop_to_mask is not None or (request.height, request.width) == filled_up:
            return own
        more_height, more_width = sides.added_to(0, 0)
        height = self._inside("height", request.height, more_height)
        width = self._inside("width", request.width, more_width)
        return self.images.fitted(request, height, width)

    @staticmethod
    def _inside(name: str, size: int, margins: int) -> int:
        """What the margins leave of a size for the image."""
        if size <= margins:
            raise FieldError(
                "{outpaint} adds {margins} of {" + name + "} {size}: nothing is left for the image",
                margins=margins,
                size=size,
            )
        return size - margins

    def _mask(self, request: ImageRequest, height: int, width: int) -> np.ndarray:
        """The mask of an init image that was fitted to this size, float32 [height, width]."""
        if request.mask is None:
            return np.zeros((height, width), np.float32)
        mask, own = self.images.grey(request.mask), self.images.whole(request).shape[:2]
        if request.invert_mask:
            mask = 1.0 - mask
        if mask.shape not in (own, (height, width)):
            sizes = f"has {mask.shape[1]}x{mask.shape[0]} pixels and the image {own[1]}x{own[0]}"
            self._notice_once(f"the mask {image_name(request.mask)} {sizes}: it is resized")
            mask = fit_mask(mask, *own)
        mask = fit_mask(mask, height, width, request.resize)
        return mask if request.soft else (mask >= 0.5).astype(np.float32)

    def _notice_once(self, line: str) -> None:
        if line not in self._noticed:
            self._noticed.add(line)
            notice(line)


def _sides(request: ImageRequest) -> Sides:
    return Sides(*map(int, request.outpaint or ()))


def _nearest(size: int, factor: int, above: int) -> int:
    """The multiple of `factor` above a size that is nearest to another one."""
    return max(round(size / factor), above // factor + 1) * factor


def inputs(
    model: LatentInpaintDiffusion,
    first_stage: FirstStage,
    canvases: Sequence[Canvas | None],
    shape: Sequence[int],
    noise: NoiseSource,
) -> dict[str, Tensor]:
    """The further channels of an inpainting model's UNet, [b, 1 + c, h, w], as `conditions` takes them.

    The mask at the size of the latents, and the latents of the image with grey where it is painted anew.
    Without canvases all of an image of `shape`, one image's latents [c, h, w], is painted.
    """
    if canvases[0] is None:
        side = model.first_stage_model.factor
        height, width = (size * side for size in shape[1:])
        mask = torch.ones(1, 1, height, width, device=model.device)
        posterior = first_stage.encode([torch.zeros(3, height, width)])
        channels = model.mask_channels(mask, model.get_first_stage_encoding(posterior.mode()))
        return {"concat": channels.expand(len(canvases), -1, -1, -1)}
    masks = torch.stack([_tensor(canvas.mask > 0) for canvas in canvases]).to(model.device)
    # one object for each canvas, so that it is encoded once
    masked = {
        canvas: to_float([canvas.image])[0] * _tensor(canvas.mask == 0) for canvas in dict.fromkeys(canvases)
    }
    posterior = first_stage.encode([masked[canvas] for canvas in canvases])
    latents = model.get_first_stage_encoding(posterior, noise.posterior())
    return {"concat": model.mask_channels(masks, latents)}


def known_region(
    run: Trajectory,
    batch: Sequence[ImageRequest],
    canvases: Sequence[Canvas],
    init: Tensor,
    noise: NoiseSource,
    *,
    task: str,
) -> KnownRegion:
    """What sampling keeps of the images' latents `init`, [b, c, h, w].

    A latent is as free as the freest of its pixels. A model for inpainting sees the known part of an image
    anyway, so that all its latents are free but for `soft` masks.
    """
    free = [task == "inpaint" and not request.soft for request in batch]
    masks = [
        torch.ones(1, *canvas.mask.shape) if is_free else _tensor(canvas.mask)
        for is_free, canvas in zip(free, canvases, strict=True)
    ]
    strength = F.adaptive_max_pool2d(torch.stack(masks), init.shape[-2:]).to(init.device)
    return KnownRegion(init.float(), noise.start(), joining_levels(strength, run.sigmas))


def _tensor(mask: np.ndarray) -> Tensor:
    """float32 [1, h, w]."""
    return torch.from_numpy(np.array(mask, dtype=np.float32))[None]
