"""How long images take, and how much memory: each figure beside its target."""

import io
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from gpu.check import Check
from gpu.exact import unet_inputs
from gpu.stand_in import (
    PROMPTS,
    WATERMARK,
    dry_run,
    free_memory,
    model_section,
    pipeline,
    random_model,
    request,
    synchronize,
)
from measuring import in_fresh_process
from parts.against_peers import GAINS, GPU_IMAGE
from peers import Diffusers, contenders, in_turn
from PIL import Image
from report import Row

from ldm.images.metadata import encode_image
from ldm.images.pixels import to_uint8
from ldm.images.watermark import Watermarker
from ldm.optimize import apply as optimize
from ldm.optimize import compile as compiling
from ldm.optimize.compile import compile_model
from ldm.optimize.norm import fuse_norms
from ldm.pipeline import Pipeline
from ldm.pipeline.device import arithmetic
from ldm.pipeline.infotext import image_texts
from ldm.runs.worker import BackgroundWriter
from ldm.weights.diffusers_writing import write_folder

STEPS = 50
BATCHES = (1, 2, 4, 8, 16)
IMAGE_TARGETS = {"v1": (GPU_IMAGE, 0.35, 0.29), "v2": (1.05, 0.80, 0.60)}  # seconds: least, good, goal
THROUGHPUT = (3.0, 4.8)  # images/s: least, goal

numbers = count()  # no two images of a process have the same prompt: each is encoded


def seconds(check: Check, work: Any) -> float:
    synchronize(check)
    start = time.perf_counter()
    work()
    synchronize(check)
    return time.perf_counter() - start


def one_image(
    check: Check, made: Pipeline, steps: int = STEPS, level: int | None = None, **settings: Any
) -> None:
    """From a new prompt to a PNG file with watermark and settings; `level` replaces the compression level."""
    prompt = f"{PROMPTS[0]}, number {next(numbers)}"
    (image,) = made.generate([request(check, prompt, steps=steps, **settings)])
    path = check.folder / "image.png"
    if level is None:
        image.save(path)
    else:
        marked = Watermarker.of(WATERMARK)(image.pixels)
        path.write_bytes(png(marked, level))


def png(pixels: Any, level: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=level)
    return file.getvalue()


