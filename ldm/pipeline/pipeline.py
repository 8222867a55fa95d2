"""Pipeline: a model and what it takes to make images of requests with it."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import FieldError, InputError
from ldm.images.pixels import finite_images, to_uint8
from ldm.log import notice
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize.graph import free_recordings
from ldm.pipeline import drawing, inpainting, passes, seams, upscaling
from ldm.pipeline.adapters import Adapters
from ldm.pipeline.batches import (
    Steps,
    check_one_stream,
    half_of,
    parts_of,
    plan_batches,
    probe,
    with_start_seeds,
)
from ldm.pipeline.conditioning import check_task
from ldm.pipeline.control import Controls
from ldm.pipeline.depth import DepthMaps, has_estimator
from ldm.pipeline.device import arithmetic, choose_device, precision_of, precision_on, weights_dtype
from ldm.pipeline.first_stage import FirstStage
from ldm.pipeline.generated import GeneratedImage
from ldm.pipeline.init_images import InitImages
from ldm.pipeline.memory import all_memory, is_out_of_memory, largest_batch
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.prompts import PromptReader
from ldm.pipeline.request import ImageRequest, image_seed
from ldm.pipeline.safety import Safety, safety_for
from ldm.pipeline.settings.guidance import CFG_PP_SCALE
from ldm.pipeline.settings.text import Reading
from ldm.sampling import Discretization, Trajectory, sample
from ldm.sampling.schedule import zero_terminal_snr
from ldm.sampling.trajectory import guided_steps, plan_trajectory
from ldm.util import instantiate_from_config
from ldm.weights.description import TASKS, Description, Prediction, alphas_of, describe, prediction_of
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

if TYPE_CHECKING:
    from ldm.sampling.steps import Callback

SCALE, INIT_SCALE = 7.5, 5.0  # the original's, for text to image and image to image
TASK_SCALE = {"depth": 9.0, "upscale": 9.0}  # of Stability's demos
DEFAULT_SEED = 42
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
        lora_folder: str | None = None,
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
        self.controls = Controls(self.init_pixels)
        self.adapters = Adapters(lora_folder)
        self.pixel_upscalers = passes.PixelUpscalers(options)
        self.expected = dict(expected or {})
        self.hash = FileHash(files.weights)
        if vae:
            check_vae(vae, config)
            self.vae_hash = FileHash(vae_file(vae))
        self.described = describe(config)
        self._check_expected({"C": self.described.channels, "f": self.described.factor})
        self.prompts = PromptReader(self._text_encoder)
        self._embeddings: OrderedDict[tuple, Tensor] = OrderedDict()
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
        autoencoder), lora_folder (where LoRAs are looked for by name), allow_target (prefixes of classes that
        the YAML may name besides ours), safety ("auto",
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
        from ldm.optimize.apply import apply, before_loading

        before_loading(self.options, self.device)
        if self.files.notice:
            notice(self.files.notice)
        # A tensor of inference mode cannot be replaced later, as a LoRA replaces weights.
        with torch.inference_mode(False), torch.no_grad():
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

    @property
    def _alphas(self) -> np.ndarray | None:
        """The model's alphas_cumprod, [timesteps]; None if only a model that is not built yet has them."""
        return self._model_alphas if "model" in self.__dict__ else self._config_alphas

    @cached_property
    def _model_alphas(self) -> np.ndarray:
        return self.model.alphas_cumprod.cpu().numpy()  # which waits for a GPU that is at work

    @cached_property
    def _config_alphas(self) -> np.ndarray | None:
        return alphas_of(self.config)

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
        self.prompts.check(request.reading)
        self.adapters.check(self, request)
        found: dict[str, Any] = {}
        found["height"], found["width"] = self._size(request)
        if request.scale is None:
            # what is painted anew is made of the text, as a rule from pure noise
            found["scale"] = self._scales[request.init_img is not None and not request.repaints]
            if request.cfg_pp:
                found["scale"] = CFG_PP_SCALE
        if self.described.task == "upscale":
            found["tile"] = self._tile(request.twin(**found))
        if self.described.task == "depth":
            self._check_depth(request.twin(**found))
        if request.zero_snr is None:
            found["zero_snr"] = self._prediction.zero_snr
        self._check_shape(request.twin(**found))
        if request.control:
            self.controls.check(self, request.twin(**found))
            self.controls.check(self, self.last_pass(request.twin(**found)))
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

    def _check_shape(self, request: ImageRequest) -> None:
        """InputError for a second pass, steps, seams or windows of a sized request that cannot be."""
        if request.hires is not None:
            factor, most = self.described.factor or 8, self.init_pixels.max_pixels
            passes.check_second_pass(request, factor, most, self.pixel_upscalers)
        for each in (request,) if request.hires is None else (request, self.last_pass(request)):
            if request.guided:
                guided_steps(each.steps_to_run, request.guidance_start, request.guidance_end)
            if self._alphas is not None:
                with passes.naming_hires_steps(each, request):
                    self.trajectory(each)
        if request.tiling != "none" or request.panorama:
            seams.check_seams(request, self.options, self.device)

    def image_size(self, request: ImageRequest) -> tuple[int, int]:
        """Height and width of a resolved request's image: with a mask it is pasted into the init image."""
        if request.repaints:
            return self.canvases(request, self.described).whole.shape[:2]
        return passes.final_size(request, self.described.factor or 8)

    def last_pass(self, request: ImageRequest) -> ImageRequest:
        """A resolved request as the last of its passes sees it: with the size of its image."""
        return passes.second_pass(request, self.described.factor or 8)

    def _text_encoder(self) -> torch.nn.Module:
        """The model's, or before it is built one without weights."""
        if "model" in self.__dict__:
            return self.model.cond_stage_model
        if "_bare_encoder" not in self.__dict__:
            with torch.device("meta"):
                section = self.config["params"]["cond_stage_config"]
                self._bare_encoder = instantiate_from_config(section, self.allow_target)
        return self._bare_encoder

    def embed(self, prompt: str, reading: Reading = Reading()) -> Tensor:  # noqa: B008
        """The embedding of a prompt without schedules, [1, n, d]; those used last are kept."""
        key = self.adapters.text_key, prompt, reading
        if key not in self._embeddings:
            encode = self.model.get_learned_conditioning
            plain = reading == Reading()
            found = encode([prompt]) if plain else self.prompts.embed(encode, prompt, reading)
            self._embeddings[key] = found
            while len(self._embeddings) > KEPT_EMBEDDINGS:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(key)
        return self._embeddings[key]

    def forget_files(self) -> None:
        """Read init images, masks, depth maps and LoRAs anew from now on, as they may have changed."""
        self.init_pixels.forget()
        self.canvases.forget()
        self.depth_maps.forget()
        self.controls.forget()
        self.prompts.forget()
        self.adapters.forget()
        for key in [key for key in self._embeddings if key[-1].embedding]:
            del self._embeddings[key]

    def cut_off(self, prompt: str, reading: Reading = Reading()) -> str:  # noqa: B008
        """The end of a prompt that the text encoder does not read; "" if it reads all of it."""
        if reading != Reading():
            return " … ".join(self.prompts.layout(prompt, reading).cut_off)
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

        def work(request: ImageRequest) -> tuple[int, int]:
            last = self.last_pass(request)
            return last.height * last.width, request.rows

        tried = self.resolve(probe(max(requests, key=work)))

        def make(images: int) -> None:
            list(self.batches([[tried] * images]))
            free_recordings(self.model)  # a replay would take no memory that could be read

        size = largest_batch(make, self.model.device, min(LARGEST_BATCH, most))
        notice(f"--batch_size auto: {size} images at once")
        return size

    def fitted(self, request: ImageRequest) -> int:
        """How many images like a resolved request's fit into memory at once, once more did not."""
        return self._largest.get(request.batch_key(), LARGEST_BATCH)

    def read_images(self, request: ImageRequest) -> None:
        """Read the files that a resolved request's image starts from, so that its batch finds them kept.

        InputError if one cannot be read: a run may leave out this image then, and not its whole batch.
        """
        if request.repaints:
            self.canvases(request, self.described)
        elif self.described.task == "upscale":
            upscaling.small_image(request, self.init_pixels, self.model.first_stage_model.factor)
        elif request.init_img is not None:
            self.init_pixels(request)
        for each in (request, self.last_pass(request)):
            self.controls.read(self, each)
            if self.described.task == "depth":
                self.depth_maps.source(each)

    def batches(
        self,
        batches: Iterable[Sequence[ImageRequest]],
        on_step: Callable[[int], None] | None = None,
        on_x0: Callback = None,
    ) -> Iterator[list[GeneratedImage]]:
        """The images of each batch of resolved, seeded requests that have one `batch_key`.

        `on_step` is called after every step with the number of images that took it, and `on_x0` with the
        step, from 1, and the clean latents [b, c, h, w] that the model then sees.
        A batch that needs more memory than there is is made in halves, and so are those like it after it;
        InputError if there is too little for one image.
        """
        stream, streamed = None, None
        for batch in batches:
            start, key = time.perf_counter(), batch[0].batch_key()
            if batch[0].rng == "compvis":
                stream, streamed = stream or drawing.compvis_stream(self, batch), streamed or key
                if key != streamed:
                    raise InputError("--rng compvis is one stream for images of equal settings")
            parts = parts_of(batch, self._largest.get(key, len(batch)))
            images: list[np.ndarray | None] = []
            while parts:
                steps, latents = Steps(on_step, on_x0), []
                calls = drawing.calls(self, parts[0], stream, len(images), steps.count, latents)
                try:
                    with torch.inference_mode(), arithmetic(self.device), self._autocast(), closing(calls):
                        for arguments in calls:
                            latents.append(sample(**arguments))
                        decoded = drawing.decoded(self, self.last_pass(batch[0]), torch.cat(latents))
                        made = list(to_uint8(decoded)), finite_images(decoded)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    made = None
                # outside of the block above, whose error holds the tensors
                if made is None:
                    steps.take_back()
                    last = self.last_pass(batch[0])
                    self._largest[key] = half_of(parts[0], last.height, last.width)
                    parts = [smaller for part in parts for smaller in parts_of(part, self._largest[key])]
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
                    self._depth(self.last_pass(request)),
                    self._painted(request),
                    self.controls.hints(self, self.last_pass(request)),
                )
                for request, (pixels, nsfw) in zip(batch, self.safety(images), strict=True)
            ]

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
        """The noise levels of a request's steps. FieldError if they are too near to each other."""
        alphas = self._alphas
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

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, enabled=self.precision == "autocast")


def _default_seed(request: ImageRequest, k: int) -> int:
    """In the original's one stream all images have the run's seed."""
    return DEFAULT_SEED if request.rng == "compvis" else image_seed(DEFAULT_SEED, k)
