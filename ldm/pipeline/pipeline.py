"""Pipeline: a model and what it takes to make images of requests with it."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import FieldError, InputError
from ldm.fields import settings_of
from ldm.images.pixels import finite_images, to_uint8
from ldm.log import notice
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize.graph import free_recordings
from ldm.pipeline import inpainting, upscaling
from ldm.pipeline.batches import check_one_stream, plan_batches, with_start_seeds
from ldm.pipeline.conditioning import check_task, conditions
from ldm.pipeline.depth import DepthMaps, has_estimator
from ldm.pipeline.device import arithmetic, choose_device, precision_of, precision_on, weights_dtype
from ldm.pipeline.first_stage import FirstStage
from ldm.pipeline.generated import GeneratedImage
from ldm.pipeline.init_images import InitImages
from ldm.pipeline.memory import all_memory, is_out_of_memory, largest_batch
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.request import DEPTH, INIT, MASK, UPSCALE, ImageRequest, image_seed
from ldm.pipeline.safety import Safety, safety_for
from ldm.sampling import Denoiser, Discretization, Trajectory, catalogue, sample
from ldm.sampling.noise import CompvisStream, ImageNoise, ImageSeeds
from ldm.sampling.schedule import zero_terminal_snr
from ldm.sampling.trajectory import guidance_interval, plan_trajectory
from ldm.weights.description import TASKS, Description, Prediction, describe, prediction_of
from ldm.weights.hashes import FileHash
from ldm.weights.loading import (
    BUNDLED_CONFIG,
    ModelFiles,
    advised_scale,
    choose_model,
    load_model,
    read_config,
)
from ldm.weights.vae import check_vae, vae_file

SCALE, INIT_SCALE = 7.5, 5.0  # the original's, for text to image and image to image
TASK_SCALE = {"depth": 9.0, "upscale": 9.0}  # of Stability's demos
DEFAULT_SEED = 42
INPUTS = (INIT, MASK, DEPTH, UPSCALE)  # groups of settings that decide what the UNet is given
KEPT_EMBEDDINGS = 2048  # 0.2 MB each for v1
LARGEST_BATCH = 64  # beyond 16 a GPU gains nothing, and what is lost to an interrupt only grows


class Pipeline:
    """A built model with its text-embedding cache, safety checker and options. One call at a time.

    `open` finds the model's files and reads its config; the weights are read when `model` is first used.
    `load` reads them at once. Settings of the process that torch has for CUDA are changed only while images
    are made: float32 is IEEE float32 then, without TF32 (`ldm.pipeline.device.arithmetic`).
    """

    def __init__(
        self,
        files: ModelFiles,
        config: Mapping[str, Any],
        options: RuntimeOptions,
        *,
        weights: str | None = None,
        vae: str | None = None,
        allow_target: Iterable[str] = (),
        safety: str = "auto",
        max_pixels: int = 64_000_000,
        expected: Mapping[str, int | None] | None = None,
    ):
        self.files, self.config, self.options = files, config, options
        self.recorded_files: ModelFiles | None = files  # in the settings of images
        self.weights, self.vae, self.allow_target = weights, vae, tuple(allow_target)
        self.safety_mode = safety_for(safety)
        self.init_pixels = InitImages(max_pixels)
        self.canvases = inpainting.Canvases(self.init_pixels)
        self.depth_maps = DepthMaps(self.init_pixels)
        self.expected = dict(expected or {})
        self.hash = FileHash(files.weights)
        if vae:
            check_vae(vae, config)
            self.vae_hash = FileHash(vae_file(vae))
        self.described = describe(config)
        self._check_expected({"C": self.described.channels, "f": self.described.factor})
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()
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

        `choices` are the constructor's: weights ("raw" or "ema"), vae (a file or folder with another
        autoencoder), allow_target (prefixes of classes that the YAML may name besides ours), safety ("auto",
        "on", "off", "flag"). InputError for what cannot be used.
        """
        files = choose_model(config, ckpt, None)
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
        pipeline = cls(
            files or choose_model(BUNDLED_CONFIG, None), {"target": ""}, RuntimeOptions(), safety="off"
        )
        pipeline.recorded_files = files
        factor = model.first_stage_model.factor
        size = getattr(model, "image_size", 64) * factor
        task = TASKS.get(type(model).__name__, "text")
        pipeline.described = Description(model.channels, factor, size, task)
        zero_snr = getattr(model, "zero_terminal_snr", False)
        pipeline.__dict__ |= {
            "model": model,
            "_prediction": Prediction(model.parameterization, zero_snr),
            "_scales": (SCALE, INIT_SCALE),
            "_estimates_depth": getattr(model, "depth_model", None) is not None,
            "device": model.device,
            "precision": precision_of(model),
        }
        return pipeline

    @cached_property
    def device(self) -> torch.device:
        return choose_device(self.options.device)

    def use_device(self, device: torch.device) -> None:
        """Compute on this device, whatever the options say. InputError if the model is on another one."""
        if "model" in self.__dict__:
            here = self.model.device
            # "cuda" is the current one of several, where the model went, too
            if here.type != device.type or (None not in (here.index, device.index) and here != device):
                raise InputError(f"the model is on {here} already; it cannot be used on {device}")
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
            self.config,
            self.files.weights,
            self.weights,
            self.allow_target,
            weights_dtype(self.precision),
            self.files.undecided,
            self.vae,
        )
        self._check_expected({"C": model.channels, "f": model.first_stage_model.factor})
        apply(model, self.options, self.device)
        return model

    @cached_property
    def first_stage(self) -> FirstStage:
        return FirstStage(self.model)

    @cached_property
    def safety(self) -> Safety:
        return Safety.load(self.safety_mode, self.model.device)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What an image's settings say about the model and how it computes."""
        from ldm import __version__

        files = {}
        if self.recorded_files:
            files = {"config": str(self.files.config), "checkpoint": str(self.files.weights)}
            files["model_hash"] = self.hash.result()
        if self.vae:
            files |= {"vae": self.vae, "vae_hash": self.vae_hash.result()}
        return {
            **files,
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
        return prediction_of(self.config, self.files.weights, self.files.undecided)

    @cached_property
    def _estimates_depth(self) -> bool:
        return has_estimator(self.config, self.files.weights)

    @cached_property
    def _scales(self) -> tuple[float, float]:
        """The guidance scales for text to image and for image to image."""
        task = TASK_SCALE.get(self.described.task)
        return tuple(advised_scale(self.files.config, task or default) for default in (SCALE, INIT_SCALE))

    def check_size(self, request: ImageRequest) -> None:
        """FieldError for a size that the model cannot make, by its config alone."""
        request.check_size(self.described.factor or 8)

    def resolve(self, request: ImageRequest) -> ImageRequest:
        """The request with all that the model decides: size, scale and zero terminal SNR. FieldError."""
        self.check_size(request)
        # where the file does not say what its UNet predicts, the loaded model does
        if request.zero_snr and (self._prediction.parameterization or self.model.parameterization) == "eps":
            raise FieldError(
                "{zero_snr}: this model predicts the noise (eps), which says nothing about the image where "
                "there is only noise; rescaling to zero terminal SNR is for v-prediction models"
            )
        check_task(self.described.task, request)
        found: dict[str, Any] = {}
        found["height"], found["width"] = self._size(request)
        if request.scale is None:
            # what is painted anew is made of the text, as a rule from pure noise
            found["scale"] = self._scales[request.init_img is not None and not request.repaints]
        if self.described.task == "upscale":
            found["tile"] = self._tile(request.twin(**found))
        if self.described.task == "depth":
            self._check_depth(request.twin(**found))
        if request.zero_snr is None:
            found["zero_snr"] = self._prediction.zero_snr
        found = {name: value for name, value in found.items() if getattr(request, name) != value}
        return replace(request, **found) if found else request

    def _size(self, request: ImageRequest) -> tuple[int, int]:
        """Height and width that are sampled: of the request, or of what it starts from. InputError."""
        if request.repaints:
            return self.canvases.size(request, self.described)
        if request.noise_level is not None:
            return upscaling.enlarged_size(request, self.init_pixels, self.described.factor or 4)
        if request.init_img is not None:
            return self.init_pixels(request).shape[:2]
        if request.depth is not None:
            return self.depth_maps.size(request)
        side = self.described.native_size
        return request.height or side, request.width or side

    def _tile(self, request: ImageRequest) -> int:
        """The side of an upscaler's tiles; 0 for none. FieldError for what this model cannot make."""
        upscaling.check_level(request, self.config)
        width = 2 if weights_dtype(self.precision) else 4
        memory = all_memory(self.device)
        return upscaling.tile_size(request, self.config, self.described, self.options, memory, width)

    def _check_depth(self, request: ImageRequest) -> None:
        """InputError for a depth map that cannot be had; notices about one that is given."""
        if request.depth is not None:
            self.depth_maps.given(request)
        elif not self._estimates_depth:
            raise FieldError(
                "{checkpoint} has no weights that estimate depth (depth_model.*): give a map with {depth}",
                checkpoint=self.files.weights,
            )

    def image_size(self, request: ImageRequest) -> tuple[int, int]:
        """Height and width of a resolved request's image: with a mask it is pasted into the init image."""
        if request.repaints:
            return self.canvases(request, self.described).whole.shape[:2]
        return request.height, request.width

    def embed(self, prompt: str) -> Tensor:
        """The embedding of a prompt, [1, n, d]; those used last are kept."""
        if prompt not in self._embeddings:
            self._embeddings[prompt] = self.model.get_learned_conditioning([prompt])
            while len(self._embeddings) > KEPT_EMBEDDINGS:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(prompt)
        return self._embeddings[prompt]

    def forget_files(self) -> None:
        """Read init images, masks and depth maps anew from now on, as they may have changed."""
        self.init_pixels.forget()
        self.canvases.forget()
        self.depth_maps.forget()

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
        self.forget_files()
        requests = [self.resolve(request) for request in requests]
        if not requests:
            return
        check_one_stream(requests)
        for line in dict.fromkeys(line for request in requests for line in request.in_vain()):
            notice(line)
        seeded = [
            request if request.seed is not None else request.twin(seed=_default_seed(request, k))
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
        largest = max(requests, key=lambda request: (request.height * request.width, request.scale != 1.0))
        probe = self.resolve(_probe(largest))
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
        stream, streamed = None, None
        for batch in batches:
            start, key = time.perf_counter(), batch[0].batch_key()
            if batch[0].rng == "compvis":
                stream, streamed = stream or self._stream(batch), streamed or key
                if key != streamed:
                    raise InputError("--rng compvis is one stream for images of equal settings")
            parts = _parts(batch, self._largest.get(key, len(batch)))
            images: list[np.ndarray | None] = []
            while parts:
                steps = _Steps(on_step)
                try:
                    with torch.inference_mode(), arithmetic(self.device), self._autocast():
                        latents = []
                        for arguments in self._samplings(parts[0], stream, len(images), steps.count):
                            latents.append(sample(**arguments))
                        # with --vae_tiling it has tiles of its own
                        tile = 0 if self.options.vae_tiling else batch[0].tile or 0
                        decoded = self.first_stage.decode(torch.cat(latents), tile)
                        made = list(to_uint8(decoded)), finite_images(decoded)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    made = None
                # outside of the block above, whose error holds the tensors
                if made is None:
                    steps.take_back()
                    self._largest[key] = _half(parts[0])
                    parts = [smaller for part in parts for smaller in _parts(part, self._largest[key])]
                    free_recordings(self.model)  # whose memory the smaller batch may need
                    if self.device.type == "cuda":
                        torch.cuda.empty_cache()
                    continue
                images += [pixels if finite else None for pixels, finite in zip(*made, strict=True)]
                parts = parts[1:]
            seconds = (time.perf_counter() - start) / len(batch)
            yield [
                GeneratedImage(
                    request,
                    self._finished(request, pixels),
                    nsfw,
                    seconds,
                    self,
                    self._depth(request),
                    self._painted(request),
                )
                for request, (pixels, nsfw) in zip(batch, self.safety(images), strict=True)
            ]

    def _samplings(
        self,
        batch: Sequence[ImageRequest],
        stream: CompvisStream | None,
        place: int,
        on_step: Callable[[int], None],
    ) -> Iterator[dict[str, Any]]:
        """The arguments of each call of `sample` that requests with one `batch_key` take.

        An adaptive sampler chooses its steps by the error of all that it samples, so it samples each image by
        itself: an image alone is then the image of a batch.
        """
        size = 1 if catalogue.SAMPLERS[batch[0].sampler].adaptive else len(batch)
        for k, part in enumerate(_parts(batch, size)):
            yield self._sampling(part, stream, place + k, on_step)

    def _sampling(
        self,
        batch: Sequence[ImageRequest],
        stream: CompvisStream | None,
        place: int,
        on_step: Callable[[int], None],
    ) -> dict[str, Any]:
        """The arguments of `sample` for requests that have one `batch_key`.

        `place` is that of the first of them in the batch that the original's stream is drawn for.
        """
        first = batch[0]
        discretization, run = self.trajectory(first)
        noise = stream.batch(len(batch), place) if stream else self._image_noise(batch)
        cond, uncond = conditions(self.model, batch, self.embed, **self._inputs(batch, noise))
        scales = [request.scale for request in batch]
        denoiser = Denoiser(
            upscaling.tiled(self.model, batch) if self.described.task == "upscale" else self.model,
            cond,
            uncond,
            scales[0] if len(set(scales)) == 1 else scales,
            rescale=first.cfg_rescale,
            interval=guidance_interval(run, first.guidance_start, first.guidance_end),
            discretization=discretization,
        )
        init, known = None, None
        keeps_known = first.repaints and (self.described.task != "inpaint" or any(r.soft for r in batch))
        if _starts_from_image(first) or keeps_known:
            posterior = self.first_stage.encode([self._start_pixels(request) for request in batch])
            init = self.model.get_first_stage_encoding(posterior, noise.posterior())
        if keeps_known:
            canvases = [self.canvases(request, self.described) for request in batch]
            known = inpainting.known_region(run, batch, canvases, init, noise, task=self.described.task)
        return {
            "denoiser": denoiser,
            "sampler": first.sampler,
            "run": run,
            "noise": noise,
            "init": init if _starts_from_image(first) else None,
            "known": known,
            "options": first.options,
            "callback": lambda step, x0: on_step(len(batch)),
        }

    def _inputs(self, batch: Sequence[ImageRequest], noise: ImageNoise) -> dict[str, Tensor]:
        """What the UNet is given besides latents, timestep and text, as `conditions` takes it."""
        match self.described.task:
            case "inpaint":
                canvases = [
                    self.canvases(request, self.described) if request.repaints else None for request in batch
                ]
                return inpainting.inputs(self.model, self.first_stage, canvases, self._shape(batch[0]), noise)
            case "depth":
                return self.depth_maps.inputs(self.model, batch, self._shape(batch[0])[1:])
            case "upscale":
                return upscaling.inputs(self.model, batch, self.init_pixels, noise)
        return {}

    def _start_pixels(self, request: ImageRequest) -> np.ndarray:
        """The image that sampling starts from, uint8 [H, W, 3]."""
        if request.repaints:
            return self.canvases(request, self.described).image
        return self.init_pixels(request)

    def _finished(self, request: ImageRequest, pixels: np.ndarray | None) -> np.ndarray | None:
        """The image as the user gets it: what was painted anew is pasted into the rest."""
        if pixels is None or not request.repaints:
            return pixels
        return self.canvases(request, self.described).paste(pixels)

    def _painted(self, request: ImageRequest) -> np.ndarray | None:
        """Where a result shows that is pasted into its init image, bool [H, W]."""
        return self.canvases(request, self.described).alpha > 0 if request.repaints else None

    def _depth(self, request: ImageRequest) -> np.ndarray | None:
        """The depth map that an image was painted over, uint16 [H, W]."""
        return self.depth_maps.greys(self.model, request) if self.described.task == "depth" else None

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

    def _image_noise(self, batch: Sequence[ImageRequest]) -> ImageNoise:
        seeds = [
            ImageSeeds(
                request.seed, request.start_seed, request.variation_seed, request.variation_strength or 0.0
            )
            for request in batch
        ]
        brownian = catalogue.SAMPLERS[batch[0].sampler].noise == "brownian"
        return ImageNoise(seeds, self._shape(batch[0]), self.model.device, brownian=brownian)

    def _autocast(self) -> torch.autocast:
        on = self.precision == "autocast" and self.device.type != "cpu"
        return torch.autocast(self.model.device.type, enabled=on)


class _Steps:
    """Counts the steps of one batch, so that they can be taken back if they were for nothing."""

    def __init__(self, on_step: Callable[[int], None] | None):
        self.on_step, self.taken = on_step, 0

    def count(self, images: int) -> None:
        self.taken += images
        if self.on_step:
            self.on_step(images)

    def take_back(self) -> None:
        if self.on_step:
            self.on_step(-self.taken)


def _probe(request: ImageRequest) -> ImageRequest:
    """One step of a request: the same size, guidance and inputs of the UNet."""
    names = [name for name, each in settings_of(ImageRequest).items() if each.group in (*INPUTS, "size")]
    inputs = {name: getattr(request, name) for name in names}
    if request.strength is not None:
        inputs["strength"] = 1.0
    return ImageRequest(scale=request.scale, steps=1, seed=0, **inputs)


def _starts_from_image(request: ImageRequest) -> bool:
    """Whether the init image has a say: at full strength it has none."""
    return request.init_img is not None and request.strength is not None and request.strength < 1


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
        raise FieldError(
            "out of memory with one image of {size}; take a smaller {height} and {width}", size=size
        )
    if batch[0].rng == "compvis":
        raise FieldError(
            "out of memory with {images} images of {size}; the original's stream ({rng} compvis) is drawn "
            "for whole batches, so take a smaller {n_samples}",
            images=images,
            size=size,
        )
    notice(f"out of memory with {images} images of {size} at once: going on with {images // 2}")
    return images // 2
