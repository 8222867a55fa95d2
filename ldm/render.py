"""What the sampling scripts do between their arguments and their last line."""

from __future__ import annotations

import argparse
import hashlib
import json
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ldm.cli import IMAGE_OPTIONS, IMG2IMG_SCALE, SCALE, notice
from ldm.errors import InputError
from ldm.loading import ModelFiles, advised_scale, choose_model, native_size, read_config
from ldm.outputs import CannotWrite, OutputFolder, PictureWriter, Watermarker
from ldm.record import RunRecord

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ldm.generate import Settings
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.prompts import Batch, Line


@dataclass(frozen=True)
class Kind:
    """What images that may share a batch have in common."""

    settings: Settings
    init_image: np.ndarray | None
    facts: dict[str, Any]  # what is told of each
    watermark: Watermarker | None


def render(args: argparse.Namespace) -> int:
    """From checked arguments to files: text to image, or with an `init_img` among them image to image.

    Returns the exit code: 1 if an image could not be made or saved, 130 if the user ended the run.
    """
    lines, own_args = prompt_lines(args)
    files, config = model_files(args)
    check_model(args, config)
    # the output folder is tried, and a run to resume is found, before anything slow
    folder = output_folder(args)
    if args.resume and args.seed == -1:
        args.seed = RunRecord.last_settings(folder.path).get("seed", -1)
    args.seed = choose_seed(args.seed)
    kinds, batches = plan_run(args, lines, own_args, files, config)
    record = RunRecord(folder.path, kinds[0].facts | told_of(args, lines, kinds), sum(map(len, batches)))
    resumed = args.resume and record.resume()
    batches = remaining(batches, record.missing(), args.rng)
    columns = args.n_rows or args.n_samples
    writer = PictureWriter(
        folder, record, not args.skip_save, not args.skip_grid, columns, kinds[0].watermark
    )
    if batches:
        model = load(args, files, config)
        check_prompts(model, [*(line.prompt for line in lines), *(own.negative_prompt for own in own_args)])
        for kind in kinds:
            tell_steps(kind)
    else:
        notice(f"all {record.images} images are there")
        model = None
    if not resumed:
        record.start(folder.next_number)
    with ending(record), Interrupt() as interrupt:
        failed = make(model, kinds, batches, writer, interrupt, args.no_metadata) if batches else 0
        if not interrupt.asked:
            prompt = "\n".join(dict.fromkeys(line.prompt for line in lines))
            writer.finish(None if args.no_metadata else kinds[0].facts | {"prompt": prompt})
    if left := len(record.missing()):
        notice(f"{left} of {record.images} images are missing; the same command with --resume makes them")
    if failed:
        notice(f"{failed} of {record.images} images failed: manifest.jsonl says which")
    print(args.outdir)
    return 130 if interrupt.asked else 1 if failed else 0


def plan_run(
    args: argparse.Namespace,
    lines: list[Line],
    own_args: list[argparse.Namespace],
    files: ModelFiles,
    config: dict[str, Any],
) -> tuple[list[Kind], list[Batch]]:
    """The kinds of images that the lines ask for, the command's own first, and all batches of the run."""
    from ldm.prompts import plan

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
            facts, watermark = common | facts_of(args, settings), watermarker(args, height, width)
            kinds[key] = Kind(settings, init, facts, watermark)
        kind_of[id(own)] = numbers[key]
    batches = plan(
        [line.prompt for line in lines],
        args.n_iter,
        args.n_samples,
        [kind_of[id(own)] for own in own_args],
        own_seeds(lines, own_args),
    )
    return list(kinds.values()), batches


def make(
    model: LatentDiffusion,
    kinds: list[Kind],
    batches: list[Batch],
    writer: PictureWriter,
    interrupt: Interrupt,
    no_metadata: bool,
) -> int:
    """Make and save what the record lacks, until it is there or the user ends it; the number that failed."""
    from ldm.generate import generate

    missing, failed = set(writer.record.missing()), 0
    steps = [kind.settings.steps_to_run for kind in kinds]
    adaptive = any(kind.settings.sampler == "dpm_adaptive" for kind in kinds)
    total = None if adaptive else sum(len(batch) * steps[batch.kind] for batch in batches)
    with StepBar(sum(map(len, batches)), total) as bar:
        for number, kind in enumerate(kinds):
            mine = [batch for batch in batches if batch.kind == number]
            if not mine or interrupt.asked:
                continue
            start = time.perf_counter()
            for batch, images in generate(model, mine, kind.settings, bar.step, kind.init_image):
                seconds = round((time.perf_counter() - start) / len(batch), 3)
                own_facts = image_facts(kind.settings, batch)
                for image, prompt, own in zip(images, batch.prompts, own_facts, strict=True):
                    if own["image"] in missing:
                        facts = kind.facts | {"prompt": prompt} | own
                        told = facts | {"seconds": seconds, "nan": image is None}
                        metadata = None if no_metadata else facts
                        failed += not save(writer, own["image"], image, metadata, told, kind.watermark, bar)
                bar.finish(len(batch))
                start = time.perf_counter()
                if interrupt.asked:
                    break
    return failed


def tell_steps(kind: Kind) -> None:
    """How many steps image to image runs."""
    if kind.init_image is not None:
        steps = kind.settings.steps_to_run
        trip = "" if steps else ": the pictures are the autoencoder's round trip"
        notice(f"img2img runs {steps} of {kind.settings.steps} steps{trip}")


