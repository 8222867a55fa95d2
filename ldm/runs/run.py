"""A run: many images, one or several processes, files that no fault can harm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.images.outputs import AGAIN, CannotWrite, OutputFolder, resumable
from ldm.images.preview import Preview, factors_of
from ldm.log import LOG, log_to, notice, problem
from ldm.pipeline.memory import peak_memory
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import ImageRequest
from ldm.runs.checks import check_run, report_prompts, report_sizes, report_steps
from ldm.runs.costs import Meter, device_power, duration, rounded
from ldm.runs.dry_run import print_plan
from ldm.runs.forecast import Forecast, Stopwatch, forecast, print_forecast, probed, remember
from ldm.runs.manifest import RunRecord, new_seed
from ldm.runs.options import RunOptions
from ldm.runs.plan import file_names, plan_run
from ldm.runs.processes import LeaderEnded, Team, find_place
from ldm.runs.settings import grid_settings, recorded_lines, recorded_settings
from ldm.runs.worker import ImageCosts, Interrupt, Job, ReportOptions, make_images
from ldm.runs.writer import ImageWriter, Sheet, page_size

if TYPE_CHECKING:
    from ldm.images.provenance import Signer

WORTH_A_LINE = 60.0  # seconds of a run from which on the user reads what it took


def run(
    pipeline: Pipeline,
    requests: Iterable[ImageRequest],
    options: RunOptions,
    sheet: Sheet | None = None,
    started: Callable[[str], object] | None = None,
    again: str = AGAIN,
) -> int:
    """Make the images of a round of requests, `n_iter` times over, into an output folder.

    Returns the exit code: 1 if an image could not be made or saved, 130 if the user ended the run. The
    requests are read by the process with rank 0 alone, which plans for all. A `sheet` is drawn in place of
    grids. `started` gets the run's id, by which the folder's files know it, before the first image.
    `again` is told the user as what makes the images that are missing.
    """
    team = Team(find_place(options.devices, options.num_nodes))
    log_to(None if options.dry_run else options.log_file, options.quiet or not team.leads)
    if not team.leads:
        return 0 if options.dry_run or options.plan else follow(pipeline, options, team)
    pipeline.forget_files()
    sign = signer(options)  # its files are tried before the model is loaded
    requests = [pipeline.resolve(request) for request in requests]
    check_run(pipeline, requests, options, team, sheet)
    if options.dry_run:
        seed, batch_size = choices(pipeline, requests, options, team)
        plan = plan_run(requests, seed, options.n_iter, options.n_samples, batch_size)
        print_plan(pipeline, plan, options.json)
        return 0
    if options.plan:
        return report_forecast(pipeline, requests, options, team.place.size)
    meter = Meter(
        pipeline.device,
        team.place.size,
        power=options.power,
        region=options.region,
        energy=options.energy,
        nodes=team.place.nodes,
    )
    # the output folder is tried, and a run to resume is found, before anything slow
    folder = OutputFolder(options.outdir, options.format, options.quality, sign)
    seed, batch_size = choices(pipeline, requests, options, team)
    plan = plan_run(requests, seed, options.n_iter, options.n_samples, batch_size)
    facts = {"n_samples": options.n_samples} | ({"batch_size": batch_size} if batch_size else {})
    recorded = recorded_settings(pipeline, requests[0], options, facts | {"seed": seed})
    record = RunRecord(folder.path, recorded, len(plan.requests), recorded_lines(pipeline, requests))
    with record.ending():
        resumed = options.resume and record.resume()
        if options.resume and not resumed:
            notice(f"--resume: {options.outdir} has no run yet; a new one begins")
        todo = plan.remaining(record.missing())
        if todo:
            prepare(pipeline, requests, team, sheet)
        else:
            notice(f"all {record.images} images are there")
            if team.place.started and team.device is None:  # the others wait to hear that nothing is to do
                team.join("cpu")
        if not resumed:
            record.start(folder.next_number)  # listed anew, under the record's lock
        folder.own(record.run)
        if started is not None:
            started(record.run)
        names = file_names(options.filename, plan, record.first, model_name(pipeline, options.filename))
        expected = forecast(pipeline, plan, todo, team.place.size) if todo else None
        costs = ImageCosts(meter.watts / team.place.size, meter.factor, expected)
        job = Job(plan, todo, names, record, facts, costs)
        if team.device is not None:  # the others were started, and wait for it
            team.share(job)
        LOG.info("%d of %d images to make in %s", sum(map(len, todo)), record.images, folder.path.absolute())
        writer = image_writer(folder, record, options, sheet)
        writer.grid_settings = lambda numbers: grid_settings(
            pipeline, [requests[k % len(requests)] for k in numbers], facts, seed
        )
        if writer.save_grids:
            writer.page_size = page_size(map(pipeline.image_size, requests), writer.columns)
        report = ReportOptions(options.json, bar=not options.quiet)
        with resumable(again if can_resume(writer) else None), Interrupt() as interrupt, writer:
            if todo:
                preview = preview_of(pipeline, folder, options)
                watch = Stopwatch()
                lost = make_images(pipeline, job, writer, team, interrupt, report, preview, watch)
                if team.asked and not interrupt.asked:
                    notice("a process of this run was asked to end, and all have ended with it")
                    interrupt.asked = True
                if team.place.size == 1:
                    remember(pipeline, plan, watch, meter.seconds)
                if team.place.size > 1:
                    record.gather()
                if lost and not interrupt.asked:  # what they have left is made here
                    folder.clear(record.run)
                    left = replace(job, batches=plan.remaining(record.missing()))
                    make_images(pipeline, left, writer, Team(), interrupt, report, preview)
            if not interrupt.asked and not record.lost:
                writer.finish()
        if todo:
            record_costs(record, meter, None if interrupt.asked else expected)
    report_peak(pipeline, bool(todo))
    return conclusion(record, writer, interrupt, options, again)


def report_forecast(
    pipeline: Pipeline, requests: Sequence[ImageRequest], options: RunOptions, processes: int
) -> int:
    """Print what a run of these requests will take. Returns the exit code."""
    seed, batch_size = choices(pipeline, requests, options, Team())
    plan = plan_run(requests, seed, options.n_iter, options.n_samples, batch_size)
    found = probed(pipeline, plan, processes)
    watts = device_power(pipeline.device) if options.power is None else options.power
    print_forecast(pipeline, found, watts, options)
    return 0


def record_costs(record: RunRecord, meter: Meter, expected: Forecast | None) -> None:
    """Record what this part of a run took, and what was expected; a notice where that were minutes."""
    seconds, costs = meter.seconds, meter.stop()
    line = {"seconds": rounded(seconds)} | costs.record()
    words = ""
    if expected is not None and expected.seconds > 0:
        more = seconds / expected.seconds - 1
        line |= {"planned_seconds": rounded(expected.seconds), "more_than_planned": rounded(more)}
        sign = "more" if more > 0 else "less"
        words = f", {abs(more):.0%} {sign} than the {duration(expected.seconds)} planned"
    with suppress(CannotWrite):  # the images are there
        record.add_costs(line)
    message = f"it took {duration(seconds)}{words}: {costs}"
    LOG.info(message) if seconds < WORTH_A_LINE else notice(message)


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
    folder = OutputFolder(options.outdir, options.format, options.quality, signer(options))
    folder.owner = job.record.run
    writer = image_writer(folder, job.record, options)
    with Interrupt() as interrupt:
        make_images(pipeline, job, writer, team, interrupt, ReportOptions(options.json, bar=False))
    return 0


def conclusion(
    record: RunRecord, writer: ImageWriter, interrupt: Interrupt, options: RunOptions, again: str
) -> int:
    """The exit code, after a line for images that are not there; the folder's name on stdout."""
    missing = record.missing()
    failed = record.failed.intersection(missing)
    if left := len(missing) - len(failed):
        advice = f"; {again} makes them" if can_resume(writer) else ""
        if writer.sheet_saved:
            advice = ", and black on the sheet"
        notice(f"{left} of {record.images} images are missing{advice}")
    if failed:
        problem(f"{len(failed)} of {record.images} images failed: manifest.jsonl says which")
    if record.lost:
        problem("another machine has taken up this run, because this process gave no sign of life for long")
    if not options.json:
        print(options.outdir)
    return 130 if interrupt.asked else 1 if missing or record.lost or writer.lacking else 0


