#!/usr/bin/env python3
"""One labelled sheet over the values of two sampling options, from the same start noise on one model.

compare.py --x sampler ddim plms "Euler a" --y steps 5 10 20 takes every other option of txt2img.py, and with
--init-img those of img2img.py.
"""

import secrets
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import arguments, entry, parser
from ldm.errors import InputError
from ldm.fields import listed_by_name
from ldm.log import notice
from ldm.pipeline.request import ImageRequest
from ldm.weights.description import describe

ONE = {"n_samples": 1, "n_iter": 1, "n_rows": 0}  # what these may say: each cell holds one image
NOT_FOR_CELLS = (*ONE, "batch_size", "from_file", "repeat", "resume", "fixed_code", "devices", "num_nodes")
NOT_COMPARED = ("fixed_code", "start_seed", "watermark", "height", "width", "zero_snr")
Axis = tuple[str, list[str]]  # an option and its values


def parse(argv: list[str]) -> tuple[arguments.Arguments, Axis, Axis, list[list[ImageRequest]]]:
    """The arguments, both axes, and the request of every cell: rows of --y's values, columns of --x's."""
    with_init = any(word.startswith("--init") for word in argv)  # also abbreviated, as argparse takes it
    options = (parser.img2img_parser if with_init else parser.txt2img_parser)("compare.py", __doc__)
    options.command_defaults = options.command_defaults | {
        "n_samples": 1,
        "n_iter": 1,
        "outdir": "outputs/compare",
    }
    for axis, where in (("--x", "columns"), ("--y", "rows")):
        options.add_argument(
            axis, nargs="+", required=True, metavar=("OPTION", "VALUE"), help=f"what the {where} vary"
        )
    given = vars(options.parse_args(argv))
    for name in NOT_FOR_CELLS:
        if name in given and given[name] != ONE.get(name):
            raise InputError(f"--{name} is not for compare.py: each cell of its sheet holds one image")
    command = arguments.gather(options, given)
    arguments.warn_of_ignored_eta(command.values)
    x, y = (_axis(flag, given[flag[2:]], options) for flag in ("--x", "--y"))
    if x[0] == y[0]:
        raise InputError(f"--x and --y both vary {given['x'][0]}; give two different options")
    seed = command.run.seed
    if seed == -1:
        seed = secrets.randbelow(2**32)
        notice(f"seed {seed}")
        command = replace(command, run=replace(command.run, seed=seed))
    # the seed is each image's own: it does not move on from cell to cell
    cells = [[command.variant({"seed": seed, x[0]: a, y[0]: b}) for a in x[1]] for b in y[1]]
    factor = describe(command.config).factor or 8  # a mistake in it need not wait for torch
    for row in cells:
        for request in row:
            request.check_size(factor)
    return command, x, y, cells


def _axis(flag: str, words: list[str], options: parser.Parser) -> Axis:
    name, values = words[0].lstrip("-"), words[1:]
    known = {
        spelling: each.name
        for spelling, each in listed_by_name(ImageRequest).items()
        if each.name not in NOT_COMPARED
        and (each.group not in parser.EXTRA_GROUPS or (options.groups and each.name == "strength"))
    } | {"ddim_eta": "ddim_eta"}
    if name not in known:
        raise InputError(f"{flag} {words[0]}: no option to compare; choose from {', '.join(known)}")
    if not values:
        raise InputError(f"{flag} {name} has no values; write {flag} {name} VALUE VALUE …")
    return known[name], values


def main(argv: list[str] | None = None) -> int:
    command, x, y, cells = parse(sys.argv[1:] if argv is None else argv)

    from ldm.images.sheets import contact_sheet
    from ldm.runs.run import run
    from ldm.runs.writer import Sheet

    pipeline = command.pipeline()
    title = f"{command.given['y'][0]} by {command.given['x'][0]}"
    if "prompt" not in (x[0], y[0]):
        title += f": {cells[0][0].prompt}"

    def requests() -> Iterator[ImageRequest]:
        command.warn_of_another_model(pipeline)  # within the run, whose --quiet holds for it
        yield from (request for row in cells for request in row)

    def draw(images: list) -> object:
        rows = [images[i : i + len(x[1])] for i in range(0, len(images), len(x[1]))]
        return contact_sheet(rows, x[1], y[1], title)

    sheet = Sheet(draw, {"x": command.given["x"], "y": command.given["y"]})
    return run(pipeline, requests(), command.run, sheet)


if __name__ == "__main__":
    sys.exit(entry.run(main))
