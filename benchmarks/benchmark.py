#!/usr/bin/env python3
"""Measure the toolkit on this machine: start-up, one image, loading, a UNet step, numbers of model calls."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from parts.against_peers import measure_peers
from parts.approximations import measure_approximations
from parts.ideas import measure_ideas
from parts.image_to_image import measure_img2img
from parts.model_loading import measure_load, measure_load_v2
from parts.runs import measure_runs
from parts.sampling import measure_calls, measure_samplers, measure_sheet
from parts.starts import measure_help, measure_image
from parts.unet import measure_unet
from peers import CONTENDERS, PRECISIONS
from report import Row, machine, write_results

from ldm.cli.entry import run
from ldm.cli.parser import Parser, number
from ldm.errors import InputError
from ldm.log import notice
from ldm.weights.loading import ROOT

# A part measures one thing: a function from the options to its rows.
PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "help": measure_help,
    "image": measure_image,
    "load": measure_load,
    "load_v2": measure_load_v2,
    "unet": measure_unet,
    "peers": measure_peers,
    "ideas": measure_ideas,
    "calls": measure_calls,
    "samplers": measure_samplers,
    "sheet": measure_sheet,
    "runs": measure_runs,
    "approximations": measure_approximations,
    "img2img": measure_img2img,
}


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="benchmark.py", description=__doc__)
    add = parser.add_argument
    parts = ", ".join(PARTS)
    add(
        "--only",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help=f"measure only these: {parts}",
    )
    add(
        "--name",
        help="results go to benchmarks/results/NAME.json and .md (cpu; with --only the names of the parts)",
    )
    add(
        "--cache",
        type=Path,
        default=ROOT / "outputs/benchmark-cache",
        metavar="DIR",
        help="keeps 4.3 GB of stand-in weights, and as much again for some peers (outputs/benchmark-cache)",
    )
    add("--device", default="cpu", help="of `peers` and `ideas`: cpu or cuda (cpu)")
    add(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        help="of `peers` and `ideas` (full and bf16; on a GPU half)",
    )
    add(
        "--peers",
        nargs="+",
        choices=CONTENDERS,
        metavar="NAME",
        help=f"compare only these of `peers`: {', '.join(CONTENDERS)} (those that are installed)",
    )
    add("--compiled", action="store_true", help="torch.compile in `peers` too (on a GPU always)")
    add("--steps", type=number(int, 1, 1000), help="of the image of `peers` (5; on a GPU 50)")
    add(
        "--from_start",
        type=number(int, 1, 1000),
        metavar="STEPS",
        help="let `peers` also make an image of so many steps in fresh processes, as often as --repeats says "
        "(20 take a minute or two each on a CPU)",
    )
    add("--batches", nargs="+", type=number(int, 1), help="batch sizes for `peers` (1 2; on a GPU 1 4 8 16)")
    add("--repeats", type=number(int, 1), default=5, help="readings of each time of `peers` and `ideas` (5)")
    add(
        "--latents",
        type=number(int, 8, 128),
        default=64,
        metavar="N",
        help="side of the latents for the v1 UNet and decoder (64, that is 512 pixels)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    from ldm.pipeline.device import choose_device

    options = parser().parse_args(argv)
    parts = list(dict.fromkeys(options.only))
    # a few parts must not take the place of all of them
    options.name = options.name or ("cpu" if parts == list(PARTS) else "-".join(parts))
    if not re.fullmatch(r"[\w-][\w.-]*", options.name):
        raise InputError(f"--name {options.name!r} is no file name: use letters, digits, - and _")
    os.environ["HF_HUB_OFFLINE"] = "1"
    choose_device(options.device)
    facts, rows = machine(options.device), {}
    for part in parts:
        notice(f"{part} …")
        rows[part] = PARTS[part](options)
        table = write_results(options.name, facts, rows)  # every time: an interrupted run keeps what it has
    print(table, end="")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
