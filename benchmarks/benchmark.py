#!/usr/bin/env python3
"""Measure the toolkit on this machine: start-up, one image, loading, a UNet step, numbers of model calls."""

import argparse
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli.entry import run
from ldm.cli.parser import Parser, number
from ldm.errors import InputError
from ldm.log import notice
from ldm.weights.loading import BUNDLED_CONFIG, ROOT, SMALL_CONFIG, V1_CONFIG

RESULTS = ROOT / "benchmarks/results"
GIB = 2**30
PROMPT = "a red cube on top of a blue sphere"


@dataclass
class Row:
    """One line of the table."""

    what: str
    target: str
    measured: str
    met: bool | None = None  # None: there is nothing to meet, or it could not be measured
    values: dict[str, Any] = field(default_factory=dict)  # every single reading, in seconds and bytes


def in_fresh_process(function: Callable, *args: Any) -> Any:
    """What the function returns in a new Python: nothing is imported yet, and peak memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def seconds(work: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def timed_runs(command: list[str], repeats: int) -> list[float]:
    """Wall times of whole processes; InputError with its last line if one of them fails."""

    def once() -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise InputError((done.stderr.strip() or "no message").splitlines()[-1].replace(f"{ROOT}/", ""))

    return [seconds(once) for _ in range(repeats)]


# --help and one image: whole processes


def measure_help(options: argparse.Namespace) -> list[Row]:
    command = [str(ROOT / "scripts/txt2img.py"), "--help"]
    tracing = [sys.executable, "-X", "importtime", *command]
    # this run, which is not timed, also writes the .pyc files
    imports = subprocess.run(tracing, capture_output=True, text=True).stderr
    has_torch = bool(re.search(r"\| +torch$", imports, re.M))
    times = timed_runs([sys.executable, *command], 5)
    return [
        Row(
            "`txt2img.py --help`, whole process, median of 5",
            "< 0.5 s, torch not imported",
            f"{median(times):.2f} s, torch {'' if has_torch else 'not '}imported",
            median(times) < 0.5 and not has_torch,
            {"seconds": times, "torch imported": has_torch},
        )
    ]


def measure_image(options: argparse.Namespace) -> list[Row]:
    what, target = "one image of scenes-128, 50 PLMS steps, whole process, median of 3", "< 8 s"
    arguments = ["--plms", "--n_samples", "1", "--n_iter", "1", "--skip_grid"]
    arguments += ["--prompt", PROMPT, "--config", str(ROOT / BUNDLED_CONFIG)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "scripts/txt2img.py"), *arguments, "--outdir", folder]
        try:
            times = timed_runs(command, 3)
        except InputError as error:
            return [Row(what, target, f"not measured: {error}")]
    return [Row(what, target, f"{median(times):.2f} s", median(times) < 8, {"seconds": times})]


# the full v1 model, on stand-in weights


def stand_in_weights(config: Path, path: Path) -> Path:
    """`path`: the config's model as float32 safetensors, made if need be, and now in the page cache."""
    from peers import read_through

    if not path.exists():
        notice(f"making stand-in weights, once: {path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            in_fresh_process(write_weights, config, path)
        except OSError as error:
            raise InputError(f"--cache {path.parent}: {error.strerror}") from error
    read_through(path)
    return path


def write_weights(config: Path, path: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests/golden"))
    import torch
    from pseudo_weights import pseudo_state_dict
    from safetensors.torch import save_file

    from ldm.util import instantiate_from_config
    from ldm.weights.loading import read_config

    with torch.device("meta"):
        wanted = instantiate_from_config(read_config(config)).state_dict()
    state = pseudo_state_dict({name: ["float32", list(tensor.shape)] for name, tensor in wanted.items()})
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        save_file(state, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def v1_weights(options: argparse.Namespace) -> Path:
    return stand_in_weights(ROOT / V1_CONFIG, options.cache / "v1-float32.safetensors")


def memory() -> dict[str, int]:
    """This process's memory now and at its peak, in bytes, mapped pages that were touched included (Linux).

    Not `getrusage`'s ru_maxrss: that starts from the peak of the process which started this one.
    """
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = {"now": "VmRSS", "anonymous": "RssAnon", "peak": "VmHWM"}
    return {name: int(status[key].split()[0]) * 1024 for name, key in kilobytes.items()}


def load_and_use(
    config: Path | None, weights: Path, latents: int | None, dtype: str = "float32"
) -> dict[str, Any]:
    """Seconds of `load_model` after imports and of first touching every weight; memory at each stage.

    Without a config the file is recognised first, and that counts, too. With `latents`, also memory after
    text encoder, UNet (batch 2) and decoder at that latent size.
    """
    import omegaconf  # noqa: F401
    import torch

    from ldm.weights.loading import choose_model, load_model, read_config

    for module in (
        "weights.prediction",
        "weights.checkpoint",
        "models.autoencoder",
        "models.diffusion.ddpm",
        "modules.encoders.modules",
    ):
        import_module(f"ldm.{module}")
    import_module("ldm.modules.diffusionmodules.openaimodel")
    readings = {"memory": {"imports": memory()}}
    start = time.perf_counter()
    section = read_config(config or choose_model(None, str(weights)).config)
    model = load_model(section, weights, dtype=getattr(torch, dtype))
    readings["load"] = time.perf_counter() - start
    readings["memory"]["load"] = memory()
    for parameter in model.parameters():
        parameter.flatten()[::1024].sum()  # one value of each 4 KiB page
    readings["load and touch"] = time.perf_counter() - start
    readings["memory"]["touch"] = memory()
    if latents:
        with torch.inference_mode():
            context = model.get_learned_conditioning(["", PROMPT])
            x = torch.randn(2, model.channels, latents, latents)
            eps = model.apply_model(x, torch.full((2,), 500.0), context)
            readings["memory"]["UNet"] = memory()
            model.decode_first_stage(eps[:1])
            readings["memory"]["decoder"] = memory()
    return readings


def measure_load(options: argparse.Namespace) -> list[Row]:
    what = "building and loading the full v1 model, float32, after imports, median of 3"
    if not Path("/proc/self/status").exists():
        return [Row(what, "< 2 s", "not measured: memory is read from Linux's /proc")]
    weights = v1_weights(options)
    readings = []
    for i in range(3):
        notice(f"load: process {i + 1} of 3")
        use = options.latents if i == 2 else None  # the last one computes, too
        readings.append(in_fresh_process(load_and_use, ROOT / V1_CONFIG, weights, use))
    load, touch = (median(reading[key] for reading in readings) for key in ("load", "load and touch"))
    rows = [
        Row(what, "< 2 s", f"{load:.2f} s", load < 2, {"readings": readings}),
        Row("… and every page of the weights read", "", f"{touch:.2f} s"),
    ]
    size = weights.stat().st_size
    stages = {
        "load": "loaded",
        "touch": "every weight read",
        "UNet": f"text encoder and UNet run (batch 2, {options.latents}x{options.latents})",
        "decoder": "decoder run (batch 1)",
    }
    for stage, what in stages.items():
        found = readings[-1]["memory"][stage]
        share = f"{(found['peak'] / size - 1) * 100:+.0f} %"
        measured = f"{found['peak'] / GIB:.2f} GiB ({share}), {found['anonymous'] / GIB:.2f} GiB not mapped"
        row = Row(f"peak memory of that process: {what}", "", measured)
        if stage in ("load", "touch"):
            row.target, row.met = f"< file ({size / GIB:.2f} GiB) + 15 %", found["peak"] < 1.15 * size
        rows.append(row)
    return rows


def measure_load_v2(options: argparse.Namespace) -> list[Row]:
    what = "recognising and loading a full v2 file of float32 as {}, after imports, median of 3"
    if not Path("/proc/self/status").exists():
        return [Row(what.format("float32"), "< 2.5 s", "not measured: memory is read from Linux's /proc")]
    config = ROOT / "configs/stable-diffusion/v2-inference-v.yaml"
    weights = stand_in_weights(config, options.cache / "768-v-float32.safetensors")
    size, rows = weights.stat().st_size, []
    for dtype in ("float32", "bfloat16", "float16"):
        notice(f"load_v2: {dtype}")
        readings = [in_fresh_process(load_and_use, None, weights, None, dtype) for _ in range(3)]
        load = median(reading["load"] for reading in readings)
        peak = max(reading["memory"]["touch"]["peak"] for reading in readings)
        values = {"readings": readings}
        rows += [
            Row(what.format(dtype), "< 2.5 s", f"{load:.2f} s", load < 2.5, values),
            Row(
                "… peak memory, every weight read",
                f"< file ({size / GIB:.2f} GiB) + 15 %",
                f"{peak / GIB:.2f} GiB ({(peak / size - 1) * 100:+.0f} %)",
                peak < 1.15 * size,
            ),
        ]
    return rows


# one guided UNet step, ours and diffusers'


def time_unets(config: Path, weights: Path, latents: int, theirs: bool, repeats: int) -> dict[str, Any]:
    """Seconds of UNet calls at batch 2, of ours and, if asked for, diffusers' in turn, on the same weights;
    largest difference.
    """
    import torch

    from ldm.weights.loading import load_model, read_config

    section = read_config(config)
    model = load_model(section, weights)
    unet = model.model.diffusion_model
    torch.manual_seed(0)
    x, t = torch.randn(2, model.channels, latents, latents), torch.tensor([500.0, 500.0])
    with torch.inference_mode():
        context = model.get_learned_conditioning(["", PROMPT])
        calls = {"ours": lambda: unet(x, t, context)}
        if theirs:
            other = diffusers_twin(unet, section["params"])
            calls["diffusers"] = lambda: other(x, t, context).sample
        outputs = {name: call() for name, call in calls.items()}  # the warm-up
        readings = {name: [] for name in calls}
        for i in range(repeats):
            notice(f"unet: {i + 1} of {repeats}")
            for name, call in calls.items():
                readings[name].append(seconds(call))
    if theirs:
        readings["difference"] = (outputs["ours"] - outputs["diffusers"]).abs().max().item()
        readings["largest output"] = outputs["diffusers"].abs().max().item()
    return readings | {"threads": torch.get_num_threads()}


def diffusers_twin(unet: Any, params: dict) -> Any:
    """diffusers' UNet with the very tensors of ours; `params` are those of the model's YAML."""
    import torch
    from diffusers import UNet2DConditionModel

    from ldm.weights.diffusers_configs import unet_config
    from ldm.weights.diffusers_names import unet_to_theirs

    theirs = unet_to_theirs(unet.state_dict())
    with torch.device("meta"):
        twin = UNet2DConditionModel.from_config(unet_config(params, theirs))
    twin.load_state_dict(theirs, assign=True)
    return twin.eval().requires_grad_(False)


def measure_unet(options: argparse.Namespace) -> list[Row]:
    size = f"{options.latents}x{options.latents}"
    has_diffusers = find_spec("diffusers") is not None
    weights = v1_weights(options)
    readings = in_fresh_process(time_unets, ROOT / V1_CONFIG, weights, options.latents, has_diffusers, 5)
    ours = median(readings["ours"])
    what = f"a plain v1 UNet step (`--eager`), {size} latents, float32, {readings['threads']} threads"
    rows = [Row(what, "", f"{ours:.2f} s", values=readings)]
    what, target = "… against diffusers' `UNet2DConditionModel` in the same process", "no slower"
    if not has_diffusers:
        return [*rows, Row(what, target, "not measured: diffusers is not installed")]
    theirs = median(readings["diffusers"])
    difference = f"{readings['difference']:.1e} of {readings['largest output']:.1f}"
    return [
        *rows,
        Row(what, target, f"{ours / theirs:.3f} of its {theirs:.2f} s", ours <= theirs),
        Row("… largest difference of the two outputs, same weights", "", difference),
    ]


# this toolkit and diffusers, as their users get them

NAMES = {"full": "float32", "half": "float16", "bf16": "bfloat16"}
TARGETS = {  # parts of diffusers' time on two CPU cores
    ("full", "step 1"): 0.90,
    ("bf16", "step 1"): 0.85,
    ("full", "decode"): 0.90,
    ("bf16", "decode"): 0.90,
}
LARGEST_PEAK = 6.5e9  # bytes, of a float32 image on a CPU
GPU_IMAGE = 0.49  # seconds, 50 steps
GAINS = {"diffusers": 2.0, "diffusers compiled": 1.15}  # on a GPU


def measure_peers(options: argparse.Namespace) -> list[Row]:
    from peers import STEPS, from_start, makers, plot, race, write_for_openvino

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
            notice(f"peers: {NAMES[precision]}")
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
            found[NAMES[precision]] = race(makes, steps, batches, options.repeats, Path(folder))
            for name, seconds in whole.items():
                found[NAMES[precision]][name]["whole"] = median(seconds)
                found[NAMES[precision]][name].setdefault("readings", {})["whole"] = seconds
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
    from peers import STEPS

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

    short = next(key for key, name in NAMES.items() if name == precision)
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
            ("peak", "peak memory of that image", lambda value: f"{value / 1e9:.2f} GB", None),
        )
        if key in ours  # another's program may be timed as a whole alone
    }
    if cpu and short == "full":
        peak = rows["peak"]
        peak.target, peak.met = f"< {LARGEST_PEAK / 1e9} GB", ours["peak"] < LARGEST_PEAK
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


def measure_ideas(options: argparse.Namespace) -> list[Row]:
    """What each optimisation gains, alone."""
    from peers import gains

    files = {"config": ROOT / V1_CONFIG, "weights": v1_weights(options)}
    rows = []
    for precision in options.precisions or (["full", "bf16"] if options.device == "cpu" else ["half"]):
        notice(f"ideas: {NAMES[precision]}")
        found = gains(files, precision, options.device, options.repeats)
        times = {ideas: {part: median(of[part]) for part in of} for ideas, of in found.items()}
        for ideas, ours in times.items():
            shown = f"step {ours['step']:.3g} s, decode {ours['decode']:.3g} s"
            if ideas:
                before = times[ideas[:-1] if ideas[0] != "compiled" else ideas[1:]]
                shown += "; gain {step:.3f}x, {decode:.3f}x".format_map(
                    {k: before[k] / ours[k] for k in ours}
                )
            name = ", ".join(ideas) or "plain (`--eager`)"
            rows.append(Row(f"{NAMES[precision]}: {name}", "", shown, values=found[ideas]))
    return rows


# numbers of calls


class CountingModel:
    """What a pipeline asks of a LatentDiffusion, without weights: counts the calls."""

    parameterization = "eps"
    conditioning_key = "crossattn"
    channels = 4

    def __init__(self):
        import torch

        from ldm.modules.diffusionmodules.util import make_beta_schedule

        self.device = torch.device("cpu")
        betas = torch.from_numpy(make_beta_schedule("linear", 1000, 0.00085, 0.012))
        self.alphas_cumprod = (1 - betas).cumprod(0)
        self.first_stage_model = argparse.Namespace(factor=8)
        self.unet_calls = 0
        self.encoded: list[str] = []

    def apply_model(self, x: Any, t: Any, cond: Any) -> Any:
        self.unet_calls += 1
        return 0.1 * x

    def get_learned_conditioning(self, prompts: list[str]) -> Any:
        import torch

        self.encoded += prompts
        return torch.zeros(len(prompts), 77, 8)

    def decode_first_stage(self, z: Any) -> Any:
        return z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)


