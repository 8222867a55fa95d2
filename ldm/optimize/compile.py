"""`--compile`: torch's compiler over the UNet and the decoder, which fuses norms, activations and sums.

Compiled code is kept on disk, so that a second run of the same model, shapes and torch starts sooner
(https://docs.pytorch.org/docs/stable/torch.compiler.html), and so that of the processes of a run only one
compiles: the others wait, and read what it made.
"""

import hashlib
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.cache import cache_folder
from ldm.log import notice
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize.norm import fuse_norms, take_statistics

# Options of torch's inductor: the first two are its mode max-autotune-no-cudagraphs, since `graph_unet` has
# recordings of its own; the others are those that gained for SDXL's UNet, whose layers are the same
# (https://pytorch.org/blog/accelerating-generative-ai-3/).
TUNED = {
    "max_autotune": True,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "conv_1x1_as_mm": True,
}

_plainly = ContextVar("uncompiled", default=False)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, what `compiled` returned calls the plain functions."""
    token = _plainly.set(True)
    try:
        yield
    finally:
        _plainly.reset(token)


def tuning() -> dict[str, Any]:
    """Those of the `TUNED` options that this torch has: it refuses any that it does not know."""
    from torch._inductor import list_options

    known = set(list_options())
    return {name: value for name, value in TUNED.items() if name in known}


def compiled(
    plain: Callable, name: str, report: Callable[[str], None] = notice, identity: Hashable = ()
) -> Callable:
    """`plain`, compiled when it is first called with arguments of some shapes, for exactly those.

    Where that fails, `plain` itself is called from then on. Beyond torch's limit, 8 kinds of arguments,
    others run uncompiled, too. `report` is given one message about either, in which the function is called
    `name`. `identity` is what the code depends on besides the name and the arguments.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    fast = torch.compile(plain, dynamic=False, fullgraph=True, options=tuning())
    ready: set[Hashable] = set()
    left_out: set[Hashable] = set()
    failed = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        kind = tuple(map(_signature, (*args, *sorted(kwargs.items()))))
        if failed or kind in left_out or _plainly.get():
            return plain(*args, **kwargs)
        try:
            if kind in ready:
                return fast(*args, **kwargs)
            with first_compiles(name, (identity, kind), report):
                result = fast(*args, **kwargs)
            ready.add(kind)
            return result
        except FailOnRecompileLimitHit:
            if not left_out:
                report(f"--compile: the {name} is compiled for {len(ready)} shapes; others run uncompiled")
            left_out.add(kind)
        except TorchDynamoException as error:
            if (cause := out_of_memory(error)) is not None:
                raise cause from error  # of which smaller batches are the cure
            failed = True
            reason = " ".join(str(error).split())
            report(f"--compile: the {name} is not compiled and goes on in plain PyTorch: {reason:.200}")
        return plain(*args, **kwargs)

    return forward


def out_of_memory(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """What the device said when it had no memory left while code was generated; None for another failure.

    torch keeps it as `inner_exception`. The error's context may be an earlier lack of memory, after which a
    smaller batch is compiled.
    """
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    return error


def _signature(value: Any) -> Hashable:
    """What compiled code fixes of an argument."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return tuple(map(_signature, value)) if isinstance(value, tuple) else value


@contextmanager
def first_compiles(name: str, key: Hashable, report: Callable[[str], None] = notice) -> Iterator[None]:
    """Inside, one process compiles what `key` describes, and the others only once it is in the cache.

    They come in one by one until the first has left, then all at once: reading the cache takes a while, too.
    Where the cache's folder cannot be locked nobody waits.
    """
    from filelock import FileLock, Timeout

    digest = hashlib.sha256(repr((torch.__version__, device_name(), name, key)).encode()).hexdigest()[:16]
    lock = None
    try:
        folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or cache_folder() / "inductor")
        done = folder / "toolkit" / f"{digest}.done"
        done.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(done.with_suffix(".lock"), fallback_to_soft=False)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            report(f"--compile: another process compiles the {name}; waiting for it")
            lock.acquire()
        if done.exists():
            lock.release()
    except (OSError, RuntimeError):  # read-only, no home folder, or a file system without locks
        lock = None
    try:
        yield
        if lock is not None and lock.is_locked:
            with suppress(OSError):  # a full disk: the next process compiles once more
                done.touch()
    finally:
        if lock is not None:
            lock.release()


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def compile_model(
    model: LatentDiffusion, report: Callable[[str], None] = notice, fused_norms: bool = True
) -> None:
    """Compile `model`'s UNet and decoder, with channels last in memory.

    The result equals the plain one to rounding. The first call of each shape takes as long as compiling does,
    minutes where the disk has nothing of it, as all candidates for a kernel are timed. Apply this before
    `graph_unet`, which then records the compiled functions. With `fused_norms` weights of 16 bits on a GPU
    are normalised by `fuse_norms`; without, as the compiler does it.
    """
    if not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        with suppress(RuntimeError):  # without a home folder torch keeps the code in a folder of its own
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder() / "inductor")
    parts = {"UNet": model.model.diffusion_model}
    if isinstance(model.first_stage_model, AutoencoderKL):
        parts["decoder"] = model.first_stage_model.decoder
        take_statistics(parts["decoder"])  # before it is compiled: tiles may be asked for at any time
    weight = next(parts["UNet"].parameters())
    fused = fused_norms and weight.is_cuda and weight.dtype in (torch.float16, torch.bfloat16)
    if fused:
        fused = fuse_norms(model, report)
    for name, module in parts.items():
        module.to(memory_format=torch.channels_last)
        module.forward = compiled(module.forward, name, report, (fused, *layout(module)))


def layout(module: nn.Module) -> Iterator[Hashable]:
    """What tells the networks of two models apart."""
    for name, weight in module.named_parameters():
        yield name, tuple(weight.shape), str(weight.dtype)
