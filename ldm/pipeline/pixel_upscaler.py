"""Pixel upscalers such as ESRGAN (Wang et al. 2018, https://arxiv.org/abs/1809.00219): one pass, no prompt.

Their architectures come from the spandrel package, which recognises them by the names of the weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import FieldError, InputError
from ldm.fields import changed
from ldm.images.pixels import finite_images, to_float, to_uint8
from ldm.log import notice
from ldm.optimize.tiling import in_tiles, overlap_of
from ldm.pipeline.device import choose_device, precision_on, weights_dtype
from ldm.pipeline.generated import GeneratedImage
from ldm.pipeline.init_images import InitImages
from ldm.pipeline.memory import is_out_of_memory
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.request import ImageRequest
from ldm.pipeline.safety import Safety, safety_for
from ldm.pipeline.upscaling import check_tile, enlarged_size, small_image
from ldm.weights.checkpoint import read_state_dict
from ldm.weights.families import identify
from ldm.weights.files import check_file, exists
from ldm.weights.hashes import FileHash
from ldm.weights.header import read_header
from ldm.weights.loading import ModelFiles

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

TILE = 256  # pixels; ESRGAN takes about 1 GB for one in float32
UNKNOWN = ("a pixel upscaler", "an unknown model")  # files about which spandrel knows more than we do
SETTINGS = ("height", "width", "init_img", "resize", "background", "tile", "watermark")
OPTIONS = ("device", "precision", "batch_size", "eager")  # of RuntimeOptions, those that are used


class PixelRequest(ImageRequest):
    """A request of which a pixel upscaler reads the image and its size alone."""

    def settings(self) -> dict[str, Any]:
        """The settings in use by name; the prompt is empty."""
        return {"prompt": ""} | {
            name: value for name, value in super().settings().items() if name in SETTINGS
        }

    @property
    def loras(self) -> tuple:
        return ()


class PixelUpscaler:
    """Enlarges init images by a network of pixels, as a pipeline does it for a run.

    The file's architecture decides the factor. Images are made one by one. InputError for a file that is no
    pixel upscaler; `option` is what gave it.
    """

    def __init__(
        self,
        path: str | Path,
        options: RuntimeOptions | None = None,
        *,
        safety: str = "auto",
        max_pixels: int = 64_000_000,
        option: str = "--model",
    ):
        path = Path(path)
        if not exists(path):
            raise InputError(f"{option} {path}: there is no such file")
        check_file(path)
        self.option = option
        self.files = ModelFiles(path, path)
        self.options = options or RuntimeOptions()
        self.weights = self.vae = None
        self.config = {"target": "spandrel"}
        self.safety_mode = safety_for(safety)
        self.init_pixels = InitImages(max_pixels)
        self.hash = FileHash(path)
        if vain := [f"--{name}" for name in changed(self.options) if name not in OPTIONS]:
            notice(f"{', '.join(vain)}: without effect on a pixel upscaler")

    @cached_property
    def network(self) -> ImageModelDescriptor:
        """The network on the CPU, in float32."""
        return load_network(self.files.weights, self.option)

    @cached_property
    def factor(self) -> int:
        return self.network.scale

    @cached_property
    def device(self) -> torch.device:
        return choose_device(self.options.device)

    def use_device(self, device: torch.device) -> None:
        """Compute on this device, whatever the options say."""
        self.__dict__["device"] = device

    @cached_property
    def precision(self) -> str:
        """As asked for, but full where the architecture cannot have it."""
        precision = precision_on(self.device, self.options.precision)
        network = self.network
        able = {"half": network.supports_half, "bf16": network.supports_bfloat16}.get(precision, True)
        if not able and self.options.precision is not None:
            notice(f"{network.architecture.name} cannot be computed in {precision}: it is in full precision")
        return precision if able else "full"

    @cached_property
    def model(self) -> ImageModelDescriptor:
        """The network on its device, in its precision."""
        return self.network.to(self.device, weights_dtype(self.precision) or torch.float32).eval()

    @cached_property
    def safety(self) -> Safety:
        return Safety.load(self.safety_mode, self.device)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What an image's settings say about the network and how it computes."""
        from ldm import __version__

        return {
            "checkpoint": str(self.files.weights),
            "model_hash": self.hash.result(),
            "upscaler": self.network.architecture.name,
            "precision": self.precision,
            "version": __version__,
        }

    def check_size(self, request: ImageRequest) -> None:
        """FieldError for a size that is no multiple of the factor."""
        request.check_size(self.factor)

    def resolve(self, request: ImageRequest) -> PixelRequest:
        """The request with the size of its result and of its tiles. InputError."""
        if request.init_img is None:
            raise FieldError("{init_img} is missing: there is no image to enlarge")
        self.check_size(request)
        height, width = enlarged_size(request, self.init_pixels, self.factor)
        kept = {name: getattr(request, name) for name in SETTINGS} | {"height": height, "width": width}
        tile = self._tile(request.tile, max(height, width) // self.factor)
        return PixelRequest(**kept | {"noise_level": 0, "steps": 1, "scale": 1.0, "tile": tile})

    def _tile(self, tile: int | None, longest: int) -> int:
        """The side of tiles for an image of this longest side; 0 for none."""
        from spandrel import ModelTiling

        tiling = self.network.tiling
        if tile is None:  # some networks look at the image as a whole, or cut it themselves
            tile = TILE if tiling is ModelTiling.SUPPORTED else 0
        check_tile(tile)
        return tile if tile < longest else 0

    def image_size(self, request: ImageRequest) -> tuple[int, int]:
        """Height and width of a resolved request's image."""
        return request.height, request.width

    def forget_files(self) -> None:
        """Read init images anew from now on, as they may have changed."""
        self.init_pixels.forget()

    def cut_off(self, prompt: str, reading: object = None) -> str:
        """No prompt is read."""
        return ""

    def fitting_batch(self, requests: Sequence[ImageRequest], most: int) -> int:
        return 1

    def generate(
        self, requests: Iterable[ImageRequest], on_step: Callable[[int], None] | None = None
    ) -> Iterator[GeneratedImage]:
        """The images of requests, in their order. `on_step` is called after each with 1."""
        self.forget_files()
        resolved = [self.resolve(request).twin(seed=0) for request in requests]
        for images in self.batches(([request] for request in resolved), on_step):
            yield from images

    def read_images(self, request: ImageRequest) -> None:
        """Read the file that a resolved request enlarges, so that its batch finds it kept. InputError."""
        small_image(request, self.init_pixels, self.factor)

    def batches(
        self,
        batches: Iterable[Sequence[ImageRequest]],
        on_step: Callable[[int], None] | None = None,
        on_x0: Any = None,
    ) -> Iterator[list[GeneratedImage]]:
        """The images of each batch of resolved requests. InputError if memory is too small for one.

        There are no latents for `on_x0`.
        """
        for batch in batches:
            made = []
            for request in batch:
                start = time.perf_counter()
                pixels = self._pixels(request)
                ((pixels, nsfw),) = self.safety([pixels])
                made.append(GeneratedImage(request, pixels, nsfw, time.perf_counter() - start, self))
                if on_step:
                    on_step(1)
            yield made

    def enlarged(self, pixels: np.ndarray) -> np.ndarray | None:
        """An image uint8 [h, w, 3] at `factor` times its size; None if it came out as NaN. InputError."""
        return self._of_pixels(pixels, self._tile(None, max(pixels.shape[:2])))

    def _pixels(self, request: ImageRequest) -> np.ndarray | None:
        """The enlarged image, uint8 [H, W, 3]; None if it came out as NaN."""
        return self._of_pixels(small_image(request, self.init_pixels, self.factor), request.tile)

    def _of_pixels(self, pixels: np.ndarray, tile: int) -> np.ndarray | None:
        try:
            with torch.inference_mode():
                enlarged = self._enlarged(to_float([pixels]), tile)
                if not all(finite_images(enlarged)) and self.model.dtype != torch.float32:
                    name = self.files.weights.name
                    notice(f"{name} yields NaN in low precision: it works in float32 from here on")
                    self.model.float()
                    enlarged = self._enlarged(to_float([pixels]), tile)
                return to_uint8(enlarged)[0] if all(finite_images(enlarged)) else None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise FieldError("out of memory with an image of {size}; take a smaller {tile}", size=size)

    def _enlarged(self, image: Tensor, tile: int) -> Tensor:
        """An image [1, 3, h, w] in [-1, 1], enlarged."""
        on = self.precision == "autocast" and self.device.type != "cpu"
        with torch.autocast(self.device.type, enabled=on):
            x = ((image + 1) / 2).to(self.device, self.model.dtype)
            if not tile:
                return 2 * self.model(x).float() - 1
            whole = in_tiles(lambda part: self.model(part).float(), x, tile, overlap_of(tile), 1, self.factor)
            return 2 * whole - 1


def load_network(path: Path, option: str = "--model") -> ImageModelDescriptor:
    """The network in a `.pth` or `.safetensors` file, of which no code is run. InputError for any other."""
    family = identify(read_header(path).tensors)
    if family not in UNKNOWN:
        raise InputError(f"{option} {path} looks like {family}, which is no pixel upscaler such as ESRGAN")
    try:
        import spandrel
    except ImportError as error:
        raise InputError(f"{option} needs the spandrel package ({error}): pip install spandrel") from error
    try:
        network = spandrel.ModelLoader().load_from_state_dict(read_state_dict(path))
    except spandrel.UnsupportedModelError as error:
        raise InputError(f"{option} {path} is no pixel upscaler that the spandrel package knows") from error
    except InputError:
        raise
    except Exception as error:  # weights that look like an architecture's and do not fit it fail anywhere
        why = str(error).partition("\n")[0][:200]
        raise InputError(f"{option} {path} cannot be used ({type(error).__name__}: {why})") from error
    channels = network.input_channels, network.output_channels
    if not isinstance(network, spandrel.ImageModelDescriptor) or channels != (3, 3):
        name = network.architecture.name
        raise InputError(
            f"{option} {path} is {name} for {channels[0]} channels, and no upscaler of RGB images"
        )
    return network
