#!/usr/bin/env python3
"""What samplers, schedules, guidance and LoRAs for few steps win: docs/samplers.md, docs/guidance.md.

`known`: errors on data whose denoiser is known exactly, eight normal clusters. `distances`: how far few
steps are from where 100 steps arrive, from the same noise, as a share of the latents' standard deviation.
`scenes`: how many images show what their prompt says, by the scene detector.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.evaluation.scenes import SceneEvaluation
from ldm.pipeline import ImageRequest, Pipeline
from ldm.sampling import SAMPLERS as SAMPLER
from ldm.sampling import SCHEDULES as SCHEDULE
from ldm.sampling import Denoiser, catalogue, plan_trajectory, sample
from ldm.sampling.noise import ImageNoise, ImageSeeds
from ldm.sampling.schedule import published
from ldm.scenes.captions import caption
from ldm.scenes.detector import load_detector
from ldm.scenes.scores import check, evaluation_scenes
from ldm.weights.loading import SMALL_CONFIG, find

STEPS = (5, 8, 10, 15)
SAMPLERS = ("ddim", "lms", "dpmpp_2m", "unipc", "deis", "ipndm", "res_multistep", "gradient_estimation")
SCHEDULES = ("linspace", "karras", "ays", "beta", "kl_optimal")
DETECTOR = "models/scenes-64/detector.safetensors"


class Clusters:
    """The exact denoiser of eight normal clusters in 16 dimensions, of standard deviation 0.25 each."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.centres = torch.randn(8, 16, generator=generator, dtype=torch.float64)
        self.start = torch.randn(512, 16, generator=generator, dtype=torch.float64)
        self.std = 0.25

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        variance = self.std**2 + sigma**2
        shares = (-(torch.cdist(x, self.centres) ** 2) / (2 * variance)).softmax(1)
        return (self.std**2 * x + sigma**2 * (shares @ self.centres)) / variance


def known(samplers: Iterable[str], schedules: Iterable[str]) -> None:
    """The median over starts of the distance from the solution, in percent of a cluster's size.

    A start whose solution lies at the border of two clusters may end in either: hence the median.
    """
    data = Clusters()
    size = data.std * 16**0.5

    def end(sampler: str, schedule: str, steps: int) -> Tensor:
        sigmas = SCHEDULE[schedule](published(), steps)
        options = {"eta": 0.0} if "eta" in catalogue.SAMPLERS[sampler].options else {}
        return SAMPLER[sampler](data, data.start * (1 + sigmas[0] ** 2) ** 0.5, sigmas, **options)

    solution = end("heun", "karras", 1000)
    print("\nDistance in percent from the solution, eight normal clusters, median of 512\n")
    print("| sampler | schedule |" + "".join(f" {n} steps |" for n in STEPS))
    print("|---|---|" + "---|" * len(STEPS))
    for sampler in samplers:
        for schedule in schedules:
            errors = [(end(sampler, schedule, n) - solution).norm(dim=1).median() for n in STEPS]
            print(f"| `{sampler}` | `{schedule}` |" + "".join(f" {100 * e / size:.1f} |" for e in errors))


