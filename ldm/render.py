"""What the sampling scripts do between their arguments and their last line."""

from __future__ import annotations

import argparse
import hashlib
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ldm.cli import IMG2IMG_SCALE, SCALE, notice
from ldm.errors import InputError
from ldm.loading import ModelFiles, advised_scale, choose_model, native_size, read_config
from ldm.outputs import CannotWrite, OutputFolder, PictureWriter, Watermarker
from ldm.record import RunRecord

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ldm.generate import Settings
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.prompts import Batch


def render(args: argparse.Namespace) -> int:
    """From checked arguments to files: text to image, or with an `init_img` among them image to image.

    Returns the exit code: 1 if an image could not be made or saved, 130 if the user ended the run.
    """
    from ldm.prompts import plan, read_prompts

    prompts = read_prompts(args.from_file) if args.from_file else [args.prompt] * args.n_samples
    files, config = model_files(args)
    init_image = read_init(args)
    height, width = init_image.shape[:2] if init_image is not None else picture_size(args, config)
    batches = plan(prompts, args.n_iter, args.n_samples)
    # the output folder is tried, and a run to resume is found, before anything slow
    folder, watermark = output_folder(args), watermarker(args, height, width)

    from ldm.generate import generate

    if args.resume and args.seed == -1:
        args.seed = RunRecord.last_settings(folder.path).get("seed", -1)
    settings = settings_of(args, files, height, width)
    facts = facts_of(args, settings) | {"n_samples": args.n_samples} | model_facts(args, files)
    told = told_of(args, prompts, init_image)
    record = RunRecord(folder.path, facts | told, sum(map(len, batches)))
    resumed = args.resume and record.resume()
    missing = set(record.missing())
    batches = remaining(batches, missing, settings.rng)
    writer = PictureWriter(
        folder, record, watermark, not args.skip_save, not args.skip_grid, args.n_rows or args.n_samples
    )
    pictures, steps = iter(()), settings.steps_to_run
    if batches:
        model = load(args, files, config)
        check_prompts(model, [*prompts, args.negative_prompt])
        if init_image is not None:
            trip = "" if steps else ": the pictures are the autoencoder's round trip"
            notice(f"img2img runs {steps} of {settings.steps} steps{trip}")
    else:
        notice(f"all {record.images} images are there")
    count = sum(map(len, batches))
    failed = 0
    with (
        Interrupt() as interrupt,
        ending(record),
        StepBar(count, None if settings.sampler == "dpm_adaptive" else count * steps) as bar,
    ):
        if not resumed:
            record.start(folder.next_number)
        if batches:
            pictures = generate(model, batches, settings, bar.step, init_image)
        start = time.perf_counter()
        for batch, images in pictures:
            seconds = round((time.perf_counter() - start) / len(batch), 3)
            for k, prompt, image in zip(batch.numbers, batch.prompts, images, strict=True):
                if k not in missing:
                    continue
                own = facts | {"prompt": prompt, "image": k} | seeds(settings, k)
                told = own | {"seconds": seconds, "nan": image is None}
                failed += not save(writer, k, image, None if args.no_metadata else own, told, bar)
            bar.finish(len(batch))
            start = time.perf_counter()
            if interrupt.asked:
                break
        else:
            prompt = "\n".join(dict.fromkeys(prompts))
            writer.finish(None if args.no_metadata else facts | {"prompt": prompt})
    left = len(record.missing())
    if left:
        notice(f"{left} of {record.images} images are missing; the same command with --resume makes them")
    if failed:
        notice(f"{failed} of {record.images} images failed: manifest.jsonl says which")
    print(args.outdir)
    return 130 if interrupt.asked else 1 if failed else 0


def save(
    writer: PictureWriter,
    k: int,
    image: np.ndarray | None,
    settings: dict[str, Any] | None,
    told: dict[str, Any],
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
        writer.add(k, image, settings, told)
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


def told_of(args: argparse.Namespace, prompts: list[str], init_image: np.ndarray | None) -> dict[str, Any]:
    """What else a run's files depend on, prompts and init image as hashes that tell them from others."""
    text = "\n".join(prompts).encode("utf-8", "surrogateescape")
    told = {name: getattr(args, name) for name in ("n_iter", "watermark", "no_metadata")}
    told["prompts"] = f"{len(prompts)}, {_hash(text)}"
    return told if init_image is None else told | {"init image": _hash(init_image.tobytes())}


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def remaining(batches: list[Batch], missing: set[int], rng: str) -> list[Batch]:
    """The batches with missing images; of one stream for all also those before, which draw from it."""
    wanted = [i for i, batch in enumerate(batches) if missing & {*batch.numbers}]
    if rng == "compvis":
        return batches[: wanted[-1] + 1] if wanted else []
    return [batches[i] for i in wanted]


def seeds(settings: Settings, k: int) -> dict[str, int]:
    """The seeds with which image k can be made alone; in the original's one stream none has its own."""
    from ldm.sampling.noise import image_seed

    own = {"seed": settings.seed, "variation_seed": settings.variation_seed}
    return {
        name: image_seed(seed, k)
        for name, seed in own.items()
        if seed is not None and settings.rng == "image"
    }


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
        seed=choose_seed(args.seed),
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
