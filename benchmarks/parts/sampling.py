"""Samplers: how often they call the model, what they take beside it, and a sheet that compares them."""

import argparse
import sys
import tempfile
from dataclasses import replace
from statistics import median
from typing import Any

from measuring import PROMPT, in_fresh_process, seconds, timed_runs
from parts.unet import time_unets
from report import Row
from weights_cache import v1_weights

from ldm.errors import InputError
from ldm.weights.loading import ROOT, SMALL_CONFIG, V1_CONFIG


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
