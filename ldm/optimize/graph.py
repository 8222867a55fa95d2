"""CUDA graphs: a function's kernels recorded once, then replayed without Python or the driver in between.

A UNet step is some 800 kernels, which a fast GPU finishes sooner than the host can launch them. A recording
fixes the arguments of its kernels, addresses included: inputs are copied into the recording's own buffers
before a replay, and the output is copied out of one after it. The kernels are those of the eager call, and so
are the bits.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.log import notice
from ldm.models.diffusion.ddpm import LatentDiffusion

Function = Callable[..., Tensor]
WARM_UP = 2  # calls before a recording, in which libraries choose kernels and take their workspaces


@dataclass(frozen=True)
class Recording:
    """`replay` computes `output` anew, in place, from the inputs that were recorded."""

    replay: Callable[[], object]
    output: Tensor


Capture = Callable[[Callable[[], Tensor]], Recording]


class CudaCapture:
    """Records on a CUDA device.

    All recordings share one pool of memory: they are never replayed at the same time, and the output of one
    is copied before the next replay.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], Tensor]) -> Recording:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        with torch.cuda.device(self.device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a capture must not begin on the default stream, nor its warm-up
                for _ in range(WARM_UP):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=self.pool):
                output = call()
        return Recording(graph.replay, output)


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

    `function` takes tensors, or None, by name and returns a tensor. Everything else that it reads, first of
    all its weights, must stay at its address; it may not draw random numbers, nor branch in Python on what a
    tensor holds. Results are the caller's own. The `most` kinds of inputs used last are kept. Where recording
    fails the function itself is called, and `report` gets one message. With gradients nothing is recorded.
    """

    def __init__(
        self, function: Function, capture: Capture, most: int = 4, report: Callable[[str], None] = notice
    ):
        self.function, self.capture, self.most, self.report = function, capture, most, report
        self.entries: OrderedDict[tuple, Entry | None] = OrderedDict()  # None: recording failed
        self.reported = False

    def __call__(self, **inputs: Tensor | None) -> Tensor:
        if torch.is_grad_enabled():
            return self.function(**inputs)
        with torch.inference_mode(False), torch.no_grad():  # the buffers outlive the caller's mode
            return self.run(inputs)

    def run(self, inputs: dict[str, Tensor | None]) -> Tensor:
        device = next(value.device.type for value in inputs.values() if value is not None)
        key = (autocast_state(device), *(signature(name, value) for name, value in inputs.items()))
        if key not in self.entries:
            self.entries[key] = self.record(inputs, device)
            while len(self.entries) > self.most:
                self.entries.popitem(last=False)
        self.entries.move_to_end(key)
        entry = self.entries[key]
        if entry is None:
            return self.function(**inputs)
        for name, buffer in entry.inputs.items():
            buffer.copy_(inputs[name])
        entry.recording.replay()
        return entry.recording.output.clone()

    def record(self, inputs: dict[str, Tensor | None], device: str) -> Entry | None:
        buffers = {name: value.clone() for name, value in inputs.items() if value is not None}
        absent = {name: None for name, value in inputs.items() if value is None}
        enabled, dtype = autocast_state(device)
        try:
            # autocast's own copies of weights would be freed at its end
            with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
                return Entry(buffers, self.capture(lambda: self.function(**buffers, **absent)))
        except torch.OutOfMemoryError:
            self.clear()  # then the plain call may fit
            self.fail("not enough memory")
        except RuntimeError as error:
            self.fail(str(error).partition("\n")[0])
        return None

    def fail(self, reason: str) -> None:
        if not self.reported:
            self.report(f"no CUDA graph, going on without: {reason}")
            self.reported = True

    def clear(self) -> None:
        """Forget all recordings and free their memory."""
        self.entries.clear()


def graph_unet(model: LatentDiffusion, capture: Capture | None = None, most: int = 4) -> GraphRunner:
    """Replay `model`'s UNet as CUDA graphs, one for each shape and precision; returns the runner.

    The model must be on a CUDA device and stay there, so this cannot be combined with `offload`, which moves
    weights, nor with `reuse_deep_features`, whose kernels differ from step to step. The first call of a kind
    takes four times as long. The runner's `clear` frees the memory of its recordings. `capture` is for tests.
    """
    unet = model.model.diffusion_model
    runner = GraphRunner(unet.forward, capture or CudaCapture(model.device), most)

    def forward(
        x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        return runner(x=x, timesteps=timesteps, context=context, y=y)

    unet.forward = forward
    return runner