def can_resume(writer: ImageWriter) -> bool:
    """Whether --resume takes up the run of a writer."""
    return writer.save_images and writer.sheet is None


def choices(
    pipeline: Pipeline, requests: Sequence[ImageRequest], options: RunOptions, team: Team
) -> tuple[int, int | None]:
    """Seed and batch size. What is left to chance is, in a run that is taken up, what was chosen then."""
    given = {"seed": options.seed, "batch_size": pipeline.options.batch_size}
    chosen = [name for name, value in given.items() if value in (-1, "auto")]
    if chosen and options.resume:
        facts = {name: value for name, value in given.items() if value is not None}
        facts |= {"n_samples": options.n_samples}
        settings = recorded_settings(pipeline, requests[0], options, facts)
        lines = recorded_lines(pipeline, requests)
        before = RunRecord(Path(options.outdir), settings, 0, lines).earlier(chosen)
        given |= {name: before[name] for name in chosen if name in before}
    seed, batch_size = given.values()
    if seed == -1:
        seed = new_seed()
        notice(f"seed {seed}")
    if batch_size == "auto":
        if options.dry_run:
            return seed, None  # which the model would have to be loaded for
        use_device_of(team, pipeline)
        batch_size = pipeline.fitting_batch(requests, len(requests) * options.n_iter)
    return seed, batch_size


