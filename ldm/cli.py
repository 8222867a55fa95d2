"""The command line: arguments and their checks, exit codes, devices. torch is not imported here."""

from __future__ import annotations

import argparse
import math
import secrets
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import InputError

if TYPE_CHECKING:
    import torch

    from ldm.loading import ModelFiles
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.outputs import PictureWriter

SAMPLER_NAMES = ("ddim", "plms", "dpmpp_2m")
WATERMARK = "StableDiffusionV1"  # the original's
SCALE = 7.5  # the original's for text to image


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: an int or float in low … high; NaN and infinities are out of range."""

    def parse(text: str) -> float:
        bounds = f"{low:,} … {high:,}" if math.isfinite(high) else f"at least {low:,}"
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text} is not {what} in range: {bounds}")
        return value

    return parse


def txt2img_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="txt2img.py", description="Text to image.")
    parser.add_argument(
        "--prompt",
        nargs="?",
        default="a painting of a virus monster playing guitar",
        help="the text to render",
    )
    parser.add_argument("--negative_prompt", default="", metavar="TEXT", help="what to steer away from")
    parser.add_argument("--from-file", metavar="FILE", help="read prompts from this UTF-8 file, one per line")
    parser.add_argument(
        "--outdir", nargs="?", default="outputs/txt2img-samples", help="folder for the results"
    )
    add_sampling_arguments(parser, scale=SCALE, n_iter=2, n_samples=3)
    parser.add_argument("--fixed_code", action="store_true", help="start every batch from the same noise")
    parser.add_argument("--H", type=number(int, 8), help="height in pixels, a multiple of 8")
    parser.add_argument("--W", type=number(int, 8), help="width in pixels, a multiple of 8")
    add_model_arguments(parser)
    parser.add_argument("--laion400m", action="store_true", help="use the LAION-400M model")
    add_output_arguments(parser)
    return parser


def add_sampling_arguments(
    parser: argparse.ArgumentParser, scale: float, n_iter: int, n_samples: int
) -> None:
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add(
        "--ddim_steps",
        type=number(int, 1, 1000),
        default=50,
        metavar="N",
        help="sampling steps, 1 to 1000 (50)",
    )
    add("--plms", action="store_true", help="use the PLMS sampler")
    add("--dpm_solver", action="store_true", help="use the DPM-Solver++ (2M) sampler")
    add("--sampler", choices=SAMPLER_NAMES, help="sampler by name (ddim)")
    add("--ddim_eta", type=number(float, 0, 1), default=0.0, metavar="ETA", help="DDIM's noise, 0 to 1 (0)")
    add(
        "--scale",
        type=number(float, -1e4, 1e4),
        help=f"guidance scale; 1 is none ({scale}, unless the config's sampling: section says otherwise)",
    )
    add(
        "--n_iter",
        type=number(int, 1),
        default=n_iter,
        metavar="N",
        help=f"repeat all of it N times ({n_iter})",
    )
    add(
        "--n_samples",
        type=number(int, 1),
        default=n_samples,
        metavar="N",
        help=f"batch size: images of one prompt, or prompts of the file ({n_samples})",
    )
    add(
        "--seed",
        type=number(int, -1, 2**63 - 1),
        default=42,
        help="image k has seed SEED + k; -1 picks a seed and prints it (42)",
    )
    add(
        "--rng",
        choices=("image", "compvis"),
        default="image",
        help="image: every image has a noise stream of its own (default); compvis: the original's one stream",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--config", metavar="YAML", help="model configuration")
    add("--ckpt", metavar="FILE", help="weights, .ckpt or .safetensors")
    add(
        "--weights",
        choices=("raw", "ema"),
        help="which weights of the checkpoint (default: the config's use_ema)",
    )
    add("--C", type=number(int, 1), help="latent channels (default: the model's)")
    add("--f", type=number(int, 1), help="downsampling factor (default: the model's)")
    add(
        "--precision",
        choices=("full", "autocast"),
        default="autocast",
        help="autocast is full precision on a CPU",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add(
        "--allow_target",
        action="append",
        default=[],
        metavar="PREFIX",
        help="let the config name classes of this package",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--skip_grid", action="store_true", help="do not save a grid")
    add("--skip_save", action="store_true", help="do not save single images")
    add("--n_rows", type=number(int, 0), default=0, help="images in a row of the grid (default: n_samples)")
    add("--watermark", default=WATERMARK, metavar="TEXT", help=f"invisible watermark, or none ({WATERMARK})")
    add("--no_metadata", action="store_true", help="do not write the settings into the images")
    add("--debug", action="store_true", help="show where an error comes from")


def check_arguments(args: argparse.Namespace) -> None:
    """Everything about arguments that concerns more than one of them; sets `args.sampler`. InputError."""
    if args.laion400m:
        raise InputError(
            "--laion400m: its text encoder (BERT) is not available yet; use a Stable Diffusion v1 model"
        )
    for name in ("prompt", "outdir"):
        if getattr(args, name) is None:
            raise InputError(f"--{name} needs a value")
    implied = "dpmpp_2m" if args.dpm_solver else "plms" if args.plms else None
    if implied and args.sampler not in (None, implied):
        flag = "--dpm_solver" if args.dpm_solver else "--plms"
        raise InputError(f"--sampler {args.sampler} and {flag} name different samplers; give one of them")
    args.sampler = args.sampler or implied or "ddim"
    if args.ddim_eta and args.sampler == "plms":
        raise InputError(f"--ddim_eta {args.ddim_eta:g} with PLMS: its eta is always 0; use --sampler ddim")
    for name in ("H", "W"):
        size = getattr(args, name)
        if size is not None and size % (args.f or 8):
            step = args.f or 8
            nearest = max(step, round(size / step) * step)
            raise InputError(f"--{name} {size} is not a multiple of {step}; the nearest is {nearest}")


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
    """A progress bar over the sampling steps of a run, and images/s at its end."""

    def __init__(self, images: int, steps: int):
        from tqdm import tqdm

        self.images, self.steps = images, steps
        self.bar = tqdm(total=images * steps, unit="step", desc=f"{images} images")

    def __enter__(self) -> StepBar:
        return self

    def step(self, images: int) -> None:
        """One step of a batch of `images` is done."""
        self.bar.update(images)

    def notice(self, message: str) -> None:
        """One line above the bar."""
        self.bar.write(message, file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        rate = self.bar.n / self.steps / max(self.bar.format_dict["elapsed"], 1e-9)
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


def one_line(message: object) -> str:
    """The message without the line ends that a file name or a library's error may bring along."""
    return " ".join(str(message).splitlines())


def notice(message: str) -> None:
    """One line for the user that is no result."""
    print(message, file=sys.stderr)


def run(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """main's exit code. The user's errors are one line and exit code 2; --debug shows the traceback."""
    arguments = sys.argv[1:] if argv is None else argv
    prog = Path(sys.argv[0]).name
    try:
        return main(arguments)
    except (InputError, OSError) as error:  # a path that the system refuses is the user's to mend
        if "--debug" in arguments:
            raise
        notice(f"{prog}: error: {one_line(error)}")
        return 2
    except KeyboardInterrupt:
        notice(f"{prog}: interrupted; the images that were finished are saved")
        return 130
    except Exception as error:
        if "--debug" in arguments:
            raise
        notice(f"{prog}: {type(error).__name__}: {one_line(error)} (--debug shows where)")
        return 1
