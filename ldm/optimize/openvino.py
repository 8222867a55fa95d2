"""`--compile` on a CPU: the UNet and the decoder through OpenVINO, at the shapes that are asked for.

A network is converted once, for any shape, and kept in the user's cache folder as OpenVINO's own file. The
first call of a shape makes that shape static and compiles it, which takes seconds: OpenVINO then lays out
weights and activations for the processor and fuses what lies between products.
https://docs.openvino.ai/2026/openvino-workflow/model-preparation/convert-model-pytorch.html
"""

import copy
import hashlib
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ldm.cache import cache_folder
from ldm.errors import InputError
from ldm.log import notice
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize.kernels import fingerprint_of_layers

FORMAT = 1  # of what is kept on disk; a change of the conversion counts it up
KEPT = 6  # networks on disk: UNets and decoders of three models
CHANGED = {
    "UNet": "--tome, --deepcache or --attention_slicing looks inside it",
    "decoder": "--attention_slicing looks inside it",
}
TILED = "--vae_tiling or the upscaler's tiles need its norms"
HINTS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
SECONDS, PARAMETERS_A_SECOND = 5, 15e6  # to convert any network, and for its size, on two cores

Report = Callable[[str], None]


class Network(nn.Module):
    """A module whose `forward` takes the inputs that are not None, in the order of its arguments."""

    def __init__(self, module: nn.Module, present: Sequence[bool]):
        super().__init__()
        self.module, self.present = module, present

    def forward(self, *given: Tensor) -> Tensor:
        rest = iter(given)
        return self.module(*(next(rest) if there else None for there in self.present))


def import_openvino() -> ModuleType:
    """The package without its telemetry, which reports every conversion to Google Analytics.

    It goes without the package for that where there is none
    (https://docs.openvino.ai/2026/about-openvino/additional-resources/telemetry.html).
    """
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino

    return openvino


@cache
def core() -> Any:
    """OpenVINO's core, one for the process and never let go of.

    Its CPU plugin gives the thread that first uses it another stack for signal handlers, and unmaps that when
    the core ends, in whatever thread that is: the next signal, such as Ctrl-C, would kill the process.
    """
    return import_openvino().Core()


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's names, shapes, types and values; a second for the v1 UNet."""

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        found = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        found.update(data)
        return found.digest()

    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, module.state_dict().items()))).hexdigest()


def key_of(module: nn.Module, example: Sequence[Tensor | None]) -> str:
    """What a converted network depends on: weights, layers, the kinds of inputs, and versions."""
    kinds = [None if x is None else (x.ndim, str(x.dtype)) for x in example]
    layers = fingerprint_of_layers(module)
    facts = (FORMAT, version("openvino"), version("torch"), layers, kinds, fingerprint(module))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def convert(module: nn.Module, example: Sequence[Tensor | None], path: Path) -> None:
    """Write a module as OpenVINO's model for inputs of any shape, with the weights that it has.

    The model's arithmetic is in float32, whatever the weights are in: OpenVINO chooses the precision when it
    compiles, and has no 16-bit kernels for networks that are written in 16 bits (2026.4: no GroupNorm).
    """
    openvino = import_openvino()
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        for known in (FutureWarning, torch.jit.TracerWarning):  # it traces, which torch wants to replace
            warnings.simplefilter("ignore", known)
        network = Network(as_float32(module), [x is not None for x in example]).eval()
        given = tuple(x.clone() for x in example if x is not None)
        model = openvino.convert_model(network, example_input=given)
    # float16 would do for weights that come from it, but not for the frequencies of the timestep's embedding
    openvino.save_model(model, path, compress_to_fp16=False)


def as_float32(module: nn.Module) -> nn.Module:
    """The module itself, or a copy where its weights are in 16 bits."""
    return module if next(module.parameters()).dtype == torch.float32 else copy.deepcopy(module).float()


def locked(path: Path, name: str, report: Report) -> AbstractContextManager:
    """The lock at `path`, taken; a line says so where another process has it for more than a second."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, fallback_to_soft=False)
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        report(f"--compile: another process converts the {name}; waiting for it")
        return lock.acquire()


def converted(name: str, module: nn.Module, example: Sequence[Tensor | None], report: Report) -> Path:
    """The module's file in the cache folder, converted if it is not there yet; one process does that."""
    folder = cache_folder() / "openvino"
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / f"{name}-{key_of(module, example)}"
    path = found / "model.xml"
    with locked(folder / "lock", name, report):
        if path.exists():
            with suppress(OSError):  # another user's: then its time of use stays the old one
                os.utime(found)
            report(f"--compile: the {name} is read from {folder}, as converted for OpenVINO before")
            return path
        seconds = sum(p.numel() for p in module.parameters()) / PARAMETERS_A_SECOND
        report(
            f"--compile: converting the {name} for OpenVINO, once, about {max(seconds, 1):.0f} s; in {folder}"
        )
        start = time.monotonic()
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder))
        try:
            convert(module, example, unfinished / path.name)
            shutil.rmtree(found, ignore_errors=True)  # what is left where only some of its files went
            unfinished.rename(found)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        size = sum(file.stat().st_size for file in found.iterdir())
        report(f"--compile: the {name} took {time.monotonic() - start:.0f} s and {size / 1e9:.2f} GB of disk")
        for old in sorted(folder.glob("*-*/"), key=last_used)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return path