def count_calls(sampler: str, steps: int, prompts: list[str], n_iter: int, n_samples: int) -> CountingModel:
    """The model after a guided run."""
    from ldm.pipeline import ImageRequest, Pipeline
    from ldm.runs.plan import plan_run

    model = CountingModel()
    pipeline = Pipeline.of_model(model)
    like = ImageRequest(height=64, width=64, sampler=sampler, steps=steps, scale=7.5)
    requests = [pipeline.resolve(replace(like, prompt=prompt)) for prompt in prompts]
    plan = plan_run(requests, 42, n_iter, n_samples, None)
    for _ in pipeline.batches(map(plan.batch, plan.batches)):
        pass
    return model


def measure_calls(options: argparse.Namespace) -> list[Row]:
    steps, rows = 20, []
    for sampler, extra in (("ddim", 0), ("plms", 1), ("dpmpp_2m", 0)):
        calls = count_calls(sampler, steps, ["a"], 1, 1).unet_calls
        rows.append(
            Row(
                f"model calls, {sampler}, N = {steps}, guided",
                f"N{' + 1' if extra else ''}",
                str(calls),
                calls == steps + extra,
                {"calls": calls},
            )
        )
    encoded = count_calls("ddim", 1, ["a", "b", "a", "a", "b"], 2, 2).encoded
    rows.append(
        Row(
            "prompts encoded, 10 images of 2 prompts in 6 batches",
            "3: each prompt once, and the empty one",
            str(len(encoded)),
            sorted(encoded) == ["", "a", "b"],
            {"encoded": encoded},
        )
    )
    return rows


