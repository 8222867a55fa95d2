"""The full models: how long building and loading them takes, and how much memory at each stage."""

import argparse
import time
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from measuring import GIB, PROMPT, in_fresh_process, memory
from report import Row
from weights_cache import stand_in_weights, v1_weights

from ldm.log import notice
from ldm.weights.loading import ROOT, V1_CONFIG


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
