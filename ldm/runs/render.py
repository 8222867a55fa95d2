"""One run of a sampling script, between its arguments and its last line."""

from __future__ import annotations

import argparse
import hashlib
import json
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ldm.cli.parser import IMAGE_OPTIONS, IMG2IMG_SCALE, SCALE
from ldm.errors import InputError
from ldm.images.names import file_name, unique_names
from ldm.images.outputs import OutputFolder, PictureWriter, Watermarker
from ldm.log import LOG, log_to, notice, problem
from ldm.runs.manifest import RunRecord
from ldm.runs.processes import LeaderEnded, Team, find_place
from ldm.runs.worker import Interrupt, Job, Kind, Safety, Telling, image_facts, make
from ldm.weights.loading import (
    BUNDLED_WEIGHTS,
    SAFETY_FOLDER,
    ModelFiles,
    advised_scale,
    choose_model,
    find,
    native_size,
    read_config,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ldm.cli.prompts import Line
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.pipeline.generate import Settings
    from ldm.sampling.batches import Batch


def render(args: argparse.Namespace) -> int:
    """From checked arguments to files: text to image, or with an `init_img` among them image to image.

    Returns the exit code: 1 if an image could not be made or saved, 130 if the user ended the run.
    """
    team = Team(find_place(args.devices, args.num_nodes))
    log_to(args.log_file, args.quiet or not team.leads)
    return lead(args, team) if team.leads else follow(args, team)


def lead(args: argparse.Namespace, team: Team) -> int:
    """The run as the process sees it that has rank 0, or is alone: it checks, plans, and tells the end."""
    lines, own_args = prompt_lines(args)
    files, config = model_files(args)
    check_model(args, config)
    check_team(args, team)
    safety_mode = safety_of(args)
    # the output folder is tried, and a run to resume is found, before anything slow
    folder = output_folder(args)
    if args.resume:  # what was chosen then
        before = RunRecord.last_settings(folder.path)
        args.seed = before.get("seed", -1) if args.seed == -1 else args.seed
        args.batch_size = before.get("batch_size", "auto") if args.batch_size == "auto" else args.batch_size
    args.seed = choose_seed(args.seed)
    kinds, batches = plan_run(args, lines, own_args, files, config)
    model = None
    if args.batch_size == "auto":
        team.join(choose_device(args.device).type)
        model = load(args, files, config, team)
        kinds, batches = fit(model, kinds, batches)
    told = kinds[0].facts | told_of(args, lines, kinds) | {"safety": safety_mode}
    record = RunRecord(folder.path, told, sum(map(len, batches)))
    resumed = args.resume and record.resume()
    todo = remaining(batches, record.missing(), args.rng)
    writer = picture_writer(args, folder, record)
    if todo:
        if model is None:
            team.join(choose_device(args.device).type)
            model = load(args, files, config, team)
        check_prompts(model, [*(line.prompt for line in lines), *(own.negative_prompt for own in own_args)])
        for kind in kinds:
            tell_steps(kind)
    else:
        notice(f"all {record.images} images are there")
        if team.place.started and model is None:  # the others wait to be told
            team.join("cpu")
    safety = load_safety(safety_mode, model)
    if not resumed:
        record.start(folder.next_number)
    with ending(record), Interrupt() as interrupt:
        job = team.share(Job(kinds, todo, file_names(args.filename, kinds, batches, record.first), record))
        LOG.info("%d of %d images to make in %s", sum(map(len, todo)), record.images, folder.path.absolute())
        lost = make(model, job, writer, team, interrupt, safety, telling_of(args, team)) if todo else 0
        if lost and not interrupt.asked:  # what they have left
            output_folder(args)  # without their temporary files
            record.refresh()
            job = replace(job, batches=remaining(batches, record.missing(), args.rng))
            make(model, job, writer, Team(), interrupt, safety, telling_of(args, team))
        if team.place.size > 1:
            record.refresh()
        if not interrupt.asked:
            prompt = "\n".join(dict.fromkeys(line.prompt for line in lines))
            writer.finish(None if args.no_metadata else kinds[0].facts | {"prompt": prompt})
    tell_peak(args, model)
    if left := len(record.missing()):
        notice(f"{left} of {record.images} images are missing; the same command with --resume makes them")
    if failed := team.count("failed", 0):
        problem(f"{failed} of {record.images} images failed: manifest.jsonl says which")
    if not args.json:
        print(args.outdir)
    return 130 if interrupt.asked else 1 if failed or left else 0


def follow(args: argparse.Namespace, team: Team) -> int:
    """The run as any other process sees it: rank 0 has checked everything, and says what there is to do."""
    try:
        team.join(choose_device(args.device).type)
        job = team.share(None)
    except LeaderEnded:  # it has told why
        return 1
    if not job.batches:
        return 0
    model = load(args, *model_files(args), team)
    safety = load_safety(safety_of(args), model)
    writer = picture_writer(args, output_folder(args), job.record)
    with Interrupt() as interrupt:
        make(model, job, writer, team, interrupt, safety, telling_of(args, team))
    return 0


def check_team(args: argparse.Namespace, team: Team) -> None:
    """InputError for what several processes cannot do."""
    if team.place.size == 1:
        return
    for wrong, why in (
        (args.rng == "compvis", "--rng compvis is one stream for all images, so one process has to draw it"),
        (args.skip_save, "--skip_save leaves nothing that grids could be made from"),
        (":" in args.device, f"--device {args.device} is one device; name its kind, such as cuda"),
        (args.device == "mps", "there is one mps device"),
    ):
        if wrong:
            raise InputError(f"{team.place.size} processes (--devices, --num_nodes): {why}")
    device = choose_device(args.device)
    if device.type == "cuda":
        import torch

        if team.place.devices > torch.cuda.device_count():
            raise InputError(f"--devices {team.place.devices}: this machine has {torch.cuda.device_count()}")


def picture_writer(args: argparse.Namespace, folder: OutputFolder, record: RunRecord) -> PictureWriter:
    mark = None if args.watermark == "none" else Watermarker(args.watermark)
    columns = args.n_rows or args.n_samples
    return PictureWriter(folder, record, not args.skip_save, not args.skip_grid, columns, mark)


def telling_of(args: argparse.Namespace, team: Team) -> Telling:
    return Telling(not args.no_metadata, args.json, team.leads and not args.quiet)


def file_names(template: str, kinds: list[Kind], batches: list[Batch], first: int) -> dict[int, str]:
    """The file of each image of a run, by its number within it, as --filename says."""
    names = {}
    for batch in batches:
        facts = kinds[batch.kind].facts
        for own, prompt in zip(image_facts(kinds[batch.kind].settings, batch), batch.prompts, strict=True):
            number = {"number": first + own["image"], "prompt": prompt}
            model = {"model": PurePath(facts["checkpoint"]).stem}
            names[own["image"]] = file_name(template, facts | own | number | model)
    numbers = sorted(names)
    return dict(zip(numbers, unique_names(names[k] for k in numbers), strict=True))


def safety_of(args: argparse.Namespace) -> str:
    """What --safety comes to here: "on", "flag", "off", or "unchecked" for "auto" without a checker."""
    there = find(SAFETY_FOLDER).is_dir()
    if args.safety in ("on", "flag") and not there:
        raise InputError(
            f"--safety {args.safety}: there is no {SAFETY_FOLDER}; put the published config.json and "
            "model.safetensors there, or choose --safety off"
        )
    return ("on" if there else "unchecked") if args.safety == "auto" else args.safety


def load_safety(mode: str, model: LatentDiffusion | None) -> Safety:
    """The checks for a mode of `safety_of`, on the model's device; a notice if pictures go unchecked."""
    if model is None or mode == "off":
        return Safety()
    if mode == "unchecked":
        notice(f"The pictures are unchecked: there is no {SAFETY_FOLDER} (told unless --safety off)")
        return Safety()
    from ldm.pipeline.safety import load_safety_checker

    return Safety(load_safety_checker(find(SAFETY_FOLDER), model.device), blacken=mode == "on")


def plan_run(
    args: argparse.Namespace,
    lines: list[Line],
    own_args: list[argparse.Namespace],
    files: ModelFiles,
    config: dict[str, Any],
) -> tuple[list[Kind], list[Batch]]:
    """The kinds of images that the lines ask for, the command's own first, and all batches of the run."""
    from ldm.sampling.batches import plan

    different = {id(own): own for own in own_args}.values()  # lines without options share the command's
    sizes = {(own.H, own.W): own for own in different}
    init_images = {size: read_init(own) for size, own in sizes.items()}
    common = {"n_samples": args.n_samples} | model_facts(args, files)
    kinds: dict[str, Kind] = {}
    numbers: dict[str, int] = {}
    kind_of: dict[int, int] = {}
    for own in different:
        init = init_images[own.H, own.W]
        height, width = init.shape[:2] if init is not None else picture_size(own, config)
        settings = replace(settings_of(own, files, height, width), seed=args.seed)
        key = repr(settings)
        if key not in kinds:
            numbers[key] = len(kinds)
            if args.watermark != "none" and not Watermarker.fits(height, width):
                notice(f"No watermark: it needs 256x256 pixels and these pictures have {width}x{height}")
            kinds[key] = Kind(settings, init, common | facts_of(args, settings))
        kind_of[id(own)] = numbers[key]
    batches = plan(
        [line.prompt for line in lines],
        args.n_iter,
        args.n_samples,
        [kind_of[id(own)] for own in own_args],
        own_seeds(lines, own_args),
    )
    if args.batch_size in (None, "auto"):
        return list(kinds.values()), batches
    return sampled_together(args.batch_size, list(kinds.values()), batches)


def sampled_together(size: int, kinds: list[Kind], batches: list[Batch]) -> tuple[list[Kind], list[Batch]]:
    """The run with batches of `size` images, and its images telling so."""
    from ldm.sampling.batches import regroup

    kinds = [replace(kind, facts=kind.facts | {"batch_size": size}) for kind in kinds]
    return kinds, regroup(batches, size)


LARGEST_BATCH = 64  # beyond 16 a GPU gains nothing, and what is lost to an interrupt only grows


def fit(model: LatentDiffusion, kinds: list[Kind], batches: list[Batch]) -> tuple[list[Kind], list[Batch]]:
    """The run with as many images at once as fit into memory, by its largest kind; told."""
    from ldm.optimize.memory import largest_batch

    largest = max((kind.settings for kind in kinds), key=lambda settings: settings.height * settings.width)
    size = largest_batch(model, largest, min(LARGEST_BATCH, sum(map(len, batches))))
    notice(f"--batch_size auto: {size} images at once")
    return sampled_together(size, kinds, batches)


def tell_steps(kind: Kind) -> None:
    """How many steps image to image runs."""
    if kind.init_image is not None:
        steps = kind.settings.steps_to_run
        trip = "" if steps else ": the pictures are the autoencoder's round trip"
        notice(f"img2img runs {steps} of {kind.settings.steps} steps{trip}")


def prompt_lines(args: argparse.Namespace) -> tuple[list[Line], list[argparse.Namespace]]:
    """The run's prompts, and the arguments of each: the command's, with the options of its line over them."""
    from ldm.cli.prompts import Line, read_prompts

    if not args.from_file:
        return [Line(args.prompt)] * args.n_samples, [args] * args.n_samples
    lines = [line for line in read_prompts(args.from_file) for _ in range(args.repeat)]
    variants: dict[str, argparse.Namespace] = {repr(()): args}  # seeds 1 and 1.0 are equal, and not the same
    for line in lines:
        if repr(line.options) not in variants:
            variants[repr(line.options)] = line_arguments(args, line)
    return lines, [variants[repr(line.options)] for line in lines]


def line_arguments(args: argparse.Namespace, line: Line) -> argparse.Namespace:
    """The arguments with a JSON line's options; InputError that names the line."""
    options = dict(line.options)
    allowed = [*IMAGE_OPTIONS, "H", "W"]
    try:
        for name in options:
            if name not in allowed or not hasattr(args, "ddim_steps" if name == "steps" else name):
                raise InputError(f"no option {name!r} for a line; there are prompt, {', '.join(allowed)}")
        if args.rng == "compvis":
            raise InputError("options of its own with --rng compvis: that is one stream for all images")
        own = args.variant(options)
        if "seed" in options and own.seed == -1:
            raise InputError("a seed of -1; leave it out, and the line has the run's")
        return own
    except InputError as error:
        raise InputError(f"--from-file {line.place}: {error}") from error


def own_seeds(lines: list[Line], own_args: list[argparse.Namespace]) -> list[int | None]:
    """Each line's own seed, if it has one; a line that comes again has the next."""
    seeds: list[int | None] = []
    for i, (line, own) in enumerate(zip(lines, own_args, strict=True)):
        again = i > 0 and lines[i - 1] is line and seeds[-1] is not None
        own_seed = own.seed if any(name == "seed" for name, _ in line.options) else None
        seeds.append(seeds[-1] + 1 if again else own_seed)
    return seeds


@contextmanager
def ending(record: RunRecord) -> Iterator[None]:
    """The record ends with the run, however that ends; if even that cannot be written, it is no matter."""
    try:
        yield
    finally:
        with suppress(OSError):
            record.end()


def told_of(args: argparse.Namespace, lines: list[Line], kinds: list[Kind]) -> dict[str, Any]:
    """What else a run's files depend on, prompts and init images as hashes that tell them from others."""
    text = json.dumps([(line.prompt, line.options) for line in lines]).encode()
    told = {name: getattr(args, name) for name in ("n_iter", "no_metadata", "format", "quality", "filename")}
    told["prompts"] = f"{len(lines)}, {_hash(text)}"
    if kinds[0].init_image is not None:
        told["init image"] = _hash(b"".join(kind.init_image.tobytes() for kind in kinds))
    return told


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def remaining(batches: list[Batch], missing: list[int], rng: str) -> list[Batch]:
    """The batches with missing images; of one stream for all also those before, which draw from it."""
    lacking = set(missing)
    wanted = [i for i, batch in enumerate(batches) if not lacking.isdisjoint(batch.numbers)]
    if rng == "compvis":
        return batches[: wanted[-1] + 1] if wanted else []
    return [batches[i] for i in wanted]


def model_files(args: argparse.Namespace) -> tuple[ModelFiles, dict[str, Any]]:
    """The chosen model's files, with a notice if nobody chose them, and its `model:` section."""
    files = choose_model(args.config, args.ckpt)
    if wanted := args.picture.get("model_hash"):
        from ldm.weights.checkpoint import fingerprint

        if args.config is None and args.ckpt is None and wanted == fingerprint(find(BUNDLED_WEIGHTS)):
            files = choose_model(None, BUNDLED_WEIGHTS)
        elif wanted != fingerprint(files.weights):
            maker = args.picture.get("checkpoint") or "another model"
            notice(
                f"--like: that picture is by {maker} ({wanted}), this is {files.weights.name}: it will differ"
            )
    if files.notice:
        notice(files.notice)
    return files, read_config(files.config)


def check_model(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """InputError if flags do not fit the model that the config describes, as far as it tells."""
    try:
        params = config.get("params") or {}
        stage = (params.get("first_stage_config") or {}).get("params") or {}
        levels = (stage.get("ddconfig") or {}).get("ch_mult")
        known = {"C": params.get("channels"), "f": levels and 2 ** (len(levels) - 1)}
    except (AttributeError, TypeError) as error:
        raise InputError(f"the config does not describe a latent diffusion model: {error}") from error
    for flag, value in known.items():
        if value is not None and getattr(args, flag) not in (None, value):
            raise InputError(f"--{flag} {getattr(args, flag)} does not fit this model: its value is {value}")
    if args.zero_snr and params.get("parameterization", "eps") == "eps":
        raise InputError(
            "--zero_snr: this model predicts the noise (eps), which tells nothing of the picture where there "
            "is only noise; rescaling to zero terminal SNR is for v-prediction models"
        )


def read_init(args: argparse.Namespace) -> np.ndarray | None:
    """The init image as the model takes it, uint8 [H, W, 3]; None for text to image."""
    if not hasattr(args, "init_img"):
        return None
    from ldm.images.init_image import read_init_image

    return read_init_image(args.init_img, args.H, args.W, args.resize, args.background, args.max_pixels)


def picture_size(args: argparse.Namespace, config: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels of text to image."""
    size = native_size(config)
    return args.H or size, args.W or size


def settings_of(args: argparse.Namespace, files: ModelFiles, height: int, width: int) -> Settings:
    """Checked arguments as the settings of a run."""
    from ldm.pipeline.generate import Settings

    default_scale = IMG2IMG_SCALE if hasattr(args, "init_img") else SCALE
    return Settings(
        height=height,
        width=width,
        sampler=args.sampler,
        steps=args.ddim_steps,
        scale=advised_scale(files.config, default_scale) if args.scale is None else args.scale,
        schedule=args.schedule,
        rho=args.rho,
        timesteps=args.timesteps,
        sigmas=args.sigmas,
        options=args.options,
        strength=getattr(args, "strength", None),
        cfg_rescale=args.cfg_rescale,
        guidance_start=args.guidance_start,
        guidance_end=args.guidance_end,
        zero_snr=args.zero_snr,
        negative_prompt=args.negative_prompt,
        seed=args.seed,
        variation_seed=args.variation_seed,
        variation_strength=args.variation_strength,
        rng=args.rng,
        fixed_code=args.fixed_code,
        start_seed=args.start_seed,
        autocast=precision_of(args) == "autocast",
    )


def facts_of(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The settings as an image tells them: those in use, the sampler's options among them."""
    facts = {name: value for name, value in vars(settings).items() if value is not None}
    facts |= facts.pop("options") | {"watermark": args.watermark}
    changes = {"vae_tiling": args.vae_tiling, "deepcache": args.deepcache, "tome": args.tome}
    plain = {"vae_tiling": False, "deepcache": 1, "tome": 0}
    facts |= {name: value for name, value in changes.items() if value != plain[name]}
    if hasattr(args, "init_img"):
        facts |= {"init_img": args.init_img, "resize": args.resize, "background": args.background}
    return facts


def choose_seed(seed: int) -> int:
    """The seed itself, or for -1 a random one, which is printed."""
    if seed == -1:
        seed = secrets.randbelow(2**32)
        notice(f"seed {seed}")
    return seed


def output_folder(args: argparse.Namespace) -> OutputFolder:
    """Where pictures go; InputError if `--outdir` cannot be written."""
    if args.resume and args.skip_save:
        raise InputError("--resume with --skip_save: a run that saves no images cannot be taken up again")
    return OutputFolder(args.outdir, args.format, args.quality)


def load(
    args: argparse.Namespace, files: ModelFiles, config: dict[str, Any], team: Team | None = None
) -> LatentDiffusion:
    """The model on its device; InputError if it is not what `--C` and `--f` say."""
    import torch

    from ldm.weights.loading import load_model

    device = team.device if team and team.device else choose_device(args.device)
    dtype = {"half": torch.float16, "bf16": torch.bfloat16}.get(precision_of(args))
    model = load_model(config, files.weights, args.weights, args.allow_target, dtype)
    for flag, given, true in (("C", args.C, model.channels), ("f", args.f, model.first_stage_model.factor)):
        if given not in (None, true):
            raise InputError(f"--{flag} {given} does not fit this model: its value is {true}")
    return optimize(model, args, device)


def optimize(model: LatentDiffusion, args: argparse.Namespace, device: torch.device) -> LatentDiffusion:
    """The model on its device, with what that is fast with, and what --vae_tiling and its like ask for."""
    if args.attention_slicing:
        from ldm.optimize.slicing import slice_attention

        slice_attention(model)
    if args.vae_tiling:
        from ldm.optimize.tiling import tile_first_stage

        tile_first_stage(model)
    if args.tome or args.deepcache > 1:
        from ldm.optimize.approximate import merge_similar_tokens, reuse_deep_features

        merge_similar_tokens(model, args.tome)
        reuse_deep_features(model, args.deepcache)
    if args.low_vram and device.type != "cpu":
        from ldm.optimize.offload import offload

        offload(model, device, by_layer=args.low_vram == "max")
        return model
    if args.low_vram:
        notice("--low_vram: on a CPU there is only one memory, and nothing to save")
    model.to(device)
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    # what follows knows how our UNet is made, not how that of another package is (--allow_target)
    if not args.eager and isinstance(model.model.diffusion_model, UNetModel):
        speed_up(model, args, device)
    return model


def speed_up(model: LatentDiffusion, args: argparse.Namespace, device: torch.device) -> None:
    """What a device is fast with. On CUDA no bit changes, elsewhere and with --compile the order of sums."""
    if args.compile and device.type == "cpu":
        notice("--compile: on a CPU it is no faster than what is done without it")
    elif args.compile:
        from ldm.optimize.compile import compile_model

        compile_model(model)
    if device.type == "cpu":
        from ldm.optimize.cpu import fold_upsampling, keep_memory, prepack, return_memory
        from ldm.optimize.guidance import share_prefix

        if keep_memory():
            return_memory(model)
        fold_upsampling(model)  # of float32 weights
        prepack(model)  # those of 16 bits
        share_prefix(model)
    if device.type == "cuda":
        from ldm.optimize.context import keep_context
        from ldm.optimize.graph import graph_unet
        from ldm.optimize.timesteps import keep_timesteps

        if args.deepcache == 1:  # else not every step runs the same kernels
            graph_unet(model)
        keep_context(model)
        keep_timesteps(model)


def precision_of(args: argparse.Namespace) -> str:
    """--precision, or what is best on the device: half on a GPU, full on a CPU."""
    if args.precision is None:
        return "half" if choose_device(args.device).type == "cuda" else "full"
    return args.precision


def tell_peak(args: argparse.Namespace, model: LatentDiffusion | None) -> None:
    """The memory that a run took which was to save it."""
    if model is not None and (args.low_vram or args.vae_tiling or args.attention_slicing):
        from ldm.optimize.memory import peak_memory

        what = "tensors on the GPU" if model.device.type == "cuda" else "the process"
        notice(f"peak memory of {what}: {peak_memory(model.device) / 2**30:.2f} GiB")


def model_facts(args: argparse.Namespace, files: ModelFiles) -> dict[str, Any]:
    """What an image's settings say about the model."""
    from ldm import __version__
    from ldm.weights.checkpoint import fingerprint

    return {
        "config": str(files.config),
        "checkpoint": str(files.weights),
        "model_hash": fingerprint(files.weights),
        "weights": args.weights,
        "precision": precision_of(args),
        "version": __version__,
    }


def check_prompts(model: LatentDiffusion, prompts: Iterable[str]) -> None:
    """Warn of every prompt that is longer than the text encoder reads, showing what is cut off.

    A text encoder of another package (`--allow_target`) need not tell.
    """
    cut_off = getattr(getattr(model.cond_stage_model, "tokenizer", None), "cut_off", lambda prompt: "")
    for prompt in dict.fromkeys(prompts):
        if lost := cut_off(prompt):
            notice(f"The prompt {prompt[:30]!r}… is longer than 77 tokens; cut off: {lost!r}")


def choose_device(name: str) -> torch.device:
    """The device for `--device`; InputError if this machine has no such device."""
    import torch

    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise InputError(f"--device {name} is not there; this machine has {', '.join(available)}")
    return torch.device(name)
