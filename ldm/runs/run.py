"""A run: many images, one or several processes, files that no fault can harm."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ldm.errors import InputError
from ldm.images.outputs import OutputFolder
from ldm.images.watermark import Watermarker
from ldm.log import LOG, log_to, notice, problem
from ldm.pipeline.memory import peak_memory
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import ImageRequest
from ldm.runs.manifest import RunRecord, last_settings
from ldm.runs.options import RunOptions
from ldm.runs.plan import file_names, plan_run
from ldm.runs.processes import LeaderEnded, Team, find_place
from ldm.runs.worker import Interrupt, Job, ReportOptions, make_images
from ldm.runs.writer import ImageWriter, Sheet
from ldm.weights.hashes import quick_hash


def run(
    pipeline: Pipeline, requests: Iterable[ImageRequest], options: RunOptions, sheet: Sheet | None = None
) -> int:
    """Make the images of a round of requests, `n_iter` times over, into an output folder.

    Returns the exit code: 1 if an image could not be made or saved, 130 if the user ended the run. The
    requests are read by the process with rank 0 alone, which plans for all. A `sheet` is drawn in place of
    grids.
    """
    team = Team(find_place(options.devices, options.num_nodes))
    log_to(options.log_file, options.quiet or not team.leads)
    if team.leads:
        return lead(pipeline, list(requests), options, team, sheet)
    return follow(pipeline, options, team)


def lead(
    pipeline: Pipeline, requests: list[ImageRequest], options: RunOptions, team: Team, sheet: Sheet | None
) -> int:
    """The run as the process sees it that has rank 0, or is alone: it checks, plans, and reports the end."""
    requests = [pipeline.resolve(request) for request in requests]
    check_team(pipeline, requests[0], options, team)
    check_watermarks(requests, sheet)
    # the output folder is tried, and a run to resume is found, before anything slow
    folder = OutputFolder(options.outdir, options.format, options.quality)
    seed, batch_size = choices(pipeline, options)
    if batch_size == "auto":
        use_device_of(team, pipeline)
        batch_size = pipeline.fitting_batch(requests, len(requests) * options.n_iter)
    plan = plan_run(requests, seed, options.n_iter, options.n_samples, batch_size)
    facts = {"n_samples": options.n_samples} | ({"batch_size": batch_size} if batch_size else {})
    record = RunRecord(
        folder.path,
        recorded_settings(pipeline, requests[0], options, facts | {"seed": seed}),
        len(plan.requests),
        [differences_to(requests[0], request, pipeline) for request in requests],
    )
    with record.ending():
        resumed = options.resume and record.resume()
        todo = plan.remaining(record.missing())
        if todo:
            use_device_of(team, pipeline)
            report_prompts(pipeline, requests)
            if sheet is None:  # which shows them
                report_steps(requests)
            pipeline.safety  # noqa: B018, a checker that cannot be loaded is an error before the first image
        else:
            notice(f"all {record.images} images are there")
            if team.place.started and team.device is None:  # the others wait to hear that nothing is to do
                team.join("cpu")
        if not resumed:
            record.start(folder.next_number)
        folder.owner = record.run
        folder.clear(record.run)
        names = file_names(options.filename, plan, record.first, model_name(pipeline, options.filename))
        job = team.share(Job(plan, todo, names, record, facts))
        LOG.info("%d of %d images to make in %s", sum(map(len, todo)), record.images, folder.path.absolute())
        writer = image_writer(folder, record, options, sheet)
        with Interrupt() as interrupt:
            if todo:
                work(pipeline, job, writer, team, interrupt, options)
            if not interrupt.asked and not record.lost:
                writer.finish(grid_settings(pipeline, requests, facts, seed))
    report_peak(pipeline, bool(todo))
    return conclusion(record, interrupt, options)


def work(
    pipeline: Pipeline, job: Job, writer: ImageWriter, team: Team, interrupt: Interrupt, options: RunOptions
) -> None:
    """Make the images of a job with the team, and what lost processes have left without it."""
    report = ReportOptions(options.json, bar=not options.quiet)
    lost = make_images(pipeline, job, writer, team, interrupt, report)
    if team.place.size > 1:
        job.record.refresh()
    if lost and not interrupt.asked:
        writer.folder.clear(job.record.run)
        left = replace(job, batches=job.plan.remaining(job.record.missing()))
        make_images(pipeline, left, writer, Team(), interrupt, report)


def follow(pipeline: Pipeline, options: RunOptions, team: Team) -> int:
    """The run as any other process sees it: rank 0 has checked everything, and says what there is to do."""
    try:
        team.join(pipeline.device.type)
        job = team.share(None)
    except LeaderEnded:  # and it has said why
        return 1
    if not job.batches:
        return 0
    if team.device is not None:
        pipeline.use_device(team.device)
    folder = OutputFolder(options.outdir, options.format, options.quality)
    folder.owner = job.record.run
    writer = image_writer(folder, job.record, options)
    with Interrupt() as interrupt:
        make_images(pipeline, job, writer, team, interrupt, ReportOptions(options.json, bar=False))
    return 0


def conclusion(record: RunRecord, interrupt: Interrupt, options: RunOptions) -> int:
    """The exit code, after a line for images that are not there; the folder's name on stdout."""
    missing = record.missing()
    failed = record.failed.intersection(missing)
    if left := len(missing) - len(failed):
        notice(f"{left} of {record.images} images are missing; the same command with --resume makes them")
    if failed:
        problem(f"{len(failed)} of {record.images} images failed: manifest.jsonl says which")
    if record.lost:
        problem("another machine has taken up this run, because this process gave no sign of life for long")
    if not options.json:
        print(options.outdir)
    return 130 if interrupt.asked else 1 if missing or record.lost else 0


