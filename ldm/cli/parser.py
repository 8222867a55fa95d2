"""The command line: arguments and their checks, exit codes. torch is not imported here."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ldm.errors import InputError
from ldm.images.names import FIELDS, check_template
from ldm.log import notice
from ldm.sampling import catalogue
from ldm.sampling.batches import MAX_SEED

WATERMARK = "StableDiffusionV1"  # the original's
SCALE, IMG2IMG_SCALE = 7.5, 5.0  # the original's
LARGEST = 1e15  # of numbers without another limit: floats hold whole ones exactly up to there
LONGEST_SIDE = 65_536
# what each picture of a run may have of its own
IMAGE_OPTIONS = (
    *("negative_prompt", "seed", "variation_seed", "variation_strength"),
    *("sampler", "steps", "ddim_steps", "schedule", "rho", "timesteps", "sigmas", "strength"),
    *("eta", "ddim_eta", "s_churn", "s_tmin", "s_tmax", "s_noise"),
    *("scale", "cfg_rescale", "guidance_start", "guidance_end"),
)
SAMPLER_OPTIONS = ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> None:
        raise InputError(message)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        for word in args or ():
            if word.startswith("--") and word.endswith("=--"):  # of which argparse makes an empty list
                raise InputError(f"{word} has no value that can be used")
        return super().parse_args(args, namespace)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Arguments, checked, with those of the picture that --like names under them.

        They also get a function `variant`, the same ones but for some options, and the `picture`'s settings.
        """
        argv, picture = self.like_picture(argv)
        try:
            args = self.parse_args(argv)
            check_arguments(args)
        except InputError as error:
            if picture:
                raise InputError(f"--like, or a flag that does not go with it: {error}") from error
            raise

        def variant(options: Mapping[str, Any]) -> argparse.Namespace:
            return self.parse([*argv, *(f"--{name}={value}" for name, value in options.items())])

        args.variant, args.picture = variant, picture
        return args

    def like_picture(self, argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """The command's words with those that --like stands for before them, and the picture's settings."""
        args = self.parse_args(argv)
        if not args.like:
            return list(argv), {}
        from ldm.cli.like import arguments_like, read_picture

        picture, unset = read_picture(args.like), object()
        blank = {name: unset for name, value in vars(args).items() if not isinstance(value, list)}
        given = {
            name
            for name, value in vars(self.parse_args(argv, argparse.Namespace(**blank))).items()
            if value is not unset
        }
        try:
            words = arguments_like(picture, given, vars(args))
        except InputError as error:
            raise InputError(f"--like {args.like}: {error}") from error
        return [*words, *argv, "--like="], picture


def number(kind: type, low: float, high: float = LARGEST) -> Callable[[str], float]:
    """An argparse type: an int or float in low … high; NaN and infinities are out of range."""

    def parse(text: str) -> float:
        bounds = f"{low:,} … {high:,}" if high != LARGEST else f"at least {low:,}"
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # NaN is not
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text} is not {what} in range: {bounds}")
        return value

    return parse


def number_or_auto(text: str) -> float | str:
    """The argparse type of a count that can be found out."""
    try:
        return text if text == "auto" else number(int, 1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or auto") from None


def txt2img_parser(prog: str = "txt2img.py", description: str = "Text to image.") -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=description)
    add_prompt_arguments(parser, outdir="outputs/txt2img-samples")
    add_sampling_arguments(parser, scale=SCALE, n_iter=2, n_samples=3)
    parser.add_argument("--H", type=number(int, 8, LONGEST_SIDE), help="height in pixels, a multiple of 8")
    parser.add_argument("--W", type=number(int, 8, LONGEST_SIDE), help="width in pixels, a multiple of 8")
    add_model_arguments(parser)
    parser.add_argument("--laion400m", action="store_true", help="use the LAION-400M model")
    add_output_arguments(parser)
    return parser


def img2img_parser(prog: str = "img2img.py", description: str = "Image to image.") -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=description)
    add_prompt_arguments(parser, outdir="outputs/img2img-samples")
    parser.add_argument("--init-img", nargs="?", metavar="FILE", help="the picture to start from")
    parser.add_argument(
        "--strength",
        type=number(float, 0, 1),
        default=0.75,
        help="share of the steps that run: 0 gives the picture back, 1 ignores it (0.75)",
    )
    add_sampling_arguments(parser, scale=IMG2IMG_SCALE, n_iter=1, n_samples=2)
    add_size_arguments(parser)
    add_model_arguments(parser)
    add_output_arguments(parser)
    return parser


