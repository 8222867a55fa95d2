"""How well the siblings of the bundled model do what they are for, on held-out scenes.

Each function returns the images of its cases in rows, uint8 [size, size, 3], what was measured, and the names
of those that came out as NaN: they are black in the rows and wrong in what was measured. A figure that is not
finite, such as the PSNR of equal images, is None.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.images.edges import canny
from ldm.pipeline.device import arithmetic
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import ImageRequest, image_seed
from ldm.pipeline.settings.control import Control
from ldm.scenes.captions import caption
from ldm.scenes.detector import Detector
from ldm.scenes.masks import SEEN, box
from ldm.scenes.places import farthest, places
from ldm.scenes.renderer import render, render_layers
from ldm.scenes.scene import COLOURS, SHAPES, Scene, Solid, pick
from ldm.scenes.scores import NOT_FINITE, check, evaluation_scenes, score
from ldm.weights.loading import find

CONTROLNET = "models/scenes-128-canny/model.safetensors"
NEAR = 1 / 16  # of the image's side that a solid may be away from its place in the depth map or the edges
NOISE_LEVEL = 20  # the default of the command
Rows = list[list[np.ndarray]]
Figures = dict[str, float | None]


@dataclass(frozen=True)
class Repainting:
    """An image, the region of one of its solids, and a scene with another solid there, which is asked for."""

    image: np.ndarray  # uint8 [size, size, 3]
    mask: np.ndarray  # bool [size, size], True is to be painted anew
    asked: Scene


def repaintings(seed: int, count: int, size: int) -> Iterator[Repainting]:
    """`count` held-out scenes of one solid and as many of two, each before one of its solids was there.

    The mask is a rectangle around the solid that is seen and the one that is asked for.
    """
    rng = np.random.default_rng([seed, 2])
    for scene in with_background(both(seed, count)):
        asked = scene.canonical()
        wanted = asked.second or asked.first
        other = wanted
        while other in (asked.first, wanted) or other.shape == wanted.shape or other.colour == wanted.colour:
            other = replace(Solid(pick(rng, SHAPES), pick(rng, tuple(COLOURS))), size=wanted.size)
        before = replace(asked, second=other) if asked.second else replace(asked, first=other)
        state = int(rng.integers(2**32))
        image, there = render_layers(before, np.random.default_rng(state), size)
        _, wished = render_layers(asked, np.random.default_rng(state), size)
        region = np.maximum(there.coverage[-1], wished.coverage[-1]) > SEEN
        yield Repainting(image, box(region, size // 32), asked)


def inpainting(
    pipeline: Pipeline, detector: Detector, like: ImageRequest, seed: int, count: int
) -> tuple[Rows, Figures, list[str]]:
    """Shares of images with the asked solid in the masked region, and of pixels outside it that are kept."""
    size = pipeline.described.native_size
    cases = list(repaintings(seed, count, size))
    requests = [
        replace(
            like,
            prompt=caption(case.asked),
            init_img=Image.fromarray(case.image),
            mask=Image.fromarray(255 * case.mask.astype(np.uint8)),
            mask_blur=0.0,
            strength=1.0,
            seed=image_seed(seed, k),
        )
        for k, case in enumerate(cases)
    ]
    images, lost = _generated(pipeline, requests, size)
    seen = _seen(detector, images, lost)
    right = [check(case.asked, scene)["all"] for case, scene in zip(cases, seen, strict=True)]
    kept = [
        (image == case.image).all(-1)[~case.mask].mean() for image, case in zip(images, cases, strict=True)
    ]
    holes = [np.where(case.mask[..., None], np.uint8(127), case.image) for case in cases]
    rows = [[case.image, hole, image] for case, hole, image in zip(cases, holes, images, strict=True)]
    figures = {
        "asked solid, of one": float(np.mean(right[:count])),
        "asked solid, of two": float(np.mean(right[count:])),
        "asked solid": float(np.mean(right)),
        "pixels kept": float(np.mean(kept)),
    }
    return rows, figures, list(lost.values())


def depth(
    pipeline: Pipeline, detector: Detector, like: ImageRequest, seed: int, count: int
) -> tuple[Rows, Figures, list[str]]:
    """Shares of images with all solids within `NEAR` of the map's, and in the colours of the prompt.

    The maps are true ones. Where solids are is read in the same way from the image and from a render.
    """
    size = pipeline.described.native_size
    near = NEAR * size
    rng = np.random.default_rng([seed, 3])
    scenes = with_background(both(seed, count))
    truth = [render_layers(scene, rng, size) for scene in scenes]
    maps = [_as_image(layers.disparity) for _, layers in truth]
    requests = [
        replace(
            like,
            prompt=caption(scene),
            height=size,
            width=size,
            depth=Image.fromarray(depth_map),
            seed=image_seed(seed, k),
        )
        for k, (scene, depth_map) in enumerate(zip(scenes, maps, strict=True))
    ]
    images, lost = _generated(pipeline, requests, size)
    away = _away(images, lost, [image for image, _ in truth], scenes)
    seen = _seen(detector, images, lost)
    checks = [check(*pair) for pair in zip(scenes, seen, strict=True)]
    rows = [
        [np.stack([depth_map] * 3, axis=-1), image] for depth_map, image in zip(maps, images, strict=True)
    ]
    figures = {
        f"places within {near:g} pixels": float(np.mean(away <= near)),
        "colours of the prompt": float(np.mean([each["colours"] for each in checks])),
        "shapes of the prompt": float(np.mean([each["shapes"] for each in checks])),
        "median distance in pixels": finite(np.median(away)),
        "correlation of estimated with true maps": estimates(pipeline, seed, count),
    }
    return rows, figures, list(lost.values())


def estimates(pipeline: Pipeline, seed: int, count: int) -> float | None:
    """The mean correlation of the model's own depth estimates with the true inverse depths of renders.

    The maps are estimated as for the pipeline's own images. None where one is flat.
    """
    rng, size = np.random.default_rng([seed, 4]), pipeline.described.native_size
    found = []
    with torch.inference_mode(), arithmetic(pipeline.device):
        for scene in both(seed, count):
            image, layers = render_layers(scene, rng, size)
            given = Image.fromarray(image)
            request = ImageRequest(init_img=given, strength=1.0, height=size, width=size)
            estimated = pipeline.depth_maps.of(pipeline.model, request)
            with np.errstate(divide="ignore", invalid="ignore"):  # of a flat map
                found.append(np.corrcoef(estimated.ravel(), layers.disparity.ravel())[0, 1])
    return finite(np.mean(found))


def upscaling(
    pipeline: Pipeline,
    detector: Detector,
    like: ImageRequest,
    seed: int,
    count: int,
    noise_level: int = NOISE_LEVEL,
) -> tuple[Rows, Figures, list[str]]:
    """The PSNR in dB of enlarged renders, and of bicubic ones, against renders at the full size."""
    size = pipeline.described.native_size
    rng = np.random.default_rng([seed, 5])
    scenes = list(both(seed, count))
    truth = [render(scene, rng, size) for scene in scenes]
    small = [Image.fromarray(image).resize((size // 4, size // 4), Image.Resampling.BOX) for image in truth]
    requests = [
        replace(
            like, prompt=caption(scene), init_img=image, noise_level=noise_level, seed=image_seed(seed, k)
        )
        for k, (scene, image) in enumerate(zip(scenes, small, strict=True))
    ]
    images, lost = _generated(pipeline, requests, size)
    bicubic = [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in small]
    rows = [list(row) for row in zip(bicubic, images, truth, strict=True)]
    mine, theirs = (
        np.array([psnr(image, true) for image, true in zip(made, truth, strict=True)])
        for made in (images, bicubic)
    )
    own, other = finite(mine.mean()), finite(theirs.mean())
    figures = {
        "PSNR": own,
        "PSNR of bicubic": other,
        "better by": None if own is None or other is None else own - other,
        "better than bicubic": float(np.mean(mine > theirs)),
        "what was asked for": score(scenes, _seen(detector, images, lost))["all"],
    }
    return rows, figures, list(lost.values())


def edges(
    pipeline: Pipeline,
    detector: Detector,
    like: ImageRequest,
    seed: int,
    count: int,
    controlnet: str | Path | None = None,
) -> tuple[Rows, Figures, list[str]]:
    """As `depth`, for a ControlNet that follows edges (the bundled one), and the same without it.

    The edges are those of renders, by Canny's method. Rows are the render, its edges, the image that follows
    them, and the image of the same prompt and seed without them.
    """
    size = pipeline.described.native_size
    near = NEAR * size
    rng = np.random.default_rng([seed, 6])
    scenes = with_background(both(seed, count))
    truth = [render(scene, rng, size) for scene in scenes]
    drawn = [canny(image) for image in truth]
    free = [
        replace(like, prompt=caption(scene), height=size, width=size, seed=image_seed(seed, k))
        for k, scene in enumerate(scenes)
    ]
    file = str(controlnet or find(CONTROLNET))
    led = [
        replace(request, control=(Control(file, Image.fromarray(image)),))
        for request, image in zip(free, drawn, strict=True)
    ]
    images, lost = _generated(pipeline, led, size)
    unled, lost_unled = _generated(pipeline, free, size)
    away, chance = _away(images, lost, truth, scenes), _away(unled, lost_unled, truth, scenes)
    checks = [check(*pair) for pair in zip(scenes, _seen(detector, images, lost), strict=True)]
    rows = [list(row) for row in zip(truth, drawn, images, unled, strict=True)]
    figures = {
        f"places within {near:g} pixels": float(np.mean(away <= near)),
        f"places within {near:g} pixels without the edges": float(np.mean(chance <= near)),
        "colours of the prompt": float(np.mean([each["colours"] for each in checks])),
        "shapes of the prompt": float(np.mean([each["shapes"] for each in checks])),
        "median distance in pixels": finite(np.median(away)),
        "median distance in pixels without the edges": finite(np.median(chance)),
    }
    return rows, figures, [*lost.values(), *(f"{name}, without the edges" for name in lost_unled.values())]


MEASURES = {"inpainting": inpainting, "depth": depth, "upscaling": upscaling, "edges": edges}


def report(title: str, scores: Mapping[str, float | None]) -> str:
    """Scores as a Markdown table: shares in percent, everything else with two digits."""
    units = ("PSNR", "better by", "correlation", "median")
    lines = [f"| {title} | |", "|---|---:|"]
    for name, value in scores.items():
        if value is None:
            shown = NOT_FINITE
        else:
            shown = f"{value:.2f}" if name.startswith(units) else f"{100 * value:.1f} %"
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines) + "\n"


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images; infinity if they are equal."""
    error = np.square(image.astype(np.float64) - truth).mean()
    return float(10 * np.log10(255**2 / error)) if error else np.inf