def prompt_lines(args: argparse.Namespace) -> tuple[list[Line], list[argparse.Namespace]]:
    """The run's prompts, and the arguments of each: the command's, with the options of its line over them."""
    from ldm.prompts import Line, read_prompts

    if not args.from_file:
        return [Line(args.prompt)] * args.n_samples, [args] * args.n_samples
    lines = [line for line in read_prompts(args.from_file) for _ in range(args.repeat)]
    variants: dict[tuple, argparse.Namespace] = {(): args}
    for line in lines:
        if line.options not in variants:
            variants[line.options] = line_arguments(args, line)
    return lines, [variants[line.options] for line in lines]


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
        if options.get("seed", 0) == -1:
            raise InputError("a seed of -1; leave it out, and the line has the run's")
        return args.variant(options)
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


def save(
    writer: PictureWriter,
    k: int,
    image: np.ndarray | None,
    settings: dict[str, Any] | None,
    told: dict[str, Any],
    watermark: Watermarker | None,
    bar: StepBar,
) -> bool:
    """Write image k and its line of the manifest; False, and a notice, if it is NaN or cannot be written.

    Raises CannotWrite where no later image could be written, either.
    """
    if image is None:
        bar.notice(f"image {k} ({told['prompt']!r}) came out as NaN and is skipped")
        writer.record.add(k, None, told)
        return False
    try:
        writer.add(k, image, settings, told, watermark)
    except CannotWrite as error:
        if error.full:
            raise
        bar.notice(f"image {k}: {error}")
        writer.record.add(k, None, told | {"error": str(error)})
        return False
    return True


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
    told = {name: getattr(args, name) for name in ("n_iter", "watermark", "no_metadata")}
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


def image_facts(settings: Settings, batch: Batch) -> list[dict[str, int]]:
    """Number and seeds of each image, to make it alone; in the original's one stream it has no seed."""
    from ldm.sampling.noise import image_seed

    facts = []
    for k, given in zip(batch.numbers, batch.seeds or [None] * len(batch), strict=True):
        own = {"image": k}
        if settings.rng == "image":
            own["seed"] = image_seed(settings.seed, k) if given is None else given
            if settings.variation_seed is not None:
                own["variation_seed"] = image_seed(settings.variation_seed, k)
        facts.append(own)
    return facts


class Interrupt:
    """The first Ctrl-C or SIGTERM asks the run to end after the batch in hand, a second one ends it."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> Interrupt:
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere signals are not ours
            self.before = {name: signal.signal(name, self._ask) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        notice("ending after the images in hand; once more ends at once")

    def __exit__(self, *_: object) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)


def model_files(args: argparse.Namespace) -> tuple[ModelFiles, dict[str, Any]]:
    """The chosen model's files, with a notice if nobody chose them, and its `model:` section."""
    files = choose_model(args.config, args.ckpt)
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
    from ldm.init_image import read_init_image

    return read_init_image(args.init_img, args.H, args.W, args.resize, args.background, args.max_pixels)


def picture_size(args: argparse.Namespace, config: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels of text to image."""
    size = native_size(config)
    return args.H or size, args.W or size


def settings_of(args: argparse.Namespace, files: ModelFiles, height: int, width: int) -> Settings:
    """Checked arguments as the settings of a run."""
    from ldm.generate import Settings

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
        autocast=args.precision == "autocast",
    )


def facts_of(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The settings as an image tells them: those in use, the sampler's options among them."""
    facts = {name: value for name, value in vars(settings).items() if value is not None}
    facts |= facts.pop("options")
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
    return OutputFolder(args.outdir)


def watermarker(args: argparse.Namespace, height: int, width: int) -> Watermarker | None:
    """What marks the pictures, None if they are too small or `--watermark` is none."""
    if args.watermark == "none":
        return None
    if not Watermarker.fits(height, width):
        notice(f"No watermark: it needs 256x256 pixels and these pictures have {width}x{height}")
        return None
    return Watermarker(args.watermark)


def load(args: argparse.Namespace, files: ModelFiles, config: dict[str, Any]) -> LatentDiffusion:
    """The model on its device; InputError if it is not what `--C` and `--f` say."""
    from ldm.loading import load_model

    device = choose_device(args.device)
    model = load_model(config, files.weights, args.weights, args.allow_target)
    for flag, given, true in (("C", args.C, model.channels), ("f", args.f, model.first_stage_model.factor)):
        if given not in (None, true):
            raise InputError(f"--{flag} {given} does not fit this model: its value is {true}")
    return model.to(device)


def model_facts(args: argparse.Namespace, files: ModelFiles) -> dict[str, Any]:
    """What an image's settings say about the model."""
    from ldm import __version__
    from ldm.checkpoint import fingerprint

    return {
        "config": str(files.config),
        "checkpoint": str(files.weights),
        "model_hash": fingerprint(files.weights),
        "weights": args.weights,
        "precision": args.precision,
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


class StepBar:
    """A progress bar over `steps` sampling steps of all images, None if unknown, and images/s at its end."""

    def __init__(self, images: int, steps: int | None):
        from tqdm import tqdm

        self.finished = 0
        self.bar = tqdm(total=steps, unit="step", desc=f"{images} images")

    def __enter__(self) -> StepBar:
        return self

    def step(self, images: int) -> None:
        """One step of a batch of `images` is done."""
        self.bar.update(images)

    def finish(self, images: int) -> None:
        """A batch of `images` is done."""
        self.finished += images

    def notice(self, message: str) -> None:
        """One line above the bar."""
        self.bar.write(message, file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        rate = self.finished / max(self.bar.format_dict["elapsed"], 1e-9)
        self.bar.set_postfix_str(f"{rate:.2f} images/s")
        self.bar.close()


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