def prepare(pipeline: Pipeline, requests: Sequence[ImageRequest], team: Team, sheet: Sheet | None) -> None:
    """Start the team, load the model and the safety checker: what cannot be loaded is an error before a run
    is recorded. Notices about the requests.
    """
    use_device_of(team, pipeline)
    report_prompts(pipeline, requests)
    report_sizes(pipeline, requests)
    if sheet is None:  # which shows them
        report_steps(requests)
    pipeline.safety  # noqa: B018


def use_device_of(team: Team, pipeline: Pipeline) -> None:
    """Start the other processes, if there are to be any, and use this process's own device."""
    if team.device is None:
        team.join(pipeline.device.type)
    if team.device is not None:
        pipeline.use_device(team.device)


def image_writer(
    folder: OutputFolder, record: RunRecord, options: RunOptions, sheet: Sheet | None = None
) -> ImageWriter:
    return ImageWriter(
        folder,
        record,
        images=not options.skip_save,
        grids=not options.skip_grid,
        metadata=not options.no_metadata,
        depths=options.save_depth,
        controls=options.save_control,
        columns=options.n_rows or options.n_samples,
        sheet=sheet,
    )


def signer(options: RunOptions) -> Signer | None:
    """What signs the files, None if nothing does. InputError for a certificate or key that is not fit."""
    if options.sign is None:
        return None
    from ldm.images.provenance import signer_of

    return signer_of(*options.sign, prompt=options.sign_prompt)


def preview_of(pipeline: Pipeline, folder: OutputFolder, options: RunOptions) -> Preview | None:
    """What writes preview.png; None if none is asked for, or, with a notice, if there are no colours for the
    model's latents.
    """
    if options.preview is None:
        return None
    factors = factors_of(float(getattr(pipeline.model, "scale_factor", 0.0)))
    if factors is None:
        notice("--preview: no colours are known for the latents of this model, so there is none")
        return None
    return Preview(folder.path, options.preview, factors)


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
