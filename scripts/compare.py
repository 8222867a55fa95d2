#!/usr/bin/env python3
"""One labelled sheet over the values of two sampling options, from the same start noise on one model.

compare.py --x sampler ddim plms "Euler a" --y steps 5 10 20 takes every other option of txt2img.py, and with
--init-img those of img2img.py.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import entry
from ldm.cli import parser as cli
from ldm.errors import InputError
from ldm.log import log_to

AXES = ("prompt", *cli.IMAGE_OPTIONS, "rng")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[list[argparse.Namespace]]]:
    """The arguments, and those of every picture: rows of the values of --y, columns of those of --x."""
    img2img = any(word.startswith("--init") for word in argv)  # also abbreviated, as argparse takes it
    make = cli.img2img_parser if img2img else cli.txt2img_parser
    parser = make("compare.py", __doc__)
    parser.set_defaults(n_samples=1, n_iter=1, outdir="outputs/compare")
    for axis, where in (("--x", "columns"), ("--y", "rows")):
        parser.add_argument(
            axis, nargs="+", required=True, metavar=("OPTION", "VALUE"), help=f"what the {where} vary"
        )
    argv, picture = parser.like_picture(argv)
    args = parser.parse_args(argv)
    for name, fine in (
        ("n_samples", 1),
        ("batch_size", None),
        ("n_iter", 1),
        ("from_file", None),
        ("resume", False),
        ("n_rows", 0),
        ("fixed_code", False),
        ("devices", None),
        ("num_nodes", None),
    ):
        if getattr(args, name) != fine:
            raise InputError(f"--{name} is not for compare.py: each cell of its sheet holds one picture")
    axes = [_axis(flag, words, img2img) for flag, words in (("--x", args.x), ("--y", args.y))]
    if axes[0][0] == axes[1][0]:
        raise InputError(f"--x and --y both vary {args.x[0]}; give two different options")
    if args.seed == -1:
        from ldm.runs.render import choose_seed

        argv = [*argv, f"--seed={choose_seed(-1)}"]
        args = parser.parse_args(argv)

    args.picture = picture
    (x, across), (y, down) = axes
    return args, [[parser.parse([*argv, f"--{x}={a}", f"--{y}={b}"]) for a in across] for b in down]


def _axis(flag: str, words: list[str], img2img: bool) -> tuple[str, list[str]]:
    name, values = words[0].lstrip("-"), words[1:]
    names = [axis for axis in AXES if img2img or axis != "strength"]
    if name not in names:
        raise InputError(f"{flag} {words[0]}: no option to compare; choose from {', '.join(names)}")
    if not values:
        raise InputError(f"{flag} {name} has no values; write {flag} {name} VALUE VALUE …")
    return ("ddim_steps" if name == "steps" else name), values


class Keeper:
    """A writer of pictures that keeps them, too, by their numbers."""

    def __init__(self, writer: Any):
        self.writer, self.record, self.pictures = writer, writer.record, {}

    def add(self, k: int, image: Any, *rest: Any) -> dict[str, Any]:
        self.pictures[k] = image
        return self.writer.add(k, image, *rest)


def main(argv: list[str] | None = None) -> int:
    args, cells = parse(sys.argv[1:] if argv is None else argv)
    log_to(args.log_file, args.quiet)

    from ldm.runs import render

    files, config = render.model_files(args)
    render.check_model(args, config)
    safety_mode = render.safety_of(args)
    init_image = render.read_init(args)
    height, width = init_image.shape[:2] if init_image is not None else render.picture_size(args, config)
    folder = render.output_folder(args)

    import numpy as np

    from ldm.images.sheets import contact_sheet
    from ldm.runs.manifest import RunRecord
    from ldm.runs.processes import Team
    from ldm.runs.worker import Interrupt, Job, Kind, make
    from ldm.sampling.batches import Batch

    flat = [own for row in cells for own in row]
    kinds, batches, common = [], [], render.model_facts(args, files)
    for k, own in enumerate(flat):
        settings = render.settings_of(own, files, height, width)
        kinds.append(Kind(settings, init_image, common | render.facts_of(own, settings)))
        # the seed is the picture's own: it does not move on from cell to cell
        batches.append(Batch((own.prompt,), (k,), seeds=(settings.seed,), kind=k))
    record = RunRecord(folder.path, common | {"x": args.x, "y": args.y}, len(flat))
    args.skip_grid, skip_sheet = True, args.skip_grid
    writer = Keeper(render.picture_writer(args, folder, record))
    model = render.load(args, files, config)
    render.check_prompts(model, [text for own in flat for text in (own.prompt, own.negative_prompt)])
    safety, team = render.load_safety(safety_mode, model), Team()
    record.start(folder.next_number)
    job = Job(kinds, batches, render.file_names(args.filename, kinds, batches, record.first), record)
    with render.ending(record), Interrupt() as interrupt:
        make(model, job, writer, team, interrupt, safety, render.telling_of(args, team))
    if interrupt.asked:
        return 130
    black = np.zeros((height, width, 3), np.uint8)
    pictures = [writer.pictures.get(k, black) for k in range(len(flat))]
    rows = [pictures[i : i + len(cells[0])] for i in range(0, len(flat), len(cells[0]))]
    title = f"{args.y[0]} by {args.x[0]}"
    if "prompt" not in (args.x[0], args.y[0]):
        title += f": {args.prompt}"
    sheet = contact_sheet(rows, args.x[1:], args.y[1:], title)
    facts = kinds[0].facts | {"prompt": args.prompt, "x": args.x, "y": args.y}
    if not skip_sheet:
        folder.save_grid(writer.writer.marked(sheet), None if args.no_metadata else facts)
    if not args.json:
        print(args.outdir)
    return 1 if team.count("failed", 0) else 0


if __name__ == "__main__":
    sys.exit(entry.run(main))
