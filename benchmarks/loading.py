#!/usr/bin/env python3
"""How long a training step of scenes-64 waits for its data, for each kind of source.

    python benchmarks/loading.py [--steps 8] [--size 256] [--images 256] [--threads 2] [--output FILE.json]

A step is that of configs/scenes/scenes-64.yaml: 64 images of 64x64 pixels. The files are JPEG images of
`--size` pixels, each read, decoded and resized in every step; "in memory" are renders of 64x64 pixels, and
"latents" are those of these renders, from their files. The first steps, in which worker processes start,
are not counted.
"""

import argparse
import io
import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BATCH = 64
UNCOUNTED = 3  # steps


def write_sources(folder: Path, images: int, size: int) -> dict[str, dict[str, Any]]:
    """The same images as a folder, a shard and a table; the `train:` section of each."""
    import numpy as np
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    from ldm.scenes.source import Scenes

    scenes = Scenes(seed=0, images=images, image_size=size)
    (folder / "images").mkdir()
    rng, rows = np.random.default_rng(0), {"image": [], "text": []}
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for index in range(images):
            example, buffer = scenes[index], io.BytesIO()
            grain = rng.normal(0, 6, example.image.shape)  # a photograph's, for files of a photograph's size
            Image.fromarray(np.clip(example.image + grain, 0, 255).astype(np.uint8)).save(
                buffer, "jpeg", quality=92
            )
            data, text = buffer.getvalue(), example.caption.encode()
            rows["image"].append(data)
            rows["text"].append(example.caption)
            for suffix, content in (("jpg", data), ("txt", text)):
                (folder / "images" / f"{index:05}.{suffix}").write_bytes(content)
                member = tarfile.TarInfo(f"{index:05}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "table.parquet")
    room, cache = "ldm.training.data", str(folder / "cache")
    renders = {"seed": 0, "images": 1000, "image_size": 64}
    return {
        "folder": {"target": f"{room}.folder.ImageFolder", "params": {"path": str(folder / "images")}},
        "shards": {
            "target": f"{room}.shards.WebDataset",
            "params": {"path": str(folder / "shard.tar"), "cache": cache},
        },
        "parquet": {
            "target": f"{room}.table.Parquet",
            "params": {"path": str(folder / "table.parquet"), "cache": cache},
        },
        "in memory": {"target": "ldm.scenes.source.Scenes", "params": renders},
        "latents": {"target": "ldm.scenes.source.Scenes", "params": renders},
    }


def measure(kind: str, section: dict[str, Any], steps: int, folder: Path) -> dict[str, float]:
    """Seconds of a step and, of these, seconds of waiting for its batch: means over the counted steps."""
    import torch

    from ldm.training.config import training_config
    from ldm.training.data.config import data_config
    from ldm.training.data.latents import cached
    from ldm.training.data.loader import loader
    from ldm.training.data.sources import open_sources
    from ldm.training.tasks import LatentDiffusionTask
    from ldm.weights.loading import SMALL_CONFIG, SMALL_WEIGHTS, find, load_model, read_config

    data = data_config({"train": section, "size": 64, "latents": kind == "latents"})
    settings = {"steps": steps + UNCOUNTED, "batch_size": BATCH, "learning_rate": 1e-6}
    config = training_config(settings | {"init": SMALL_WEIGHTS})
    model = load_model(read_config(find(SMALL_CONFIG)), find(SMALL_WEIGHTS))
    task = LatentDiffusionTask(model, config, data)
    source, _ = open_sources(data, cache=folder)
    items = cached(data, source, model, folder) if data.latents else source
    weights = list(task.trained().values())
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate)
    batches, waiting, whole = iter(loader(data, items, config)), [], []
    for _ in range(config.steps):
        start = time.perf_counter()
        batch = next(batches)
        waiting.append(time.perf_counter() - start)
        with torch.autocast("cpu", torch.bfloat16):
            loss = task.training_step(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole.append(time.perf_counter() - start)
    step, wait = (sum(each[UNCOUNTED:]) / steps for each in (whole, waiting))
    return {"step": step, "waiting": wait, "share": wait / step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("steps", 8), ("size", 256), ("images", 256), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    found = {}
    print("| data | step | waiting | share |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for kind, section in write_sources(Path(folder), args.images, args.size).items():
            found[kind] = result = measure(kind, section, args.steps, Path(folder) / "run")
            print(
                f"| {kind} | {result['step']:.2f} s | {1000 * result['waiting']:.1f} ms | "
                f"{result['share']:.2%} |",
                flush=True,
            )
    if args.output:
        args.output.write_text(json.dumps(vars(args) | {"output": None, "results": found}, indent=1))


if __name__ == "__main__":
    main()