def finite(value: float) -> float | None:
    """The figure, or None for infinity and NaN, which JSON has no words for."""
    return float(value) if np.isfinite(value) else None


def both(seed: int, count: int) -> list[Scene]:
    """`count` held-out scenes of one solid, then as many of two."""
    return [scene for pairs in (False, True) for scene in evaluation_scenes(seed, count, pairs=pairs)]


def with_background(scenes: Sequence[Scene]) -> list[Scene]:
    """The scenes, before a grey background where it was left open, so that their captions name it."""
    return [replace(scene, background=scene.background or "grey") for scene in scenes]


def _as_image(disparity: np.ndarray) -> np.ndarray:
    """A map of inverse depth as grey levels, uint8 [size, size], over their whole range."""
    low, high = disparity.min(), disparity.max()
    return (255 * (disparity - low) / (high - low) + 0.5).astype(np.uint8)


def _generated(
    pipeline: Pipeline, requests: Sequence[ImageRequest], size: int
) -> tuple[list[np.ndarray], dict[int, str]]:
    """The images of requests, a NaN one black; and the names of the NaN ones by their numbers."""
    black = np.zeros((size, size, 3), np.uint8)
    made = [image.pixels for image in pipeline.generate(requests)]
    lost = {k: requests[k].prompt for k, pixels in enumerate(made) if pixels is None}
    return [black if pixels is None else pixels for pixels in made], lost


def _away(
    images: Sequence[np.ndarray],
    lost: Mapping[int, str],
    truth: Sequence[np.ndarray],
    scenes: Sequence[Scene],
) -> np.ndarray:
    """How far in pixels the solids of each image are from their places in the true one; infinity if lost."""
    cases = enumerate(zip(images, truth, scenes, strict=True))
    return np.array(
        [
            np.inf if k in lost else farthest(places(image, scene), places(true, scene))
            for k, (image, true, scene) in cases
        ]
    )


def _seen(detector: Detector, images: Sequence[np.ndarray], lost: Mapping[int, str]) -> list[Scene | None]:
    """The scene that each image shows; None for one that was lost, whatever is read in a black image."""
    return [None if k in lost else scene for k, scene in enumerate(detector.read(images))]
