"""Whether the fast paths compute what the plain one does: bit for bit, or, compiled, to rounding."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from gpu.check import Check, notices
from gpu.stand_in import (
    PROMPTS,
    FakeCapture,
    Observed,
    difference,
    dry_run,
    free_memory,
    pipeline,
    random_model,
    request,
)
from measuring import GIB, in_fresh_process
from PIL import Image
from report import Row
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize.graph import MOST, free_recordings
from ldm.pipeline import ImageRequest, Pipeline
from ldm.pipeline.device import arithmetic

SAMPLERS = ("ddim", "plms", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_sde", "unipc", "lms")
PRECISIONS = {"half": "float16", "bf16": "bfloat16", "full": "float32", "autocast": "autocast"}
SIDES = (512, 448, 384, 320)  # of all sizes of these more are made than there are recordings
STEPS = 6
NO_GRAPH = "no CUDA graph"  # the start of the notice where recording failed
LOW_VRAM_PEAKS = {"parts": 2.6, "max": 2.0}  # GiB

Case = tuple[str, list[ImageRequest], int]  # name, requests, batch size


def cases(check: Check) -> Iterator[Case]:
    """What is made both ways: samplers, batches, prompts, and sizes until the first recording is gone."""
    base = request(check, steps=STEPS)
    pair = [base, base.twin(prompt=PROMPTS[1], seed=2)]
    for sampler in SAMPLERS[:3] if check.tiny else SAMPLERS:
        yield f"{sampler}, two prompts", [replace(each, sampler=sampler) for each in pair], 1
    four = [base.twin(prompt=prompt, seed=k, scale=5.0 + k) for k, prompt in enumerate(PROMPTS)]
    yield "a batch of 2", pair, 2
    yield "a batch of 3 and one of 1, own scales", four, 3
    yield "negative prompts", [base.twin(negative_prompt="grey"), base], 1
    yield "guidance until half of the steps", [base.twin(guidance_end=0.5)], 1
    yield "no guidance", [base.twin(scale=1.0)], 1
    noise = np.random.default_rng(0).integers(0, 256, (base.height, base.width, 3), np.uint8)
    yield "image to image", [base.twin(init_img=Image.fromarray(noise), strength=0.5)], 1
    most = 2 if check.tiny else MOST + 1
    sizes = [(height, width) for height in SIDES for width in SIDES][:most]
    for height, width in (*sizes, sizes[0]):
        yield f"{width}x{height}", [base.twin(height=check.side(height), width=check.side(width))], 1


def comparison(name: str, ours: Sequence[Tensor], reference: Sequence[Tensor]) -> dict[str, Any]:
    """Whether all tensors are equal, NaN where the other is, too, and how far they are apart."""
    equal = [bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in zip(ours, reference, strict=True)]
    finite = all(bool(b.isfinite().all()) for b in reference)
    apart = max(difference(a, b) for a, b in zip(ours, reference, strict=True))
    return {"case": name, "equal": all(equal), "finite": finite, "difference": apart}


def exactness_row(what: str, found: list[dict[str, Any]], lines: Sequence[str] = ()) -> Row:
    """`lines` are notices that must not have been given: one names a path that was not tried."""
    wrong = [one for one in found if not (one["equal"] and one["finite"])]
    measured = f"{len(found) - len(wrong)} of {len(found)} equal"
    if wrong:
        measured += "; not " + "; ".join(f"{one['case']} ({one['difference']:.1e})" for one in wrong[:4])
    bad = [line for line in lines if NO_GRAPH in line]
    measured = "; ".join([measured, *bad])
    return Row(what, "every bit", measured, not wrong and not bad, {"cases": found, "notices": list(lines)})


def replay(check: Check) -> Iterator[Row]:
    """Recordings against eager calls, in each precision."""
    for precision, name in PRECISIONS.items():
        with dry_run(check), notices() as lines:
            plain = Observed(pipeline(check, precision, eager=True))
            fast = Observed(pipeline(check, precision))
            found = []
            for case, requests, batch in cases(check):
                if not found:
                    found.append(comparison("eager, twice", plain(requests), plain(requests)))
                found.append(comparison(case, fast(requests, batch), plain(requests, batch)))
            del plain, fast
        free_memory(check)
        what = f"replay equals eager, {name}: 8 samplers, batches 1 to 3, prompts, sizes and back"
        yield exactness_row(what, found, lines)


def approximations(check: Check) -> Iterator[Row]:
    """`--deepcache` and `--tome` with recordings against the same without."""
    two = [request(check, prompt, steps=STEPS) for prompt in PROMPTS[:2]]
    for flag, options in (("--deepcache 2", {"deepcache": 2}), ("--tome 0.5", {"tome": 0.5})):
        with dry_run(check), notices() as lines:
            plain = Observed(pipeline(check, eager=True, **options))(two)
            found = [comparison(flag, Observed(pipeline(check, **options))(two), plain)]
        free_memory(check)
        yield exactness_row(f"`{flag}` with recordings equals `{flag} --eager`, float16", found, lines)


def memory(check: Check) -> Iterator[Row]:
    """`--low_vram`: its bits, and the peaks of all three, as a user's first image has them."""
    requests = [request(check, steps=STEPS)]
    with dry_run(check):
        plain = Observed(pipeline(check, eager=True))(requests)
        for mode, flag in ((None, "default"), ("parts", "`--low_vram`"), ("max", "`--low_vram max`")):
            free_memory(check)
            if mode:
                with notices() as lines:
                    found = [comparison(flag, Observed(pipeline(check, low_vram=mode))(requests), plain)]
                yield exactness_row(f"{flag} equals eager, float16, 512x512", found, lines)
            peak, held = in_fresh_process(peaks_of_image, check, mode)
            limit = LOW_VRAM_PEAKS.get(mode)
            yield Row(
                f"peak memory of a process's first image, {flag}, float16, 512x512, b1",
                f"<= {limit} GiB" if limit else "",
                f"{peak / GIB:.2f} GiB of tensors ({held / GIB:.2f} with what torch's pool holds)",
                peak <= limit * GIB if limit and check.cuda else None,
                {"peak": peak, "reserved": held},
            )