def add_prompt_arguments(parser: argparse.ArgumentParser, outdir: str) -> None:
    parser.add_argument(
        "--prompt",
        nargs="?",
        default="a painting of a virus monster playing guitar",
        help="the text to render",
    )
    parser.add_argument("--negative_prompt", default="", metavar="TEXT", help="what to steer away from")
    parser.add_argument(
        "--from-file",
        metavar="FILE",
        help="prompts, one per line, or JSON lines with options; - is standard input",
    )
    parser.add_argument(
        "--repeat", type=number(int, 1), default=1, metavar="N", help="each prompt of the file N times (1)"
    )
    parser.add_argument(
        "--like",
        metavar="IMAGE",
        help="take every setting from a picture made here, or by a tool that writes A1111 text; "
        "other flags override",
    )
    parser.add_argument("--outdir", nargs="?", default=outdir, help=f"folder for the results ({outdir})")


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """How an init image becomes as large as the pictures."""
    add = parser.add_argument_group("init image").add_argument
    add(
        "--H",
        type=number(int, 8, LONGEST_SIDE),
        help="height in pixels, a multiple of 8 (the picture's, floored to 64s)",
    )
    add(
        "--W",
        type=number(int, 8, LONGEST_SIDE),
        help="width in pixels, a multiple of 8 (the picture's, floored to 64s)",
    )
    add("--resize", choices=("stretch", "crop", "pad"), default="stretch", help="how it is fitted (stretch)")
    add(
        "--background",
        default="white",
        metavar="COLOUR",
        help="behind transparency, and the padding (white)",
    )
    add(
        "--max_pixels",
        type=number(int, 1),
        default=64_000_000,
        metavar="N",
        help="refuse larger pictures before they are decoded (64 million)",
    )


