"""The options of the commands, made from the fields of their dataclasses. torch is not imported here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ldm.errors import FieldError, InputError, ValueFieldError
from ldm.fields import Setting, settings_of
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.request import DEPTH, INIT, MASK, MAX_SEED, UPSCALE, ImageRequest
from ldm.pipeline.settings.passes import PASSES
from ldm.runs.options import RunOptions
from ldm.service.options import ServiceOptions

PROMPT = "a painting of a virus monster playing guitar"  # the original's
UPSCALE_PROMPT = "a high quality professional photograph"  # of Stability's demo


# options that are no field of a dataclass
DDIM_ETA = Setting(
    "DDIM's noise, 0 to 1", low=0, high=1, metavar="ETA", name="ddim_eta", kind=float, default=0.0
)
WEIGHTS = Setting("which weights of the checkpoint", choices=("raw", "ema"), name="weights")


def spellings_of(name: str) -> tuple[str, ...]:
    """The flags of a setting."""
    for owner in (ImageRequest, RuntimeOptions, RunOptions):
        if each := settings_of(owner).get(name):
            return each.spellings
    return ("--from-file",) if name == "from_file" else (f"--{name}",)


def flag_of(name: str) -> str:
    return spellings_of(name)[0]


def in_flags(error: InputError) -> str:
    """The message of an error, with flags for the names of settings."""
    if isinstance(error, ValueFieldError):
        return error.spelled(lambda name: f"argument {'/'.join(spellings_of(name))}")
    return error.spelled(flag_of) if isinstance(error, FieldError) else str(error)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line.

    `command_defaults` are the original's numbers for a command, `owner` is the class of its requests.
    `request_defaults` are values of the request's own settings, and `groups` those groups of its settings
    that the command has besides text to image's. For each image `needed` must be given, and one of `one_of`.
    `task` is what its model is for.
    """

    command_defaults: dict[str, Any]
    request_defaults: dict[str, Any]
    owner: type[ImageRequest] = ImageRequest
    groups: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    task = "text"

    def error(self, message: str) -> None:
        raise InputError(message)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        for word in args or ():
            if word.startswith("--") and word.endswith("=--"):  # of which argparse makes an empty list
                raise InputError(f"{word} has no value that can be used")
        return super().parse_args(args, namespace)


def number(kind: type, low: float, high: float | None = None) -> Callable[[str], float]:
    """An argparse type: an int or float in low … high; NaN and infinities are out of range."""
    return option_type(Setting("", low=low, high=high, kind=kind))


def option_type(each: Setting) -> Callable[[str], Any]:
    """The argparse type of a setting."""

    def parse(text: str) -> Any:
        try:
            return each.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def add_options(
    parser: argparse.ArgumentParser,
    owner: type,
    *,
    leave_out: Iterable[str] = (),
    defaults: dict[str, Any] | None = None,
    title: str | None = None,
) -> None:
    """An option for each setting of a dataclass, in its group, or in that of one title.

    Only options that are given are in the result.
    """
    for name, each in settings_of(owner).items():
        if name in leave_out:
            continue
        group = group_of(parser, title or each.group)
        facts: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS,
            "help": help_text(each, defaults),
        }
        if each.kind is bool:
            # without a default of its own it can be turned off, too: --no-name
            facts["action"] = argparse.BooleanOptionalAction if each.default is None else "store_true"
        else:
            facts |= {"type": option_type(each), "metavar": each.metavar}
            if each.choices:
                facts |= {"choices": each.choices, "type": str}
            if each.values > 1:
                facts |= {"nargs": each.values, "metavar": tuple(each.metavar.split())}
            elif each.kind is list:
                facts["action"] = "append"
            if each.bare is not None:
                facts |= {"nargs": "?", "const": each.bare}
        group.add_argument(*each.spellings, **facts)