def peaks_of_image(check: Check, low_vram: str | None) -> tuple[int, int]:
    """`peaks` of one image in a new process: cuDNN, too, still has to try its kernels for every shape."""
    with dry_run(check):
        made = pipeline(check, low_vram=low_vram)
        free_memory(check)  # the weights were made on the device
        list(made.generate([request(check, steps=STEPS)]))
    return peaks(check)


def peaks(check: Check) -> tuple[int, int]:
    """Bytes that tensors took at most, and with the unused parts of torch's pool."""
    if not check.cuda:
        return 0, 0
    return torch.cuda.max_memory_allocated(check.device), torch.cuda.max_memory_reserved(check.device)


# what happens when something fails


def overflowing(check: Check, **options: Any) -> Observed:
    """A pipeline whose decoder exceeds float16 at its first convolution, and float32 nowhere."""

    def random_with_fault(*args: Any) -> Any:
        model = random_model(*args)
        with torch.no_grad():
            model.first_stage_model.decoder.conv_in.weight.mul_(3e4)
        return model

    with mock.patch("gpu.stand_in.random_model", random_with_fault):
        return Observed(pipeline(check, **options))


def nan_fallback(check: Check) -> Iterator[Row]:
    """A decoder that overflows in float16, in three ways to run: two batches each, one notice."""
    requests = [request(check, prompt, steps=STEPS) for prompt in PROMPTS[:2]]
    reference = None
    for flag, options in (
        ("--eager", {"eager": True}),
        ("default", {}),
        ("--low_vram", {"low_vram": "parts"}),
        ("--low_vram max", {"low_vram": "max"}),
    ):
        with dry_run(check), notices() as lines:
            made = overflowing(check, **options)
            made(requests)
        images = [image.pixels for image in made.images]
        del made
        free_memory(check)
        said = [line for line in lines if "float32" in line]
        there = all(pixels is not None for pixels in images)
        reference = reference or images
        equal = there and all(np.array_equal(a, b) for a, b in zip(images, reference, strict=True))
        yield Row(
            f"decoder beyond float16, {flag}: two images, one notice",
            "images there and equal to eager's",
            f"{'equal' if equal else 'there' if there else 'NaN'}, {len(said)} notices",
            equal and len(said) == 1,
            {"notices": lines},
        )


