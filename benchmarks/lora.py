#!/usr/bin/env python3
"""Seconds to read a LoRA and merge it into v1, and to switch between two that are read, on this machine.

    python benchmarks/lora.py MODEL.safetensors [--precision full|bf16] [--eager]

The LoRAs are made for it: random values of 16 bits for all layers of the attention blocks, 150 MB each. What
is merged takes 1.4 GB of memory in float32. A virtual machine may have to ask its host for it, which took 0.4
to 4 s here. So that much is written and freed before each measurement (the process keeps it), and the time
of this is printed, too.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from ldm.pipeline import ImageRequest, Pipeline, RuntimeOptions
from ldm.pipeline.adapters import changeable
from ldm.weights.diffusers_names import rename, unet_levels, unet_pairs

UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer."
RANK = 128
MERGED = 1_400_000_000  # bytes of the layers that the LoRAs change


def write_lora(path: Path, pipeline: Pipeline, seed: int) -> None:
    """A file as kohya's trainer writes it by default: attention blocks and the text encoder's layers."""
    shapes = {name: shape for name, (_, _, shape) in changeable(pipeline.model).items()}
    unet = {n.removeprefix(UNET): s for n, s in shapes.items() if n.startswith(UNET)}
    theirs = rename(unet, unet_pairs(unet_levels(unet)))
    layers = {f"lora_unet_{n}": s for n, s in theirs.items() if ".attentions." in n}
    layers |= {f"lora_te_{n.removeprefix(TEXT)}": s for n, s in shapes.items() if n.startswith(TEXT)}
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, (rows, columns, *kernel) in layers.items():
        layer, ones = name.removesuffix(".weight").replace(".", "_"), [1] * len(kernel)
        for part, size in (("down", (RANK, columns, *kernel)), ("up", (rows, RANK, *ones))):
            values = torch.randn(size, generator=generator) * 0.01
            state[f"{layer}.lora_{part}.weight"] = values.half()
        state[f"{layer}.alpha"] = torch.tensor(RANK / 2, dtype=torch.float16)
    save_file(state, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--precision", choices=("full", "bf16"), default="full")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--kernels", default="measured")
    options = parser.parse_args()
    runtime = RuntimeOptions(
        device="cpu", precision=options.precision, eager=options.eager, kernels=options.kernels
    )
    pipeline = Pipeline.load(options.model, options=runtime, safety="off")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.safetensors" for name in ("one", "two")]
        for seed, path in enumerate(files):
            write_lora(path, pipeline, seed)
        megabytes = files[0].stat().st_size / 1e6
        one, two = (ImageRequest("a", lora=(str(path),)) for path in files)

        def write_memory() -> float:
            """Seconds for as much new memory as the merged weights take, which is at hand then."""
            start = time.perf_counter()
            torch.ones(MERGED // 4)
            return time.perf_counter() - start

        def seconds(request: ImageRequest) -> tuple[float, float]:
            """By the clock, and of the processors divided by torch's threads, which other programs leave."""
            memory.append(write_memory())
            start, of_processor = time.perf_counter(), time.process_time()
            pipeline.adapters.check(pipeline, request)
            pipeline.adapters.put_on(pipeline.model, request)
            used = (time.process_time() - of_processor) / torch.get_num_threads()
            return time.perf_counter() - start, used

        memory: list[float] = []
        first, second = seconds(one), seconds(two)
        switching = min(seconds(request) for _ in range(3) for request in (one, two))
        pipeline.adapters._kept.clear()
        anew = seconds(one)
        off = seconds(ImageRequest("a"))
    eager = ", eager" * options.eager
    print(f"{megabytes:.0f} MB, {options.precision}{eager}, {torch.get_num_threads()} threads")
    print(f"{MERGED / 1e9:.1f} GB of new memory: {memory[0]:.2f} and {memory[1]:.2f} s")
    for what, (clock, used) in {
        "read and merged": first,
        "another one read and merged": second,
        "switched between these two": switching,
        "merged again, read before": anew,
        "taken off": off,
    }.items():
        print(f"{what:30} {clock:5.2f} s, {used:5.2f} s of the processors")


if __name__ == "__main__":
    main()
