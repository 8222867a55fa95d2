"""What a run checks and reports before anything slow begins."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.errors import FieldError, InputError
from ldm.images.watermark import NO_WATERMARK, Watermarker
from ldm.log import notice
from ldm.optimize.apply import check_options
from ldm.pipeline.batches import check_one_stream
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import ImageRequest
from ldm.pipeline.safety import safety_for
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
    check_watermarks(pipeline, requests, sheet)


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
    prompts = [request.prompt for request in requests] + [request.negative_prompt for request in requests]
    for prompt in dict.fromkeys(prompts):
        if lost := pipeline.cut_off(prompt):
            notice(f"The prompt {prompt[:30]!r}… is longer than 77 tokens; cut off: {lost!r}")
    for line in dict.fromkeys(line for request in requests for line in request.in_vain()):
        notice(line)


def report_steps(requests: Sequence[ImageRequest]) -> None:
    """How many steps image to image runs; of inpainting, whose strength is usually 1, where it is less."""
    strengths = [
        ("inpainting" if one.repaints else "img2img", one.steps_to_run, one.steps)
        for one in requests
        if one.strength is not None and not (one.repaints and one.strength == 1)
    ]
    for what, steps, whole in dict.fromkeys(strengths):
        trip = "" if steps else ": the images are the autoencoder's round trip"
        notice(f"{what} runs {steps} of {whole} steps{trip}")
