#!/usr/bin/env python3
"""Does the model paint what it is told? Samples held-out scenes and has a detector read the pictures back."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import entry
from ldm.cli import parser as cli
from ldm.errors import InputError
from ldm.sampling import catalogue
from ldm.weights.loading import BUNDLED_CONFIG, choose_model, find, native_size, read_config

COLUMNS = 20  # pictures in a row of a grid


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="evaluate_scenes.py", description=__doc__)
    add = parser.add_argument
    count, scale, seed = cli.number(int, 1), cli.number(float, -1e4, 1e4), cli.number(int, 0, 2**63 - 1)
    add("--prompts", type=count, default=200, metavar="N", help="of one solid, and as many of two (200)")
    add("--scales", type=scale, nargs="+", default=[1, 2, 4, 7.5], help="guidance scales (1 2 4 7.5)")
    add("--sampler", default="dpmpp_2m", help="sampler by name (dpmpp_2m)")
    add("--ddim_steps", type=cli.number(int, 1, 1000), default=20, metavar="N", help="sampling steps (20)")
    add("--seed", type=seed, default=42, help="picks the prompts; image k has seed SEED + k (42)")
    add("--batch_size", type=count, default=50, metavar="N", help="pictures sampled together (50)")
    add("--outdir", default="outputs/evaluate_scenes", help="folder for the report, replacing an earlier one")
    add("--detector", default="models/scenes-64/detector.safetensors", metavar="FILE", help="its weights")
    add("--train_detector", action="store_true", help="only train the detector and save it as --detector")
    add("--detector_steps", type=count, default=2000, metavar="N", help="of 128 renders (2000)")
    add("--debug", action="store_true", help="show where an error comes from")
    cli.add_model_arguments(parser)
    args = parser.parse_args(argv)
    args.sampler, _ = catalogue.resolve(args.sampler)
    return args


def train(args: argparse.Namespace) -> None:
    """Train and save the detector, and print its accuracy on 2,000 fresh renders."""
    import numpy as np
    from tqdm import tqdm

    from ldm.scenes.detector import load_detector, save_detector, train_detector
    from ldm.scenes.scenes import random_scene, render
    from ldm.scenes.scores import markdown_table, score

    path = find(args.detector)
    training = train_detector(args.detector_steps)
    for loss, detector in (bar := tqdm(training, "training", args.detector_steps)):  # noqa: B007
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    save_detector(detector, path)
    rng = np.random.default_rng([args.seed, 1])  # another stream than the training's
    scenes = [random_scene(rng) for _ in range(2000)]
    seen = load_detector(path).read([render(scene, rng) for scene in scenes])
    print(markdown_table("detector", {"2,000 fresh renders": score(scenes, seen)}))
    print(path)


def evaluate(args: argparse.Namespace) -> None:
    """Sample, read back, and write scores.json, report.md and a grid for each scale into `--outdir`."""
    files = choose_model(args.config or BUNDLED_CONFIG, args.ckpt)
    config = read_config(files.config)
    outdir = Path(args.outdir)
    try:
        outdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--outdir {outdir}: {error.strerror}") from error

    import json

    import numpy as np
    from PIL import Image

    from ldm.pipeline.generate import Settings, generate
    from ldm.runs.render import load
    from ldm.runs.worker import StepBar
    from ldm.sampling.batches import plan
    from ldm.scenes.detector import load_detector
    from ldm.scenes.scenes import caption, render
    from ldm.scenes.scores import check, evaluation_scenes, markdown_table, marked_grid, round_trip, score

    detector = load_detector(find(args.detector))
    model = load(args, files, config)
    n, size, scales = args.prompts, native_size(config), list(dict.fromkeys(args.scales))
    scenes = [*evaluation_scenes(args.seed, n, pairs=False), *evaluation_scenes(args.seed, n, pairs=True)]
    prompts = [caption(scene) for scene in scenes]

    rng = np.random.default_rng(args.seed)
    renders = [render(scene, rng, size) for scene in scenes]
    seen = {  # first the detector's own errors: no model can be told to do better
        "renders": detector.read(renders),
        "renders, encoded and decoded": detector.read(round_trip(model.first_stage_model, renders)),
    }
    autocast = args.precision == "autocast"
    common = {"sampler": args.sampler, "steps": args.ddim_steps, "seed": args.seed, "autocast": autocast}
    with StepBar(len(prompts) * len(scales), len(prompts) * len(scales) * args.ddim_steps) as bar:
        for scale in scales:
            settings = Settings(height=size, width=size, scale=scale, **common)
            batches = generate(model, plan(prompts, 1, args.batch_size), settings, bar.step)
            images = [image for _, batch in batches for image in batch]
            bar.finish(len(images))
            pictures = [np.zeros((size, size, 3), np.uint8) if image is None else image for image in images]
            read = detector.read(pictures)
            told = [image if image is None else scene for image, scene in zip(images, read, strict=True)]
            right = [check(*pair)["all"] for pair in zip(scenes, told, strict=True)]
            Image.fromarray(marked_grid(pictures, right, COLUMNS)).save(outdir / f"scale-{scale:g}.png")
            seen[f"scale {scale:g}"] = told

    scores = {
        "one solid": {name: score(scenes[:n], told[:n]) for name, told in seen.items()},
        "two solids": {name: score(scenes[n:], told[n:]) for name, told in seen.items()},
    }
    data = {
        "settings": vars(args) | {"config": str(files.config), "ckpt": str(files.weights)},
        "scores": scores,
        "prompts": prompts,
        "seen": {name: [scene and caption(scene) for scene in told] for name, told in seen.items()},
    }
    (outdir / "scores.json").write_text(json.dumps(data, indent=1) + "\n")
    heading = f"Percent of {n} held-out prompts: {args.sampler}, {args.ddim_steps} steps, seed {args.seed}\n"
    report = "\n".join([heading, *(markdown_table(title, rows) for title, rows in scores.items())])
    (outdir / "report.md").write_text(report)
    print(report)
    print(outdir)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.train_detector:
        train(args)
    else:
        evaluate(args)
    return 0


if __name__ == "__main__":
    sys.exit(entry.run(main))
