"""Stable Diffusion's layouts on random weights, made on the device: the models that the check runs."""

import gc
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import yaml
from gpu.check import Check
from torch import Tensor

from ldm.images.watermark import NO_WATERMARK
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize import graph
from ldm.optimize.apply import apply
from ldm.optimize.offload import offload
from ldm.pipeline import ImageRequest, Pipeline, RuntimeOptions
from ldm.pipeline.device import weights_dtype
from ldm.weights.loading import ROOT, V1_CONFIG, ModelFiles, model_without_values

CONFIGS = {"v1": V1_CONFIG, "v2": "configs/stable-diffusion/v2-inference-v.yaml"}
SEED = 0
PROMPTS = ("a red cube on top of a blue sphere", "a green cone", "two tori on a navy background", "")
# the package that writes the mark is no part of every machine with a GPU
WATERMARK = "StableDiffusionV1" if find_spec("imwatermark") else NO_WATERMARK


def model_section(family: str, tiny: bool) -> dict[str, Any]:
    """The `model:` section of a family's YAML, read without omegaconf; `tiny` is a miniature."""
    section = yaml.safe_load((ROOT / CONFIGS[family]).read_text())["model"]
    if tiny:
        parts = section["params"]
        unet = parts["unet_config"]["params"]
        unet |= {"model_channels": 32, "channel_mult": [1, 2], "attention_resolutions": [1]}
        unet |= {"num_res_blocks": 1, "context_dim": 64}
        unet |= {"num_head_channels": 8} if "num_head_channels" in unet else {"num_heads": 4}
        smaller = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
        parts["first_stage_config"]["params"]["ddconfig"] |= smaller
        parts["cond_stage_config"].setdefault("params", {}).update({"width": 64, "layers": 2, "heads": 4})
        parts["image_size"] //= 8
    return section


class WordHashes:
    """A tokenizer for machines that lack CLIP's vocabulary: each word becomes one arbitrary token."""

    def __init__(self, width: int, tokens: int = 49408):
        self.width, self.tokens = width, tokens

    def __call__(self, texts: list[str]) -> Tensor:
        rows = torch.full((len(texts), self.width), self.tokens - 1)
        for row, text in zip(rows, texts, strict=True):
            ids = [zlib.crc32(word.encode()) % (self.tokens - 2) for word in text.split()[: self.width - 2]]
            row[: len(ids) + 1] = torch.tensor([self.tokens - 2, *ids])
        return rows


@torch.no_grad()
def random_model(check: Check, family: str = "v1", dtype: torch.dtype = torch.float32) -> LatentDiffusion:
    """A family's model on the device, its weights normal with variance 1 / fan-in, the same for each dtype.

    Activations then stay near unit size, so that float16 holds them.
    """
    model = model_without_values(model_section(family, check.tiny), ())
    model.to_empty(device=check.device)
    model.register_schedule()  # of float32 in any precision
    generator = torch.Generator(check.device).manual_seed(SEED)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0, (weight.numel() // len(weight)) ** -0.5, generator=generator)
        else:  # the gain of a norm, or a bias
            weight.normal_(*((1, 0.1) if name.endswith("weight") else (0, 0.02)), generator=generator)
    for part in (model.model, model.first_stage_model, model.cond_stage_model):
        part.to(dtype)
    for name, values in list(model.named_buffers(recurse=False)):
        setattr(model, name, values.to(check.device))
    if not find_spec("open_clip") or not find_spec("ftfy"):
        model.cond_stage_model.tokenizer = WordHashes(model.cond_stage_model.max_length)
    return model.eval().requires_grad_(False)


class FakeCapture:
    """Stands for `CudaCapture` in a dry run: a replay calls again what was recorded."""

    under_way = False

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, call: Callable[[], Tensor]) -> graph.Recording:
        FakeCapture.under_way = True
        try:
            output = call()
        finally:
            FakeCapture.under_way = False
        enabled, dtype = graph.autocast_state(output.device.type)

        def replay() -> None:
            with torch.autocast(output.device.type, dtype=dtype, enabled=enabled, cache_enabled=False):
                output.copy_(call())

        return graph.Recording(replay, output)

    def renew(self) -> None:
        """There is no memory to begin anew with."""


