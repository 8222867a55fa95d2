"""What works on this machine: each probe tries one matter, and each finding says what to do about it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import InputError
from ldm.log import one_line
from ldm.machine import host_memory
from ldm.weights import loading
from ldm.weights.families import FAMILIES
from ldm.weights.loading import COMMANDS, LINKED, SAFETY_FOLDER, bundled_for, find, published_for

if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

PACKAGE = "stable-diffusion-toolkit"
PIP = "python -m pip install -c constraints.txt"
MODULES = {"invisible-watermark": "imwatermark", "open_clip_torch": "open_clip", "pillow": "PIL"}
# a precision's largest relative error; that of float32 leaves room for a GPU's TF32
TOLERANCES = {"float32": 5e-3, "float16": 1e-2, "bfloat16": 5e-2}
V1_BYTES = 4_265_380_512  # sd-v1-4.ckpt
GIB = 2**30
MARKS = {"ok": "ok", "note": "--", "broken": "!!"}


@dataclass(frozen=True)
class Finding:
    state: str  # of MARKS: fine, worth knowing, or in the way of images
    what: str
    advice: str = ""  # empty where nothing is to do, or an error of ours says it itself

    def __str__(self) -> str:
        return f"{MARKS[self.state]}  {self.what}" + (f": {self.advice}" if self.advice else "")


ok, note, broken = (partial(Finding, state) for state in MARKS)
Findings = Iterator[Finding]


def examine(outdir: str, debug: bool = False) -> Findings:
    """All findings, each as soon as it is known; a probe that fails is a finding, but for `debug`."""
    first: dict[str, Callable[[], Findings]] = {
        "Python": python,
        "packages": packages,
        "memory": memory,
        "output folder": partial(output_folder, outdir),
        "torch": torch_build,
    }
    with_torch = {
        "devices": devices,
        "precisions": precisions,
        "CLIP's vocabulary": vocabulary,
        **{f"bundled model for {does}": partial(bundled_model, task) for task, does in COMMANDS.items()},
        **{f"linked weights for {does}": partial(linked_weights, task) for task, does in COMMANDS.items()},
        "safety checker": safety_checker,
    }
    for probes in (first, with_torch):
        for title, probe in probes.items():
            try:
                yield from probe()
            except Exception as error:
                if debug:
                    raise
                if isinstance(error, InputError):
                    yield broken(f"{title}: {one_line(error)}")
                elif isinstance(error, ModuleNotFoundError) and error.name:
                    module = error.name.partition(".")[0]
                    yield broken(f"{title}: the module {module} is not there", f"{PIP} {module}")
                else:
                    what = f"{title}: the probe failed ({type(error).__name__}: {one_line(error)})"
                    yield broken(what, "--debug shows where")
        if not sys.modules.get("torch"):  # already a finding
            return


def python() -> Findings:
    version, needed = platform.python_version(), _needed_python()
    if not _fits(version, needed):
        yield broken(f"Python {version} is too old", f"install Python {needed} and run `make demo`")
    else:
        yield ok(f"Python {version}, {sys.executable}")


def packages() -> Findings:
    """What this package requires but for torch, found without importing it."""
    try:
        needed = requirements()
    except metadata.PackageNotFoundError:
        what = f"{PACKAGE} itself is not installed, so that what it requires is not known"
        yield broken(what, f"run `{PIP} --editable .` in its folder")
        return
    for requirement in needed:
        name = requirement.name
        if name == "torch":
            continue
        module = MODULES.get(name, name.replace("-", "_"))
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield broken(f"{name} is not installed", f"{PIP} {name}")
            continue
        if importlib.util.find_spec(module) is None:
            what = f"{name} {version} is installed, but its module {module} is not there"
            yield broken(what, f"{PIP} --force-reinstall {name}")
        elif not _fits(version, requirement.specifier):
            yield broken(f"{name} {version} does not fit {requirement}", f"{PIP} {name}")
        else:
            yield ok(f"{name} {version}")


def memory() -> Findings:
    total, available = host_memory()
    if available < V1_BYTES:
        advice = f"Stable Diffusion v1's weights take {V1_BYTES / GIB:.1f} GiB; close other programs"
        yield note(f"only {available / GIB:.1f} of {total / GIB:.1f} GiB RAM are available", advice)
    else:
        yield ok(f"{available / GIB:.1f} of {total / GIB:.1f} GiB RAM are available")


def output_folder(outdir: str) -> Findings:
    """Whether the folder, or the one in which it would be made, takes a file, and how many more."""
    folder = Path(outdir).absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(2**16))
    except OSError as error:
        what = f"the output folder {outdir} cannot be written ({error.strerror}: {nearest})"
        yield broken(what, "mend that, or name another folder with --outdir")
        return
    free = shutil.disk_usage(nearest).free
    space = f"the output folder {outdir} can be written and has {free / GIB:.1f} GiB free"
    yield note(space, "clear the disk before a long run") if free < GIB else ok(space)


def torch_build() -> Findings:
    try:
        import torch
    except Exception as error:  # broken installations raise many kinds
        yield broken(f"torch cannot be imported ({one_line(error)})", f"{PIP} --force-reinstall torch")
        return
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
    if torch.version.hip:
        built = f"ROCm {torch.version.hip}"
    try:
        needed = next((one for one in requirements() if one.name == "torch"), None)
    except metadata.PackageNotFoundError:  # already a finding
        needed = None
    if needed and not _fits(torch.__version__, needed.specifier):
        yield broken(f"torch {torch.__version__} does not fit {needed}", f"{PIP} torch")
    else:
        yield ok(f"torch {torch.__version__} (built for {built})")


def devices() -> Findings:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    what = f"CPU cores: {os.cpu_count()}, open to this process: {usable}, threads of torch: {threads}"
    yield ok(what) if threads <= usable else note(what, f"OMP_NUM_THREADS={usable} would be faster")

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        cuda = torch.cuda.is_available()
    if torch.backends.mps.is_available():
        yield ok("mps: Apple's GPU")
    elif not cuda:
        yield _no_cuda([one_line(warning.message) for warning in warned])
    for number in range(torch.cuda.device_count() if cuda else 0):
        yield from cuda_device(number)


def _no_cuda(warned: list[str]) -> Finding:
    import torch

    what = "an NVIDIA GPU is here, but "
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return note("no CUDA device", "images are computed on the CPU")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return note(f"{what}CUDA_VISIBLE_DEVICES hides it", "unset it to use the GPU")
    if not torch.version.cuda:
        return broken(f"{what}this torch is built without CUDA", f"{PIP} --force-reinstall torch")
    why = warned[0] if warned else "it gives no reason"
    return broken(f"{what}torch cannot use it ({why})", "update the driver; see what nvidia-smi says")


def cuda_device(number: int) -> Findings:
    """Name, memory and compute capability of a GPU, and whether torch has code for it."""
    import torch

    facts = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    what = f"cuda:{number}: {facts.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if not torch.version.hip:
        what += f", compute capability {facts.major}.{facts.minor}"
    archs = torch.cuda.get_arch_list()
    if not torch.version.hip and not runs_on(archs, (facts.major, facts.minor)):
        what += f", for which this torch has no code (only {', '.join(archs)})"
        yield broken(what, "install the build for it that https://pytorch.org/get-started names")
    else:
        yield ok(what)
    if re.search(r"GTX 16\d\d", facts.name):
        yield note(f"cuda:{number}: the GTX 16 series is known for black images", "use --precision full")


def runs_on(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether a GPU runs code for `archs`: sm_86 runs sm_80's, and anything newer compiles compute_80's."""
    for arch in archs:
        kind, digits = re.match(r"(\w+)_(\d+)", arch).groups()
        built = int(digits[:-1]), int(digits[-1])
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def precisions() -> Findings:
    """Each precision on each device against float64 on the CPU."""
    import torch

    expected, _ = compute("cpu", torch.float64)
    names = ["cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    names += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in names:
        seconds = {}
        for precision, tolerance in TOLERANCES.items():
            try:
                values, seconds[precision] = compute(device, getattr(torch, precision))
                error = float((values - expected).norm() / expected.norm())
                fault = "" if error <= tolerance else f"its values are off by {100 * error:.3g} %"
                fault = "its values are NaN" if error != error else fault
            except Exception as failure:
                fault = f"{type(failure).__name__}: {one_line(failure)[:150]}"
            what = f"{device}: {precision}"
            if fault:
                yield _unusable(device, precision, fault)
            elif device == "cpu" and precision != "float32" and "float32" in seconds:
                yield ok(f"{what} works, {_speed(seconds['float32'] / seconds[precision])}")
            else:
                yield ok(f"{what} works")


def _unusable(device: str, precision: str, fault: str) -> Finding:
    what = f"{device}: {precision} does not work ({fault})"
    if precision == "float32":
        return broken(what, f"{PIP} --force-reinstall torch" if device == "cpu" else "use --device cpu")
    if precision == "float16" and device != "cpu":  # autocast's
        return broken(what, "use --precision full")
    return note(what, "images do not need it")


def _speed(ratio: float) -> str:
    """How fast a precision is, from float32's seconds over its own."""
    if ratio >= 1.2:
        return f"{ratio:.1f} times as fast as float32"
    return "about as fast as float32" if ratio > 0.8 else f"{1 / ratio:.1f} times as slow as float32"


def compute(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """A small convolution, matrix product and attention, float64 on the CPU, and the seconds they take."""
    import torch
    from torch.nn import functional

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1) -> torch.Tensor:
        values = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).to(device)  # mps has no float64

    x, kernel = random(1, 64, 48, 48), random(64, 64, 3, 3, scale=1 / 24)
    weight = random(64, 3 * 64, scale=1 / 8)
    seconds = []
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            tokens = functional.conv2d(x, kernel, padding=1).flatten(2).mT  # [1, 48 * 48, 64]
            q, k, v = (tokens @ weight).unflatten(2, (3, 4, 16)).permute(2, 0, 3, 1, 4)
            values = functional.scaled_dot_product_attention(q, k, v).cpu().double()
            seconds.append(time.perf_counter() - start)
    return values, min(seconds)