def choices(pipeline: Pipeline, options: RunOptions) -> tuple[int, int | str | None]:
    """Seed and batch size. What is left to chance is, in a run that is taken up, what was chosen then."""
    before = last_settings(options.outdir) if options.resume else {}
    seed, batch_size = options.seed, pipeline.options.batch_size
    if seed == -1:
        seed = before.get("seed", -1)
    if seed == -1:
        seed = secrets.randbelow(2**32)
        notice(f"seed {seed}")
    return seed, before.get("batch_size", batch_size) if batch_size == "auto" else batch_size


def use_device_of(team: Team, pipeline: Pipeline) -> None:
    """Start the other processes, if there are to be any, and use this process's own device."""
    if team.device is None:
        team.join(pipeline.device.type)
    if team.device is not None:
        pipeline.use_device(team.device)


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

        if team.place.devices > torch.cuda.device_count():
            raise InputError(f"--devices {team.place.devices}: this machine has {torch.cuda.device_count()}")


def check_watermarks(requests: Sequence[ImageRequest], sheet: Sheet | None = None) -> None:
    """InputError if a watermark cannot be written that is to be; a notice where images are too small."""
    small = set()
    for height, width, message in {(one.height, one.width, one.watermark) for one in requests}:
        if message == "none":
            continue
        fits = Watermarker.fits(height, width)
        if fits or sheet is not None:  # which is larger than its images
            Watermarker.of(message).check()
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
    """How many steps image to image runs."""
    strengths = [(one.steps_to_run, one.steps) for one in requests if one.init_img is not None]
    for steps, whole in dict.fromkeys(strengths):
        trip = "" if steps else ": the images are the autoencoder's round trip"
        notice(f"img2img runs {steps} of {whole} steps{trip}")


def recorded_settings(
    pipeline: Pipeline, first: ImageRequest, options: RunOptions, facts: dict[str, Any]
) -> dict[str, Any]:
    """All that the files of a run depend on, but for what its other lines have of their own.

    The checkpoint goes by its quick hash: the whole file's may not be known yet.
    """
    names = ("n_iter", "no_metadata", "format", "quality", "filename")
    return {
        **{name: getattr(options, name) for name in names},
        **line_settings(first, pipeline),
        **facts,
        "config": str(pipeline.files.config),
        "checkpoint": str(pipeline.files.weights),
        "model_hash": quick_hash(pipeline.files.weights),
        "weights": pipeline.weights,
        "precision": pipeline.precision,
        "safety": pipeline.safety_mode,
        **pipeline.options.recorded(),
    }


def line_settings(request: ImageRequest, pipeline: Pipeline) -> dict[str, Any]:
    """What an image depends on, the content of its init image among it."""
    settings = request.settings()
    if request.init_img is not None:
        settings["init image"] = hashlib.sha256(pipeline.init_pixels(request).tobytes()).hexdigest()[:16]
    return settings


def differences_to(first: ImageRequest, request: ImageRequest, pipeline: Pipeline) -> dict[str, Any]:
    """What a line has otherwise than the first one; None for what it lacks."""
    if request is first:
        return {} if first.seed is None else {"seed": first.seed}  # beside the run's
    before, own = line_settings(first, pipeline), line_settings(request, pipeline)
    names = dict.fromkeys([*before, *own])
    return {name: own.get(name) for name in names if own.get(name) != before.get(name)}


def grid_settings(
    pipeline: Pipeline, requests: Sequence[ImageRequest], facts: dict[str, Any], seed: int
) -> dict[str, Any]:
    """The settings of a grid: the first image's, under all prompts."""
    prompts = "\n".join(dict.fromkeys(request.prompt for request in requests))
    return facts | pipeline.facts | requests[0].settings() | {"seed": seed, "prompt": prompts}


def image_writer(
    folder: OutputFolder, record: RunRecord, options: RunOptions, sheet: Sheet | None = None
) -> ImageWriter:
    return ImageWriter(
        folder,
        record,
        images=not options.skip_save,
        grids=not options.skip_grid,
        metadata=not options.no_metadata,
        columns=options.n_rows or options.n_samples,
        sheet=sheet,
    )


def model_name(pipeline: Pipeline, template: str) -> dict[str, Any]:
    """What file names may show of the model; its hash is waited for only where the template asks for it."""
    name = {"checkpoint": str(pipeline.files.weights)}
    return name | {"model_hash": pipeline.hash.result()} if "{model_hash" in template else name


def report_peak(pipeline: Pipeline, used: bool) -> None:
    """The memory that a run took which was to save it."""
    options = pipeline.options
    if used and (options.low_vram or options.vae_tiling or options.attention_slicing):
        device = pipeline.model.device
        what = "tensors on the GPU" if device.type == "cuda" else "the process"
        notice(f"peak memory of {what}: {peak_memory(device) / 2**30:.2f} GiB")
