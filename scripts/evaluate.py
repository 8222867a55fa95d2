#!/usr/bin/env python3
"""The model cards' evaluation: FID against CLIP score over guidance scales, with intervals and a plot.

Without --captions it measures scenes-64 and its twin that predicts v: the distance of detector features from
those of renders, against how often the detector reads from an image what its prompt says. Images are sampled
by resumable runs: the same command goes on where an earlier one ended, and samples nothing twice.
"""

import argparse
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import entry
from ldm.cli import parser as cli
from ldm.errors import InputError
from ldm.evaluation.pareto import PLOT, Point, Results, plot
from ldm.evaluation.protocol import (
    DETECTOR,
    IMAGES,
    SCALES,
    STEPS,
    Model,
    Protocol,
    choose_models,
    common_size,
)
from ldm.fields import settings_of
from ldm.log import notice, problem
from ldm.pipeline.options import RuntimeOptions
from ldm.runs.processes import in_srun, in_torchrun
from ldm.weights.description import describe

if TYPE_CHECKING:
    import numpy as np

    from ldm.evaluation.intervals import Figure
    from ldm.evaluation.measuring import Measures
    from ldm.pipeline.pipeline import Pipeline

OF_SCENES = 100  # images of a point: 7 minutes for two models on two cores
BATCH, BATCH_OF_SCENES = 8, 50  # images sampled together


@dataclass(frozen=True)
class Evaluation:
    """What a command asks for."""

    args: argparse.Namespace
    runtime: RuntimeOptions
    protocol: Protocol
    points: Sequence[tuple[Model, float]]  # checkpoint and guidance scale

    @property
    def outdir(self) -> Path:
        return Path(self.args.outdir)

    def folder(self, model: Model, scale: float) -> Path:
        return self.outdir / model.name / f"scale-{scale:g}"

    def pipeline(self, model: Model) -> "Pipeline":
        from ldm.pipeline.pipeline import Pipeline

        args = self.args
        return Pipeline(
            model.files,
            model.config,
            self.runtime,
            weights=args.weights,
            vae=args.vae,
            allow_target=args.allow_target or (),
            safety="off",
            expected={"C": args.C, "f": args.f},
        )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="evaluate.py", description=__doc__, conflict_handler="resolve")
    cli.add_model_options(parser)
    add = parser.add_argument
    several, side = cli.number(int, 1), cli.number(int, 8, 16384)
    add(
        "--ckpt",
        nargs="+",
        metavar="FILE",
        help="checkpoints, a line of the plot each (scenes-64, scenes-64-v)",
    )
    add(
        "--captions", metavar="FILE", help="prompts: captions_val2017.json of COCO, or a text with one a line"
    )
    add("--scenes", action="store_true", help="prompts of held-out scenes, as without --captions")
    of_images = f"prompts, and images of each point ({IMAGES:,}; of scenes {OF_SCENES})"
    add("--images", type=cli.number(int, 2), metavar="N", help=of_images)
    of_scales = f"guidance scales, 0 to 100 ({' '.join(f'{scale:g}' for scale in SCALES)})"
    add(
        "--scales", type=cli.number(float, 0, 100), nargs="+", default=SCALES, metavar="SCALE", help=of_scales
    )
    add("--sampler", help="sampler by name (plms; ddim for v2 and models that predict v)")
    steps = cli.number(int, 1, 1000)
    add("--ddim_steps", "--steps", type=steps, default=STEPS, metavar="N", help=f"sampling steps ({STEPS})")
    add("--H", type=side, metavar="PIXELS", help="image height (the model's)")
    add("--W", type=side, metavar="PIXELS", help="image width (the model's)")
    seed = cli.number(int, 0, 2**63 - 1)
    add("--seed", type=seed, default=42, help="chooses the prompts; image k has seed SEED + k (42)")
    add(
        "--batch_size",
        type=several,
        metavar="N",
        help=f"images sampled together ({BATCH}; of scenes {BATCH_OF_SCENES})",
    )
    add("--devices", type=several, metavar="N", help="processes on this machine, one to a device (1)")
    add(
        "--features",
        choices=("inception", "detector"),
        help="for the distance (inception; of scenes detector)",
    )
    add("--inception", metavar="FILE", help="Inception-v3 weights as torch-fidelity has them, for FID")
    add(
        "--reference",
        metavar="PATH",
        help="folder of real images, or .npz of mu and sigma (of scenes: renders)",
    )
    add("--clip", metavar="DIR", help="CLIP model in transformers' layout, for the CLIP score")
    add("--detector", default=DETECTOR, metavar="FILE", help="weights of the scenes' detector")
    add("--outdir", default="outputs/evaluate", help="folder for images, results and plot (outputs/evaluate)")
    add("--sample", type=cli.number(int, 0), help=argparse.SUPPRESS)  # only the images of this point
    add("--debug", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)
    if args.captions and args.scenes:
        raise InputError("--captions and --scenes are two sources of prompts: give one")
    if (in_torchrun() or in_srun()) and args.sample is None:
        raise InputError("start evaluate.py without a launcher: --devices N starts the processes of its runs")
    return args


