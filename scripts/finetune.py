#!/usr/bin/env python3
"""Fine-tune a model on images: all of it, a LoRA, DreamBooth, a new word, a ControlNet.

A run that was stopped goes on from its last checkpoint when it is started again.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import entry
from ldm.cli import parser as cli
from ldm.errors import InputError
from ldm.fields import settings_of
from ldm.training.config import TrainingConfig
from ldm.training.finetune.methods import METHODS

OPTIONS = {name for method in METHODS.values() for name in settings_of(method.options)}
NEEDED = dict.fromkeys(("rank", "alpha", "layers", "layout"), "lora")  # options of DreamBooth
NEEDED |= dict.fromkeys(("class_images", "prior_weight"), "class_prompt")
# Keys of the `training:` section that have a flag here; the others are set by --base or KEY=VALUE.
FLAGS = ("steps", "learning_rate", "batch_size", "device_batch", "devices", "precision")
FLAGS += ("checkpointing", "seed")
OVERRIDE = re.compile(r"\w+(\.\w+)+=")


def new_parser() -> cli.Parser:
    parser = cli.Parser(prog="finetune.py", description=__doc__.partition("\n")[0])
    names = "; ".join(f"{name}: {method.help}" for name, method in METHODS.items())

    def add(flag: str, help: str, **facts: Any) -> None:
        parser.add_argument(flag, help=help, **facts)

    add("--method", names, required=True, choices=METHODS)
    add("--data", "images; 5 to 10 of a subject are enough; else data.train of --base", metavar="FOLDER")
    add("--prompt", 'of images without a caption beside them: "a zqx vase", with a rare word', metavar="TEXT")
    add("--output", "the .safetensors file that is made", required=True, metavar="FILE")
    add("--ckpt", "the model (the linked or bundled one)", metavar="FILE")
    add("--config", "its YAML file (found by the weights)", metavar="YAML")
    add("--weights", "which weights of the checkpoint", choices=("raw", "ema"))
    add("--base", "more keys of training: and data:", action="append", default=[], metavar="YAML")
    add("override", "the same, as data.flip=0.5", nargs="*", metavar="KEY=VALUE")
    add("--sample_prompts", "of the images of before and after", nargs="+", metavar="TEXT")
    add("--stop_at", "stop here, to go on later", type=cli.number(int, 1), metavar="STEP")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    others = [name for name in settings_of(TrainingConfig) if name not in FLAGS]
    by_method = dict.fromkeys(("steps", "learning_rate", "batch_size"), "by method")
    by_method["precision"] = "bf16 on a GPU, full elsewhere and for distillation"
    cli.add_options(parser, TrainingConfig, leave_out=others, defaults=by_method)
    added: set[str] = set()
    by_method = {"rank": "8; distillation 64", "layers": "attention; distillation all"}
    for method in METHODS.values():
        cli.add_options(parser, method.options, leave_out=added, defaults=by_method)
        added |= set(settings_of(method.options))
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; KEY=VALUE may stand anywhere, also behind the prompts of --sample_prompts."""
    parser = new_parser()
    args, rest = parser.parse_known_args(argv)
    prompts = args.sample_prompts or []
    args.override += [word for word in (*prompts, *rest) if OVERRIDE.match(word)]
    args.sample_prompts = [word for word in prompts if not OVERRIDE.match(word)]
    if unknown := [word for word in rest if not OVERRIDE.match(word)]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def own_options(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a method that were given. InputError for one that only other methods have."""
    own = settings_of(METHODS[name].options)
    for option in OPTIONS:
        if option in given and option not in own:
            *others, last = (other for other, each in METHODS.items() if option in settings_of(each.options))
            which = f"{', '.join(others)} or {last}" if others else last
            raise InputError(f"--{option} is for --method {which}, not for {name}")
    found = {option: given[option] for option in own if option in given}
    if name == "dreambooth":
        for option, needed in NEEDED.items():
            if option in found and needed not in found:
                raise InputError(f"--{option} is of use with --{needed} only")
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    method = METHODS[args.method]
    options = method.options(**own_options(args.method, vars(args)))
    given = {name: vars(args)[name] for name in FLAGS if name in vars(args)}
    if args.sample_prompts:
        given["sample_prompts"] = args.sample_prompts

    from ldm.training.finetune import setup as steps

    setup = steps.prepare(
        method,
        options,
        args.data,
        args.output,
        ckpt=args.ckpt,
        config=args.config,
        weights=args.weights,
        prompt=args.prompt,
        bases=args.base,
        given=given,
        overrides=args.override,
    )

    from ldm.training.loop import train
    from ldm.training.processes import end_processes, start_processes

    setup = steps.with_processes(setup, start_processes(setup.config))
    task = steps.new_task(method, setup, options)
    files = train(task, setup.folder, args.stop_at, setup.fabric)
    end_processes(setup.fabric)
    del task
    if args.stop_at and args.stop_at < setup.config.steps:
        return 0
    if setup.fabric.is_global_zero:
        files = steps.finished(files, setup)
        print(*files, steps.compare(method, files, setup, options), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(entry.run(main))