@contextmanager
def dry_run(check: Check, traced: bool = False) -> Iterator[None]:
    """Without CUDA nothing is recorded inside, and compiling is left out or, `traced`, generates no code."""
    if check.cuda:
        yield
        return
    without_code = partial(torch.compile, backend="eager")
    with (
        mock.patch.object(graph, "CudaCapture", FakeCapture),
        mock.patch.object(torch, "compile", without_code if traced else lambda plain, **_: plain),
    ):
        yield


def apply_options(check: Check, model: LatentDiffusion, options: RuntimeOptions) -> None:
    """`apply` for a CUDA device; on a CPU the same, with weights and inputs left where they are."""
    if check.cuda:
        apply(model, options, torch.device(check.device))
    elif options.low_vram:
        offload(model, torch.device(check.device), by_layer=options.low_vram == "max")
    else:
        with mock.patch.object(model, "to", return_value=model):
            apply(model, options, SimpleNamespace(type="cuda"))


def pipeline_of(model: LatentDiffusion, options: RuntimeOptions) -> Pipeline:
    """The pipeline of a built model. Its images' settings name no file."""
    made = Pipeline.of_model(model, ModelFiles(Path("stand-in.yaml"), Path("stand-in.safetensors")))
    made.recorded_files = None
    made.options = options
    made.__dict__["precision"] = options.precision
    return made


def pipeline(check: Check, precision: str = "half", family: str = "v1", **options: Any) -> Pipeline:
    """The pipeline that a command with these options would have, on random weights; not eager: `--graphs`."""
    options.setdefault("graphs", not (options.get("eager") or options.get("low_vram")))
    chosen = RuntimeOptions(precision=precision, device=check.device, **options)
    model = random_model(check, family, weights_dtype(precision) or torch.float32)
    if chosen.low_vram:
        model.to("cpu")  # from where it is copied
    apply_options(check, model, chosen)
    return pipeline_of(model, chosen)


def request(check: Check, prompt: str = PROMPTS[0], pixels: int = 512, **settings: Any) -> ImageRequest:
    """One image of `pixels` square, guided, from seed 1, of 50 steps unless `settings` say otherwise."""
    side = check.side(pixels)
    given = {"height": side, "width": side, "steps": 50, "scale": 7.5, "seed": 1, "watermark": WATERMARK}
    given |= settings
    return ImageRequest(prompt, **given | {"steps": check.steps(given["steps"])})


class Observed:
    """A pipeline, and what its decoder was given and returned for the last images."""

    def __init__(self, made: Pipeline):
        self.pipeline = made
        self.seen: list[Tensor] = []
        plain = made.model.decode_first_stage

        def decode(z: Tensor) -> Tensor:
            x = plain(z)
            self.seen += [z.float().cpu(), x.float().cpu()]
            return x

        made.model.decode_first_stage = decode

    def __call__(self, requests: Sequence[ImageRequest], batch: int = 1) -> list[Tensor]:
        """Latents and decoded images, batch by batch, float32 on the CPU."""
        self.seen.clear()
        self.pipeline.options = replace(self.pipeline.options, batch_size=batch)
        self.images = list(self.pipeline.generate(requests))
        return list(self.seen)


def free_memory(check: Check) -> None:
    """Give back the memory of tensors that nothing refers to any more, and begin a new peak."""
    gc.collect()
    if check.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(check.device)


def synchronize(check: Check) -> None:
    if check.cuda:
        torch.cuda.synchronize(check.device)


def difference(a: Tensor, b: Tensor) -> float:
    """The norm of the difference as a part of b's norm."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())
