"""Pipeline: a model and what it takes to make images of requests with it."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import FieldError, InputError
from ldm.images.init_image import read_init_image
from ldm.images.metadata import FORMATS, encode_image
from ldm.images.pixels import finite_images, to_float, to_uint8
from ldm.images.watermark import Watermarker
from ldm.log import notice
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.pipeline.batches import plan_batches, with_start_seeds
from ldm.pipeline.conditioning import conditions
from ldm.pipeline.device import choose_device, precision_on, weights_dtype
from ldm.pipeline.infotext import image_texts
from ldm.pipeline.memory import largest_batch
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.request import ImageRequest, image_seed
from ldm.pipeline.safety import Safety, safety_for
from ldm.sampling import Denoiser, Discretization, Trajectory, catalogue, sample
from ldm.sampling.noise import CompvisNoise, CompvisStream, ImageNoise, ImageSeeds
from ldm.sampling.schedule import zero_terminal_snr
from ldm.sampling.trajectory import guidance_interval, plan_trajectory
from ldm.weights.description import Description, Prediction, describe, prediction_of
from ldm.weights.hashes import FileHash
from ldm.weights.loading import (
    BUNDLED_CONFIG,
    ModelFiles,
    advised_scale,
    choose_model,
    load_model,
    read_config,
)

SCALE, INIT_SCALE = 7.5, 5.0  # the original's, for text to image and image to image
DEFAULT_SEED = 42
KEPT_EMBEDDINGS = 2048  # 0.2 MB each for v1
KEPT_INIT_IMAGES = 16
LARGEST_BATCH = 64  # beyond 16 a GPU gains nothing, and what is lost to an interrupt only grows


@dataclass(frozen=True)
class GeneratedImage:
    """An image and what it was made from. `pixels` are uint8 [H, W, 3], None if it came out as NaN."""

    request: ImageRequest
    pixels: np.ndarray | None
    seed: int | None
    nsfw: bool | None  # None: nobody looked
    seconds: float
    pipeline: Pipeline = field(repr=False, compare=False)

    @property
    def settings(self) -> dict[str, Any]:
        """All that is needed to make the image again, as image files and the manifest record it."""
        own = self.request.settings()
        if self.request.rng == "image":
            own["seed"] = self.seed
        flags = {} if self.nsfw is None else {"nsfw_content_detected": self.nsfw}
        return self.pipeline.facts | own | flags

    def save(self, path: str | Path, quality: int = 95) -> None:
        """Write a PNG, JPEG or WebP file with watermark and settings. InputError if it cannot be written."""
        path = Path(path)
        format = path.suffix.lower().lstrip(".").replace("jpeg", "jpg")
        if self.pixels is None:
            raise InputError(f"{path}: the image came out as NaN, and there is nothing to save")
        if format not in FORMATS:
            raise InputError(f"{path}: its suffix is none of {', '.join(FORMATS)}")
        marked = Watermarker.of(self.request.watermark)(self.pixels)
        data = encode_image(marked, image_texts(self.settings), format, quality)
        try:
            path.write_bytes(data)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error


class Pipeline:
    """A built model with its text-embedding cache, safety checker and options. One call at a time.

    `open` finds the model's files and reads its config; the weights are read when `model` is first used.
    `load` reads them at once.
    """

    def __init__(
        self,
        files: ModelFiles,
        config: Mapping[str, Any],
        options: RuntimeOptions,
        *,
        weights: str | None = None,
        allow_target: Iterable[str] = (),
        safety: str = "auto",
        max_pixels: int = 64_000_000,
        expected: Mapping[str, int | None] | None = None,
    ):
        self.files, self.config, self.options = files, config, options
        self.weights, self.allow_target = weights, tuple(allow_target)
        self.safety_mode = safety_for(safety)
        self.max_pixels = max_pixels  # of init images; larger ones are refused before they are decoded
        self.expected = dict(expected or {})
        self.hash = FileHash(files.weights)
        self.described = describe(config)
        self._check_expected({"C": self.described.channels, "f": self.described.factor})
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()
        self._init_images: OrderedDict[tuple, tuple[Any, np.ndarray]] = OrderedDict()
        self._single_precision = False  # of the first stage, once it yielded NaN
        self._largest: dict[tuple, int] = {}  # batches that may fit, once one did not

    @classmethod
    def open(
        cls,
        ckpt: str | None = None,
        config: str | None = None,
        options: RuntimeOptions | None = None,
        **choices: Any,
    ) -> Pipeline:
        """The pipeline of a checkpoint and a model YAML, or of the linked or bundled model without either.

        `choices` are the constructor's: weights ("raw" or "ema"), allow_target (prefixes of classes that the
        YAML may name besides ours), safety ("auto", "on", "off", "flag"). InputError for what cannot be used.
        """
        files = choose_model(config, ckpt)
        return cls(files, read_config(files.config), options or RuntimeOptions(), **choices)

    @classmethod
    def load(cls, *args: Any, **choices: Any) -> Pipeline:
        """`open`, and the weights are read at once. InputError if they are not the model's."""
        pipeline = cls.open(*args, **choices)
        pipeline.model  # noqa: B018
        return pipeline

    @classmethod
    def of_model(cls, model: LatentDiffusion, files: ModelFiles | None = None) -> Pipeline:
        """The pipeline of a model that is built already, from these files, and stays as it is."""
        options = RuntimeOptions(device=str(model.device))
        pipeline = cls(files or choose_model(BUNDLED_CONFIG, None), {"target": ""}, options, safety="off")
        factor = model.first_stage_model.factor
        pipeline.described = Description(model.channels, factor, getattr(model, "image_size", 64) * factor)
        zero_snr = getattr(model, "zero_terminal_snr", False)
        pipeline.__dict__ |= {
            "model": model,
            "_prediction": Prediction(model.parameterization, zero_snr),
            "_scales": (SCALE, INIT_SCALE),
        }
        return pipeline

    @cached_property
    def device(self) -> torch.device:
        return choose_device(self.options.device)

    def use_device(self, device: torch.device) -> None:
        """Compute on this device, whatever the options say; before the model is used."""
        self.__dict__["device"] = device

    @cached_property
    def precision(self) -> str:
        return precision_on(self.device, self.options.precision)

    @cached_property
    def model(self) -> LatentDiffusion:
        """The model on its device, with its weights and what it is fast with."""
        from ldm.optimize.apply import apply, check_options

        check_options(self.options, self.device)
        if self.files.notice:
            notice(self.files.notice)
        model = load_model(
            self.config, self.files.weights, self.weights, self.allow_target, weights_dtype(self.precision)
        )
        self._check_expected({"C": model.channels, "f": model.first_stage_model.factor})
        apply(model, self.options, self.device)
        return model

    @cached_property
    def safety(self) -> Safety:
        return Safety.load(self.safety_mode, self.model.device)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What an image's settings say about the model and how it computes."""
        from ldm import __version__

        return {
            "config": str(self.files.config),
            "checkpoint": str(self.files.weights),
            "model_hash": self.hash.result(),
            "weights": getattr(self.model, "weights_used", None),
            "precision": self.precision,
            "version": __version__,
            "autocast": self.precision == "autocast",
            **self.options.recorded(),
        }

    def _check_expected(self, found: Mapping[str, int | None]) -> None:
        for flag, value in found.items():
            wanted = self.expected.get(flag)
            if None not in (value, wanted) and value != wanted:
                raise InputError(f"--{flag} {wanted} does not fit this model: its value is {value}")

    # Requests

    @cached_property
    def _prediction(self) -> Prediction:
        return prediction_of(self.config, self.files.weights)

    @cached_property
    def _scales(self) -> tuple[float, float]:
        """The guidance scales for text to image and for image to image."""
        return advised_scale(self.files.config, SCALE), advised_scale(self.files.config, INIT_SCALE)

    def check_size(self, request: ImageRequest) -> None:
        """FieldError for a size that the model cannot make, by its config alone."""
        request.check_size(self.described.factor or 8)

    def resolve(self, request: ImageRequest) -> ImageRequest:
        """The request with all that the model decides: size, scale and zero terminal SNR. FieldError."""
        self.check_size(request)
        if request.zero_snr and self._prediction.parameterization == "eps":
            raise FieldError(
                "{zero_snr}: this model predicts the noise (eps), which says nothing about the image where "
                "there is only noise; rescaling to zero terminal SNR is for v-prediction models"
            )
        found: dict[str, Any] = {}
        if request.init_img is not None:
            found["height"], found["width"] = self.init_pixels(request).shape[:2]
        elif None in (request.height, request.width):
            side = self.described.native_size
            found |= {"height": request.height or side, "width": request.width or side}
        if request.scale is None:
            found["scale"] = self._scales[request.init_img is not None]
        if request.zero_snr is None:
            found["zero_snr"] = self._prediction.zero_snr
        found = {name: value for name, value in found.items() if getattr(request, name) != value}
        return replace(request, **found) if found else request

    def init_pixels(self, request: ImageRequest) -> np.ndarray:
        """A request's init image as the model takes it, uint8 [H, W, 3]; the ones used last are kept."""
        source = request.init_img
        key = (source if isinstance(source, str) else id(source), request.height, request.width)
        key += (request.resize, request.background)
        if key not in self._init_images:
            pixels = read_init_image(
                source, request.height, request.width, request.resize, request.background, self.max_pixels
            )
            # under its own size, too, which a resolved request has
            self._init_images[key] = source, pixels  # an object that is kept shares its id with no other
            self._init_images[(key[0], *pixels.shape[:2], *key[3:])] = source, pixels
            while len(self._init_images) > KEPT_INIT_IMAGES:
                self._init_images.popitem(last=False)
        return self._init_images[key][1]

    def embed(self, prompt: str) -> Tensor:
        """The embedding of a prompt, [1, n, d]; those used last are kept."""
        if prompt not in self._embeddings:
            self._embeddings[prompt] = self.model.get_learned_conditioning([prompt])
            while len(self._embeddings) > KEPT_EMBEDDINGS:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(prompt)
        return self._embeddings[prompt]

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt that the text encoder does not read; "" if it reads all of it."""
        tokenizer = getattr(self.model.cond_stage_model, "tokenizer", None)
        return tokenizer.cut_off(prompt) if hasattr(tokenizer, "cut_off") else ""

    # Images

    def generate(
        self, requests: Iterable[ImageRequest], on_step: Callable[[int], None] | None = None
    ) -> Iterator[GeneratedImage]:
        """The images of requests, in their order; a request without a seed has 42 plus its number.

        Requests that agree in what a batch must share are sampled together, `batch_size` at a time. `on_step`
        is called after every step with the number of images that took it.
        """
        self._init_images.clear()  # files may have changed since the last call
        requests = [self.resolve(request) for request in requests]
        for line in dict.fromkeys(line for request in requests for line in request.in_vain()):
            notice(line)
        seeded = [
            request if request.seed is not None else replace(request, seed=_default_seed(request, k))
            for k, request in enumerate(requests)
        ]
        size = self.options.batch_size or 1
        if size == "auto":
            size = self.fitting_batch(requests, len(requests))
        plan = plan_batches([request.batch_key() for request in seeded], size)
        batches = [with_start_seeds([seeded[k] for k in batch], DEFAULT_SEED) for batch in plan]
        finished: dict[int, GeneratedImage] = {}
        following = 0
        for numbers, images in zip(plan, self.batches(batches, on_step), strict=True):
            finished.update(zip(numbers, images, strict=True))
            while following in finished:
                yield finished.pop(following)
                following += 1

    def fitting_batch(self, requests: Sequence[ImageRequest], most: int) -> int:
        """As many of these images at once as fit into memory, at most `most`, found by making some."""
        largest = max(requests, key=lambda request: request.height * request.width)
        probe = ImageRequest(height=largest.height, width=largest.width, scale=largest.scale, steps=1, seed=0)
        probe = self.resolve(probe)
        size = largest_batch(
            lambda images: list(self.batches([[probe] * images])), self.model.device, min(LARGEST_BATCH, most)
        )
        notice(f"--batch_size auto: {size} images at once")
        return size

    def batches(
        self, batches: Iterable[Sequence[ImageRequest]], on_step: Callable[[int], None] | None = None
    ) -> Iterator[list[GeneratedImage]]:
        """The images of each batch of resolved, seeded requests that have one `batch_key`.

        A batch that needs more memory than there is is made in halves, and so are those like it after it;
        InputError if there is too little for one image.
        """
        on_step = on_step or (lambda images: None)
        stream, streamed = None, None
        for batch in batches:
            start, key = time.perf_counter(), batch[0].batch_key()
            if batch[0].rng == "compvis":
                stream, streamed = stream or self._stream(batch), streamed or key
                if key != streamed:
                    raise InputError("--rng compvis is one stream for images of equal settings")
            parts = _parts(batch, self._largest.get(key, len(batch)))
            made: list[np.ndarray | None] = []
            while parts:
                try:
                    made += self._images(parts[0], stream, on_step)
                    parts = parts[1:]
                except OutOfMemory:
                    self._largest[key] = _half(parts[0])
                    parts = [smaller for part in parts for smaller in _parts(part, self._largest[key])]
                    if self.device.type == "cuda":
                        torch.cuda.empty_cache()
            checked = self.safety(made)
            seconds = (time.perf_counter() - start) / len(batch)
            yield [
                GeneratedImage(request, pixels, request.seed, nsfw, seconds, self)
                for request, (pixels, nsfw) in zip(batch, checked, strict=True)
            ]

    def _images(
        self, batch: Sequence[ImageRequest], stream: CompvisStream | None, on_step: Callable[[int], None]
    ) -> list[np.ndarray | None]:
        """The images of one batch, uint8 [H, W, 3], None for NaN. OutOfMemory if it does not fit."""
        taken = 0  # steps, which are given back if they were for nothing

        def step(images: int) -> None:
            nonlocal taken
            taken += images
            on_step(images)

        # the step sizes of an adaptive sampler would be those of the whole batch
        adaptive = catalogue.SAMPLERS[batch[0].sampler].adaptive
        try:
            with torch.inference_mode(), self._autocast():
                parts = _parts(batch, 1 if adaptive else len(batch))
                noises = [self._noise(part, stream, place) for place, part in enumerate(parts)]
                latents = torch.cat([self.latents(*pair, step) for pair in zip(parts, noises, strict=True)])
                decoded = self._decode(latents)
                pixels, finite = to_uint8(decoded), finite_images(decoded)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            on_step(-taken)
            raise OutOfMemory from None  # without the frames that hold the tensors
        return [image if ok else None for image, ok in zip(pixels, finite, strict=True)]

    def latents(
        self,
        batch: Sequence[ImageRequest],
        noise: ImageNoise | CompvisNoise,
        on_step: Callable[[int], None] = lambda images: None,
    ) -> Tensor:
        """Sampled latents [b, c, h, w] of requests that have one `batch_key`, from their noise."""
        first = batch[0]
        discretization, run = self.trajectory(first)
        cond, uncond = conditions(self.model, batch, self.embed)
        scales = [request.scale for request in batch]
        denoiser = Denoiser(
            self.model,
            cond,
            uncond,
            scales[0] if len(set(scales)) == 1 else scales,
            rescale=first.cfg_rescale,
            interval=guidance_interval(run, first.guidance_start, first.guidance_end),
            discretization=discretization,
        )
        return sample(
            denoiser,
            first.sampler,
            run,
            noise,
            init=self._encoded(batch, noise),
            options=first.options,
            callback=lambda step, x0: on_step(len(batch)),
        )

    def trajectory(self, request: ImageRequest) -> tuple[Discretization, Trajectory]:
        """The noise levels of a request's steps. InputError if they are too near to each other."""
        alphas = self.model.alphas_cumprod.cpu().numpy()
        discretization = Discretization(zero_terminal_snr(alphas) if request.zero_snr else alphas)
        return discretization, plan_trajectory(
            discretization,
            request.sampler,
            request.steps,
            request.steps_to_run,
            schedule=request.schedule,
            rho=request.rho,
            timesteps=request.timesteps,
            sigmas=request.sigmas,
        )

    def _shape(self, request: ImageRequest) -> tuple[int, int, int]:
        factor = self.model.first_stage_model.factor
        return self.model.channels, request.height // factor, request.width // factor

    def _stream(self, batch: Sequence[ImageRequest]) -> CompvisStream:
        """The original's one stream; what it draws once for all batches has the size of the first one."""
        first = batch[0]
        return CompvisStream(
            first.seed,
            self._shape(first),
            self.model.device,
            len(batch),
            fixed_code=first.fixed_code,
            init_image=_starts_from_image(first),
        )

    def _noise(
        self, batch: Sequence[ImageRequest], stream: CompvisStream | None, place: int
    ) -> ImageNoise | CompvisNoise:
        """The noise of a batch, or of a single image at its place in the batch that is sampled one by one."""
        if stream is not None:
            return stream.batch(len(batch), place)
        seeds = [
            ImageSeeds(
                request.seed, request.start_seed, request.variation_seed, request.variation_strength or 0.0
            )
            for request in batch
        ]
        brownian = catalogue.SAMPLERS[batch[0].sampler].noise == "brownian"
        return ImageNoise(seeds, self._shape(batch[0]), self.model.device, brownian=brownian)

    def _encoded(self, batch: Sequence[ImageRequest], noise: ImageNoise | CompvisNoise) -> Tensor | None:
        """Latents of the init images, [b, c, h, w]; None where none has a say."""
        if not _starts_from_image(batch[0]):
            return None
        images = [self.init_pixels(request) for request in batch]
        moments: dict[int, Tensor] = {}  # each image is encoded once
        for pixels in images:
            if id(pixels) not in moments:
                moments[id(pixels)] = self._encode(to_float([pixels]).to(self.model.device))
        posterior = DiagonalGaussianDistribution(torch.cat([moments[id(pixels)] for pixels in images]))
        return self.model.get_first_stage_encoding(posterior, noise.posterior())

    # The first stage: those of SD 1 and 2 hold values beyond what float16 can express on some images.

    def _autocast(self) -> torch.autocast:
        on = self.precision == "autocast" and self.device.type != "cpu"
        return torch.autocast(self.model.device.type, enabled=on)

    def _encode(self, x: Tensor) -> Tensor:
        """The moments [1, 2c, h, w] of an image's latents."""

        def moments(x: Tensor) -> Tensor:
            posterior = self.model.encode_first_stage(x)
            return torch.cat([posterior.mean, posterior.logvar], dim=1)

        return self._first_stage(moments, x)

    def _decode(self, latents: Tensor) -> Tensor:
        """Images [b, 3, h, w] of latents [b, c, h, w]."""
        return self._first_stage(self.model.decode_first_stage, latents)

    def _first_stage(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The function's result; once it is NaN in low precision, the first stage works in float32."""
        if not self._single_precision:
            result = function(x)
            low = torch.promote_types(result.dtype, torch.float32) != result.dtype
            lost = x.isfinite().flatten(1).all(1) & ~result.isfinite().flatten(1).all(1)  # [b]
            if not (low and lost.any()):
                return result
            notice("the autoencoder yields NaN in low precision: it works in float32 from here on")
            self.model.first_stage_to(torch.float32)
            self._single_precision = True
        with torch.autocast(self.model.device.type, enabled=False):
            return function(x.float())


class OutOfMemory(Exception):
    """A batch did not fit."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or this machine, has no more memory; only CUDA has a class for it."""
    return isinstance(error, torch.OutOfMemoryError) or bool(
        re.search("out of memory|can't allocate memory|not enough memory", str(error))
    )


def _starts_from_image(request: ImageRequest) -> bool:
    """Whether the init image has a say: at full strength it has none."""
    return request.init_img is not None and request.strength < 1


def _default_seed(request: ImageRequest, k: int) -> int:
    """In the original's one stream all images have the run's seed."""
    return DEFAULT_SEED if request.rng == "compvis" else image_seed(DEFAULT_SEED, k)


def _parts(batch: Sequence[ImageRequest], size: int) -> list[Sequence[ImageRequest]]:
    """The same requests, at most `size` at a time."""
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def _half(batch: Sequence[ImageRequest]) -> int:
    """The size of batch to try after this one did not fit. InputError if there is none."""
    images, size = len(batch), f"{batch[0].width}x{batch[0].height}"
    if images == 1:
        raise InputError(f"out of memory with one image of {size}; take a smaller --H and --W")
    if batch[0].rng == "compvis":
        raise InputError(
            f"out of memory with {images} images of {size}; the original's stream (--rng compvis) is drawn "
            "for whole batches, so take a smaller --n_samples"
        )
    notice(f"out of memory with {images} images of {size} at once: going on with {images // 2}")
    return images // 2
