"""ControlNets: what they see, when they act, and how what they find is added to the UNet from outside."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.errors import FieldError
from ldm.images.edges import canny
from ldm.images.masks import Box, cut, resize
from ldm.images.pixels import to_float
from ldm.models.diffusion.ddpm import LatentDepth2ImageDiffusion, LatentDiffusion, like_weights
from ldm.modules.controlnet import HINT_FACTOR, ControlNet
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.optimize.compile import uncompiled
from ldm.optimize.controlnet import use_kernels_of
from ldm.optimize.offload import PlainTransfer, Whole
from ldm.pipeline.depth import has_estimator
from ldm.pipeline.init_images import InitImages, evict
from ldm.pipeline.request import ImageRequest
from ldm.sampling import Discretization, Trajectory
from ldm.sampling.denoiser import DiffusionModel, timestep_of
from ldm.util import instantiate_from_config
from ldm.weights.checkpoint import load_weights, read_state_dict
from ldm.weights.controlnet import check_controlnet, load_controlnet, weights_file
from ldm.weights.hashes import quick_hash
from ldm.weights.loading import bundled_family, choose_model, read_config

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline

MOST = 4  # ControlNets that are kept: 1.4 GB each for v1 in float32
KEPT_HINTS = 64
Span = tuple[float, float]  # timesteps (above, up to)


def steps_within(steps: int, start: float, end: float) -> tuple[int, int] | None:
    """The steps (from, up to) from part `start` to part `end` of a run; None if there are none.

    Step i of n is within if start <= i / n < end, as for guidance (`guidance_interval`).
    """
    first, last = (math.ceil(round(part * steps, 6)) for part in (start, end))
    return (first, last) if first < last else None


def timesteps_within(run: Trajectory, discretization: Discretization, start: float, end: float) -> Span:
    """The timesteps of the steps from part `start` to part `end` of a run, which has one or no steps at all.

    The run's own ends are open. Calls within a step go by their own levels.
    """
    first, last = steps_within(run.steps, start, end) or (0, run.steps)

    def timestep(step: int) -> float:
        return torch.tensor(discretization.timestep(run.sigmas[step])).item()  # in the precision of a call's

    return timestep(last) if last < run.steps else -math.inf, timestep(first) if first else math.inf


@contextmanager
def added_features(unet: UNetModel, added: Sequence[Tensor]) -> Iterator[None]:
    """Inside, a UNet's calls add to its skip connections, in their order, and to its middle block."""
    *skips, middle = added
    at = dict(zip(reversed(unet.output_blocks), skips, strict=True))
    plain = unet.run

    def run(block: nn.Module, x: Tensor, *inputs: Any) -> Tensor:
        if block in at:
            x[:, -at[block].shape[1] :] += at[block]  # what was concatenated for this block alone
        out = plain(block, x, *inputs)
        return out + middle if block is unet.middle_block else out

    before = vars(unet).get("run")
    unet.run = run
    try:
        yield
    finally:
        del unet.run
        if before is not None:
            unet.run = before