def group_of(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """The parser's group of options with this title, made if there is none."""
    known = {group.title: group for group in parser._action_groups}
    return known.get(title) or parser.add_argument_group(title)


def help_text(each: Setting, defaults: dict[str, Any] | None = None) -> str:
    """The help of an option with its default behind it, in letters that any terminal has."""
    default = (defaults or {}).get(each.name, each.shown_default)
    default = "on" if default is True else str(default).replace("∞", "no limit")
    text = each.help
    ranged = each.kind in (int, float) and each.high is not None and each.high <= 10_000
    if ranged and "0 to 1" not in text:
        text += f", {each.low:,g} to {each.high:,g}"
    text = f"{text} ({default})" if default else text
    return text.replace("…", "to").replace("%", "%%")


class ListSamplers(argparse.Action):
    """Prints the table of samplers and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from ldm.sampling import catalogue

        print(catalogue.table())
        parser.exit()


# What a command draws by default: the original's numbers.
TXT2IMG = {"n_iter": 2, "n_samples": 3, "outdir": "outputs/txt2img-samples"}
IMG2IMG = {"n_iter": 1, "n_samples": 2, "outdir": "outputs/img2img-samples"}
ONE_IMAGE = {"n_iter": 1, "n_samples": 1}
EXTRA_GROUPS = (INIT, MASK, DEPTH, UPSCALE)


def txt2img_parser(
    prog: str = "txt2img.py", description: str = "Text to image.", defaults: dict[str, Any] | None = None
) -> Parser:
    """Text to image's options; `defaults` are those of another command that has them, too."""
    parser = _image_parser(prog, description, TXT2IMG | (defaults or {}))
    text = "use the LAION-400M model in models/ldm/text2img-large, of 256x256 pixels"
    group_of(parser, "model").add_argument("--laion400m", action="store_true", help=text)
    return parser


def img2img_parser(
    prog: str = "img2img.py",
    description: str = "Image to image.",
    defaults: dict[str, Any] | None = None,
    *,
    folders: bool = True,
) -> Parser:
    """Image to image's options; `defaults` are those of another command that has them, too.

    `folders` says whether that command takes a folder of init images.
    """
    return _image_parser(
        prog,
        description,
        IMG2IMG | (defaults or {}),
        (INIT,),
        needed=("init_img",),
        request_defaults={"strength": 0.75},
        folders=folders,
    )


def compare_parser(description: str | None = None, *, with_init: bool = False) -> Parser:
    """compare.py's options: text to image's, or with an init image image to image's, and the axes."""
    facts: tuple[str, str, dict[str, Any]] = (
        "compare.py",
        description or "Labelled sheets over the values of options.",
        ONE_IMAGE | {"outdir": "outputs/compare"},
    )
    parser = img2img_parser(*facts, folders=False) if with_init else txt2img_parser(*facts)
    for flag, where in (("--x", "columns"), ("--y", "rows"), ("--z", "pages")):
        parser.add_argument(
            flag,
            nargs="+",
            required=flag != "--z",
            metavar=("OPTION", "VALUE"),
            help=f"what the {where} vary",
        )
    return parser


def walk_parser() -> Parser:
    """walk.py's options: text to image's, and the places that a walk comes by."""
    defaults = ONE_IMAGE | {"outdir": "outputs/walk", "skip_grid": True}
    parser = txt2img_parser("walk.py", "A walk between prompts and seeds.", defaults)
    add = parser.add_argument
    add("--prompts", nargs="+", required=True, metavar="PROMPT", help="where the walk comes by")
    text = "of the noise there (42, or that of the image of --like)"
    add("--seeds", nargs="+", type=number(int, 0, MAX_SEED), metavar="SEED", help=text)
    frames = number(int, 2, 100_000)
    add("--frames", type=frames, default=30, metavar="N", help="of the whole walk (30)")
    add("--loop", action="store_true", help="walk back to the start")
    add("--fps", type=number(int, 1, 240), default=12, metavar="N", help="frames of a second (12)")
    return parser


def inpaint_parser(prog: str = "inpaint.py", description: str = "Paint a part of an image anew.") -> Parser:
    defaults = ONE_IMAGE | {"outdir": "outputs/inpaint-samples"}
    parser = _image_parser(
        prog,
        description,
        defaults,
        (INIT, MASK),
        needed=("init_img",),
        request_defaults={"strength": 1.0},
        task="inpaint",
    )
    parser.one_of = ("mask", "outpaint")
    return parser


def depth2img_parser(
    prog: str = "depth2img.py", description: str = "Paint over the depth of an image."
) -> Parser:
    defaults = ONE_IMAGE | {"outdir": "outputs/depth2img-samples"}
    parser = _image_parser(
        prog, description, defaults, (INIT, DEPTH), request_defaults={"strength": 0.9}, task="depth"
    )
    parser.one_of = ("init_img", "depth")
    return parser


def upscale_parser(prog: str = "upscale.py", description: str = "Enlarge images four times.") -> Parser:
    defaults = ONE_IMAGE | {"outdir": "outputs/upscale-samples", "skip_grid": True}  # of large images
    request_defaults = {"noise_level": 20, "prompt": UPSCALE_PROMPT}
    parser = _image_parser(
        prog, description, defaults, (INIT, UPSCALE), request_defaults=request_defaults, task="upscale"
    )
    parser.one_of = ("init_img",)
    text = "a pixel upscaler, such as ESRGAN, in place of a diffusion model: no prompt, one pass"
    group_of(parser, "model").add_argument("--model", metavar="FILE", help=text)
    return parser


def _image_parser(
    prog: str,
    description: str,
    defaults: dict[str, Any],
    groups: tuple[str, ...] = (),
    *,
    needed: tuple[str, ...] = (),
    request_defaults: dict[str, Any] | None = None,
    task: str = "text",
    folders: bool = True,
) -> Parser:
    """The parser of a command that makes images; see `Parser` for the arguments."""
    parser = Parser(prog=prog, description=description, argument_default=argparse.SUPPRESS)
    parser.command_defaults, parser.request_defaults = defaults, request_defaults or {}
    parser.groups, parser.needed, parser.task = groups, needed, task
    add = group_of(parser, "prompt").add_argument
    add("--prompt", nargs="?", help=f"the text to render ({parser.request_defaults.get('prompt', PROMPT)})")
    add(
        "--from-file",
        metavar="FILE",
        help="prompts, one per line, or JSON lines with options; - is standard input",
    )
    add("--repeat", type=number(int, 1), metavar="N", help="each prompt of the file N times (1)")
    add(
        "--expand",
        choices=("random", "all"),
        help="choices in prompts, {red|blue}, and wildcards: random draws them anew for each image, by its "
        "seed; all makes every combination (default: random with --wildcards, else none)",
    )
    add(
        "--wildcards",
        metavar="DIR",
        help="folder of text files: __name__ in a prompt becomes a line of name.txt",
    )
    add(
        "--like",
        metavar="IMAGE",
        help="take every setting from an image made here, or by a tool that writes them as AUTOMATIC1111's "
        "web UI (A1111) does; other flags override",
    )
    add("--outdir", nargs="?", help=f"folder for the results ({defaults['outdir']})")
    add = group_of(parser, "sampling").add_argument
    add("--plms", action="store_true", help="use the PLMS sampler")
    add("--dpm_solver", "--dpm", action="store_true", help="use the DPM-Solver++ (2M) sampler")
    add("--list_samplers", action=ListSamplers, nargs=0, help="show all samplers and schedules, and end")
    add("--ddim_eta", type=option_type(DDIM_ETA), metavar=DDIM_ETA.metavar, help=f"{DDIM_ETA.help} (0)")
    settings = settings_of(ImageRequest)
    others = set(EXTRA_GROUPS).difference(groups)
    absent = [name for name, each in settings.items() if each.group in others]
    if task == "upscale":
        # an image is enlarged from pure noise, and in tiles where that needs them
        absent += ["strength", "tiling", "panorama", *PASSES]
    leave_out = ("prompt", "prompt_template", "negative_template", "seed", "init_img", *absent)
    add_options(parser, ImageRequest, leave_out=leave_out, defaults=parser.request_defaults)
    if INIT in groups:
        add = group_of(parser, INIT).add_argument
        if task == "upscale":
            add("--init-img", nargs="+", metavar="FILE", help="images to enlarge, or folders of them")
        else:
            text = settings["init_img"].help + (", or a folder of such images" if folders else "")
            add("--init-img", nargs="?", metavar="FILE", help=text)
        add(
            "--max_pixels",
            type=number(int, 1),
            metavar="N",
            help="refuse larger images before they are decoded (64 million)",
        )
    absent = ("outdir",) if DEPTH in groups else ("outdir", "save_depth")
    add_options(parser, RunOptions, leave_out=absent, defaults=defaults)
    add_model_options(parser)
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def serve_parser(prog: str = "serve.py") -> Parser:
    parser = Parser(prog=prog, description="Serve images over HTTP.", argument_default=argparse.SUPPRESS)
    add_options(parser, ServiceOptions, title="service")
    group_of(parser, "model").add_argument(
        "--model",
        action="append",
        metavar="NAME=CKPT[,CONFIG]",
        help="a model and the name by which clients ask for it; may be given several times, the default one "
        "first (without it the linked or bundled model)",
    )
    add_model_options(parser, of_one=False, defaults={"batch_size": 8})
    others = [name for name in settings_of(RunOptions) if name != "safety"]
    add_options(parser, RunOptions, leave_out=others, title="model")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def add_model_options(
    parser: argparse.ArgumentParser, *, of_one: bool = True, defaults: dict[str, Any] | None = None
) -> None:
    """The options that choose the model and how it computes; `of_one`: those that name its files, too."""
    add = group_of(parser, "model").add_argument
    if of_one:
        add("--config", metavar="YAML", help="model configuration")
        add("--ckpt", metavar="FILE", help="weights, .ckpt or .safetensors")
    add(
        "--weights",
        choices=WEIGHTS.choices,
        help=f"{WEIGHTS.help} (default: the config's use_ema)",
    )
    add("--vae", metavar="FILE", help="another autoencoder: a file of it, or a diffusers folder")
    if of_one:
        text = "where LoRAs are looked for by name, and below (models/loras)"
        add("--lora_folder", metavar="DIR", help=text)
        add("--C", type=number(int, 1), help="latent channels (default: the model's)")
        add("--f", type=number(int, 1), help="downsampling factor (default: the model's)")
    add(
        "--allow_target",
        action="append",
        metavar="PREFIX",
        help="let the config name classes of this package",
    )
    add_options(parser, RuntimeOptions, defaults=defaults)
