"""What a run checks and reports before anything slow begins."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.errors import FieldError, InputError
from ldm.images.metadata import check_sides
from ldm.images.watermark import NO_WATERMARK, Watermarker
from ldm.log import notice
from ldm.optimize.apply import check_options
from ldm.pipeline.batches import check_one_stream
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import ImageRequest
from ldm.pipeline.safety import safety_for
from ldm.pipeline.settings.text import Reading
from ldm.runs.options import RunOptions
from ldm.runs.processes import Team, has_own_device, in_srun
from ldm.runs.writer import Sheet


def check_run(
    pipeline: Pipeline,
    requests: Sequence[ImageRequest],
    options: RunOptions,
    team: Team,
    sheet: Sheet | None,
) -> None:
    """InputError for what this run cannot do; a notice where images are too small for a watermark."""
    if not requests:
        raise InputError("a run needs at least one request for an image")
    if sheet is not None and options.resume:
        raise FieldError("{resume} with a sheet: it is drawn from the images of a single run")
    if options.safety != "auto" and safety_for(options.safety) != pipeline.safety_mode:
        raise FieldError(
            "{safety} {given}, but the pipeline was opened with {mode}",
            given=options.safety,
            mode=pipeline.safety_mode,
        )
    check_one_stream(requests)
    check_team(pipeline, requests[0], options, team)
    check_options(pipeline.options, pipeline.device)
    for request in requests:
        if request.loras:  # a prompt may name some
            pipeline.adapters.check(pipeline, request)
    check_watermarks(pipeline, requests, sheet)
    if not options.skip_save:
        for height, width in {pipeline.image_size(one) for one in requests}:
            check_sides(height, width, options.format)
    if options.save_control and not any(request.control for request in requests):
        raise FieldError("{save_control} without {control}: no image follows a control image")


def check_team(pipeline: Pipeline, first: ImageRequest, options: RunOptions, team: Team) -> None:
    """InputError for what several processes cannot do."""
    if team.place.size == 1:
        return
    device = pipeline.options.device
    for wrong, why in (
        (first.rng == "compvis", "--rng compvis is one stream for all images, so one process has to draw it"),
        (options.skip_save, "--skip_save leaves nothing that grids could be made from"),
        (":" in device, f"--device {device} is one device; name its kind, such as cuda"),
        (device == "mps", "there is one mps device"),
    ):
        if wrong:
            raise InputError(f"{team.place.size} processes (--devices, --num_nodes): {why}")
    if pipeline.device.type == "cuda":
        import torch

        own = in_srun() and has_own_device("cuda", team.place.devices)
        if team.place.devices > torch.cuda.device_count() and not own:
            raise InputError(f"--devices {team.place.devices}: this machine has {torch.cuda.device_count()}")


def check_watermarks(
    pipeline: Pipeline, requests: Sequence[ImageRequest], sheet: Sheet | None = None
) -> None:
    """InputError if a watermark cannot be written that is to be; a notice where images are too small."""
    small = set()
    for height, width, message in {(*pipeline.image_size(one), one.watermark) for one in requests}:
        mark = Watermarker.of(message)
        if message == NO_WATERMARK:
            continue
        fits = Watermarker.fits(height, width)
        if fits or sheet is not None:  # which is larger than its images
            mark.check()
        if not fits:
            small.add((width, height))
    for width, height in sorted(small):
        notice(f"No watermark: it needs 256x256 pixels and these images have {width}x{height}")


def report_prompts(pipeline: Pipeline, requests: Sequence[ImageRequest]) -> None:
    """Notices before sampling: what is cut off from prompts or has no effect."""
    for prompt, reading in texts_read(requests):
        if lost := pipeline.cut_off(prompt, reading):
            room = pipeline.model.cond_stage_model.tokenizer.max_length - 2  # without start and end
            notice(f"The prompt {prompt[:30]!r}… is longer than {room} tokens; cut off: {lost!r}")
    report_embeddings(pipeline, requests)
    for line in dict.fromkeys(line for request in requests for line in request.in_vain()):
        notice(line)


def report_sizes(pipeline: Pipeline, requests: Sequence[ImageRequest]) -> None:
    """A notice where images are at most half as high or wide as those that the model was made for.

    A small init image without --H and --W is the usual reason. The layout of such an image means nothing.
    """
    # A pixel upscaler is no Pipeline; upscalers of both kinds take images of any size.
    if not isinstance(pipeline, Pipeline) or pipeline.described.task == "upscale":
        return
    native = pipeline.described.native_size
    sizes = {(one.height, one.width) for one in requests if not one.repaints}
    for height, width in sorted(size for size in sizes if min(size) <= native // 2):
        notice(
            f"{width}x{height} pixels: the model was made for {native}x{native}, and draws little sense in "
            f"half of that; --H {native} --W {native} fits"
        )


def texts_read(requests: Sequence[ImageRequest]) -> list[tuple[str, Reading]]:
    """The different texts that the text encoder reads, prompts before negative prompts, and how."""
    prompts: dict[tuple[str, Reading], None] = {}
    negatives: dict[tuple[str, Reading], None] = {}
    for request in requests:
        for stage in request.all_texts():
            prompts |= {(text, request.reading): None for text, _ in stage.parts}
            negatives[stage.negative, request.reading] = None
        if request.prompt_to:
            prompts[request.prompt_to, request.reading] = None
    return list(prompts | negatives)


def report_embeddings(pipeline: Pipeline, requests: Sequence[ImageRequest]) -> None:
    """Notices about textual inversions that no prompt calls by their name."""
    texts: dict[Reading, list[str]] = {}
    for request in requests:
        if request.embedding:
            texts.setdefault(request.reading, []).extend(
                (request.prompt, request.negative_prompt, request.prompt_to or "")
            )
    for reading, prompts in texts.items():
        for each in pipeline.prompts.unused(prompts, reading):
            names = " or ".join(map(repr, each.names))
            notice(f"--embedding {each.path.name}: no prompt has its name, {names}")


def report_steps(requests: Sequence[ImageRequest]) -> None:
    """How many steps image to image runs; of inpainting, whose strength is usually 1, where it is less."""
    strengths = [
        ("inpainting" if one.repaints else "img2img", one.steps_to_run, one.steps)
        for one in requests
        if one.strength is not None and not (one.repaints and one.strength == 1)
    ]
    strengths += [
        ("the second pass", one.second_steps, one.hires_steps or one.steps)
        for one in requests
        if one.hires is not None
    ]
    for what, steps, whole in dict.fromkeys(strengths):
        trip = "" if steps else ": the images are the autoencoder's round trip"
        notice(f"{what} runs {steps} of {whole} steps{trip}")
