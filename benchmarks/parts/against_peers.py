"""This toolkit and its peers as their users get them, on equal weights: rows of what `peers.py` measures."""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from measuring import in_fresh_process
from peers import PRECISIONS, STEPS, from_start, makers, plot, race, write_for_openvino
from report import RESULTS, Row, machine
from weights_cache import v1_weights

from ldm.errors import InputError
from ldm.log import notice
from ldm.weights.loading import ROOT, V1_CONFIG

TARGETS = {  # parts of diffusers' time on two CPU cores
    ("full", "step 1"): 0.90,
    ("bf16", "step 1"): 0.85,
    ("full", "decode"): 0.90,
    ("bf16", "decode"): 0.90,
}
GPU_IMAGE = 0.49  # seconds, 50 steps
GAINS = {"diffusers": 2.0, "diffusers compiled": 1.15}  # on a GPU


def measure_peers(options: argparse.Namespace) -> list[Row]:
    weights = v1_weights(options)
    files = {"config": ROOT / V1_CONFIG, "weights": weights}
    files |= {"diffusers": weights.with_name("v1-diffusers"), "openvino": weights.with_name("v1-openvino")}
    cpu = options.device == "cpu"
    steps = options.steps or (5 if cpu else STEPS)
    batches = options.batches or ([1, 2] if cpu else [1, 4, 8, 16])
    batches = list(dict.fromkeys([1, *batches]))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in options.precisions or (["full", "bf16"] if cpu else ["half"]):
            notice(f"peers: {PRECISIONS[precision]}")
            makes = makers(files, precision, options.device, options.compiled or not cpu)
            missing = set(options.peers or ()) - set(makes)
            if missing:
                raise InputError(f"--peers {', '.join(sorted(missing))}: can be had here: {', '.join(makes)}")
            makes = {name: make for name, make in makes.items() if name in (options.peers or makes)}
            if {"diffusers", "diffusers compiled"} & set(makes):
                write_once(files["diffusers"] / "text_encoder/model.safetensors", write_for_diffusers, files)
            if "openvino" in makes:
                write_once(files["openvino"] / "unet.xml", write_for_openvino, files)
            whole = {}
            if options.from_start:
                path, rounds = Path(folder) / "image.png", options.repeats
                whole = from_start(makes, files, options.from_start, path, rounds)
            found[PRECISIONS[precision]] = race(makes, steps, batches, options.repeats, Path(folder))
            for name, seconds in whole.items():
                found[PRECISIONS[precision]][name]["whole"] = median(seconds)
                found[PRECISIONS[precision]][name].setdefault("readings", {})["whole"] = seconds
    if find_spec("matplotlib"):
        RESULTS.mkdir(parents=True, exist_ok=True)
        facts = machine(options.device)
        title = f"SD 1.5 layout, 512x512, {facts['GPU'] or facts['CPU']}, torch {facts['torch']}"
        plot(found, steps, title, RESULTS / f"{options.name}.png")
    else:
        notice("no plot: pip install matplotlib")
    return [row for name, contenders in found.items() for row in peer_rows(name, contenders, steps, cpu)]


def write_once(last: Path, write: Callable[[dict[str, Path]], None], files: dict[str, Path]) -> None:
    """Bring the weights into a contender's layout, of which `last` is the file that comes last."""
    if not last.exists():
        notice(f"writing the weights to {last.parent.name}, once")
        in_fresh_process(write, files)


def write_for_diffusers(files: dict[str, Path]) -> None:
    from ldm.weights.convert import Conversion, convert

    job = Conversion(files["weights"], files["diffusers"], "diffusers", config=str(files["config"]))
    convert(job, lambda size: nullcontext(lambda count: None))


def peer_rows(precision: str, contenders: dict[str, dict], steps: int, cpu: bool) -> list[Row]:
    """What one precision came to: this toolkit's figure, then the others', with its part of each.

    The first contender takes its place where it was not measured.
    """
    first = "this" if "this" in contenders else next(iter(contenders))
    ours, theirs = contenders[first], contenders.get("diffusers")

    def row(what: str, key: str, show: Callable[[float], str], target: float | None = None) -> Row:
        others = {name: one[key] for name, one in contenders.items() if name != first and key in one}
        beside = [f"{name} {show(value)} ({ours[key] / value:.2f}x)" for name, value in others.items()]
        text, met = "", None
        if target is not None:
            text = f"<= {target:.2f} of diffusers' time"
            met = None if theirs is None else ours[key] <= target * theirs[key]
        shown = show(ours[key]) if first == "this" else f"{first} {show(ours[key])}"
        return Row(f"{precision}: {what}", text, "; ".join([shown, *beside]), met, contenders)

    def seconds(value: float) -> str:
        return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"

    def steps_per_second(value: float) -> str:
        return f"{seconds(value)}, {1 / value:.3g} it/s"

    short = next(key for key, name in PRECISIONS.items() if name == precision)
    step, decode = (TARGETS.get((short, key)) if cpu else None for key in ("step 1", "decode"))
    rows = {
        key: row(what, key, show, target)
        for key, what, show, target in (
            ("load", "start and load", seconds, None),
            ("text", "text encoder, two prompts", seconds, None),
            ("step 1", "one guided UNet step", steps_per_second, step),
            ("decode", "decoder", seconds, decode),
            ("first", "start, load, and the first call of each", seconds, None),
            ("image", f"one image, {steps} DPM-Solver++ steps, with its PNG", seconds, None),
            (
                "peak",
                "peak memory, with decodes before that image",
                lambda value: f"{value / 1e9:.2f} GB",
                None,
            ),
        )
        if key in ours  # another's program may be timed as a whole alone
    }
    if not cpu and steps == STEPS:
        image = rows["image"]
        best = min(readings["image"] for name, readings in contenders.items() if name.startswith(first))
        limits = [GPU_IMAGE]
        limits += [contenders[name]["image"] / gain for name, gain in GAINS.items() if name in contenders]
        gains = " and ".join(f"{gain}x {name}" for name, gain in GAINS.items())
        image.target, image.met = f"<= {GPU_IMAGE} s, {gains}", best <= min(limits)
    rows = list(rows.values())
    if "whole" in ours:
        rows.append(row("process start to the image's PNG", "whole", seconds))
    for key in ours:
        if key.startswith("images/s "):
            what = f"images/s of {STEPS} guided steps, {key.split()[1]} at once"
            rows.append(row(what, key, lambda value: f"{value:.3g}"))
    differences = {name: one["difference"] for name, one in contenders.items() if "difference" in one}
    plain = "this --eager" if "this --eager" in differences else next(iter(differences), first)
    text = "; ".join(f"{name} {value:.1e}" for name, value in differences.items())
    rows.append(Row(f"{precision}: largest difference to `{plain}`, of the largest output", "", text))
    for one in rows[1:]:
        one.values = {}  # the first row has all readings
    return rows
