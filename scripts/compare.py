#!/usr/bin/env python3
"""One labelled sheet over the values of two sampling options, from the same start noise on one model.

compare.py --x sampler ddim plms "Euler a" --y steps 5 10 20 takes every other option of txt2img.py, and with
--init-img those of img2img.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli
from ldm.errors import InputError

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
    args = parser.parse_args(argv)
    for name, fine in (
        ("n_samples", 1),
        ("n_iter", 1),
        ("from_file", None),
        ("resume", False),
        ("n_rows", 0),
        ("fixed_code", False),
    ):
        if getattr(args, name) != fine:
            raise InputError(f"--{name} is not for compare.py: each cell of its sheet holds one picture")
    axes = [_axis(flag, words, img2img) for flag, words in (("--x", args.x), ("--y", args.y))]
    if axes[0][0] == axes[1][0]:
        raise InputError(f"--x and --y both vary {args.x[0]}; give two different options")
    if args.seed == -1:
        from ldm.render import choose_seed

        argv = [*argv, f"--seed={choose_seed(-1)}"]
        args = parser.parse_args(argv)

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


def main(argv: list[str] | None = None) -> int:
    args, cells = parse(sys.argv[1:] if argv is None else argv)

    from ldm.render import (
        StepBar,
        check_model,
        check_prompts,
        ending,
        facts_of,
        load,
        model_facts,
        model_files,
        output_folder,
        picture_size,
        read_init,
        settings_of,
        watermarker,
    )

    files, config = model_files(args)
    check_model(args, config)
    init_image = read_init(args)
    height, width = init_image.shape[:2] if init_image is not None else picture_size(args, config)
    folder, watermark = output_folder(args), watermarker(args, height, width)

    import numpy as np

    from ldm.generate import generate
    from ldm.outputs import PictureWriter
    from ldm.prompts import Batch
    from ldm.record import RunRecord
    from ldm.sheet import contact_sheet

    model = load(args, files, config)
    check_prompts(model, [text for row in cells for own in row for text in (own.prompt, own.negative_prompt)])
    settings = [[settings_of(own, files, height, width) for own in row] for row in cells]
    flat = [own for row in settings for own in row]
    adaptive = any(own.sampler == "dpm_adaptive" for own in flat)
    common, rows, missing = model_facts(args, files), [], 0
    record = RunRecord(folder.path, common | {"x": args.x, "y": args.y}, len(flat))
    record.start(folder.next_number)
    writer = PictureWriter(folder, record, images=not args.skip_save, grid=False)
    total = None if adaptive else sum(own.steps_to_run for own in flat)
    with ending(record), StepBar(len(flat), total) as bar:
        for row, own_settings in zip(cells, settings, strict=True):
            rows.append([])
            for own, chosen in zip(row, own_settings, strict=True):
                ((_, (image,)),) = generate(model, [Batch((own.prompt,), (0,))], chosen, bar.step, init_image)
                bar.finish(1)
                if image is None:
                    bar.notice(f"the picture in row {len(rows)}, column {len(rows[-1]) + 1} came out as NaN")
                    missing += 1
                    record.add(len(record.done), None, {"nan": True})
                    image = np.zeros((height, width, 3), np.uint8)
                else:
                    facts = common | facts_of(own, chosen) | {"prompt": own.prompt}
                    writer.add(len(record.done), image, None if args.no_metadata else facts, facts, watermark)
                rows[-1].append(image)
    title = f"{args.y[0]} by {args.x[0]}"
    if "prompt" not in (args.x[0], args.y[0]):
        title += f": {args.prompt}"
    sheet = contact_sheet(rows, args.x[1:], args.y[1:], title)
    facts = common | facts_of(args, settings[0][0]) | {"prompt": args.prompt, "x": args.x, "y": args.y}
    if not args.skip_grid:
        folder.save_grid(watermark(sheet) if watermark else sheet, None if args.no_metadata else facts)
    print(args.outdir)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