class ListSamplers(argparse.Action):
    """Prints the table of samplers and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(catalogue.table())
        parser.exit()


def add_sampling_arguments(
    parser: argparse.ArgumentParser, scale: float, n_iter: int, n_samples: int
) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add(
        "--ddim_steps",
        "--steps",
        type=number(int, 1, 1000),
        default=50,
        metavar="N",
        help="sampling steps, 1 to 1000 (50)",
    )
    add("--plms", action="store_true", help="use the PLMS sampler")
    add("--dpm_solver", "--dpm", action="store_true", help="use the DPM-Solver++ (2M) sampler")
    add("--sampler", metavar="NAME", help='sampler by any of its names, such as "Euler a" (ddim)')
    add("--list_samplers", action=ListSamplers, nargs=0, help="show all samplers and schedules, and end")
    add("--schedule", metavar="NAME", help="which noise levels the steps visit (the sampler's own)")
    add(
        "--rho",
        type=number(float, 0.1, 100),
        help="of the karras (7) and polyexponential (1) schedules",
    )
    add("--timesteps", metavar="LIST", help="own timesteps instead of a schedule: 999,700,400,100")
    add("--sigmas", metavar="LIST", help="own noise levels instead of a schedule, the last too: 14.6,3,0.5,0")
    add("--zero_snr", action="store_true", help="rescale a v-model's noise schedule to zero terminal SNR")
    add("--ddim_eta", type=number(float, 0, 1), default=0.0, metavar="ETA", help="DDIM's noise, 0 to 1 (0)")
    add("--eta", type=number(float, 0, 1), help="noise of any sampler that has it, 0 to 1 (the sampler's)")
    add("--s_churn", type=number(float, 0), help="noise that euler, heun and dpm_2 add over the run (0)")
    add("--s_tmin", type=number(float, 0), help="churn at sigmas from this one (0)")
    add("--s_tmax", type=number(float, 0), help="churn at sigmas up to this one")
    add("--s_noise", type=number(float, 0, 10), help="factor on the noise of the steps (1)")
    add(
        "--scale",
        type=number(float, -1e4, 1e4),
        help=f"guidance scale; 1 is none ({scale}, unless the config's sampling: section says otherwise)",
    )
    add("--cfg_rescale", type=number(float, 0, 1), default=0.0, metavar="PHI", help="tames large scales (0)")
    add(
        "--guidance_start",
        type=number(float, 0, 1),
        default=0.0,
        help="guide from this share of the steps",
    )
    add("--guidance_end", type=number(float, 0, 1), default=1.0, help="guide up to this share of the steps")
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
        help=f"images of one prompt in a round, or prompts of the file ({n_samples})",
    )
    add(
        "--batch_size",
        type=number_or_auto,
        metavar="N",
        help="images sampled together (n_samples); auto: as many as fit into memory",
    )
    add(
        "--seed",
        type=number(int, -1, MAX_SEED),
        default=42,
        help="image k has seed SEED + k; -1 picks a seed and prints it (42)",
    )
    add(
        "--variation_seed",
        type=number(int, 0, MAX_SEED),
        metavar="SEED",
        help="vary towards this seed's noise",
    )
    add("--variation_strength", type=number(float, 0, 1), metavar="T", help="how far, 0 to 1")
    add("--fixed_code", action="store_true", help="start every batch from the same noise")
    add(
        "--start_seed",
        type=number(int, 0, MAX_SEED),
        metavar="SEED",
        help="with --fixed_code: start from this seed's noise (SEED)",
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
        choices=("full", "autocast", "half", "bf16"),
        help="of weights and activations: half on a GPU, full on a CPU; bf16 is faster on CPUs that have it",
    )
    add(
        "--vae_tiling",
        action="store_true",
        help="encode and decode large pictures in blended tiles: less memory, slightly other colours",
    )
    add(
        "--attention_slicing",
        action="store_true",
        help="attention in slices where the device has no fused kernel: less memory",
    )
    add(
        "--low_vram",
        nargs="?",
        const="parts",
        choices=("parts", "max"),
        help="weights are on the GPU only while they work; max: the UNet block by block",
    )
    add(
        "--deepcache",
        type=number(int, 1, 1000),
        default=1,
        metavar="N",
        help="the UNet's deep features at every N-th call only: faster, approximate (1)",
    )
    add(
        "--tome",
        type=number(float, 0, 0.75),
        default=0.0,
        metavar="RATIO",
        help="merge this share of self-attention's tokens: faster, approximate (0)",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the UNet and the decoder for the GPU: slow to start, faster after (kept on disk)",
    )
    add(
        "--eager",
        action="store_true",
        help="plain PyTorch, the reference: no recorded steps on a GPU, nothing folded or shared on a CPU",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--devices", type=number(int, 1), metavar="N", help="processes on this machine, one to a device (1)")
    add("--num_nodes", type=number(int, 1), metavar="M", help="machines that work on this run together (1)")
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
    add("--resume", action="store_true", help="finish an interrupted run of the same settings in --outdir")
    add("--format", choices=("png", "jpg", "webp"), default="png", help="of the files (png)")
    add("--quality", type=number(int, 1, 100), default=95, help="of jpg and webp, 1 to 100 (95)")
    add(
        "--filename",
        default="{number:05}",
        metavar="TEMPLATE",
        help=f"names of the files in samples/, from {', '.join(FIELDS)} ({{number:05}})".replace("%", "%%"),
    )
    add("--skip_grid", action="store_true", help="do not save a grid")
    add("--skip_save", action="store_true", help="do not save single images")
    add("--n_rows", type=number(int, 0), default=0, help="images in a row of the grid (default: n_samples)")
    add(
        "--safety",
        choices=("auto", "on", "off", "flag"),
        default="auto",
        help="models/safety-checker blackens what it finds (on), only marks it (flag), is not asked (off); "
        "auto is on where it is there",
    )
    add("--watermark", default=WATERMARK, metavar="TEXT", help=f"invisible watermark, or none ({WATERMARK})")
    add("--no_metadata", action="store_true", help="do not write the settings into the images")
    add("--json", action="store_true", help="print one JSON line per image")
    add("--quiet", action="store_true", help="no progress and no notices, only results and errors")
    add("--log_file", metavar="FILE", help="append what happens, with its time, to this file")
    add("--debug", action="store_true", help="show where an error comes from")


def check_arguments(args: argparse.Namespace) -> None:
    """Everything about arguments that concerns more than one of them. InputError.

    Sets `sampler`, `schedule`, `timesteps`, `sigmas` and `options`, the sampler's own.
    """
    if getattr(args, "laion400m", False):
        raise InputError(
            "--laion400m: its text encoder (BERT) is not available yet; use a Stable Diffusion v1 model"
        )
    for name in ("prompt", "outdir", "init_img"):
        if getattr(args, name, "") is None:
            raise InputError(f"--{name.replace('_', '-')} is missing, or has no value")
    check_template(args.filename)
    _check_sampler(args)
    _check_schedule(args)
    if args.guidance_start >= args.guidance_end:
        raise InputError(
            f"--guidance_start {args.guidance_start:g} is not below --guidance_end {args.guidance_end:g}; "
            "--scale 1 samples without guidance"
        )
    if (args.variation_seed is None) != (args.variation_strength is None):
        given, lacking = "strength", "seed"
        if args.variation_strength is None:
            given, lacking = lacking, given
        raise InputError(f"--variation_{given} needs a --variation_{lacking}, too")
    if args.variation_seed is not None and args.rng == "compvis":
        raise InputError(
            "--variation_seed is for --rng image: in the original's one stream no image has a seed"
        )
    if args.start_seed is not None and (not args.fixed_code or args.rng == "compvis"):
        raise InputError(f"--start_seed {args.start_seed} is for --fixed_code with --rng image")
    if args.batch_size is not None and (args.rng == "compvis" or args.fixed_code):
        why = "--rng compvis draws" if args.rng == "compvis" else "--fixed_code starts"
        raise InputError(
            f"--batch_size {args.batch_size}: {why} for n_samples images at a time; leave it out"
        )
    for name in ("H", "W"):
        size = getattr(args, name)
        if size is not None and size % (args.f or 8):
            step = args.f or 8
            nearest = max(step, round(size / step) * step)
            raise InputError(f"--{name} {size} is not a multiple of {step}; the nearest is {nearest}")


def _check_sampler(args: argparse.Namespace) -> None:
    implied = "dpmpp_2m" if args.dpm_solver else "plms" if args.plms else None
    named, args.implied_schedule = catalogue.resolve(args.sampler) if args.sampler else (None, None)
    if implied and named not in (None, implied):
        flag = "--dpm_solver" if args.dpm_solver else "--plms"
        raise InputError(f"--sampler {args.sampler} and {flag} name different samplers; give one of them")
    args.sampler = named or implied or "ddim"
    if args.ddim_eta and args.sampler == "plms":
        raise InputError(f"--ddim_eta {args.ddim_eta:g} with PLMS: its eta is always 0; use --sampler ddim")
    if args.ddim_eta and args.dpm_solver:
        notice(f"--ddim_eta {args.ddim_eta:g} does nothing with --dpm_solver, as in the original")
    elif args.ddim_eta and args.sampler != "ddim":
        raise InputError(f"--ddim_eta {args.ddim_eta:g} with {args.sampler}: it is DDIM's; there is --eta")
    if args.ddim_eta and args.eta is not None:
        raise InputError("--ddim_eta and --eta are one; give one of them")
    given = {name: getattr(args, name) for name in SAMPLER_OPTIONS if getattr(args, name) is not None}
    for name, value in given.items():
        if name not in catalogue.SAMPLERS[args.sampler].options:
            having = ", ".join(n for n, facts in catalogue.SAMPLERS.items() if name in facts.options)
            raise InputError(f"--{name} {value:g}: {args.sampler} has no such option; it is one of {having}")
    if "s_churn" in catalogue.SAMPLERS[args.sampler].options and given and not given.get("s_churn"):
        raise InputError(f"--{min(given)} without --s_churn: {args.sampler} adds no noise")
    if given.get("s_tmin", 0) > given.get("s_tmax", math.inf):
        raise InputError(f"--s_tmin {args.s_tmin:g} is above --s_tmax {args.s_tmax:g}")
    args.options = {"eta": args.ddim_eta} | given if args.sampler == "ddim" else given


def _check_schedule(args: argparse.Namespace) -> None:
    if args.schedule is not None:
        args.schedule = catalogue.resolve_schedule(args.schedule)
    if args.implied_schedule and args.schedule not in (None, args.implied_schedule):
        raise InputError(
            f"--sampler implies the {args.implied_schedule} schedule and --schedule is {args.schedule}; "
            "give one of them"
        )
    args.schedule = args.schedule or args.implied_schedule
    lists = [name for name in ("timesteps", "sigmas") if getattr(args, name) is not None]
    if len(lists) + (args.schedule is not None) > 1:
        names = " and ".join(f"--{name}" for name in [*(["schedule"] if args.schedule else []), *lists])
        raise InputError(f"{names} all say which noise levels to visit; give one of them")
    args.timesteps = falling_list("--timesteps", args.timesteps, 999, 1)
    args.sigmas = falling_list("--sigmas", args.sigmas, 1e5, 2)
    if args.zero_snr and not args.schedule and not lists:
        args.schedule = "trailing"  # visits the last timestep, which the rescaling is for
    if args.rho is not None and args.schedule not in catalogue.RHO:
        raise InputError(f"--rho {args.rho:g} is for --schedule {' or '.join(catalogue.RHO)}")
    if lists:
        steps = len(args.timesteps) if args.timesteps else len(args.sigmas) - 1
        if args.ddim_steps not in (50, steps):  # 50: not given
            raise InputError(
                f"--ddim_steps {args.ddim_steps}, but --{lists[0]} makes {steps} steps; give one"
            )
        args.ddim_steps = steps


def falling_list(flag: str, text: str | None, highest: float, least: int) -> tuple[float, ...] | None:
    """Numbers in 0 … highest, each below the one before; None stays None."""
    if text is None:
        return None
    parse = number(float, 0, highest)
    try:
        values = tuple(parse(word) for word in text.replace(",", " ").split())
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{flag}: {error}") from error
    for value, following in pairwise(values):
        if following >= value:
            raise InputError(f"{flag}: the list must fall, but {following:g} comes after {value:g}")
    if len(values) < least:
        raise InputError(f"{flag} {text!r}: at least {least} numbers are needed, separated by commas")
    return values
