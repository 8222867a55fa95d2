#!/usr/bin/env python3
"""Train a model: a latent diffusion model, its autoencoder, or a depth estimator.

A run that was stopped goes on from its last checkpoint when it is started again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import entry
from ldm.cli import parser as cli


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="train.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--base",
        required=True,
        nargs="+",
        metavar="YAML",
        help="files with model:, data: and training: sections; what comes later goes over what came before",
    )
    parser.add_argument(
        "override", nargs="*", default=[], metavar="KEY=VALUE", help="goes over them, as training.steps=10"
    )
    parser.add_argument(
        "--logdir", default="logs", help="everything goes to LOGDIR/<name of the last YAML> (logs)"
    )
    parser.add_argument("--name", help="the name of that folder instead")
    parser.add_argument("--output", metavar="FILE", help="the weights (LOGDIR/<name>/model.safetensors)")
    parser.add_argument(
        "--stop_at", type=cli.number(int, 1), metavar="STEP", help="stop here, to go on later"
    )
    parser.add_argument(
        "--allow_target", action="append", default=[], metavar="PREFIX", help="a package of yours in YAML"
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)

    from ldm.training.sections import output_folder, read_sections

    bases, overrides = split_overrides(args.base, args.override)
    sections = read_sections(bases, overrides)
    folder = output_folder(Path(args.logdir, args.name or bases[-1].stem), args.output)

    from ldm.training.data.sources import open_sources
    from ldm.training.files import move
    from ldm.training.loop import train
    from ldm.training.processes import end_processes, start_processes
    from ldm.training.start import new_task

    fabric = start_processes(sections.training)
    sources = open_sources(sections.data, args.allow_target, Path(sections.data.cache or folder))
    task = new_task(sections.model, sections.training, sections.data, args.allow_target)
    task.opened = sources  # before the weights were read, because that may take minutes
    task.section = sections.model
    files = train(task, folder, args.stop_at, fabric)
    end_processes(fabric)
    if args.output and fabric.is_global_zero:
        files = [move(files[0], Path(args.output)), *files[1:]]
    print(*files, sep="\n", end="\n" if files else "")
    return 0


def split_overrides(bases: list[str], overrides: list[str]) -> tuple[list[Path], list[str]]:
    """Files and overrides, which may follow --base without a word between them."""
    words = [*bases, *overrides]
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    return [Path(word) for word in files], [word for word in words if word not in files]


if __name__ == "__main__":
    sys.exit(entry.run(main))
