"""What the sampling scripts do between their arguments and their last line."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ldm.cli import IMG2IMG_SCALE, SCALE, notice
from ldm.errors import InputError
from ldm.loading import ModelFiles, advised_scale, choose_model, native_size, read_config

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ldm.generate import Settings
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.outputs import PictureWriter


def render(args: argparse.Namespace) -> int:
    """From checked arguments to files: text to image, or with an `init_img` among them image to image.

    Returns the exit code: 1 if an image came out as NaN.
    """
    from ldm.prompts import plan, read_prompts

    prompts = read_prompts(args.from_file) if args.from_file else [args.prompt] * args.n_samples
    files, config = model_files(args)
    init_image = read_init(args)
    height, width = init_image.shape[:2] if init_image is not None else picture_size(args, config)
    writer = picture_writer(args, height, width)  # tries the output folder before anything slow

    from ldm.generate import generate
    from ldm.sampling.noise import image_seed

    model = load(args, files, config)
    check_prompts(model, [*prompts, args.negative_prompt])
    settings = settings_of(args, files, height, width)
    steps = settings.steps_to_run
    if init_image is not None:
        trip = "" if steps else ": the pictures are the autoencoder's round trip"
        notice(f"img2img runs {steps} of {settings.steps} steps{trip}")
    facts = facts_of(args, settings) | {"n_samples": args.n_samples} | model_facts(args, files)
    batches = plan(prompts, args.n_iter, args.n_samples)
    skipped = 0
    count = sum(map(len, batches))
    with StepBar(count, None if settings.sampler == "dpm_adaptive" else count * steps) as bar:
        for batch, images in generate(model, batches, settings, bar.step, init_image):
            for k, (prompt, image) in enumerate(zip(batch.prompts, images, strict=True), batch.first):
                if image is None:
                    bar.notice(f"image {k} ({prompt!r}) came out as NaN and is skipped")
                    skipped += 1
                    continue
                own = {"prompt": prompt, "image": k}
                if settings.rng == "image":  # the original's one stream has no seed for image k alone
                    own["seed"] = image_seed(settings.seed, k)
                if settings.variation_seed is not None:
                    own["variation_seed"] = image_seed(settings.variation_seed, k)
                writer.add(image, None if args.no_metadata else facts | own)
            bar.finish(len(batch))
    prompt = "\n".join(dict.fromkeys(prompts))
    writer.finish(args.n_rows or args.n_samples, None if args.no_metadata else facts | {"prompt": prompt})
    print(args.outdir)
    return 1 if skipped else 0


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


def picture_writer(args: argparse.Namespace, height: int, width: int) -> PictureWriter:
    """What saves the pictures; InputError if `--outdir` cannot be written."""
    from ldm.outputs import OutputFolder, PictureWriter, Watermarker

    folder = OutputFolder(args.outdir)
    watermark = None
    if args.watermark != "none" and Watermarker.fits(height, width):
        watermark = Watermarker(args.watermark)
    elif args.watermark != "none":
        notice(f"No watermark: it needs 256x256 pixels and these pictures have {width}x{height}")
    return PictureWriter(folder, watermark, images=not args.skip_save, grid=not args.skip_grid)


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