class ControlledModel:
    """A model whose UNet follows control images, as a `Denoiser` calls it.

    Conditions have the features of the control images, [b, c, h, w] for each ControlNet, as `c_control`. A
    wrapper that calls this with a part of the latents cuts them as it cuts `c_concat`. `nets` are called with
    latents, timesteps, context and features; each has its weight and its timesteps.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        nets: Sequence[ControlNet | Moved],
        weights: Sequence[float],
        spans: Sequence[Span],
    ):
        self.model, self.acting = model, list(zip(nets, weights, spans, strict=True))
        self.parameterization, self.alphas_cumprod = model.parameterization, model.alphas_cumprod
        self.conditioning_key = model.conditioning_key

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """As `LatentDiffusion.apply_model`."""
        plain = {name: value for name, value in cond.items() if name != "c_control"}
        added = self.added(x_noisy, t, plain, cond["c_control"])
        if added is None:
            return self.model.apply_model(x_noisy, t, plain)
        with added_features(self.model.model.diffusion_model, added), uncompiled():
            if getattr(self.model, "recordings", None) is not None:  # a recorded call would add nothing
                return type(self.model).apply_model(self.model, x_noisy, t, plain)
            return self.model.apply_model(x_noisy, t, plain)

    def added(
        self, x: Tensor, t: Tensor, cond: Mapping[str, Any], features: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """The sum of what the ControlNets that act at these timesteps add; None if none of them does."""
        at, total = timestep_of(t), None
        contexts = cond["c_crossattn"]
        context = contexts[0] if len(contexts) == 1 else torch.cat(list(contexts), dim=1)
        x, context, features = like_weights([x, context, list(features)], self.model.model)
        for (net, weight, span), own in zip(self.acting, features, strict=True):
            if not span[0] < at <= span[1]:
                continue
            found = net(x, t, context, own)
            if weight != 1.0:
                found = [each * weight for each in found]
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        return total


class Controls:
    """The ControlNets of a pipeline and what they see; those used last are kept, and their images."""

    def __init__(self, images: InitImages):
        self.images = images
        self._nets: OrderedDict[tuple, ControlNet | Moved] = OrderedDict()
        self._hints: OrderedDict[tuple, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._fitting: set[str] = set()  # files that were found to fit the model
        self._estimator: nn.Module | None = None

    def check(self, pipeline: Pipeline, request: ImageRequest) -> None:
        """InputError if a sized request has ControlNets or images that cannot be used; no model is needed."""
        options = pipeline.options
        if pipeline.described.task == "upscale":
            raise FieldError("{control}: there are no ControlNets for models that enlarge images")
        if options.deepcache > 1:
            raise FieldError(
                "{control} with {deepcache} {calls}: kept features would lack what a ControlNet adds",
                calls=options.deepcache,
            )
        if options.compile and pipeline.device.type == "cpu":
            raise FieldError(
                "{control} with {compile} on a CPU: the UNet that OpenVINO has compiled takes nothing from a "
                "ControlNet; leave one of them out"
            )
        if "depth" in request.preprocessors and pipeline.described.task != "depth":
            estimator_files(pipeline)
        for k, one in enumerate(request.controls):
            if one.file not in self._fitting:
                check_controlnet(one.file, pipeline.config)
                self._fitting.add(one.file)
            if not isinstance(one.image, str) and not hasattr(one.image, "getexif"):
                raise FieldError(
                    "{control} with an image of type {type}: give a file or a PIL image",
                    type=type(one.image).__name__,
                )
            self.images.whole(_as_init(request, k))  # whatever is wrong with the file comes up here
            steps = request.steps_to_run
            if steps and steps_within(steps, one.start, one.end) is None:
                raise FieldError(
                    "{control} {text!r}: none of the {steps} steps is within {start:g}-{end:g}",
                    text=str(one),
                    steps=steps,
                    start=one.start,
                    end=one.end,
                )

    def hint(self, pipeline: Pipeline, request: ImageRequest, k: int) -> np.ndarray:
        """What ControlNet k of a sized request sees, uint8 [8 h, 8 w, 3] for latents [h, w]. InputError."""
        pixels, box, size = self._image(pipeline, request, k)
        key = id(pixels), box, size, request.preprocessors[k], request.canny_thresholds
        if key not in self._hints:
            part = pixels if box is None else resize(cut(pixels, box), *size)
            self._hints[key] = pixels, self._preprocess(pipeline, part, request, k)
            evict(self._hints, KEPT_HINTS, lambda kept: kept[1].nbytes)
        self._hints.move_to_end(key)
        return self._hints[key][1]

    def _image(
        self, pipeline: Pipeline, request: ImageRequest, k: int
    ) -> tuple[np.ndarray, Box | None, tuple[int, int]]:
        """Control image k, fitted; the part of it that a mask leaves, None for all; the size of a hint."""
        factor = pipeline.described.factor or 8
        size = tuple(side // factor * HINT_FACTOR for side in (request.height, request.width))
        box, whole = None, size
        if request.repaints:  # the control image is of the whole image, of which a part is painted
            canvas = pipeline.canvases(request, pipeline.described)
            box, whole = canvas.box, canvas.whole.shape[:2]
        return self.images.fitted(_as_init(request, k), *whole), box, size

    def read(self, pipeline: Pipeline, request: ImageRequest) -> None:
        """Read the control images of a sized request, which are then kept. InputError."""
        for k in range(len(request.control)):
            self._image(pipeline, request, k)

    def hints(self, pipeline: Pipeline, request: ImageRequest) -> tuple[np.ndarray, ...]:
        """What each ControlNet of a sized request sees, uint8 [8 h, 8 w, 3]."""
        return tuple(self.hint(pipeline, request, k) for k in range(len(request.control)))

    def features(self, pipeline: Pipeline, batch: Sequence[ImageRequest]) -> list[Tensor]:
        """What the ControlNets that have a weight see of requests with one `batch_key`: [b, c, h, w] each."""
        found = []
        used = [(k, one.file) for k, one in enumerate(batch[0].controls) if one.weight]
        for k, file in used:
            image = to_float([self.hint(pipeline, request, k) for request in batch]) / 2 + 0.5
            image = like_weights(image, pipeline.model.model).to(pipeline.model.device)
            found.append(self.net(pipeline, file, len(used)).embed(image))
        return found

    def around(
        self,
        pipeline: Pipeline,
        first: ImageRequest,
        run: Trajectory,
        discretization: Discretization,
    ) -> DiffusionModel:
        """The model as requests with the `batch_key` of `first` call it: with the ControlNets that they have.

        A weight of 0 is none.
        """
        used = [one for one in first.controls if one.weight]
        if not used:
            return pipeline.model
        nets = [self.net(pipeline, one.file, len(used)) for one in used]
        spans = [timesteps_within(run, discretization, one.start, one.end) for one in used]
        weights = [one.weight for one in used]
        return ControlledModel(pipeline.model, nets, weights, spans)

    def net(self, pipeline: Pipeline, path: str, together: int) -> ControlNet | Moved:
        """The ControlNet of a file, loaded when it is first used and when the file has changed.

        So many are used `together`, and kept.
        """
        status = weights_file(path).stat()
        key = path, status.st_mtime_ns, status.st_size
        if key not in self._nets:
            model = pipeline.model
            net = load_controlnet(path, pipeline.config, next(model.model.parameters()).dtype)
            moves = pipeline.options.low_vram == "max" and model.device.type != "cpu"
            self._nets[key] = Moved(net, model.device) if moves else net.to(model.device)
            if model.device.type == "cpu" and not pipeline.options.eager:
                use_kernels_of(model, net)
            while len(self._nets) > max(MOST, together):
                self._nets.popitem(last=False)
        self._nets.move_to_end(key)
        return self._nets[key]

    def networks(self, pipeline: Pipeline, request: ImageRequest) -> list[ControlNet]:
        """The ControlNets that act on requests like this one."""
        used = [one.file for one in request.controls if one.weight]
        nets = [self.net(pipeline, file, len(used)) for file in used]
        return [net.net if isinstance(net, Moved) else net for net in nets]

    def forget(self) -> None:
        """Read all control images, and the headers of all files, anew from now on."""
        self._hints.clear()
        self._fitting.clear()

    def _preprocess(
        self, pipeline: Pipeline, pixels: np.ndarray, request: ImageRequest, k: int
    ) -> np.ndarray:
        match request.preprocessors[k]:
            case "canny":
                return canny(pixels, *request.canny_thresholds)
            case "depth":
                return self._depth(pipeline, pixels)
            case "invert":
                return 255 - pixels
        return pixels

    def _depth(self, pipeline: Pipeline, pixels: np.ndarray) -> np.ndarray:
        """The estimated depth of an image, uint8 [H, W, 3]: the nearest is white, the farthest black."""
        image = to_float([pixels]).to(pipeline.model.device)
        if getattr(pipeline.model, "depth_model", None) is not None:
            depth = pipeline.model.estimate_depth(image)
        else:
            if self._estimator is None:
                self._estimator = load_estimator(*estimator_files(pipeline)).to(pipeline.model.device)
            with torch.autocast(image.device.type, enabled=False):
                depth = LatentDepth2ImageDiffusion.estimate_depth(
                    SimpleNamespace(depth_model=self._estimator), image
                )
        grey = np.nan_to_num(depth[0, 0].float().cpu().numpy())
        grey = (grey - grey.min()) * (255 / max(np.ptp(grey), 1e-9))
        return np.repeat(grey.round().astype(np.uint8)[:, :, None], 3, axis=2)


def digests(images: InitImages, request: ImageRequest) -> dict[str, str]:
    """What distinguishes the content of each ControlNet and control image of a sized request."""
    found = {}
    for k, one in enumerate(request.controls):
        found[f"ControlNet {k}"] = quick_hash(weights_file(one.file))
        found[f"control image {k}"] = images.digests(_as_init(request, k))["init image"]
    return found


class Moved:
    """A ControlNet whose weights are on the device only while it is called, for `--low_vram max`."""

    def __init__(self, net: ControlNet, device: torch.device):
        self.net = net
        with torch.inference_mode(False):
            self.weights = Whole(net, device, PlainTransfer())

    def embed(self, image: Tensor) -> Tensor:
        with self.there():
            return self.net.embed(image)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        with self.there():
            return self.net(*inputs)

    @contextmanager
    def there(self) -> Iterator[None]:
        with torch.inference_mode(False):  # weights are no inference tensors, whoever calls
            self.weights.enter()
        try:
            yield
        finally:
            with torch.inference_mode(False):
                self.weights.leave()


def estimator_files(pipeline: Pipeline) -> tuple[Mapping[str, Any], Path]:
    """The `depth_stage_config` and the file of weights that estimate depth for a pipeline's control images.

    They are those of the depth model that is linked; the bundled one's are for the bundled models alone.
    FieldError if there are none.
    """
    files = choose_model(None, None, "depth")
    config = read_config(files.config)
    foreign = bundled_family(files.weights) is not None and bundled_family(pipeline.files.weights) is None
    if foreign or not has_estimator(config, files.weights):
        raise FieldError(
            "{control_preprocess} depth takes the estimator of a Stable Diffusion v2 depth checkpoint: link "
            "it at {place}, or give a depth map as the control image, with {control_preprocess} none",
            place="models/ldm/stable-diffusion-v2-depth/model.ckpt",
        )
    return config["params"]["depth_stage_config"], files.weights


def load_estimator(config: Mapping[str, Any], weights: Path) -> nn.Module:
    """The depth estimator of a checkpoint on the CPU, in float32."""
    with torch.device("meta"):
        estimator = instantiate_from_config(config)
    prefix = "depth_model."
    state = {
        name.removeprefix(prefix): t
        for name, t in read_state_dict(weights).items()
        if name.startswith(prefix)
    }
    load_weights(estimator, state, path=weights, dtype=torch.float32)
    return estimator.eval().requires_grad_(False)


def _as_init(request: ImageRequest, k: int) -> ImageRequest:
    """A request that starts from its control image k; what "pad" adds is black: nothing to follow."""
    return request.twin(
        init_img=request.controls[k].image,
        resize=request.control_resize,
        background="black",
        mask=None,
        outpaint=None,
        depth=None,
        noise_level=None,
    )
