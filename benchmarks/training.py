#!/usr/bin/env python3
"""One training step of the v1 UNet, batch 1, gradient checkpointing: this toolkit and diffusers in turn.

    python benchmarks/training.py [--cache FOLDER] [--rounds 2] [--steps 2] [--precision bf16|full]

A step is the noised latents, the UNet's loss, its gradients and AdamW, on weights of float32. The cache has
the stand-in weights of `benchmark.py --only peers`. Weights, gradients and their averages take 14 GB, so that
each contender runs alone, in a process of its own, one after the other.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from measuring import memory
from peers import SIDE

from ldm.weights.loading import ROOT, V1_CONFIG

TIMESTEP = 500


def inputs(device: str) -> tuple[Any, Any, Any]:
    """Latents [1, 4, 64, 64], their noise and text embeddings [1, 77, 768], the same for both."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = (1, 4, SIDE, SIDE), (1, 4, SIDE, SIDE), (1, 77, 768)
    return tuple(torch.randn(shape, generator=generator).to(device) for shape in shapes)


def ours(files: dict[str, Path], device: str, precision: str) -> tuple[Any, Callable[[], Any]]:
    """The optimiser of the UNet's weights as `train.py` has it, and the loss."""
    import torch

    from ldm.optimize.memory import keep_memory
    from ldm.training.config import TrainingConfig
    from ldm.training.processes import Autocast
    from ldm.training.tasks import LatentDiffusionTask
    from ldm.weights.header import let_go
    from ldm.weights.loading import load_model, read_config

    model = load_model(read_config(files["config"]), files["weights"])
    model.cond_stage_trainable = False
    config = TrainingConfig(steps=1, batch_size=1, learning_rate=1e-5, checkpointing=True)
    task = LatentDiffusionTask(model, config)
    for frozen in (*model.cond_stage_model.parameters(), *model.first_stage_model.parameters()):
        let_go(frozen.detach())  # which the other contender does not hold
    if device == "cpu":
        keep_memory()  # as `train.py` does
    task.to(device)
    x0, noise, context = inputs(device)
    t = torch.full((1,), TIMESTEP, device=device)
    autocast = Autocast("bf16-mixed", device).forward_context() if precision == "bf16" else nullcontext()

    def loss() -> Any:
        with autocast, task.attention(x0):
            return task.denoising_losses(x0, context, t, noise).mean()

    weights = task.trained().values()
    return torch.optim.AdamW(weights, lr=1e-5, fused=device == "cpu" or None), loss


def diffusers(files: dict[str, Path], device: str, precision: str) -> tuple[Any, Callable[[], Any]]:
    """The same of its UNet, as its train_text_to_image.py has them."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(files["diffusers"] / "unet").to(device).train()
    unet.enable_gradient_checkpointing()
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x0, noise, context = inputs(device)
    t = torch.full((1,), TIMESTEP, device=device)

    def loss() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            predicted = unet(scheduler.add_noise(x0, noise, t), t, context).sample
            return torch.nn.functional.mse_loss(predicted.float(), noise)

    return torch.optim.AdamW(unet.parameters(), lr=1e-5), loss


def serve(
    pipe: Connection,
    make: Callable[..., Any],
    files: dict[str, Path],
    precision: str,
    device: str,
    steps: int,
) -> None:
    """Send the first loss, the seconds of each step after the first, and the peak of memory in bytes."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    cuda = torch.device(device).type == "cuda"
    optimizer, loss_of = make(files, device, precision)
    readings, losses = [], []
    for _ in range(steps + 1):
        start = time.perf_counter()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        readings.append(time.perf_counter() - start)
    pipe.send((losses[0], readings[1:], torch.cuda.max_memory_allocated() if cuda else memory()["peak"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "outputs/benchmark-cache")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="of a contender in a round, after the first")
    parser.add_argument("--precision", choices=("full", "bf16"), default="bf16")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    files = {
        "config": ROOT / V1_CONFIG,
        "weights": options.cache / "v1-float32.safetensors",
        "diffusers": options.cache / "v1-diffusers",
    }
    seconds: dict[str, list[float]] = {"this": [], "diffusers": []}
    for _ in range(options.rounds):
        for make, name in ((ours, "this"), (diffusers, "diffusers")):
            here, there = Pipe(duplex=False)
            given = (there, make, files, options.precision, options.device, options.steps)
            process = get_context("spawn").Process(target=serve, args=given)
            process.start()
            there.close()
            loss, readings, peak = here.recv()
            process.join()
            seconds[name] += readings
            print(
                f"{name}: loss {loss:.6f}, {', '.join(f'{one:.1f}' for one in readings)} s a step, "
                f"{peak / 1e9:.2f} GB at the peak",
                flush=True,
            )
    ratio = median(seconds["this"]) / median(seconds["diffusers"])
    print(f"this toolkit takes {ratio:.2f} of diffusers' time")


if __name__ == "__main__":
    main()