def last_used(folder: Path) -> float:
    """When a folder was used; 0 if another process has just removed it."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


class StaticShapes:
    """Calls a converted network through OpenVINO, compiled for each kind of inputs at its first call.

    The `most` kinds that were used last are kept, each with its own copy of the weights. A kind is the shapes
    and the precision, which is that of the first input, or autocast's. No gradients. The file is read at
    once, and not needed any more after that: another process may remove it.
    """

    def __init__(self, name: str, path: Path, most: int = 2, report: Report = notice):
        self.core = core()
        self.model = self.core.read_model(path)
        self.name, self.most, self.report = name, most, report
        self.requests: OrderedDict[tuple, Any] = OrderedDict()
        self.hints: dict[str, str] = {}  # the precision that was asked for: the one that is computed in

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        given = [x for x in inputs if x is not None]
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else given[0].dtype
        arrays = [(x.float() if x.is_floating_point() else x).contiguous().numpy() for x in given]
        key = (HINTS[dtype], *(array.shape for array in arrays))
        if key not in self.requests:
            while len(self.requests) >= self.most:  # before the next one takes its memory
                self.requests.popitem(last=False)
            self.requests[key] = self.compile(*key)
        self.requests.move_to_end(key)
        output = self.requests[key].infer(arrays, share_inputs=True)[0]
        return torch.from_numpy(output.copy()).to(dtype)

    def compile(self, hint: str, *shapes: tuple[int, ...]) -> Any:
        if hint not in self.hints:
            name = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}[hint]
            able = name in self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            self.hints[hint] = hint if able else "f32"
            if not able:
                self.report(f"--compile: no {hint} in this processor: the {self.name} computes in float32")
        model = self.model.clone()
        model.reshape({i: list(shape) for i, shape in enumerate(shapes)})
        properties = {"INFERENCE_PRECISION_HINT": self.hints[hint]}
        try:
            return self.core.compile_model(model, "CPU", properties).create_infer_request()
        except RuntimeError as error:  # the plain weights have gone: there is nothing to go on with
            shown = ", ".join("x".join(map(str, shape)) for shape in shapes)
            reason = " ".join(str(error).split())
            raise InputError(
                f"--compile: OpenVINO cannot compile the {self.name} for inputs of {shown} (leave --compile "
                f"out): {reason:.200}"
            ) from error


def read(name: str, path: Path, most: int, report: Report) -> StaticShapes:
    """The network in a file of the cache, which is removed if it is damaged: the next run converts anew."""
    try:
        return StaticShapes(name, path, most, report)
    except RuntimeError:
        shutil.rmtree(path.parent, ignore_errors=True)
        raise


def is_changed(module: nn.Module) -> bool:
    """Whether another optimisation has put functions of its own on the module or on one of its layers."""
    return any({"forward", "run", "attend"} & vars(layer).keys() for layer in module.modules())


def compile_with_openvino(
    model: LatentDiffusion, unet_too: bool = True, most: int = 2, report: Report = notice
) -> None:
    """Run `model`'s UNet and decoder through OpenVINO on the CPU, where it is, for inference only.

    The result equals the plain one to rounding. The plain weights are let go: the modules' parameters keep
    shape and dtype, but no values (they are on the meta device), so apply this before what reads them. What
    cannot be converted, or is changed by another option, stays as it is, with a line that says so: `unet_too`
    is False where one is yet to change the UNet. The last `most` shapes of each stay compiled; another takes
    some seconds at its first call.
    """
    if find_spec("openvino") is None:
        report("--compile: on a CPU it takes OpenVINO: pip install openvino; going on without")
        return
    unet, first_stage = model.model.diffusion_model, model.first_stage_model
    parts = {"UNet": (unet, unet_example(model), is_changed(unet) or not unet_too)}
    if isinstance(first_stage, AutoencoderKL):
        decoder = first_stage.decoder
        # tiles share statistics that are read inside; an upscaler's decoder works in tiles without an option
        tiled = "decode_first_stage" in vars(model) or hasattr(model, "low_scale_model")
        z = torch.zeros(1, first_stage.shape.z_channels, 16, 16)
        parts["decoder"] = decoder, [z], is_changed(decoder) or tiled
    for name, (module, example, changed) in parts.items():
        if changed:
            reason = CHANGED[name] if name == "UNet" or is_changed(module) else TILED
            report(f"--compile: the {name} goes on without OpenVINO, as {reason}")
            continue
        try:
            call = read(name, converted(name, module, example, report), most, report)
        except (RuntimeError, OSError, TypeError, ValueError, ImportError, MemoryError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            report(f"--compile: the {name} goes on without OpenVINO: {reason:.200}")
            continue
        module.forward = positional(call)
        module.to("meta")


def positional(call: StaticShapes) -> Callable[..., Tensor]:
    """`call` with the names of the UNet's, and of the decoder's, arguments."""

    def forward(
        x: Tensor, timesteps: Tensor | None = None, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        return call(x, None if timesteps is None else timesteps.float(), context, y)

    return forward


def unet_example(model: LatentDiffusion) -> list[Tensor | None]:
    """Small inputs of the UNet: x, timesteps, context, y."""
    unet = model.model.diffusion_model
    context_dim = next(
        layer.in_features for name, layer in unet.named_modules() if name.endswith("attn2.to_k")
    )
    match unet.num_classes:
        case None:
            y = None
        case int():
            y = torch.zeros(2, dtype=torch.int64)
        case "continuous":
            y = torch.zeros(2, 1)
        case _:
            y = torch.zeros(2, unet.label_emb[0][0].in_features)
    return [
        torch.zeros(2, unet.in_channels, 16, 16),
        torch.full((2,), 500.0),
        torch.zeros(2, 77, context_dim),
        y,
    ]
