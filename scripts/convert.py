#!/usr/bin/env python3
"""A checkpoint as .safetensors, .ckpt or diffusers folder; merged with others, or with another VAE."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ldm.cli import entry
from ldm.cli import parser as cli
from ldm.errors import InputError
from ldm.weights.writing import FORMATS, PRECISIONS, target_format


def convert_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="convert.py",
        description="Write a checkpoint in another form: one file, or a folder that diffusers loads.",
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="a .safetensors, a .ckpt or a diffusers folder")
    add("target", metavar="DST", help="its suffix decides the format; a name without one is a folder")
    add("--to", choices=FORMATS, help="the format, where the name does not say it")
    add("--precision", choices=tuple(PRECISIONS), help="of the weights (as they are)")
    add(
        "--weights",
        choices=("raw", "ema"),
        help="which of a training checkpoint's (both in a file, raw in a folder)",
    )
    add("--vae", metavar="FILE", help="put in this autoencoder: a file, a vae/ folder or another checkpoint")
    add("--merge", metavar="OTHER", help="add another checkpoint: SRC (1 - R) + OTHER R")
    add("--ratio", type=cli.number(float, -10, 10), metavar="R", help="of the merge (0.5)")
    add("--add_difference", metavar="BASE", help="SRC + R (OTHER - BASE) instead")
    add("--config", metavar="YAML", help="for a folder, of a model that is not recognised")
    add("--force", action="store_true", help="replace what is at DST")
    add("--debug", action="store_true", help="show where an error comes from")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = convert_parser().parse_args(argv)
    if args.merge is None and (args.ratio is not None or args.add_difference):
        raise InputError("--ratio and --add_difference are for --merge OTHER")
    target = Path(args.target)
    to = target_format(target, args.to)

    from ldm.weights.convert import Conversion, convert

    def path(text: str | None) -> Path | None:
        return None if text is None else Path(text)

    job = Conversion(
        source=Path(args.source),
        target=target,
        to=to,
        precision=args.precision,
        weights=args.weights,
        vae=path(args.vae),
        other=path(args.merge),
        ratio=0.5 if args.ratio is None else args.ratio,
        base=path(args.add_difference),
        config=args.config,
        force=args.force,
    )
    convert(job, progress_bar)
    print(target)
    return 0


@contextmanager
def progress_bar(size: int) -> Iterator[Callable[[int], object]]:
    """A bar over the bytes to be written, on a terminal's stderr."""
    from tqdm import tqdm

    with tqdm(desc="writing", total=size, unit="B", unit_scale=True, disable=None) as bar:
        yield bar.update


if __name__ == "__main__":
    sys.exit(entry.run(main))
