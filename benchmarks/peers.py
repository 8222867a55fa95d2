"""This toolkit and diffusers on the same weights, each in a process of its own, called in turn.

Each contender runs as its users get it: its own start, its own memory, none of another's settings. They are
called in turn, so that a machine that slows down slows all of them.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

PROMPT = "a red cube on top of a blue sphere"
SCALE = 7.5
SIDE = 64  # latents
TIMESTEP = 700.0
STEPS = 50  # of an image, for images/s


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

        argv = ["--config", str(files["config"]), "--ckpt", str(files["weights"]), "--precision", precision]
        argv += ["--device", device, "--safety", "off", *flags]
        self.pipeline = parse(txt2img_parser(), argv).pipeline()
        self.model = self.pipeline.model
        self.device = self.model.device
        self.inputs: dict[int, tuple] = {}

    def text(self) -> Any:
        return self.model.get_learned_conditioning(["", PROMPT])

    def step(self, batch: int = 1) -> Any:
        """One guided model output; the prompts are encoded once."""
        import torch

        if batch not in self.inputs:
            uncond, cond = self.text().repeat_interleave(batch, 0).chunk(2)
            x = noise(batch, self.device)
            t = torch.full((2 * batch,), TIMESTEP, device=self.device)
            self.inputs[batch] = torch.cat([x, x]), t, torch.cat([uncond, cond])
        return guided(self.model.apply_model(*self.inputs[batch]).float())

    def decode(self, batch: int = 1) -> Any:
        return self.model.decode_first_stage(noise(batch, self.device))

    def image(self, steps: int, path: Path) -> None:
        from PIL import Image

        from ldm.pipeline import ImageRequest

        request = ImageRequest(PROMPT, height=8 * SIDE, width=8 * SIDE, steps=steps, scale=SCALE)
        for image in self.pipeline.generate([request]):
            Image.fromarray(image.pixels).save(path)


class Ideas(Ours):
    """The plain toolkit with some of what makes it fast."""

    def __init__(self, files: dict[str, Path], precision: str, device: str, ideas: tuple[str, ...]):
        from ldm.optimize import compile, context, cpu, graph, guidance, timesteps

        super().__init__(files, precision, device, ("--eager",))
        apply = {
            "memory kept": lambda model: cpu.keep_memory() and cpu.return_memory(model),
            "upsampling folded": cpu.fold_upsampling,
            "weights in oneDNN's layout": cpu.prepack,
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
    more = ("upsampling folded" if precision == "full" else "weights in oneDNN's layout", "prefix shared")
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
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextModel

        from ldm.modules.encoders.tokenizer import CLIPTokenizer

        folder = files["diffusers"]
        dtype = {"full": torch.float32, "half": torch.float16, "bf16": torch.bfloat16}[precision]
        parts = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
        loaded = {name: part.from_pretrained(folder / name, dtype=dtype) for name, part in parts.items()}
        self.pipe = StableDiffusionPipeline(
            **loaded,
            tokenizer=None,
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
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
    pipe.send(time.perf_counter() - start)
    while True:
        try:
            method, given, wanted = pipe.recv()
        except EOFError:
            return
        if method == "peak":
            pipe.send(torch.cuda.max_memory_allocated() if cuda else resident_peak())
            continue
        with torch.inference_mode() if method != "image" else torch.no_grad():
            start = time.perf_counter()
            result = getattr(contender, method)(*given)
            wait()
            seconds = time.perf_counter() - start
        pipe.send((seconds, result.float().cpu().numpy() if wanted else None))


def resident_peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


class Contender:
    """A process that serves, and what it was measured to take."""

    def __init__(self, make: Callable[..., Any], *args: Any):
        context = get_context("spawn")
        self.pipe, other = Pipe()
        self.process = context.Process(target=serve, args=(other, make, args), daemon=True)
        self.process.start()
        other.close()
        self.load_seconds = self.pipe.recv()

    def call(self, method: str, *given: Any, wanted: bool = False) -> Any:
        self.pipe.send((method, given, wanted))
        return self.pipe.recv()

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
            running[name] = Contender(make.func, *make.args)
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


def makers(
    files: dict[str, Path], precision: str, device: str, has_diffusers: bool, compiled: bool
) -> dict[str, partial]:
    """Who there is to compare, by name. On a CPU `--compile` does nothing for this toolkit."""
    ours = partial(partial, Ours, files, precision, device)
    theirs = partial(partial, Diffusers, files, precision, device)
    found = {"this": ours(()), "this --eager": ours(("--eager",))}
    if compiled and device != "cpu":
        found["this --compile"] = ours(("--compile",))
    if has_diffusers:
        found["diffusers"] = theirs(False)
    if has_diffusers and compiled:
        found["diffusers compiled"] = theirs(True)
    return found


def race(
    makes: dict[str, partial], steps: int, batches: list[int], repeats: int, folder: Path
) -> dict[str, dict[str, Any]]:
    """Everything that is measured of each contender. What their outputs differ from is the eager one's."""
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

        note("text", in_turn(running, 2 * repeats, "text"))
        note("step 1", in_turn(running, repeats, "step", 1))
        note("decode", in_turn(running, repeats, "decode"))
        for name, contender in running.items():
            found[name]["image"] = contender.call("image", steps, folder / "image.png")[0]
            found[name]["peak"] = contender.call("peak")
        for batch in batches:
            if batch != 1:
                note(f"step {batch}", in_turn(running, repeats, "step", batch))
        for one in found.values():
            for batch in batches:
                one[f"images/s {batch}"] = batch / (STEPS * one[f"step {batch}"] + batch * one["decode"])
        outputs = {name: contender.call("step", 1, wanted=True)[1] for name, contender in running.items()}
    plain = outputs["this --eager"]
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
            heights = [readings[part] / max(c[part] for c in contenders.values()) for part in parts]
            bars = left.bar([k + i * width for k in range(len(parts))], heights, width, label=name)
            texts = [f"{readings[part]:.3g}" for part in parts]
            left.bar_label(bars, texts, fontsize=6, rotation=90, padding=2)
            sizes = [int(key.split()[1]) for key in readings if key.startswith("images/s ")]
            rates = [readings[f"images/s {size}"] for size in sizes]
            right.plot(sizes, rates, "o-", label=name)
        left.set_xticks([k + 0.4 - width / 2 for k in range(len(parts))], parts.values(), fontsize=8)
        left.set_ylim(0, 1.25)
        left.set_title(f"{precision}: seconds, as parts of the slowest (image: {steps} steps)", fontsize=9)
        right.set_title(f"{precision}: images/s of {STEPS} guided steps, over the batch size", fontsize=9)
        right.set_xticks(sizes)
        right.set_ylim(0, 1.1 * right.get_ylim()[1])
        right.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
