"""From requests that are sampled together to images: conditions, noise, sampler, decoder, and both passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm.optimize.tiling import TILE
from ldm.pipeline import guidance, inpainting, panorama, passes, seams, upscaling
from ldm.pipeline.conditioning import conditions, context_lengths, prompt_stages
from ldm.pipeline.request import ImageRequest
from ldm.pipeline.settings.passes import LATENT
from ldm.sampling import Denoiser, Discretization, Trajectory, catalogue
from ldm.sampling.denoiser import DiffusionModel
from ldm.sampling.noise import CompvisStream, ImageNoise, ImageSeeds, tree_depth
from ldm.sampling.staged import first_part, staged
from ldm.sampling.trajectory import guidance_interval

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline
    from ldm.sampling.steps import Callback


def calls(
    pipeline: Pipeline,
    batch: Sequence[ImageRequest],
    stream: CompvisStream | None,
    place: int,
    callback: Callback,
    latents: list[Tensor],
) -> Iterator[dict[str, Any]]:
    """The arguments of each call of `sample` that requests with one `batch_key` take, in one pass or two.

    What a call returns is to be added to `latents` before the next one; at the end it has the last pass's.
    """
    pipeline.adapters.put_on(pipeline.model, batch[0])
    groups = sampled_together(pipeline, batch)
    with seamless(pipeline, batch[0]):
        for numbers in groups:
            part = [batch[k] for k in numbers]
            yield sampling(pipeline, part, stream, place + numbers[0], callback)
    put_in_order(latents, groups)
    if batch[0].hires is None:
        return
    start = enlarged(pipeline, batch[0], torch.cat(latents))
    latents.clear()
    batch = [pipeline.last_pass(request) for request in batch]
    groups = sampled_together(pipeline, batch, second=True)
    with seamless(pipeline, batch[0]):
        for numbers in groups:
            part = [batch[k] for k in numbers]
            own = start[numbers] if isinstance(start, Tensor) else [start[k] for k in numbers]
            yield sampling(pipeline, part, None, place + numbers[0], callback, own)
    put_in_order(latents, groups)


def sampled_together(
    pipeline: Pipeline, batch: Sequence[ImageRequest], second: bool = False
) -> list[list[int]]:
    """The numbers of the requests that each call samples, in one pass: an image alone is that of a batch.

    An adaptive sampler chooses its steps by the error of all that it samples, so it samples each image by
    itself. Contexts of several lengths would be repeated to their least common multiple, 504 chunks for 7, 8
    and 9, so those of a call agree; the original's one stream, which draws for whole batches, is not divided.
    """
    numbers = list(range(len(batch)))
    if catalogue.SAMPLERS[batch[0].sampler].adaptive:
        return [[k] for k in numbers]
    if len(batch) == 1 or batch[0].rng == "compvis":
        return [numbers]
    lengths = [context_lengths(request, pipeline.embed, second) for request in batch]
    numbers.sort(key=lengths.__getitem__)
    return [list(group) for _, group in groupby(numbers, key=lengths.__getitem__)]


def put_in_order(latents: list[Tensor], groups: Sequence[Sequence[int]]) -> None:
    """Brings the latents [b, c, h, w] of these groups of a batch into its order."""
    numbers = [k for group in groups for k in group]
    if numbers != sorted(numbers):
        latents[:] = [torch.cat(latents)[sorted(range(len(numbers)), key=numbers.__getitem__)]]


def enlarged(pipeline: Pipeline, first: ImageRequest, latents: Tensor) -> passes.Start:
    """What the second pass starts from, of the latents of the first."""
    factor, dims = pipeline.model.first_stage_model.factor, seams.dims_of(first.tiling)
    size = passes.final_size(first, factor)
    if first.hires_upscaler == LATENT:
        return passes.enlarged_latents(latents, tuple(side // factor for side in size), dims)
    upscaler = pipeline.pixel_upscalers.of(first)
    if upscaler is not None:
        upscaler.use_device(pipeline.device)
    return passes.enlarged_images(decoded(pipeline, first, latents), size, dims, upscaler)


def decoded(pipeline: Pipeline, first: ImageRequest, latents: Tensor) -> Tensor:
    """Images [b, 3, H, W], about [-1, 1], of the latents of requests like this one."""
    tile = 0 if pipeline.options.vae_tiling else first.tile or 0  # with --vae_tiling it has its own
    dims = seams.dims_of(first.tiling)
    return seams.decode(pipeline.first_stage, latents, tile, dims, _works_in_tiles(pipeline, first))


def _works_in_tiles(pipeline: Pipeline, request: ImageRequest) -> bool:
    """Whether the first stage encodes and decodes images of this size in tiles of its own."""
    return pipeline.options.vae_tiling and max(_shape(pipeline, request)[1:]) > TILE


def seamless(pipeline: Pipeline, first: ImageRequest) -> AbstractContextManager[None]:
    """Inside, the networks draw images that continue at their edges, if requests like this one do."""
    dims = seams.dims_of(first.tiling)
    alone, size = dims, _shape(pipeline, first)[1:]
    if first.panorama:  # whose windows go around by themselves
        alone = panorama.within_windows(_window(pipeline), size, dims)
    in_tiles = _works_in_tiles(pipeline, first)
    nets = pipeline.controls.networks(pipeline, first) if dims else ()
    return seams.seamless(pipeline.model, alone, () if in_tiles else dims, nets)


def _window(pipeline: Pipeline) -> int:
    """The side in latents of images that the model was made for."""
    return pipeline.described.native_size // pipeline.model.first_stage_model.factor


def sampling(
    pipeline: Pipeline,
    batch: Sequence[ImageRequest],
    stream: CompvisStream | None,
    place: int,
    callback: Callback,
    start: passes.Start | None = None,
) -> dict[str, Any]:
    """The arguments of `sample` for requests that have one `batch_key`.

    `place` is that of the first of them in the batch that the original's stream is drawn for. `start` is
    what a second pass starts from, in place of an init image.
    """
    first = batch[0]
    discretization, run = pipeline.trajectory(first)
    noise = stream.batch(len(batch), place) if stream else _image_noise(pipeline, batch, run)
    features = pipeline.controls.features(pipeline, batch)
    inputs = {"control": features, **_inputs(pipeline, batch, noise)}
    texts, order = prompt_stages(batch, run.steps, second=start is not None)
    stages = [conditions(pipeline.model, batch, pipeline.embed, each, **inputs) for each in texts]
    cond, uncond = stages[0]
    scales = [request.scale for request in batch]
    within = (first.guidance_start, first.guidance_end) if first.guided else (0.0, 1.0)
    network = _network(pipeline, batch, run, discretization)
    network = staged(network, stages, order, len(batch), run, discretization)
    denoiser = Denoiser(
        network,
        first_part(cond),
        uncond,
        scales[0] if len(set(scales)) == 1 else scales,
        rescale=first.cfg_rescale,
        interval=guidance_interval(run, *within),
        discretization=discretization,
        factor=guidance.scale_factor(first, run),
        further=guidance.further(first),
    )
    init, known = None, None
    from_image = _starts_from_image(first, start)
    keeps_known = first.repaints and (pipeline.described.task != "inpaint" or any(r.soft for r in batch))
    if isinstance(start, Tensor):
        init = start
    elif from_image or keeps_known:
        pixels = [_start_pixels(pipeline, request) for request in batch] if start is None else start
        posterior = pipeline.first_stage.encode(pixels)
        init = pipeline.model.get_first_stage_encoding(posterior, noise.posterior())
    if keeps_known:
        canvases = [pipeline.canvases(request, pipeline.described) for request in batch]
        known = inpainting.known_region(run, batch, canvases, init, noise, task=pipeline.described.task)
    return {
        "denoiser": denoiser,
        "sampler": first.sampler,
        "run": run,
        "noise": noise,
        "init": init if from_image else None,
        "known": known,
        "options": first.options,
        "callback": callback,
    }


def _network(
    pipeline: Pipeline, batch: Sequence[ImageRequest], run: Trajectory, discretization: Discretization
) -> DiffusionModel:
    """The model as a denoiser calls it for requests with one `batch_key`."""
    model: DiffusionModel = pipeline.model
    if pipeline.described.task == "upscale":
        model = upscaling.tiled(pipeline.model, batch)
    if batch[0].control:
        model = pipeline.controls.around(pipeline, batch[0], run, discretization)
    if batch[0].panorama:
        dims = seams.dims_of(batch[0].tiling)
        model = panorama.windowed(model, _window(pipeline), _shape(pipeline, batch[0])[1:], dims)
    return model


def _inputs(pipeline: Pipeline, batch: Sequence[ImageRequest], noise: ImageNoise) -> dict[str, Tensor]:
    """What the UNet is given besides latents, timestep and text, as `conditions` takes it."""
    match pipeline.described.task:
        case "inpaint":
            canvases = [
                pipeline.canvases(request, pipeline.described) if request.repaints else None
                for request in batch
            ]
            return inpainting.inputs(
                pipeline.model, pipeline.first_stage, canvases, _shape(pipeline, batch[0]), noise
            )
        case "depth":
            return pipeline.depth_maps.inputs(pipeline.model, batch, _shape(pipeline, batch[0])[1:])
        case "upscale":
            return upscaling.inputs(pipeline.model, batch, pipeline.init_pixels, noise)
    return {}


def _start_pixels(pipeline: Pipeline, request: ImageRequest) -> np.ndarray:
    """The image that sampling starts from, uint8 [H, W, 3]."""
    if request.repaints:
        return pipeline.canvases(request, pipeline.described).image
    return pipeline.init_pixels(request)


def _shape(pipeline: Pipeline, request: ImageRequest) -> tuple[int, int, int]:
    factor = pipeline.model.first_stage_model.factor
    return pipeline.model.channels, request.height // factor, request.width // factor


def compvis_stream(pipeline: Pipeline, batch: Sequence[ImageRequest]) -> CompvisStream:
    """The original's one stream; what it draws once for all batches has the size of the first one."""
    first = batch[0]
    return CompvisStream(
        first.seed,
        _shape(pipeline, first),
        pipeline.model.device,
        len(batch),
        fixed_code=first.fixed_code,
        init_image=_starts_from_image(first),
    )


def _image_noise(pipeline: Pipeline, batch: Sequence[ImageRequest], run: Trajectory) -> ImageNoise:
    seeds = [
        ImageSeeds(
            request.seed, request.start_seed, request.variation_seed, request.variation_strength or 0.0
        )
        for request in batch
    ]
    brownian = catalogue.SAMPLERS[batch[0].sampler].noise == "brownian"
    depth = tree_depth(run.shortest)
    return ImageNoise(seeds, _shape(pipeline, batch[0]), pipeline.model.device, brownian, depth)


def _starts_from_image(request: ImageRequest, start: passes.Start | None = None) -> bool:
    """Whether the init image, or the first pass's, has a say: at full strength it has none."""
    there = start is not None or request.init_img is not None
    return there and request.strength is not None and request.strength < 1