def out_of_memory(check: Check) -> Iterator[Row]:
    """Memory for a part of a batch only: it is made in halves, and so are those after it."""
    requests = [request(check, prompt, steps=STEPS, seed=k) for k, prompt in enumerate(2 * PROMPTS)]
    with dry_run(check), notices() as lines:
        held, reference = {}, []
        for batch in (8, 4):
            free_memory(check)
            made = Observed(pipeline(check))
            made(requests, batch)  # in a first run cuDNN tries kernels that take more memory
            free_recordings(made.pipeline.model)
            free_memory(check)
            reference = together(made(requests, batch))
            held[batch] = peaks(check)[1]
            del made
        free_memory(check)
        made = Observed(pipeline(check))
        # torch gives back what it holds and does not use, so that more than 4 may fit into the mean of both
        with limited_memory(check, made, min(int(1.15 * held[4]), sum(held.values()) // 2)):
            found = [comparison("8 images", together(made(requests, 8)), reference)]
            found.append(comparison("8 more", together(made(requests, 8)), reference))
    halves = [line for line in lines if "out of memory with" in line]
    row = exactness_row("8 images where memory is for fewer: made in halves, equal to batches of 4", found)
    row.met = row.met and len(halves) == 1 and halves[0].endswith("going on with 4")
    row.measured += f"; {'; '.join(halves) or 'no notice'}"
    row.values |= {"bytes held by batch size": held}
    yield row


@contextmanager
def limited_memory(check: Check, made: Observed, limit: int) -> Iterator[None]:
    """At most `limit` bytes for this process's tensors; in a dry run calls of more than 4 images fail."""
    if check.cuda:
        free_memory(check)
        total = torch.cuda.get_device_properties(check.device).total_memory
        index = torch.device(check.device).index
        index = torch.cuda.current_device() if index is None else index  # "cuda" alone is refused below
        torch.cuda.set_per_process_memory_fraction(limit / total, index)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, index)
        return
    unet = made.pipeline.model.model.diffusion_model
    plain = unet.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(x) > 2 * 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(x, *args, **kwargs)

    with mock.patch.object(unet, "forward", forward):
        yield


def together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Latents and decoded images of all batches, each as one tensor."""
    return [torch.cat(list(tensors[k::2])) for k in (0, 1)]


def failed_recording(check: Check) -> Iterator[Row]:
    """A layer that reads its output on the host cannot be recorded: everything goes on without."""
    requests = [request(check, prompt, steps=STEPS) for prompt in PROMPTS[:2]]

    def read_on_host(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        if check.cuda:
            output.sum().item()
        elif FakeCapture.under_way:
            raise RuntimeError("operation not permitted when stream is capturing")

    with dry_run(check), notices() as lines:
        plain = Observed(pipeline(check, eager=True))(requests)
        made = Observed(pipeline(check))
        unet = made.pipeline.model.model.diffusion_model
        hook = unet.middle_block.register_forward_hook(read_on_host)
        before = current_stream(check)
        found = [comparison("with the layer", made(requests), plain)]
        same_stream = current_stream(check) == before
        given_back = gives_back(check)
        hook.remove()
        found.append(
            comparison(
                "another size without it",
                *(
                    Observed(each)([request(check, pixels=384, steps=STEPS)])
                    for each in (made.pipeline, pipeline(check, eager=True))
                ),
            )
        )
    row = exactness_row("a recording that fails: eager's bits, the stream as before, one notice", found)
    said = [line for line in lines if NO_GRAPH in line]
    row.met = row.met and same_stream and given_back and len(said) == 1
    row.measured += f"; stream {'as before' if same_stream else 'switched'}; {'; '.join(said) or 'no notice'}"
    row.measured += f"; memory {'' if given_back else 'not '}given back"
    yield row


def gives_back(check: Check) -> bool:
    """Whether torch gives memory back to the device that no tensor uses."""
    if not check.cuda:
        return True
    before = torch.cuda.memory_reserved(check.device)
    size = before - torch.cuda.memory_allocated(check.device) + 2**28  # more than torch holds unused
    torch.empty(size, dtype=torch.uint8, device=check.device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(check.device) <= before


def current_stream(check: Check) -> int:
    return torch.cuda.current_stream(check.device).cuda_stream if check.cuda else 0


# compiled


def compiled(check: Check) -> Iterator[Row]:
    """`--compile`: its distance to float32 beside eager float16's, graph breaks, recompilations."""
    from torch._dynamo.utils import counters

    with dry_run(check, traced=True), notices() as lines:
        inputs = unet_inputs(check)
        parts = {
            "UNet call": lambda model: model.apply_model(*inputs),
            "decoder": lambda model: model.decode_first_stage(inputs[0][:1]),
        }

        def outputs(model: LatentDiffusion) -> list[Tensor]:
            with torch.inference_mode(), arithmetic(torch.device(check.device)):
                return [call(model).float().clone() for call in parts.values()]

        right = outputs(pipeline(check, "full", eager=True).model)
        plain = pipeline(check, eager=True)
        low = outputs(plain.model)
        counters.clear()
        torch._dynamo.reset()
        made = pipeline(check, compile=True)
        for part, *each in zip(parts, right, low, outputs(made.model), strict=True):
            eager, ours = difference(each[1], each[0]), difference(each[2], each[0])
            yield Row(
                f"`--compile`, {part}, float16: distance to float32, against eager float16's",
                "<= 1.5x",
                f"{ours:.2e} against {eager:.2e} ({ours / eager:.2f}x)",
                ours <= 1.5 * eager,
            )
        one = request(check, steps=STEPS)
        made_of = {
            "first": one,
            "other prompt": request(check, PROMPTS[1], steps=STEPS, seed=5, sampler="euler_ancestral"),
            "other size": one.twin(width=one.width * 5 // 4 // 8 * 8),
            "first again": one,
        }
        images, graphs = {}, []
        for name, each in made_of.items():
            images[name] = only_image(made, each)
            graphs.append(counters["stats"]["unique_graphs"])
        references = {name: only_image(plain, made_of[name]) for name in ("first", "other size")}
    decibels = {name: psnr(images[name], of) for name, of in references.items()}
    breaks = dict(counters["graph_break"])
    yield Row(
        f"`--compile`: image of {STEPS} steps against eager, and of another size",
        ">= 30 dB",
        " and ".join(f"{value:.0f} dB" for value in decibels.values()),
        min(decibels.values()) >= 30,
        decibels,
    )
    yield Row(
        "`--compile`: graph breaks",
        "none",
        f"{sum(breaks.values())}" + "".join(f"; {key}" for key in breaks)[:300],
        not breaks,
        {"breaks": breaks, "notices": lines},
    )
    yield Row(
        "`--compile`: graphs after an image, another prompt and sampler, another size, the first again",
        "2 for each size, none for what came before",
        ", ".join(map(str, graphs)),
        graphs[0] == graphs[1] and graphs[2] <= graphs[1] + 2 and graphs[3] == graphs[2],
        {"graphs": graphs},
    )
    failed = [line for line in lines if "goes on" in line or NO_GRAPH in line]
    what = "`--compile`: parts that failed to compile or to be recorded"
    yield Row(what, "none", "; ".join(failed) or "none", not failed)


def only_image(made: Pipeline, one: ImageRequest) -> np.ndarray:
    (image,) = made.generate([one])
    return image.pixels


def unet_inputs(check: Check, images: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and contexts of a guided call of `images` images, float32."""
    generator = torch.Generator().manual_seed(3)
    side, width = check.side(512) // 8, 64 if check.tiny else 768
    x = torch.randn(images, 4, side, side, generator=generator)
    context = torch.randn(2 * images, 77, width, generator=generator)
    t = torch.full((2 * images,), 500.0)
    return torch.cat([x, x]).to(check.device), t.to(check.device), context.to(check.device)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, of images uint8."""
    error = ((a.astype(float) - b) ** 2).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-6)))


def tiled(check: Check) -> Iterator[Row]:
    """`--compile` with `--vae_tiling`: tiles are normalised by the whole image's statistics in both."""
    larger = request(check, pixels=1024, steps=2)
    images = []
    with dry_run(check), notices() as lines:
        for options in ({"eager": True}, {"compile": True}):
            made = pipeline(check, vae_tiling=True, **options)
            images.append(only_image(made, larger))
            del made
            free_memory(check)
    yield Row(
        "`--compile --vae_tiling` against `--eager --vae_tiling`, 1024x1024",
        ">= 30 dB",
        f"{psnr(*images):.0f} dB",
        psnr(*images) >= 30,
        {"notices": lines},
    )
