#!/usr/bin/env python3
"""Does the model draw what its prompts ask for? Samples held-out scenes; a detector reads the images back."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import entry
from ldm.cli import parser as cli
from ldm.fields import settings_of
from ldm.log import problem
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.request import ImageRequest
from ldm.weights.loading import BUNDLED_CONFIG, choose_model, find, read_config


def parse(argv: list[str]) -> tuple[argparse.Namespace, RuntimeOptions, ImageRequest]:
    """The arguments, the options among them, and what the images of all scenes have in common."""
    parser = cli.Parser(prog="evaluate_scenes.py", description=__doc__, conflict_handler="resolve")
    cli.add_model_options(parser)
    add = parser.add_argument
    count, scale, seed = cli.number(int, 1), cli.number(float, -1e4, 1e4), cli.number(int, 0, 2**63 - 1)
    add("--prompts", type=count, default=200, metavar="N", help="of one solid, and as many of two (200)")
    add("--scales", type=scale, nargs="+", default=[1, 2, 4, 7.5], help="guidance scales (1 2 4 7.5)")
    add("--sampler", default="dpmpp_2m", help="sampler by name (dpmpp_2m)")
    add("--ddim_steps", type=cli.number(int, 1, 1000), default=20, metavar="N", help="sampling steps (20)")
    add("--seed", type=seed, default=42, help="picks the prompts; image k has seed SEED + k (42)")
    add("--batch_size", type=count, default=50, metavar="N", help="images sampled together (50)")
    add("--outdir", default="outputs/evaluate_scenes", help="folder for the report, replacing an earlier one")
    add("--detector", default="models/scenes-64/detector.safetensors", metavar="FILE", help="its weights")
    add("--train_detector", action="store_true", help="only train the detector and save it as --detector")
    add("--detector_steps", type=count, default=2000, metavar="N", help="of 128 renders (2000)")
    add("--debug", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)
    known = settings_of(RuntimeOptions)
    runtime = RuntimeOptions(**{name: value for name, value in vars(args).items() if name in known})
    return args, runtime, ImageRequest(sampler=args.sampler, steps=args.ddim_steps)


def train(args: argparse.Namespace) -> None:
    """Train and save the detector, and print its accuracy on 2,000 fresh renders."""
    import numpy as np
    from tqdm import tqdm

    from ldm.scenes.detector import load_detector, save_detector, train_detector
    from ldm.scenes.renderer import render
    from ldm.scenes.scene import random_scene
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


def evaluate(args: argparse.Namespace, runtime: RuntimeOptions, like: ImageRequest) -> int:
    """Sample, read back, and write scores.json, report.md and a grid for each scale into `--outdir`."""
    files = choose_model(args.config or (None if args.ckpt else BUNDLED_CONFIG), args.ckpt)
    config = read_config(files.config)  # a mistake in it need not wait for torch

    from PIL import Image

    from ldm.evaluation.scenes import SceneEvaluation, writing
    from ldm.pipeline.pipeline import Pipeline
    from ldm.runs.worker import StepBar
    from ldm.sampling import catalogue
    from ldm.scenes.detector import load_detector

    outdir, scales = Path(args.outdir), list(dict.fromkeys(args.scales))
    with writing(outdir):
        outdir.mkdir(parents=True, exist_ok=True)
    chosen = {"weights": args.weights, "allow_target": args.allow_target or (), "safety": "off"}
    pipeline = Pipeline(files, config, runtime, **chosen, expected={"C": args.C, "f": args.f})
    size, detector = pipeline.described.native_size, load_detector(find(args.detector))
    evaluation = SceneEvaluation(detector, args.seed, args.prompts, size)
    evaluation.read_renders(pipeline)
    images = len(evaluation.prompts) * len(scales)
    adaptive = catalogue.SAMPLERS[like.sampler].adaptive
    lost = 0
    with StepBar(images, None if adaptive else images * like.steps) as bar:
        for scale in scales:
            generated = list(pipeline.generate(evaluation.requests(like, scale), bar.step))
            grid = evaluation.read(f"scale {scale:g}", [image.pixels for image in generated])
            with writing(outdir):
                Image.fromarray(grid).save(outdir / f"scale-{scale:g}.png")
            bar.finish(len(generated))
            lost += sum(image.pixels is None for image in generated)
    settings = vars(args) | asdict(runtime) | {"sampler": like.sampler, "schedule": like.schedule}
    settings |= {"config": str(files.config), "ckpt": str(files.weights)}
    how = f"{like.sampler}, {like.steps} steps, seed {args.seed}"
    report = evaluation.report(f"Percent of {args.prompts} held-out prompts: {how}\n")
    with writing(outdir):
        (outdir / "scores.json").write_text(
            json.dumps(evaluation.record(settings), indent=1, allow_nan=False) + "\n"
        )
        (outdir / "report.md").write_text(report)
    print(report)
    print(outdir)
    if lost:
        problem(f"{lost} of {images} images came out as NaN, and count as wrong")
    return 1 if lost else 0


def main(argv: list[str] | None = None) -> int:
    args, runtime, like = parse(sys.argv[1:] if argv is None else argv)
    if args.train_detector:
        train(args)
        return 0
    return evaluate(args, runtime, like)


if __name__ == "__main__":
    sys.exit(entry.run(main))