def prepare(args: argparse.Namespace) -> Evaluation:
    """The evaluation of a command, checked before anything slow. InputError."""
    known = settings_of(RuntimeOptions)
    given = {name: value for name, value in vars(args).items() if name in known and value is not None}
    runtime = RuntimeOptions(**{"batch_size": BATCH if args.captions else BATCH_OF_SCENES} | given)
    models = choose_models(args.ckpt, args.config, args.sampler, args.ddim_steps)
    size = None if args.H and args.W else common_size(models)
    protocol = Protocol(
        images=args.images or (IMAGES if args.captions else OF_SCENES),
        height=args.H or size,
        width=args.W or size,
        captions=args.captions,
        seed=args.seed,
        steps=args.ddim_steps,
        sampler=args.sampler,
        features=args.features or ("inception" if args.captions else "detector"),
        inception=args.inception,
        reference=args.reference,
        clip=args.clip,
        detector=args.detector,
        weights=args.weights,
        vae=args.vae,
        runtime=runtime.recorded(),
    )
    if args.sample is None:
        protocol.check()
    for model in models:
        protocol.request(model, 1.0).check_size(describe(model.config).factor or 8)
    points = [(model, scale) for model in models for scale in sorted(dict.fromkeys(args.scales))]
    return Evaluation(args, runtime, protocol, points)


def sample(evaluation: Evaluation, number: int, pipeline: "Pipeline") -> int:
    """Make the images of a point by a run of this process, and of others that it starts; its exit code."""
    from ldm.evaluation import measuring

    model, scale = evaluation.points[number]
    protocol, folder = evaluation.protocol, evaluation.folder(model, scale)
    request, devices = protocol.request(model, scale), evaluation.args.devices
    return measuring.sample(pipeline, protocol.prompts, request, folder, protocol.seed, devices)


def sample_apart(number: int, argv: list[str]) -> int:
    """`sample` in a process of its own: those that a run on many devices starts end with the run."""
    from ldm.runs.worker import Interrupt

    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--sample", str(number)]
    # in a session of its own, so that a Ctrl-C reaches it from here alone, once
    with Interrupt() as interrupt, subprocess.Popen(command, start_new_session=True) as process:
        sent = False
        while True:
            try:
                return process.wait(0.2)
            except subprocess.TimeoutExpired:
                if interrupt.asked and not sent:
                    process.send_signal(signal.SIGINT)
                    sent = True