def vocabulary() -> Findings:
    from ldm.modules.encoders.tokenizer import vocabulary_file

    path = vocabulary_file()
    if path.is_file():
        yield ok("CLIP's vocabulary is there, in open_clip_torch")
    else:
        yield broken(f"CLIP's vocabulary is not at {path}", f"{PIP} --force-reinstall open_clip_torch")


def bundled_model(task: str) -> Findings:
    """The model that the commands of a task take where no weights are linked for them."""
    family = bundled_for(task)
    yield from model_loads("bundled model", find(family.config), find(family.bundled))


def linked_weights(task: str) -> Findings:
    """The weights that the commands of a task would take by themselves."""
    files = loading.choose_model(None, None, task)
    weights, bundled, wanted = _shown(files.weights), bundled_for(task), published_for(task)
    instead = None  # what the commands take where no weights are linked for the task itself
    if files.weights == loading.ROOT / bundled.bundled:
        instead = bundled.name
    elif task != "text" and files.weights == loading.choose_model(None, None).weights:
        instead = weights  # which has a finding of its own
    folder = _shown(find(f"{LINKED}/{wanted.folder}"))
    advice = f"mkdir -p {folder} && ln -s /path/to/{wanted.download} {folder / 'model.ckpt'}"
    if instead and folder.is_symlink() and not folder.exists():
        yield broken(f"{folder} is a link to nowhere ({folder.readlink()})", f"rm {folder} && {advice}")
    elif instead:
        name = "Stable Diffusion" if task == "text" else wanted.name.removeprefix("the ")
        what = f"no {name} weights are linked, images of {COMMANDS[task]} come from {instead}"
        yield note(what, advice)
    elif not weights.exists():
        family = next(one for one in FAMILIES if one.folder == weights.parent.name)
        advice = f"link it again with ln -sf /path/to/{family.download} {weights}"
        yield broken(f"{weights} is a link to nowhere ({weights.readlink()})", advice)
    else:
        yield from model_loads("linked weights", files.config, files.weights)


