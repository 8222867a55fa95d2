"""This toolkit and its peers on the same weights, each in a process of its own, called in turn.

Each contender runs as its users get it: its own start, its own memory, none of another's settings. On a GPU
this toolkit has `--graphs`, which its users have to ask for. They are called in turn, so that a machine that
slows down slows all of them.
"""

import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from measuring import PROMPT, memory

from ldm.weights.loading import ROOT

SCALE = 7.5
SIDE = 64  # latents
TIMESTEP = 700.0
STEPS = 50  # of an image, for images/s
PRECISIONS = {"full": "float32", "half": "float16", "bf16": "bfloat16"}  # our option and what it means


def noise(batch: int, device: Any) -> Any:
    import torch

    return torch.randn(batch, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(device)


def guided(output: Any) -> Any:
    uncond, cond = output.chunk(2)
    return uncond + SCALE * (cond - uncond)


class Ours:
    """The toolkit as its commands set it up, with further flags."""

    def __init__(self, files: dict[str, Path], precision: str, device: str, flags: tuple[str, ...] = ()):
        from ldm.cli.arguments import parse
        from ldm.cli.parser import txt2img_parser

        argv = self.options(files, precision, device, flags)
        self.pipeline = parse(txt2img_parser(), argv).pipeline()
        self.model = self.pipeline.model
        self.device = self.model.device
        self.inputs: dict[int, tuple] = {}

    @staticmethod
    def options(files: dict[str, Path], precision: str, device: str, flags: tuple[str, ...]) -> list[str]:
        argv = ["--config", str(files["config"]), "--ckpt", str(files["weights"]), "--precision", precision]
        return [*argv, "--device", device, "--safety", "off", *flags]

    @classmethod
    def command(cls, *options: Any, steps: int, folder: Path) -> list[str]:
        """The command that makes one image, in `folder`, with all that a user's does by default."""
        argv = ["--prompt", PROMPT, "--n_samples", "1", "--n_iter", "1", "--outdir", str(folder)]
        argv += ["--H", str(8 * SIDE), "--W", str(8 * SIDE), "--scale", str(SCALE)]
        argv += ["--sampler", "dpmpp_2m", "--steps", str(steps)]
        return [sys.executable, str(ROOT / "scripts/txt2img.py"), *cls.options(*options), *argv]

    def text(self) -> Any:
        return self.model.get_learned_conditioning(["", PROMPT])

    def step(self, batch: int = 1) -> Any:
        """One guided model output; the prompts are encoded once."""
        import torch

        from ldm.pipeline.device import arithmetic
        from ldm.sampling.denoiser import timesteps

        if batch not in self.inputs:
            uncond, cond = self.text().repeat_interleave(batch, 0).chunk(2)
            x = noise(batch, self.device)
            t = timesteps(TIMESTEP, 2 * batch, self.device, equal_halves=True)
            self.inputs[batch] = torch.cat([x, x]), t, torch.cat([uncond, cond])
        with arithmetic(self.device):
            return guided(self.model.apply_model(*self.inputs[batch]).float())

    def decode(self, batch: int = 1) -> Any:
        from ldm.pipeline.device import arithmetic

        with arithmetic(self.device):
            return self.model.decode_first_stage(noise(batch, self.device))

    def image(self, steps: int, path: Path) -> None:
        from PIL import Image

        from ldm.pipeline import ImageRequest

        request = ImageRequest(
            PROMPT, height=8 * SIDE, width=8 * SIDE, sampler="dpmpp_2m", steps=steps, scale=SCALE
        )
        for image in self.pipeline.generate([request]):
            if image.pixels is None:
                raise ValueError("an image came out as NaN")
            Image.fromarray(image.pixels).save(path)


class Ideas(Ours):
    """The plain toolkit with some of what makes it fast."""

    def __init__(self, files: dict[str, Path], precision: str, device: str, ideas: tuple[str, ...]):
        from ldm.optimize import (
            attention,
            compile,
            context,
            graph,
            guidance,
            layers,
            memory,
            timesteps,
            upsampling,
        )

        super().__init__(files, precision, device, ("--eager",))
        apply = {
            "memory kept": lambda model: memory.keep_memory() and memory.return_memory(model),
            "upsampling folded": upsampling.fold_upsampling,
            "oneDNN convolutions": lambda model: layers.use_packed_convolutions(model, "onednn"),
            "Winograd's convolutions": lambda model: layers.use_packed_convolutions(model, "winograd"),
            "oneDNN linear layers": lambda model: layers.use_onednn_linears(model, packed=True),
            "attention in rows": attention.use_attention_in_rows,
            "prefix shared": guidance.share_prefix,
            "compiled": compile.compile_model,
            "graphs": graph.graph_unet,
            "keys and values kept": context.keep_context,
            "timesteps kept": timesteps.keep_timesteps,
        }
        for idea in ideas:
            apply[idea](self.model)


def combinations(precision: str, device: str) -> list[tuple[str, ...]]:
    """Nothing, what pays most, and that with each of the others alone."""
    if device != "cpu":
        more = ("keys and values kept", "timesteps kept")
        return [(), ("graphs",), *(("graphs", one) for one in more), ("compiled", "graphs")]
    more = [
        "upsampling folded",
        "oneDNN convolutions",
        "oneDNN linear layers",
        "attention in rows",
        "prefix shared",
    ]
    if precision == "full":
        more.insert(2, "Winograd's convolutions")
    return [(), ("memory kept",), *(("memory kept", one) for one in more)]


def gains(
    files: dict[str, Path], precision: str, device: str, repeats: int
) -> dict[tuple[str, ...], dict[str, list[float]]]:
    """Seconds of a guided step and of a decode with each of the combinations, in turn."""
    makes = {
        " + ".join(ideas): partial(Ideas, files, precision, device, ideas)
        for ideas in combinations(precision, device)
    }
    with contenders(makes) as running:
        found = {method: in_turn(running, repeats, method) for method in ("step", "decode")}
    return {
        ideas: {method: found[method][name][1:] for method in found}
        for ideas, name in zip(combinations(precision, device), makes, strict=True)
    }


class Diffusers:
    """diffusers' pipeline from a folder in its own layout, with torch's compiler if asked for."""

    def __init__(self, files: dict[str, Path], precision: str, device: str, compiled: bool = False):
        import torch
        from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
        from diffusers import DPMSolverMultistepScheduler as DPMSolver
        from transformers import CLIPTextModel

        from ldm.modules.encoders.tokenizer import CLIPTokenizer

        folder = files["diffusers"]
        dtype = {"full": torch.float32, "half": torch.float16, "bf16": torch.bfloat16}[precision]
        parts = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
        loaded = {name: part.from_pretrained(folder / name, dtype=dtype) for name, part in parts.items()}
        self.pipe = StableDiffusionPipeline(
            **loaded,
            tokenizer=None,
            scheduler=DPMSolver(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.device, self.dtype = torch.device(device), dtype
        self.inputs: dict[int, tuple] = {}
        self.tokens = CLIPTokenizer()(["", PROMPT]).to(device)  # it has none of its own here
        if compiled:
            for part in (self.pipe.unet, self.pipe.vae):
                part.to(memory_format=torch.channels_last)
            mode = "reduce-overhead" if self.device.type == "cuda" else None
            self.pipe.unet = torch.compile(self.pipe.unet, mode=mode, fullgraph=True)
            self.pipe.vae.decode = torch.compile(self.pipe.vae.decode, mode=mode)

    def text(self) -> Any:
        return self.pipe.text_encoder(self.tokens)[0]

    def step(self, batch: int = 1) -> Any:
        import torch

        if batch not in self.inputs:
            x = noise(batch, self.device).to(self.dtype)
            t = torch.full((2 * batch,), TIMESTEP, device=self.device)
            self.inputs[batch] = torch.cat([x, x]), t, self.text().repeat_interleave(batch, 0)
        return guided(self.pipe.unet(*self.inputs[batch]).sample.float())

    def decode(self, batch: int = 1) -> Any:
        vae = self.pipe.vae
        return vae.decode(noise(batch, self.device).to(self.dtype) / vae.config.scaling_factor).sample

    def image(self, steps: int, path: Path) -> None:
        uncond, cond = self.text().chunk(2)
        made = self.pipe(
            prompt_embeds=cond, negative_prompt_embeds=uncond, num_inference_steps=steps, guidance_scale=SCALE
        )
        made.images[0].save(path)


class OpenVino(Ours):
    """OpenVINO's UNet and decoder, converted for one image of one size; the rest is our plain path.

    A larger batch is made one image after the other. What it compiles it keeps on disk in float32 only: in
    bfloat16 a UNet that is read from there yields NaN in two of three processes (2026.4.1, AMD Zen 5). One
    that is compiled anew, which takes 2 s instead of 1.5, never did. https://docs.openvino.ai/2026/
    """

    def __init__(self, files: dict[str, Path], precision: str):
        from ldm.optimize.openvino import core

        super().__init__(files, "full", "cpu", ("--eager",))  # its UNet and decoder are never read from disk
        if precision == "full":
            core().set_property({"CACHE_DIR": str(files["openvino"] / "compiled")})
        hint = {"INFERENCE_PRECISION_HINT": {"full": "f32", "bf16": "bf16"}[precision]}
        parts = {"unet": self.model.model.diffusion_model, "decoder": self.model.first_stage_model.decoder}
        for name, module in parts.items():
            compiled = core().compile_model(files["openvino"] / f"{name}.xml", "CPU", hint)
            module.forward = partial(self.call, compiled.create_infer_request(), 2 if name == "unet" else 1)

    def call(self, request: Any, rows: int, *inputs: Any, **named: Any) -> Any:
        """The output for any multiple of `rows`, by as many of them at a time."""
        import torch

        given = [value for value in (*inputs, *named.values()) if value is not None]
        parts = zip(*(value.float().contiguous().split(rows) for value in given), strict=True)
        return torch.cat(
            [torch.from_numpy(request.infer([x.numpy() for x in part])[0].copy()) for part in parts]
        )


class StableDiffusionCpp:
    """stable-diffusion.cpp, which reads the weights' file and makes whole images; its parts cannot be called.

    https://github.com/leejet/stable-diffusion.cpp
    """

    def __init__(self, files: dict[str, Path], precision: str):
        import torch
        from stable_diffusion_cpp import StableDiffusion

        self.device = torch.device("cpu")
        wtype = {"full": "f32", "half": "f16", "bf16": "bf16"}[precision]
        self.model = StableDiffusion(
            model_path=str(files["weights"]),
            wtype=wtype,
            n_threads=torch.get_num_threads(),  # its default is half of the cores
            diffusion_flash_attn=True,
            verbose=False,
        )

    def image(self, steps: int, path: Path) -> None:
        made = self.model.generate_image(
            prompt=PROMPT,
            width=8 * SIDE,
            height=8 * SIDE,
            sample_steps=steps,
            cfg_scale=SCALE,
            sample_method="dpm++2m",
            seed=0,
        )
        made[0].save(path)


def write_for_openvino(files: dict[str, Path]) -> None:
    """UNet (two rows) and decoder (one) as OpenVINO's float32 files, of static shapes."""
    import torch

    from ldm.optimize.openvino import import_openvino
    from ldm.weights.loading import load_model, read_config

    openvino, folder = import_openvino(), files["openvino"]
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model(read_config(files["config"]), files["weights"]).eval()
    unet, decoder = model.model.diffusion_model, model.first_stage_model.decoder
    x, t = torch.zeros(2, 4, SIDE, SIDE), torch.full((2,), TIMESTEP)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it traces, which torch wants to replace
        context = model.get_learned_conditioning(["", PROMPT])
        for name, module, inputs in (("decoder", decoder, (x[:1],)), ("unet", unet, (x, t, context))):
            small = (inputs[0][..., :16, :16].clone(), *inputs[1:])  # for a quick trace
            converted = openvino.convert_model(module, example_input=small)
            converted.reshape({i: list(value.shape) for i, value in enumerate(inputs)})
            openvino.save_model(converted, folder / f"{name}.xml", compress_to_fp16=False)


# one process for each contender


def serve(pipe: Connection, make: Callable[..., Any], args: tuple) -> None:
    """Make a contender, then do what is asked for: (method, arguments, whether the result is wanted)."""
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    start = time.perf_counter()
    import torch

    contender = make(*args)
    cuda = contender.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    wait()
    pipe.send((time.perf_counter() - start, hasattr(contender, "step")))
    while True:
        try:
            method, given, wanted = pipe.recv()
        except EOFError:
            return
        if method == "peak":
            pipe.send(torch.cuda.max_memory_allocated() if cuda else memory()["peak"])
            continue
        with torch.inference_mode() if method != "image" else torch.no_grad():
            start = time.perf_counter()
            result = getattr(contender, method)(*given)
            wait()
            seconds = time.perf_counter() - start
        pipe.send((seconds, result.float().cpu().numpy() if wanted else None))


class Contender:
    """A process that serves, what it took to start, and whether its parts can be called one by one."""

    def __init__(self, name: str, make: Callable[..., Any], *args: Any):
        context = get_context("spawn")
        self.name, (self.pipe, other) = name, Pipe()
        self.process = context.Process(target=serve, args=(other, make, args), daemon=True)
        self.process.start()
        other.close()
        self.load_seconds, self.has_parts = self.answer("start")

    def call(self, method: str, *given: Any, wanted: bool = False) -> Any:
        self.pipe.send((method, given, wanted))
        return self.answer(method)

    def answer(self, method: str) -> Any:
        """What the process sends; a RuntimeError if it has ended, after it said why on stderr."""
        try:
            return self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} ended in {method!r}") from None

    def close(self) -> None:
        self.pipe.close()
        self.process.join(10)
        self.process.terminate()


@contextmanager
def contenders(makes: dict[str, partial]) -> Iterator[dict[str, Contender]]:
    """All of them, started one after the other."""
    running: dict[str, Contender] = {}
    try:
        for name, make in makes.items():
            running[name] = Contender(name, make.func, *make.args)
        yield running
    finally:
        for contender in running.values():
            contender.close()


def in_turn(running: dict[str, Contender], repeats: int, method: str, *given: Any) -> dict[str, list[float]]:
    """Seconds of a first call and of `repeats` more, every contender's before the next round."""
    readings = {name: [contender.call(method, *given)[0]] for name, contender in running.items()}
    for _ in range(repeats):
        for name, contender in running.items():
            readings[name].append(contender.call(method, *given)[0])
    return readings


def one_image(make: Callable[..., Any], args: tuple, steps: int, path: Path) -> None:
    """The whole work of a process that makes one image."""
    import torch

    contender = make(*args)
    with torch.no_grad():
        contender.image(steps, path)


def from_start(
    makes: dict[str, partial], files: dict[str, Path], steps: int, path: Path, rounds: int
) -> dict[str, list[float]]:
    """Seconds from the start of a process to its end, after the image's file; `rounds` of each in turn.

    This toolkit's process is its command, `txt2img.py`, which also writes a grid, a watermark and metadata.
    Its weights are in the page cache. The first one may find no compiled model and no chosen kernels in the
    user's cache folder, which it fills.
    """
    readings: dict[str, list[float]] = {name: [] for name in makes}
    for _ in range(rounds):
        for name, make in makes.items():
            read_through(files.get(name.split()[0], files["weights"]))
            start = time.perf_counter()
            if make.func is Ours:
                command = Ours.command(*make.args, steps=steps, folder=path.parent)
                done = subprocess.run(command, capture_output=True, text=True)
                code = done.returncode
                sys.stderr.write(done.stderr if code else "")
            else:
                given = (make.func, make.args, steps, path)
                process = get_context("spawn").Process(target=one_image, args=given)
                process.start()
                process.join()
                code = process.exitcode
            readings[name].append(time.perf_counter() - start)
            if code:
                raise RuntimeError(f"{name} made no image (exit code {code})")
    return readings


def read_through(path: Path) -> None:
    """Bring a file, or the files of a folder, into the page cache."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as data:
                while data.read(2**24):
                    pass


CONTENDERS = (
    "this",
    "this --eager",
    "this --compile",
    "diffusers",
    "diffusers compiled",
    "openvino",
    "stable-diffusion.cpp",
)


def makers(files: dict[str, Path], precision: str, device: str, compiled: bool = False) -> dict[str, partial]:
    """Who there is to compare on this machine, by name; with `compiled` torch's compiler takes part."""
    cpu = device == "cpu"
    ours = partial(partial, Ours, files, precision, device)
    theirs = partial(partial, Diffusers, files, precision, device)
    makes = {
        "this": (ours(() if cpu else ("--graphs",)), True),
        "this --eager": (ours(("--eager",)), True),
        "this --compile": (ours(("--compile",)), find_spec("openvino") is not None if cpu else compiled),
        "diffusers": (theirs(False), find_spec("diffusers") is not None),
        "diffusers compiled": (theirs(True), find_spec("diffusers") is not None and compiled),
        "openvino": (
            partial(OpenVino, files, precision),
            cpu and precision != "half" and find_spec("openvino") is not None,
        ),
        "stable-diffusion.cpp": (
            partial(StableDiffusionCpp, files, precision),
            cpu and find_spec("stable_diffusion_cpp") is not None,
        ),
    }
    return {name: make for name, (make, possible) in makes.items() if possible}


def race(
    makes: dict[str, partial], steps: int, batches: list[int], repeats: int, folder: Path
) -> dict[str, dict[str, Any]]:
    """Everything that is measured of each contender, as far as it can be.

    Outputs are compared with the eager one's or, without it, the first one's.
    """
    import numpy as np

    with contenders(makes) as running:
        found: dict[str, dict[str, Any]] = {
            name: {"load": contender.load_seconds, "first": contender.load_seconds}
            for name, contender in running.items()
        }

        def note(what: str, readings: dict[str, list[float]]) -> None:
            for name, (first, *seconds) in readings.items():
                found[name][what] = median(seconds)
                found[name].setdefault("readings", {})[what] = [first, *seconds]
                if not what.startswith("step ") or what == "step 1":
                    found[name]["first"] += first

        by_parts = {name: one for name, one in running.items() if one.has_parts}
        note("text", in_turn(by_parts, 2 * repeats, "text"))
        note("step 1", in_turn(by_parts, repeats, "step", 1))
        note("decode", in_turn(by_parts, repeats, "decode"))
        for name, contender in running.items():
            found[name]["image"] = contender.call("image", steps, folder / "image.png")[0]
            found[name]["peak"] = contender.call("peak")
        for batch in batches:
            if batch != 1:
                note(f"step {batch}", in_turn(by_parts, repeats, "step", batch))
        for name in by_parts:
            one = found[name]
            for batch in batches:
                one[f"images/s {batch}"] = batch / (STEPS * one[f"step {batch}"] + batch * one["decode"])
        outputs = {name: contender.call("step", 1, wanted=True)[1] for name, contender in by_parts.items()}
    plain = outputs.get("this --eager", next(iter(outputs.values()), None))
    for name, output in outputs.items():
        found[name]["difference"] = float(np.abs(output - plain).max() / np.abs(plain).max())
    return found


def plot(found: dict[str, dict[str, dict[str, Any]]], steps: int, title: str, path: Path) -> None:
    """Times as parts of the slowest contender's, and images/s over batch sizes, for each precision."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(found), 2, figsize=(11, 3.2 * len(found)), squeeze=False)
    parts = {
        "load": "load",
        "text": "text encoder",
        "step 1": "UNet step",
        "decode": "decoder",
        "image": "image",
    }
    for (precision, contenders), (left, right) in zip(found.items(), axes, strict=True):
        width = 0.8 / len(contenders)
        for i, (name, readings) in enumerate(contenders.items()):
            measured = {k: part for k, part in enumerate(parts) if part in readings}
            slowest = {part: max(c.get(part, 0) for c in contenders.values()) for part in parts}
            heights = [readings[part] / slowest[part] for part in measured.values()]
            bars = left.bar([k + i * width for k in measured], heights, width, label=name)
            texts = [f"{readings[part]:.3g}" for part in measured.values()]
            left.bar_label(bars, texts, fontsize=6, rotation=90, padding=2)
            sizes = [int(key.split()[1]) for key in readings if key.startswith("images/s ")]
            rates = [readings[f"images/s {size}"] for size in sizes]
            right.plot(sizes, rates, "o-", label=name)
        left.set_xticks([k + 0.4 - width / 2 for k in range(len(parts))], parts.values(), fontsize=8)
        left.set_ylim(0, 1.25)
        left.set_title(f"{precision}: seconds, as parts of the slowest (image: {steps} steps)", fontsize=9)
        right.set_title(f"{precision}: images/s of {STEPS} guided steps, over the batch size", fontsize=9)
        right.set_xticks(
            sorted({int(key.split()[1]) for c in contenders.values() for key in c if "/s" in key})
        )
        right.set_ylim(0, 1.1 * right.get_ylim()[1])
        right.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