# the samplers' own arithmetic, and a sheet of them


class ConstantModel(CountingModel):
    """Answers every call with the same tensor at once: what is left of a run is the sampler's own work."""

    def __init__(self, latents: int):
        import torch

        super().__init__()
        self.answer = torch.randn(2, 4, latents, latents, generator=torch.Generator().manual_seed(0))

    def apply_model(self, x: Any, t: Any, cond: Any) -> Any:
        return self.answer


def sampler_overheads(latents: int, steps: int) -> dict[str, float]:
    """Seconds per step of each sampler, guidance and noise included, model calls excluded; best of 3 runs."""
    import torch

    from ldm.sampling import SAMPLERS, Denoiser, catalogue, default_trajectory, sample
    from ldm.sampling.noise import ImageNoise, ImageSeeds

    model = ConstantModel(latents)
    cond = torch.zeros(1, 77, 8)
    denoiser, shape = Denoiser(model, cond, cond, 7.5), (4, latents, latents)

    def once(name: str) -> None:
        noise = ImageNoise(
            [ImageSeeds(42)], shape, model.device, brownian=catalogue.SAMPLERS[name].noise == "brownian"
        )
        sample(denoiser, name, default_trajectory(denoiser, name, steps), noise)

    names = [name for name in SAMPLERS if name != "dpm_adaptive"]  # its steps are its own choice
    with torch.inference_mode():
        return {name: min(seconds(lambda name=name: once(name)) for _ in range(3)) / steps for name in names}