def model_loads(title: str, config: Path, weights: Path) -> Findings:
    """The family of a checkpoint whose weights are all those that its config asks for; InputError."""
    from ldm.weights.checkpoint import read_state_dict
    from ldm.weights.families import UNET_INPUT, identify
    from ldm.weights.hashes import file_hash

    weights = _shown(weights)
    state = read_state_dict(weights)
    dtype = state[UNET_INPUT].dtype if UNET_INPUT in state else None  # the file's: little is copied
    model = loading.load_model(loading.read_config(config), weights, dtype=dtype)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    what = f"{size:.0f} million weights, all there, model hash {file_hash(weights)}"
    kind = "" if title == "bundled model" else f"{identify(state)}, "
    yield ok(f"{title} {weights}: {kind}{what}")


def safety_checker() -> Findings:
    from ldm.weights.checkpoint import read_state_dict

    folder = find(SAFETY_FOLDER)
    names = "config.json and model.safetensors (or pytorch_model.bin)"
    if not folder.exists() and not folder.is_symlink():
        advice = f"images are unchecked; the published checker's {names} go there"
        yield note(f"no folder {SAFETY_FOLDER}", advice)
        return
    config = folder / "config.json"
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    weights = next((path for path in files if path.exists()), None)
    if weights is None or not config.exists():
        yield broken(f"{SAFETY_FOLDER} is not complete", f"put {names} of the published checker there")
        return
    try:
        json.loads(config.read_bytes())
    except ValueError as error:
        yield broken(f"{_shown(config)} is not JSON ({one_line(error)})", "download it again")
        return
    yield ok(f"safety checker {_shown(weights)}: {len(read_state_dict(_shown(weights)))} tensors")


def requirements() -> list[Requirement]:
    """What this package requires here, without its extras; PackageNotFoundError if it is not installed."""
    from packaging.requirements import Requirement

    every = map(Requirement, metadata.requires(PACKAGE) or [])
    return [one for one in every if one.marker is None or one.marker.evaluate({"extra": ""})]


def _needed_python() -> str:
    """The versions of Python that the package runs on, such as ">=3.11"; "" if it is not installed."""
    try:
        return metadata.metadata(PACKAGE).get("Requires-Python", "")
    except metadata.PackageNotFoundError:
        return ""


def _fits(version: str, needed: SpecifierSet | str) -> bool:
    """Whether a version, which may be a preview, is one of those needed."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(str(needed)).contains(version, prereleases=True)


def _shown(path: Path) -> Path:
    """The path as short as the user may type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
