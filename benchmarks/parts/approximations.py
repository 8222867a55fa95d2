"""Approximations: what they gain, and how far their images are from the exact ones."""

import argparse
from dataclasses import replace
from statistics import median

from measuring import in_fresh_process, seconds
from report import Row

from ldm.weights.loading import ROOT, SMALL_CONFIG

APPROXIMATIONS = (
    "--deepcache 2",
    "--deepcache 3",
    "--deepcache 5",
    "--tome 0.5",
    "--guidance_end 0.8",
    "--guidance_end 0.6",
)


def measure_approximations(options: argparse.Namespace) -> list[Row]:
    steps, images = 50, 16
    found = in_fresh_process(approximations, steps, images)
    whole = median(found[""][0])
    what = f"`{{}}`, {images} pictures of scenes-64, {steps} DDIM steps, one at a time"
    return [
        Row(
            what.format(name),
            "",
            f"{whole / median(times):.2f}x the speed; "
            f"{min(psnr):.0f} to {max(psnr):.0f} dB to the exact, median {median(psnr):.0f}",
            values={"seconds": times, "exact seconds": found[""][0], "psnr": psnr},
        )
        for name, (times, psnr) in found.items()
        if name
    ]


def approximations(steps: int, images: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of three runs of scenes-64, and each image's PSNR in dB to the exact one, by flags.

    The prompts are encoded before, once for each pipeline.
    """
    import numpy as np

    from ldm.cli.arguments import Arguments, parse
    from ldm.cli.parser import txt2img_parser
    from ldm.pipeline import Pipeline
    from ldm.scenes.captions import caption
    from ldm.scenes.scene import random_scene

    rng = np.random.default_rng(0)
    prompts = [caption(random_scene(rng)) for _ in range(images)]
    commands: dict[str, tuple[Arguments, Pipeline]] = {}
    for flags in ("", *APPROXIMATIONS):
        argv = ["--config", str(ROOT / SMALL_CONFIG), "--steps", str(steps), "--device", "cpu"]
        command = parse(txt2img_parser(), [*argv, "--safety", "off", *flags.split()])
        commands[flags] = command, command.pipeline()

    def generate(name: str) -> np.ndarray:
        command, pipeline = commands[name]
        requests = [replace(command.request, prompt=prompt) for prompt in prompts]
        return np.stack([image.pixels for image in pipeline.generate(requests)])

    exact = generate("").astype(float)
    found: dict[str, tuple[list[float], list[float]]] = {}
    for name in commands:
        errors = ((generate(name) - exact) ** 2).mean(axis=(1, 2, 3))
        found[name] = [], list(10 * np.log10(255**2 / np.maximum(errors, 1e-6)))
    for _ in range(3):
        for name in commands:
            found[name][0].append(seconds(lambda name=name: generate(name)))
    return found