def measure_samplers(options: argparse.Namespace) -> list[Row]:
    step = time_unets_alone(options)
    times = in_fresh_process(sampler_overheads, options.latents, 20)
    slowest = max(times, key=times.get)
    return [
        Row(
            f"a sampler's own work in a step of 20, of a guided v1 step of {step:.2f} s, slowest sampler",
            "< 1 %",
            f"{times[slowest] / step:.2%} ({slowest}, {1e3 * times[slowest]:.1f} ms); "
            f"median {median(times.values()) / step:.2%}",
            times[slowest] < 0.01 * step,
            {"seconds per step": times, "guided v1 step": step},
        )
    ]


def time_unets_alone(options: argparse.Namespace) -> float:
    weights = v1_weights(options)
    return median(in_fresh_process(time_unets, ROOT / V1_CONFIG, weights, options.latents, None, 2)["ours"])


def measure_sheet(options: argparse.Namespace) -> list[Row]:
    what, target = "`compare.py`, scenes-64, 8 samplers x 6 step counts, whole process", "< 60 s"
    samplers = ["ddim", "plms", "euler_ancestral", "heun", "lms", "dpmpp_2m", "dpmpp_sde", "unipc"]
    arguments = ["--x", "sampler", *samplers, "--y", "steps", *map(str, (5, 10, 15, 20, 30, 50))]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "scripts/compare.py"), *arguments, "--prompt", PROMPT]
        command += ["--config", str(ROOT / SMALL_CONFIG), "--outdir", folder]
        try:
            (time,) = timed_runs(command, 1)
        except InputError as error:
            return [Row(what, target, f"not measured: {error}")]
    return [Row(what, target, f"{time:.1f} s", time < 60, {"seconds": time})]


