"""Depth to image: the depth map that a depth model is given, from a file or estimated from the init image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.images.init_image import allowed_size
from ldm.images.pixels import to_float
from ldm.log import notice
from ldm.models.diffusion.ddpm import LatentDepth2ImageDiffusion
from ldm.pipeline.init_images import MOST, InitImages, evict
from ldm.pipeline.request import ImageRequest, image_name
from ldm.weights.header import read_header

# A given map is measured in the greys of 16 bits, whose range is large beside the 0.001 of the channel.
WHITE = 65535


def has_estimator(config: Mapping[str, Any], weights: Path) -> bool:
    """Whether a depth model can estimate depth: its config names an estimator, its file has the weights."""
    stage = (config.get("params") or {}).get("depth_stage_config")
    return bool(stage) and any(name.startswith("depth_model.") for name in read_header(weights).tensors)


class DepthMaps:
    """The depth maps of resolved requests. Each is read or estimated once, and those used last are kept."""

    def __init__(self, images: InitImages):
        self.images = images
        self._kept: OrderedDict[Hashable, tuple[Any, np.ndarray]] = OrderedDict()
        self._said: set[str] = set()

    def size(self, request: ImageRequest) -> tuple[int, int]:
        """Height and width of an image that is made from a depth map alone. InputError if it is too large."""
        height, width = self.images.grey(request.depth).shape
        return allowed_size(
            image_name(request.depth),
            (width, height),
            request.height,
            request.width,
            self.images.max_pixels,
        )

    def given(self, request: ImageRequest) -> np.ndarray:
        """A request's own depth map in the size of its image, float32 [H, W] in 0 … 65535. InputError.

        A map of the init image's file is fitted as that is. A notice for one of another size, and for one
        that says nothing because it is flat.
        """
        source = self.images.grey(request.depth)
        size = request.height, request.width
        whole = None if request.init_img is None else self.images.whole(request).shape[:2]
        key = (id(source), *size, request.resize, whole)
        return self._keep(key, source, lambda: self._fitted(request, source, size) * WHITE)

    def of(self, model: LatentDepth2ImageDiffusion, request: ImageRequest) -> np.ndarray:
        """The depth map of a request in the size of its image, float32 [H, W], larger is nearer.

        Without a map of its own it is the model's estimate for the init image.
        """
        source = self.source(request)
        if request.depth is not None:
            return source
        return self._keep(id(source), source, lambda: self._estimate(model, source))

    def source(self, request: ImageRequest) -> np.ndarray:
        """What a request's depth map comes from: its own map as `given`, or its init image. InputError."""
        return self.images(request) if request.depth is None else self.given(request)

    def greys(self, model: LatentDepth2ImageDiffusion, request: ImageRequest) -> np.ndarray:
        """The depth map of a request as an image, uint16 [H, W]; an estimate takes up the whole range."""
        depth = np.nan_to_num(self.of(model, request))
        if request.depth is None:
            low, high = depth.min(), depth.max()
            depth = (depth - low) * (WHITE / max(high - low, 1e-9))
        return depth.round().clip(0, WHITE).astype(np.uint16)

    def inputs(
        self, model: LatentDepth2ImageDiffusion, batch: Sequence[ImageRequest], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """What the UNet is given besides the prompts: concat [b, 1, *size] in [-1, 1]."""
        maps = [torch.from_numpy(self.of(model, request)).to(model.device) for request in batch]
        return {"concat": torch.cat([model.depth_channel(depth[None, None], size) for depth in maps])}

    def forget(self) -> None:
        """Read and estimate all maps anew from now on."""
        self._kept.clear()
        self._said.clear()

    def _fitted(self, request: ImageRequest, source: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        name = image_name(request.depth)
        how, (height, width) = request.resize, source.shape
        known = size if request.init_img is None else self.images.whole(request).shape[:2]
        if request.init_img is not None and source.shape not in (size, known):
            self._say(
                f"the depth map {name} has {width}x{height} pixels and is resized to {size[1]}x{size[0]}"
            )
            how = "stretch"
        fitted = source if source.shape == size else _fit(source, size, how)
        if fitted.max() - fitted.min() < 1 / WHITE:
            grey = "black" if fitted.max() == 0 else "one grey"
            self._say(f"the depth map {name} is all {grey}: it says nothing about the layout")
        return fitted

    def _estimate(self, model: LatentDepth2ImageDiffusion, pixels: np.ndarray) -> np.ndarray:
        """In the model's precision, or in float32 where that overflows."""
        image = to_float([pixels]).to(model.device)
        depth = model.estimate_depth(image)
        if not depth.isfinite().all():
            self._say("the depth estimate is not finite in low precision: it is made in float32")
            model.depth_model.float()
            with torch.autocast(model.device.type, enabled=False):
                depth = model.estimate_depth(image)
        return depth[0, 0].float().cpu().numpy()

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            notice(line)

    def _keep(self, key: Hashable, source: Any, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Maps go by the identity of what they were made from, which is kept along with them."""
        if key not in self._kept:
            self._kept[key] = source, make()
            evict(self._kept, MOST, lambda kept: kept[1].nbytes)
        self._kept.move_to_end(key)
        return self._kept[key][1]


def _fit(depth: np.ndarray, size: tuple[int, int], how: str) -> np.ndarray:
    """A map float32 [h, w] in a new size (height, width); what "pad" adds is far away."""
    image, target, method = Image.fromarray(depth), (size[1], size[0]), Image.Resampling.BILINEAR
    if how == "crop":
        return np.asarray(ImageOps.fit(image, target, method))
    if how == "pad":
        return np.asarray(ImageOps.pad(image, target, method, color=0))
    return np.asarray(image.resize(target, method))