def evaluate(evaluation: Evaluation, argv: list[str]) -> int:
    """Sample and measure every point that the output folder lacks. Returns the exit code."""
    from ldm.evaluation.scenes import writing
    from ldm.pipeline.device import choose_device, precision_on
    from ldm.runs.settings import content_hash
    from ldm.weights.hashes import file_hash

    protocol, outdir = evaluation.protocol, evaluation.outdir
    device = choose_device(evaluation.runtime.device)
    settings = protocol.settings(precision_on(device, evaluation.runtime.precision))
    with writing(outdir):
        outdir.mkdir(parents=True, exist_ok=True)
    results = Results(outdir, settings, *protocol.axes)
    for model in {model.name: model for model, _ in evaluation.points}.values():
        # the quick hash of a file may be that of what it was fine-tuned from
        weights, config = file_hash(model.files.weights), content_hash(model.config)
        results.use(model.name, {"weights": weights, "config": config, "sampler": model.sampler})
    results.write()
    todo = [k for k, (model, scale) in enumerate(evaluation.points) if not results.find(model.name, scale)]
    notice(f"{len(todo)} of {len(evaluation.points)} points to measure, {protocol.images:,} images each")
    if find_spec("matplotlib") is None:
        notice('no plot is drawn: pip install -e ".[evaluation]"')
    measure = None
    if todo or (protocol.has_limits and not results.find("renders", None)):
        measure = protocol.measures(device, outdir / "reference.npz")
    code = measure_points(evaluation, todo, results, measure, argv)
    if code not in (0, 1):
        return code
    if protocol.has_limits and not results.find("renders", None):
        add_limits(evaluation, results, measure)
    print(results.markdown())
    print(outdir)
    if lost := sum(point.missing for point in results.points):
        problem(f"{lost} images came out as NaN or could not be written; results.csv says at which points")
    return 1 if lost else 0


def measure_points(
    evaluation: Evaluation, todo: Sequence[int], results: Results, measure: "Measures", argv: list[str]
) -> int:
    """Sample and measure some points. Returns the exit code of the last run: 130 if the user ended it."""
    from ldm.evaluation import measuring

    protocol, opened = evaluation.protocol, {}
    code = 0
    for k in todo:
        model, scale = evaluation.points[k]
        folder = evaluation.folder(model, scale)
        if (evaluation.args.devices or 1) > 1:
            code = sample_apart(k, argv)
        else:
            if model.name not in opened:
                opened = {model.name: evaluation.pipeline(model)}  # one model at a time is in memory
            code = sample(evaluation, k, opened[model.name])
        if code < 0:
            raise InputError(f"signal {-code} ended the run in {folder}; the same command goes on from there")
        if code not in (0, 1):
            if code == 130:
                notice("the same command goes on from here")
            return code
        files = measuring.sampled_files(folder, protocol.images)
        images = measuring.read_images(files)
        distance, agreement = with_bar(measure, f"{model.name}, scale {scale:g}", images, protocol.images)
        point = Point(
            model.name,
            scale,
            model.sampler,
            protocol.steps,
            protocol.images,
            files.count(None),
            distance,
            agreement,
            str(folder.relative_to(evaluation.outdir)),
        )
        keep(results, point)
    return code


def with_bar(
    measure: "Measures", title: str, images: "Iterable[tuple[int, np.ndarray]]", count: int
) -> "tuple[Figure, Figure]":
    from tqdm import tqdm

    with tqdm(total=count, desc=f"measuring {title}", unit="image", leave=False) as bar:
        return measure(images, count, bar.update)


def keep(results: Results, point: Point) -> None:
    """Add a point to the files and the plot, and report it."""
    results.add(point)
    if find_spec("matplotlib"):
        plot(results, results.outdir / PLOT)
    notice(results.in_words(point))


def add_limits(evaluation: Evaluation, results: Results, measure: "Measures") -> None:
    """Measure renders of the same scenes, also after the first stage: what a model could reach at best."""
    from ldm.evaluation import measuring
    from ldm.scenes.scores import round_trip

    protocol = evaluation.protocol
    scenes = measuring.asked_scenes(protocol.seed, protocol.images)
    drawn = list(measuring.renders(scenes, protocol.seed, protocol.height))
    model, _ = evaluation.points[0]
    decoded = round_trip(evaluation.pipeline(model), drawn)
    for name, images in (("renders, encoded and decoded", decoded), ("renders", drawn)):
        figures = with_bar(measure, name, enumerate(images), protocol.images)
        keep(results, Point(name, None, None, None, protocol.images, 0, *figures))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    evaluation = prepare(parse(argv))
    number = evaluation.args.sample
    if number is not None:
        return sample(evaluation, number, evaluation.pipeline(evaluation.points[number][0]))
    return evaluate(evaluation, argv)


if __name__ == "__main__":
    sys.exit(entry.run(main))