# long runs: bookkeeping, several processes, resuming


def bookkeeping_share(images: int) -> tuple[float, float]:
    """Seconds that metadata, encoding, writing and the manifest take in a run, and those of the run."""
    from ldm.cli.arguments import parse
    from ldm.cli.parser import txt2img_parser
    from ldm.runs import worker
    from ldm.runs.run import run

    spent: list[float] = []
    worker.save = timed(worker.save, spent)
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--prompt", PROMPT, "--config", str(ROOT / SMALL_CONFIG), "--outdir", folder, "--quiet"]
        argv += ["--n_samples", "4", "--n_iter", str(images // 4), "--safety", "off", "--plms"]
        command = parse(txt2img_parser(), argv)

        def whole_run() -> None:
            pipeline = command.pipeline()
            run(pipeline, command.requests(pipeline), command.run)

        with redirect_stdout(io.StringIO()):
            whole = seconds(whole_run)
    return sum(spent), whole


def timed(function: Callable, spent: list[float]) -> Callable:
    """The function, which notes how long each call takes."""

    def call(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args)
        finally:
            spent.append(time.perf_counter() - start)

    return call


def images_per_second(devices: int, images: int) -> float:
    """Of a run of scenes-64 by processes of one thread each, one to a core, as its bar says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "scripts/txt2img.py"), "--prompt", PROMPT, "--outdir", folder]
        command += ["--config", str(ROOT / SMALL_CONFIG), "--device", "cpu", "--devices", str(devices)]
        command += ["--n_samples", "4", "--n_iter", str(images // 4), "--steps", "20", "--skip_grid"]
        if devices == 1 and shutil.which("taskset"):
            command = ["taskset", "-c", "0", *command]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        rates = re.findall(r"([0-9.]+) images/s", done.stderr)
        if done.returncode or not rates:
            raise InputError((done.stderr.strip() or "no message").splitlines()[-1].replace(f"{ROOT}/", ""))
        return float(rates[-1])


def resume_seconds(lines: int) -> float:
    """How long it takes to find what a run lacks whose manifest has so many lines."""
    from ldm.runs.manifest import RunRecord

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record = RunRecord(folder, {"steps": 50}, lines)
        record.start(0)
        with record.ending():
            write_half_a_manifest(folder, record, lines)
        again = RunRecord(folder, {"steps": 50}, lines)

        def decide() -> None:
            again.resume()
            assert len(again.missing()) == lines // 2

        with again.ending():
            return seconds(decide)


def write_half_a_manifest(folder: Path, record: Any, lines: int) -> None:
    """Every other image of a run and its line of the manifest, and as many lines of another run."""
    from ldm.runs.manifest import MANIFEST

    (folder / "samples").mkdir()
    settings = {"prompt": PROMPT, "sampler": "ddim", "steps": 50, "scale": 7.5, "height": 512, "width": 512}
    with open(folder / MANIFEST, "w") as manifest:
        for k in range(0, lines, 2):
            file = f"samples/{k:05}.png"
            (folder / file).touch()
            manifest.write(json.dumps({"run": record.run, "image": k, "file": file, **settings}) + "\n")
        for k in range(1, lines, 2):
            line = {"run": "another", "image": k, "file": f"samples/{k:05}.png", **settings}
            manifest.write(json.dumps(line) + "\n")


def planning_seconds(lines: int) -> float:
    """How long it takes from the arguments of a command, whose JSON lines each have options of their own, to
    the plan of its run; after imports, and without the model.
    """
    import ldm.pipeline.pipeline  # noqa: F401, imports torch
    from ldm.cli.arguments import parse
    from ldm.cli.parser import txt2img_parser
    from ldm.runs.plan import plan_run

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.jsonl")
        own = ({"seed": k, "steps": 10 + k % 40, "scale": 1.5 + k / lines} for k in range(lines))
        path.write_text("".join(json.dumps({"prompt": PROMPT, **options}) + "\n" for options in own))
        argv = ["--from-file", str(path), "--config", str(ROOT / SMALL_CONFIG), "--n_iter", "1"]
        argv += ["--sampler", "dpmpp_2m", "--safety", "off", "--device", "cpu"]

        def plan() -> None:
            command = parse(txt2img_parser(), argv)
            requests = list(command.requests(command.pipeline()))
            found = plan_run(requests, command.run.seed, command.run.n_iter, command.run.n_samples, None)
            assert len(found.requests) == lines

        return seconds(plan)


def measure_runs(options: argparse.Namespace) -> list[Row]:
    spent, whole = in_fresh_process(bookkeeping_share, 48)
    share = spent / whole
    one, two = images_per_second(1, 160), images_per_second(2, 160)
    again = in_fresh_process(resume_seconds, 100_000)
    planning = in_fresh_process(planning_seconds, 10_000)
    return [
        Row(
            "metadata, PNG and manifest of 48 images of scenes-64, 50 PLMS steps, of the run's time",
            "< 3 %",
            f"{share:.1%} ({1000 * spent / 48:.1f} ms an image, beside the sampling)",
            share < 0.03,
            {"spent": spent, "whole": whole},
        ),
        Row(
            "two processes (`--devices 2`), images/s, against one that is pinned to one core",
            "at least 1.6x",
            f"{two / one:.2f}x ({two:.2f} and {one:.2f} images/s, 160 images of 20 steps)",
            two / one >= 1.6,
            {"one": one, "two": two},
        ),
        Row(
            "what is missing among 100,000 lines of a manifest",
            "< 2 s",
            f"{again:.1f} s",
            again < 2,
            {"seconds": again},
        ),
        Row(
            "10,000 JSON lines with own options planned",
            "< 2 s",
            f"{planning:.1f} s",
            planning < 2,
            {"seconds": planning},
        ),
    ]


# approximations: what they gain, and what they change

APPROXIMATIONS = (
    "--deepcache 2",
    "--deepcache 3",
    "--deepcache 5",
    "--tome 0.5",
    "--guidance_end 0.8",
    "--guidance_end 0.6",
)


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


# image to image: what stays of the image, and what comes of the prompt


def image_to_image(prompt: str, strengths: list[float]) -> dict[float, tuple[float, list[str]]]:
    """For each strength over 8 seeds: mean PSNR in dB to the round trip, and what a detector reads."""
    import numpy as np

    from ldm.pipeline import ImageRequest, Pipeline, RuntimeOptions
    from ldm.scenes.captions import caption
    from ldm.scenes.detector import load_detector

    options = RuntimeOptions(device="cpu", eager=True, batch_size=8)
    pipeline = Pipeline.open(config=BUNDLED_CONFIG, options=options, safety="off")
    detector = load_detector(ROOT / "models/scenes-64/detector.safetensors")
    init, side = str(ROOT / "assets/init.png"), 128

    def generate(strength: float) -> np.ndarray:
        request = ImageRequest(prompt, height=side, width=side, scale=3.0, init_img=init, strength=strength)
        return np.stack([image.pixels for image in pipeline.generate([request] * 8)])

    trip, found = generate(0.0).astype(float), {}
    for strength in strengths:
        made = generate(strength)
        errors = ((made - trip) ** 2).mean(axis=(1, 2, 3))
        psnr = float((10 * np.log10(255**2 / errors)).mean())
        found[strength] = psnr, [caption(scene) for scene in detector.read(list(made))]
    return found


def measure_img2img(options: argparse.Namespace) -> list[Row]:
    own = "a red cube left of a blue sphere"
    other, beside = "a yellow cone on top of a green cube", "a yellow cone left of a green cube"
    same = in_fresh_process(image_to_image, f"{own} on a grey background", [0.3])
    changed = in_fresh_process(image_to_image, f"{other} on a grey background", [0.5, 0.9])
    cases = ((0.3, own, own, same), (0.5, other, beside, changed), (0.9, other, other, changed))
    return [
        Row(
            f'img2img of "{own}", strength {strength}, prompt "{prompt}", 8 seeds',
            f'"{wanted}"',
            f"{found[strength][0]:.1f} dB to the round trip, read in {found[strength][1].count(wanted)} of 8",
            found[strength][1].count(wanted) == 8,
            {"read": found[strength][1]},
        )
        for strength, prompt, wanted, found in cases
    ]


# A part measures one thing: a function from the options to its rows.
PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "help": measure_help,
    "image": measure_image,
    "load": measure_load,
    "load_v2": measure_load_v2,
    "unet": measure_unet,
    "peers": measure_peers,
    "ideas": measure_ideas,
    "calls": measure_calls,
    "samplers": measure_samplers,
    "sheet": measure_sheet,
    "runs": measure_runs,
    "approximations": measure_approximations,
    "img2img": measure_img2img,
}


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on; nothing that says whose machine it is."""
    gpu = None
    if device != "cpu":
        import torch

        gpu = torch.cuda.get_device_name(device)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "GPU": gpu,
        "CPU": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "load average before": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch": package_version("torch"),
        **{name: package_version(name) for name in ("diffusers", "openvino", "stable-diffusion-cpp-python")},
    }


def processor() -> str:
    """The processor's name with what its name leaves open: a virtual machine's may be "AMD EPYC" alone."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.machine()
    facts = dict(re.findall(r"^([^:\n]*\S)\s*:[ \t]*(.*)$", cpuinfo.read_text().partition("\n\n")[0], re.M))
    model = [f"{key.removeprefix('cpu ')} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
    sets = facts.get("flags", facts.get("Features", "")).split()
    known = [*model, *(name for name in wanted if name in sets)]
    return f"{facts.get('model name', platform.machine())} ({', '.join(known)})"


def commit() -> str | None:
    """The commit that is measured, with a + where files were changed since."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=7", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def markdown(facts: dict[str, Any], rows: list[Row]) -> str:
    """The results as a table under one line of facts about the machine."""
    lines = [", ".join(f"{name} {value}" for name, value in facts.items() if value is not None), ""]
    lines += ["| what | target | measured |", "|---|---|---|"]
    for row in rows:
        missed = " **(missed)**" if row.met is False else ""
        lines.append(f"| {row.what} | {row.target} | {row.measured}{missed} |")
    return "\n".join(lines) + "\n"


def write_results(name: str, facts: dict[str, Any], parts: dict[str, list[Row]]) -> str:
    """The table of all parts, after writing it and every reading to `benchmarks/results`."""
    table = markdown(facts, [row for rows in parts.values() for row in rows])
    record = {
        "machine": facts,
        "parts": {part: [asdict(row) for row in rows] for part, rows in parts.items()},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    (RESULTS / f"{name}.md").write_text(table)
    return table


def parser() -> argparse.ArgumentParser:
    from peers import CONTENDERS

    parser = Parser(prog="benchmark.py", description=__doc__)
    add = parser.add_argument
    parts = ", ".join(PARTS)
    add(
        "--only",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help=f"measure only these: {parts}",
    )
    add(
        "--name",
        help="results go to benchmarks/results/NAME.json and .md (cpu; with --only the names of the parts)",
    )
    add(
        "--cache",
        type=Path,
        default=ROOT / "outputs/benchmark-cache",
        metavar="DIR",
        help="keeps 4.3 GB of stand-in weights, and as much again for some peers (outputs/benchmark-cache)",
    )
    add("--device", default="cpu", help="of `peers` and `ideas`: cpu or cuda (cpu)")
    add(
        "--precisions", nargs="+", choices=NAMES, help="of `peers` and `ideas` (full and bf16; on a GPU half)"
    )
    add(
        "--peers",
        nargs="+",
        choices=CONTENDERS,
        metavar="NAME",
        help=f"compare only these of `peers`: {', '.join(CONTENDERS)} (those that are installed)",
    )
    add("--compiled", action="store_true", help="torch.compile in `peers` too (on a GPU always)")
    add("--steps", type=number(int, 1, 1000), help="of the image of `peers` (5; on a GPU 50)")
    add(
        "--from_start",
        type=number(int, 1, 1000),
        metavar="STEPS",
        help="let `peers` also make an image of so many steps in fresh processes, as often as --repeats says "
        "(20 take a minute or two each on a CPU)",
    )
    add("--batches", nargs="+", type=number(int, 1), help="batch sizes for `peers` (1 2; on a GPU 1 4 8 16)")
    add("--repeats", type=number(int, 1), default=5, help="readings of each time of `peers` and `ideas` (5)")
    add(
        "--latents",
        type=number(int, 8, 128),
        default=64,
        metavar="N",
        help="side of the latents for the v1 UNet and decoder (64, that is 512 pixels)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    from ldm.pipeline.device import choose_device

    options = parser().parse_args(argv)
    parts = list(dict.fromkeys(options.only))
    # a few parts must not take the place of all of them
    options.name = options.name or ("cpu" if parts == list(PARTS) else "-".join(parts))
    if not re.fullmatch(r"[\w-][\w.-]*", options.name):
        raise InputError(f"--name {options.name!r} is no file name: use letters, digits, - and _")
    os.environ["HF_HUB_OFFLINE"] = "1"
    choose_device(options.device)
    facts, rows = machine(options.device), {}
    for part in parts:
        notice(f"{part} …")
        rows[part] = PARTS[part](options)
        table = write_results(options.name, facts, rows)  # every time: an interrupted run keeps what it has
    print(table, end="")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
