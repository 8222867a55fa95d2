#!/usr/bin/env python3
"""How well do the siblings of the bundled model do what they are for, on held-out scenes?"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import entry
from ldm.cli import parser as cli

WEIGHTS = {
    "inpainting": "models/scenes-128-inpainting/model.safetensors",
    "depth": "models/scenes-128-depth/model.safetensors",
    "upscaling": "models/scenes-x4/model.safetensors",
    "edges": "models/scenes-128/model.safetensors",  # which a ControlNet leads
}
# An upscaler that makes one step says what it expects; more steps are sharper, and further from the truth.
SAMPLING = {
    "inpainting": {"sampler": "dpmpp_2m", "steps": 20},
    "depth": {"sampler": "dpmpp_2m", "steps": 20},
    "upscaling": {"sampler": "ddim", "steps": 1, "schedule": "trailing"},
    "edges": {"sampler": "dpmpp_2m", "steps": 20},
}
COLUMNS = {"inpainting": 6, "depth": 8, "upscaling": 1, "edges": 4}  # cases in a row of a grid


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="evaluate_siblings.py", description=__doc__)
    add = parser.add_argument
    count, seed = cli.number(int, 1), cli.number(int, 0, 2**63 - 1)
    add("models", nargs="*", metavar="MODEL", help=f"{', '.join(WEIGHTS)} (all of them)")
    add("--ckpt", metavar="FILE", help="weights of the one model to measure (the bundled ones)")
    add("--prompts", type=count, default=100, metavar="N", help="of one solid, and as many of two (100)")
    add(
        "--controlnet",
        metavar="FILE",
        help="of edges: the ControlNet (models/scenes-128-canny; one that belongs to --ckpt)",
    )
    add("--scale", type=cli.number(float, -1e4, 1e4), help="guidance scale (as the model's YAML says)")
    add("--sampler", help="sampler by name (dpmpp_2m; upscaling: ddim, schedule trailing)")
    add("--ddim_steps", type=cli.number(int, 1, 1000), metavar="N", help="steps (20; upscaling: 1)")
    add("--noise_level", type=cli.number(int, 0, 999), help="of upscaling (20, as the command has it)")
    add("--seed", type=seed, default=42, help="picks the prompts; image k has seed SEED + k (42)")
    add("--outdir", default="outputs/evaluate_siblings", help="folder for scores.json and the grids")
    add("--detector", default="models/scenes-64/detector.safetensors", metavar="FILE", help="its weights")
    add("--debug", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.models if name not in WEIGHTS]:
        parser.error(f"MODEL {unknown[0]!r} is not one of {', '.join(WEIGHTS)}")
    args.models = args.models or list(WEIGHTS)
    if args.ckpt and len(args.models) != 1:
        parser.error("--ckpt: name the one model that it is")
    if args.controlnet and "edges" not in args.models:
        parser.error("--controlnet is for edges")
    if args.noise_level is not None and "upscaling" not in args.models:
        parser.error("--noise_level is for upscaling")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)

    from PIL import Image

    from ldm.evaluation import siblings
    from ldm.evaluation.scenes import writing
    from ldm.images.pixels import make_grid
    from ldm.log import problem
    from ldm.pipeline.pipeline import Pipeline
    from ldm.pipeline.request import ImageRequest
    from ldm.scenes.detector import load_detector
    from ldm.training.data.sources import examples_named
    from ldm.weights.loading import find

    outdir = Path(args.outdir)
    with writing(outdir):
        outdir.mkdir(parents=True, exist_ok=True)
    detector = load_detector(find(args.detector))
    given = {"sampler": args.sampler, "steps": args.ddim_steps, "scale": args.scale}
    given = {name: value for name, value in given.items() if value is not None}
    scores, lost = {}, 0
    for name in args.models:
        pipeline = Pipeline.open(args.ckpt or str(find(WEIGHTS[name])), safety="off")
        like = ImageRequest(**SAMPLING[name] | given)
        more = {} if name != "upscaling" or args.noise_level is None else {"noise_level": args.noise_level}
        if name == "edges":
            more = {"controlnet": args.controlnet}
        rows, scores[name], missing = siblings.MEASURES[name](
            pipeline, detector, like, args.seed, args.prompts, **more
        )
        lost += len(missing)
        if missing:
            which = examples_named([repr(each) for each in missing])
            problem(f"{name}: {len(missing)} images came out as NaN, and count as wrong: {which}")
        print(
            siblings.report(
                f"{name}: {args.prompts} prompts of one solid, {args.prompts} of two", scores[name]
            )
        )
        columns = COLUMNS[name] * len(rows[0])
        with writing(outdir):
            grid = make_grid([image for row in rows for image in row], columns)
            Image.fromarray(grid).save(outdir / f"{name}.png")
    with writing(outdir):
        (outdir / "scores.json").write_text(
            json.dumps({"settings": vars(args), "scores": scores}, indent=1, allow_nan=False) + "\n"
        )
    print(outdir)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(entry.run(main))