class Distances:
    """Latents of the same prompts and noise by any sampler, and how far they are from the converged ones."""

    def __init__(self, pipeline: Pipeline, images: int, scale: float):
        self.model = pipeline.model
        scenes = [*evaluation_scenes(1, images // 2, False), *evaluation_scenes(1, images // 2, True)]
        cond = torch.cat([pipeline.embed(caption(scene)) for scene in scenes])
        uncond = pipeline.embed("")
        self.denoiser = Denoiser(self.model, cond, uncond, scale)
        self.seeds = [ImageSeeds(k) for k in range(len(scenes))]
        self.reference = self.latents("dpmpp_2m", "karras", 100)

    def latents(self, sampler: str, schedule: str, steps: int) -> Tensor:
        shape = (self.model.channels, self.model.image_size, self.model.image_size)
        noise = ImageNoise(self.seeds, shape, self.model.device)
        run = plan_trajectory(self.denoiser.discretization, sampler, steps, schedule=schedule)
        return sample(self.denoiser, sampler, run, noise)

    def __call__(self, sampler: str, schedule: str, steps: int) -> tuple[float, float]:
        """The mean over images, and its standard error, in percent."""
        found = self.latents(sampler, schedule, steps) - self.reference
        errors = 100 * found.square().mean((1, 2, 3)).sqrt() / self.reference.std()
        return errors.mean().item(), (errors.std() / len(errors) ** 0.5).item()


def distances(
    pipeline: Pipeline, images: int, scale: float, samplers: Iterable[str], schedules: Iterable[str]
) -> None:
    measured = Distances(pipeline, images, scale)
    print(f"\nDistance in percent from 100 steps, {images} images, scale {scale:g}\n")
    print("| sampler | schedule |" + "".join(f" {n} steps |" for n in STEPS))
    print("|---|---|" + "---|" * len(STEPS))
    for sampler in samplers:
        for schedule in schedules:
            cells = ["{:.1f} ± {:.1f}".format(*measured(sampler, schedule, steps)) for steps in STEPS]
            print(f"| `{sampler}` | `{schedule}` | {' | '.join(cells)} |", flush=True)


def scenes(pipeline: Pipeline, prompts: int, requests: Sequence[ImageRequest], names: Sequence[str]) -> None:
    evaluation = SceneEvaluation(load_detector(find(DETECTOR)), 1, prompts, pipeline.described.native_size)
    print(f"\nPercent of {prompts} scenes of one solid and {prompts} of two that are right\n")
    print("| settings | one solid | two solids | against the first |\n|---|---|---|---|")
    first = None
    for name, like in zip(names, requests, strict=True):
        images = [image.pixels for image in pipeline.generate(evaluation.requests(like, like.scale))]
        evaluation.read(name, images)
        pairs = zip(evaluation.scenes, evaluation.seen[name], strict=True)
        right = np.array([check(*pair)["all"] for pair in pairs], dtype=float)
        first = right if first is None else first
        cells = [f"{100 * half.mean():.1f}" for half in (right[:prompts], right[prompts:])]
        change = 100 * (right - first)
        cells.append(f"{change.mean():+.1f} ± {change.std() / len(change) ** 0.5:.1f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=100, help="of one solid, and as many of two (100)")
    parser.add_argument("--scale", type=float, default=4.0)
    parser.add_argument("--samplers", nargs="*", default=SAMPLERS, help="for the distances")
    parser.add_argument("--schedules", nargs="*", default=SCHEDULES, help="for the distances")
    parser.add_argument(
        "--scenes",
        nargs="*",
        default=[],
        metavar="SETTINGS",
        help='for the detector: "sampler=er_sde,steps=10,schedule=karras", compared with the first',
    )
    parser.add_argument("--config", default=SMALL_CONFIG, help="of the model (scenes-64)")
    parser.add_argument("--known", action="store_true", help="only the clusters: seconds")
    args = parser.parse_args()
    samplers = [catalogue.resolve(name)[0] for name in args.samplers]
    if args.known:
        known(samplers, args.schedules)
        return
    pipeline = Pipeline.load(config=str(find(args.config)), safety="off")
    pipeline.options = type(pipeline.options)(batch_size=50)
    with torch.inference_mode():
        if args.samplers:
            distances(pipeline, args.images, args.scale, samplers, args.schedules)
    if args.scenes:
        chosen = [dict(pair.split("=") for pair in text.split(",")) for text in args.scenes]
        requests = [
            ImageRequest(**{"scale": args.scale} | {k: parsed(v) for k, v in each.items()}) for each in chosen
        ]
        scenes(pipeline, args.prompts, requests, args.scenes)


def parsed(value: str) -> object:
    """A number, a list of numbers with / between them, true, or the text itself."""
    if value == "true":
        return True
    try:
        return tuple(map(float, value.split("/"))) if "/" in value else float(value)
    except ValueError:
        return value


if __name__ == "__main__":
    main()
