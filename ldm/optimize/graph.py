"""CUDA graphs: a function's kernels recorded once, then replayed without Python or the driver in between.

A UNet step is some 800 kernels, which a fast GPU finishes sooner than the host can launch them. A recording
fixes the arguments of its kernels, addresses included: inputs are copied into the recording's own buffers
before a replay, and the output is copied out of one after it. The kernels are those of the eager call, and so
are the bits.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn

from ldm.log import notice
from ldm.models.diffusion.ddpm import LatentDiffusion, like_weights
from ldm.optimize.calls import Call, call_states
from ldm.sampling.denoiser import Conditioning, model_input, to_x0

Function = Callable[..., Tensor]
WARM_UP = 2  # calls before a recording, in which libraries choose kernels and take their workspaces
MOST = 8  # recordings at a time: whole and last batches, guided and not, whole and shallow calls


@dataclass(frozen=True)
class Recording:
    """`replay` computes `output` anew, in place, from the inputs that were recorded."""

    replay: Callable[[], object]
    output: Tensor


class Capture(Protocol):
    """Records functions. What it records until `renew` is one generation, which shares its memory."""

    def __call__(self, call: Callable[[], Tensor]) -> Recording: ...

    def renew(self) -> None:
        """Begin a generation: no recording of the one before is replayed any more."""


class CudaCapture:
    """Records on a CUDA device.

    All recordings of a generation share one pool of memory: they are never replayed at the same time, and the
    output of one is copied before the next replay. They also share a stream, and with it cuBLAS's workspace,
    which torch frees as soon as one of them is freed (https://github.com/pytorch/pytorch/issues/193402), and
    no more may be recorded into a pool that has lost its recordings. So a generation lives and ends as one.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.renew()

    def renew(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)

    def __call__(self, call: Callable[[], Tensor]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            # A capture must not begin on the default stream. Before torch 2.12 one that fails does not leave
            # its stream (https://github.com/pytorch/pytorch/pull/180395); this block does.
            with torch.cuda.stream(self.stream):
                try:
                    for _ in range(WARM_UP):
                        call()
                finally:
                    current.wait_stream(self.stream)
                try:
                    with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                        output = call()
                except Exception:
                    self.stop_allocating()
                    raise
        return Recording(graph.replay, output)

    def stop_allocating(self) -> None:
        """Let the allocator forget a recording that failed.

        Before torch 2.12 one that the driver has invalidated keeps the allocator in its pool, and memory that
        is freed anywhere is given back no more (https://github.com/pytorch/pytorch/pull/180395).
        """
        device = torch.cuda.current_device()
        with suppress(RuntimeError, AttributeError):  # torch has ended it, or is older than these functions
            torch._C._cuda_endAllocateToPool(device, self.pool)
            torch._C._cuda_releasePool(device, self.pool)


@dataclass
class Entry:
    inputs: dict[str, Tensor]  # the recording's own buffers
    recording: Recording


def signature(name: str, value: Tensor | None) -> tuple:
    """The properties of an input that a recording fixes."""
    if value is None:
        return (name,)
    return name, value.shape, value.stride(), value.dtype, value.device


def autocast_state(device: str) -> tuple[bool, torch.dtype]:
    """Whether autocast is on for a type of device, and its dtype: results that are kept depend on both."""
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


class GraphRunner:
    """Calls `function` through recordings that `capture` makes, one for each kind of inputs.

    `function` takes tensors, or None, by name, and by position values that a recording fixes; it returns a
    tensor. Everything else that it reads, first of all its weights, must stay at its address; it may not draw
    random numbers, nor branch in Python on what a tensor holds. Results are the caller's own.

    All recordings are dropped together: where there would be more than `most`, where one fails, after which
    the function itself is called and `report` gets one message, and where memory ends. With gradients nothing
    is recorded.
    """

    def __init__(
        self, function: Function, capture: Capture, most: int = MOST, report: Callable[[str], None] = notice
    ):
        self.function, self.capture, self.most, self.report = function, capture, most, report
        self.entries: dict[tuple, Entry | None] = {}  # None: recording failed
        self.reported = False

    def __call__(self, *fixed: Hashable, **inputs: Tensor | None) -> Tensor:
        if torch.is_grad_enabled():
            return self.function(*fixed, **inputs)
        try:
            with torch.inference_mode(False), torch.no_grad():  # the buffers outlive the caller's mode
                return self.run(fixed, inputs)
        except torch.OutOfMemoryError:
            self.clear()  # for the smaller batch that comes next
            raise

    def run(self, fixed: tuple[Hashable, ...], inputs: dict[str, Tensor | None]) -> Tensor:
        device = next(value.device.type for value in inputs.values() if value is not None)
        key = (autocast_state(device), fixed, *(signature(name, value) for name, value in inputs.items()))
        if key not in self.entries:
            if len(self.entries) >= self.most:
                self.clear()
            self.entries[key] = self.record(fixed, inputs, device)
        entry = self.entries[key]
        if entry is None:
            return self.function(*fixed, **inputs)
        for name, buffer in entry.inputs.items():
            buffer.copy_(inputs[name])
        entry.recording.replay()
        return entry.recording.output.clone()

    def record(
        self, fixed: tuple[Hashable, ...], inputs: dict[str, Tensor | None], device: str
    ) -> Entry | None:
        enabled, dtype = autocast_state(device)
        try:
            buffers = {name: value.clone() for name, value in inputs.items() if value is not None}
            absent = {name: None for name, value in inputs.items() if value is None}
            # Autocast's own copies of weights would be freed at its end. Where it is off its cache is left as
            # it is: compiled code is compiled again when that changes.
            autocast = torch.autocast(device, dtype=dtype, cache_enabled=False) if enabled else nullcontext()
            with autocast:
                return Entry(buffers, self.capture(lambda: self.function(*fixed, **buffers, **absent)))
        except torch.OutOfMemoryError:
            reason = "not enough memory"
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
        # outside of the block above, whose error holds the tensors of what failed
        self.clear()  # freeing the failed recording may free what the others use, or the plain call may fit
        if not self.reported:
            self.report(f"no CUDA graph, going on without: {reason}")
            self.reported = True
        return None

    def clear(self) -> None:
        """Forget all recordings and free their memory."""
        self.entries.clear()
        self.capture.renew()


@lru_cache(maxsize=4096)
def on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`numbers` as a tensor, not to be written to, without a copy from the host, which would wait."""
    with torch.inference_mode(False):  # it outlives the caller's mode
        return torch.stack([torch.full((), number, dtype=dtype, device=device) for number in numbers])


def flatten(cond: Mapping[str, Tensor | Sequence[Tensor]]) -> dict[str, Tensor]:
    """A condition's tensors by name; those of a list as name.0, name.1, …"""
    flat = {}
    for name, value in cond.items():
        if isinstance(value, Tensor):
            flat[name] = value
        else:
            flat |= {f"{name}.{i}": each for i, each in enumerate(value)}
    return flat


def unflatten(flat: Mapping[str, Tensor]) -> dict[str, Tensor | list[Tensor]]:
    """The condition that `flatten` made this of; empty lists are left out."""
    cond: dict[str, Tensor | list[Tensor]] = {}
    for name, value in flat.items():
        base, dot, _ = name.partition(".")
        if dot:
            cond.setdefault(base, []).append(value)
        else:
            cond[base] = value
    return cond


class RecordedModel:
    """A model whose calls are replayed: `apply_model`, and a denoiser's whole step around it."""

    def __init__(self, model: LatentDiffusion, capture: Capture, most: int):
        self.model, self.plain = model, model.apply_model
        self.runner = GraphRunner(self.compute, capture, most)
        model.apply_model, model.denoise_step = self.apply_model, self.denoise_step

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning, return_ids: bool = False) -> Tensor:
        return self.run(x_noisy, t, cond, None, 0.0)

    def denoise_step(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        c_in: float,
        sigma: float,
        scale: float | Tensor | None,
        rescale: float,
    ) -> Tensor:
        each = isinstance(scale, Tensor)
        numbers = (c_in, sigma) if each or scale is None else (c_in, sigma, scale)
        inputs = {"numbers": on_device(numbers, x.dtype, x.device), "scales": scale if each else None}
        return self.run(x, t, cond, scale is not None, rescale, **inputs)

    def run(
        self, x: Tensor, t: Tensor, cond: Conditioning, *fixed: Hashable, **inputs: Tensor | None
    ) -> Tensor:
        wrapper = self.model.model
        if not isinstance(cond, Mapping):
            cond = {f"c_{self.model.conditioning_key}": cond if isinstance(cond, Sequence) else [cond]}
        cond = like_weights(cond, wrapper)
        context = None
        if contexts := cond.get("c_crossattn"):  # a single one is not copied: states know it as an object
            context = contexts[0] if len(contexts) == 1 else torch.cat(list(contexts), dim=1)
        dtype = next(wrapper.parameters()).dtype
        call = Call(torch.Size((len(t), *x.shape[1:])), dtype, t, context, cond.get("c_adm"))
        with ExitStack() as stack:
            states = call_states(wrapper.diffusion_model)
            chosen = tuple(stack.enter_context(state.around(call)) for state in states)
            return self.runner(chosen, *fixed, x=x, t=t, **inputs, **flatten(cond))

    def compute(
        self,
        chosen: Hashable,
        guided: bool | None,
        rescale: float,
        *,
        x: Tensor,
        t: Tensor,
        numbers: Tensor | None = None,
        scales: Tensor | None = None,
        **cond: Tensor,
    ) -> Tensor:
        """`apply_model`, or, with `numbers` (c_in, sigma and perhaps the scale), a denoiser's step."""
        if numbers is None:
            return self.plain(x, t, unflatten(cond))
        c_in, sigma, *same = numbers.unbind()
        scale = same[0] if same else scales
        x_model = model_input(x, c_in, guided)
        output = self.plain(x_model, t, unflatten(cond))
        return to_x0(self.model.parameterization, x, x_model, output, c_in, sigma, scale, rescale)


def graph_unet(model: LatentDiffusion, capture: Capture | None = None, most: int = MOST) -> GraphRunner:
    """Replay `model`'s calls as CUDA graphs, one for each shape and precision; returns the runner.

    A denoiser's call is one replay: latents scaled, the UNet, guidance, x0. Other calls of `apply_model` are
    recorded as they are. The model must be on a CUDA device and stay there, so this cannot be combined with
    `offload`, which moves weights. The first call of a kind takes four times as long. `free_recordings`
    frees the memory of the recordings. `capture` is for tests.
    """
    model.recordings = RecordedModel(model, capture or CudaCapture(model.device), most).runner
    return model.recordings


def free_recordings(model: nn.Module) -> None:
    """Free the memory of `model`'s recordings, if it has any; its next calls are recorded anew."""
    recordings = getattr(model, "recordings", None)
    if recordings is not None:
        recordings.clear()