def image_times(check: Check, made: Pipeline, repeats: int = 5, **settings: Any) -> dict[str, Any]:
    """Seconds of whole images and of a step, which is what half of the steps more take."""
    one_image(check, made, 4, **settings)  # recordings and compilers' work
    readings: dict[int, list[float]] = {STEPS: [], STEPS // 2: []}
    for _ in range(check.repeats(repeats)):
        for steps, each in readings.items():
            each.append(seconds(check, lambda n=steps: one_image(check, made, n, **settings)))
    whole, half = (median(each) for each in readings.values())
    return {"image": whole, "step": (whole - half) / (STEPS - STEPS // 2), "readings": readings[STEPS]}


def image_row(what: str, found: dict[str, Any], family: str | None = None, beside: str = "") -> Row:
    """With a family its targets: the row is met where the least of them is."""
    measured = f"{found['image']:.3f} s, {1000 * found['step']:.2f} ms a step{beside}"
    if family is None:
        return Row(what, "", measured, None, found)
    least, good, goal = IMAGE_TARGETS[family]
    return Row(what, f"<= {least} s, good {good}, goal {goal}", measured, found["image"] <= least, found)


def image(check: Check) -> Iterator[Row]:
    """One image end to end, and where its time goes."""
    with dry_run(check):
        eager = image_times(check, pipeline(check, eager=True), 3)
        free_memory(check)
        made = pipeline(check)
        fast = image_times(check, made)
        ratio = f" ({eager['image'] / fast['image']:.2f}x `--eager`)"
        what = f"SD 1.5, 512x512, float16, {STEPS} guided steps, prompt to PNG file"
        yield image_row(f"{what}, default", fast, "v1", ratio)
        yield image_row(f"{what}, `--eager`", eager)
        yield parts_row(check, made)
        yield image_row(
            f"{what}, `--deepcache 2` (approximate)", image_times(check, pipeline(check, deepcache=2), 3)
        )


def parts_row(check: Check, made: Pipeline) -> Row:
    model, (x, t, context) = made.model, unet_inputs(check)
    (found,) = made.generate([request(check, steps=2)])
    with torch.inference_mode(), arithmetic(torch.device(check.device)):
        decoded = made.first_stage.decode(x[:1])
        parts = {
            "text encoder": lambda: model.get_learned_conditioning(["", PROMPTS[0]]),
            "UNet call": lambda: model.apply_model(x, t, context),
            "decoder": lambda: made.first_stage.decode(x[:1]),
            "pixels to the host": lambda: to_uint8(decoded),
            "watermark": lambda: Watermarker.of(WATERMARK)(found.pixels),
            "PNG": lambda: encode_image(found.pixels, image_texts(found.settings)),
            "PNG, level 6": lambda: png(found.pixels, 6),
            "PNG, level 1": lambda: png(found.pixels, 1),
        }
        times = {
            name: median(seconds(check, work) for _ in range(check.repeats(10)))
            for name, work in parts.items()
        }
    shown = ", ".join(f"{name} {1000 * value:.1f}" for name, value in times.items())
    return Row("… of which, in ms", "", shown, None, times)


def ladder(check: Check) -> Iterator[Row]:
    """What each idea gains on top of those before it, without the compiler."""
    norms = mock.patch.object(optimize, "compile_model", fuse_norms)  # in place of the compiler
    yield rung(check, "plain, `--eager`", level=6, eager=True)
    yield rung(check, "+ recorded kernels", level=6)
    yield rung(check, "+ PNG level 1 (the default)")
    with norms:
        yield rung(check, "+ Triton norm, channels last, not compiled", compile=True)


def ladder_compiled(check: Check) -> Iterator[Row]:
    """What each idea gains with the compiler, the last of all first: its code is on disk already."""
    yield rung(check, "`--compile`: tuned flags and Triton norm", compile=True)
    without_norm = partial(compile_model, fused_norms=False)
    with mock.patch.object(optimize, "compile_model", without_norm):
        yield rung(check, "`--compile` without the Triton norm", compile=True)
        with mock.patch.object(compiling, "TUNED", {}):
            yield rung(check, "`--compile` without the Triton norm and tuned flags", compile=True)


def rung(check: Check, name: str, level: int | None = None, **options: Any) -> Row:
    with dry_run(check):
        found = image_times(check, pipeline(check, **options), 3, level=level)
    free_memory(check)
    return image_row(f"ladder: {name}", found)


def batches(check: Check) -> Iterator[Row]:
    """Images/s, and with the files written in the background, as a run does it."""
    found = {}
    with dry_run(check):
        made = pipeline(check)
        for size in BATCHES if not check.tiny else BATCHES[:2]:
            requests = [request(check, f"{PROMPTS[0]} {k}", seed=k) for k in range(size)]
            short = [request(check, f"{PROMPTS[0]} {k}", steps=2, seed=k) for k in range(size)]
            list(made.batches([[made.resolve(each) for each in short]]))
            rounds = [[made.resolve(each) for each in requests]] * max(1, 4 // size)
            bare = seconds(check, lambda r=rounds: list(made.batches(r)))
            written = seconds(check, lambda r=rounds: write_batches(check, made, r))
            images = size * len(rounds)
            found[size] = {"bare": images / bare, "written": images / written}
    best = max(of["bare"] for of in found.values())
    yield Row(
        f"images/s, 512x512, float16, {STEPS} guided steps, by images at once; with files written meanwhile",
        f"best >= {THROUGHPUT[0]}, goal {THROUGHPUT[1]}",
        "; ".join(f"{size}: {of['bare']:.2f}, {of['written']:.2f}" for size, of in found.items()),
        best >= THROUGHPUT[0],
        found,
    )


def write_batches(check: Check, made: Pipeline, rounds: list[Any]) -> None:
    def save(images: list[Any]) -> None:
        for k, each in enumerate(images):
            each.save(check.folder / f"{k}.png")

    with ThreadPoolExecutor(1) as thread:
        background = BackgroundWriter(thread)
        for images in made.batches(rounds):
            background.submit(save, images)
        background.finish()


def v2(check: Check) -> Iterator[Row]:
    """SD 2.1 at its own size; with `compile` the slow part is its compilation."""
    yield from v2_images(check, "default")


def v2_compiled(check: Check) -> Iterator[Row]:
    yield from v2_images(check, "`--compile`", compile=True)


def v2_images(check: Check, name: str, **options: Any) -> Iterator[Row]:
    with dry_run(check):
        found = image_times(check, pipeline(check, family="v2", **options), 3, pixels=768)
    yield image_row(
        f"SD 2.1-v, 768x768, float16, {STEPS} guided steps, prompt to PNG file, {name}", found, "v2"
    )


# new processes


def first_image(check: Check, options: dict[str, Any], start: float) -> dict[str, float]:
    """In a new process: seconds of the first image, of the second, and since `start`, by time.time()."""
    with dry_run(check):
        made = pipeline(check, **options)
        first, second = (seconds(check, lambda: one_image(check, made)) for _ in range(2))
    return {"first": first, "second": second, "whole": time.time() - start}


def first(check: Check) -> Iterator[Row]:
    """The first image of a process, with recordings."""
    yield first_row(check, "graphs", 3.0)


def first_compiled(check: Check) -> Iterator[Row]:
    """The first image of a process, compiled without and with the code on disk."""
    if not (check.cache / "inductor").exists():
        yield first_row(check, "`--compile`, nothing on disk", None, compile=True)
    yield first_row(check, "`--compile`, from the cache", 60.0, compile=True)


def first_row(check: Check, name: str, limit: float | None, **options: Any) -> Row:
    found = in_fresh_process(first_image, check, options, time.time())
    return Row(
        f"first image of a process, {name}",
        f"<= {limit:g} s" if limit else "",
        f"{found['first']:.1f} s, the second {found['second']:.2f} s, {found['whole']:.1f} s with "
        "the start, imports and random weights",
        found["first"] <= limit if limit else None,
        found,
    )


class Ours:
    """A contender of peers.py: this toolkit on random weights."""

    def __init__(self, check: Check, options: dict[str, Any]):
        self.check, self.device = check, torch.device(check.device)
        self.stack = ExitStack()
        self.stack.enter_context(dry_run(check))
        self.pipeline = pipeline(check, **options)

    def image(self, steps: int, path: Path) -> None:
        one_image(self.check, self.pipeline, steps)


def diffusers(check: Check) -> Iterator[Row]:
    """diffusers on the same weights, each in its own process, called in turn."""
    yield against_diffusers(check, "diffusers", compiled=False)


def diffusers_compiled(check: Check) -> Iterator[Row]:
    """The same with torch's compiler on both sides."""
    yield against_diffusers(check, "diffusers compiled", compiled=True)


def against_diffusers(check: Check, name: str, compiled: bool) -> Row:
    flags = "`--compile`" if compiled else "default"
    what = f"one image, {STEPS} steps, prompt to PNG file, each in its own process: {flags} against {name}"
    lacking = [each for each in ("diffusers", "open_clip", "ftfy") if not find_spec(each)]
    if lacking:
        return Row(what, f">= {GAINS[name]}x", f"not measured: {', '.join(lacking)} not installed")
    compiled = compiled and check.cuda  # on a CPU this would take minutes
    folder = check.folder / "diffusers"
    if not (folder / "text_encoder/model.safetensors").exists():  # which is written last
        shutil.rmtree(folder, ignore_errors=True)
        model = random_model(check, dtype=torch.float16).to("cpu")
        write_folder(model.state_dict(), folder, model_section("v1", check.tiny), "eps")
        del model
        free_memory(check)
    makes = {
        "this": partial(Ours, check, {"compile": compiled}),
        name: partial(Diffusers, {"diffusers": folder}, "half", check.device, compiled),
    }
    path = check.folder / "theirs.png"
    with contenders(makes) as running:
        found = in_turn(running, check.repeats(5), "image", check.steps(STEPS), path)
    ours, other = (median(each[1:]) for each in found.values())
    return Row(
        what,
        f">= {GAINS[name]}x",
        f"{ours:.3f} s against {other:.3f} s ({other / ours:.2f}x)",
        other >= GAINS[name] * ours,
        found,
    )
