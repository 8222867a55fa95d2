"""`--low_vram`: weights stay in host memory and are on the compute device only while they are used.

The text encoder, the UNet and the first stage move as wholes, or (`--low_vram max`) the UNet goes through the
device block by block, the next block copied while one computes. The kernels are the same, and so are the
bits.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion

ALIGNMENT = 512  # bytes, as of torch's own allocations: libraries choose kernels by it
PARTS = {
    "cond_stage_model": ("get_learned_conditioning",),
    "model": ("apply_model",),
    "first_stage_model": ("encode_first_stage", "decode_first_stage"),
    "depth_model": ("estimate_depth",),
}


class Transfer(Protocol):
    """Copies host memory to the device."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy `source` to `target` once all work queued so far, which may still read `target`, is done."""

    def join(self) -> None:
        """Let all work queued from now on wait for the copies begun."""


class PlainTransfer:
    """Copies in the order of the work, for a device without streams."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def join(self) -> None:
        pass


class StreamTransfer:
    """Copies on a separate CUDA stream while the device computes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def copy(self, source: Tensor, target: Tensor) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


class PackedWeights:
    """A module's parameters and buffers in one block of host memory, which one copy brings to the device.

    The block is page-locked (`pin`) where a GPU is to read it while the host continues.
    """

    def __init__(self, module: nn.Module, pin: bool):
        self.tensors = list({id(t): t for t in [*module.parameters(), *module.buffers()]}.values())
        self.layouts, self.size = [], 0
        for tensor in self.tensors:
            stop = self.size + tensor.numel() * tensor.element_size()
            # the order in memory stays, channels_last too: libraries choose kernels by it
            stride = torch.empty_like(tensor, device="meta").stride()
            self.layouts.append((slice(self.size, stop), tensor.dtype, tensor.shape, stride))
            self.size = -(-stop // ALIGNMENT) * ALIGNMENT
        self.home = torch.empty(self.size, dtype=torch.uint8, pin_memory=pin)
        for tensor, view in zip(self.tensors, self.views(self.home), strict=True):
            view.copy_(tensor.data)
        self.unpack(self.home)

    def views(self, block: Tensor) -> list[Tensor]:
        return [
            block[inside].view(dtype).as_strided(shape, stride)
            for inside, dtype, shape, stride in self.layouts
        ]

    def unpack(self, block: Tensor) -> None:
        """Make the module use the weights in `block`, uint8 [size or more], on any device."""
        for tensor, view in zip(self.tensors, self.views(block), strict=True):
            tensor.data = view


class Whole:
    """A part whose weights are on the device all together."""

    def __init__(self, module: nn.Module, device: torch.device, transfer: Transfer):
        self.module, self.device, self.transfer = module, device, transfer
        self.pack()

    def pack(self) -> None:
        """Take the module's weights, which are in host memory, as those that `enter` copies."""
        self.weights = PackedWeights(self.module, pin=self.device.type == "cuda")

    def enter(self) -> None:
        block = torch.empty(self.weights.size, dtype=torch.uint8, device=self.device)
        self.transfer.copy(self.weights.home, block)
        self.transfer.join()
        self.weights.unpack(block)

    def leave(self) -> None:
        self.weights.unpack(self.weights.home)


class Layered:
    """A part that goes through the device unit by unit: one computes while the next is copied.

    `units` are modules in the order in which they are called. Only the prefetch relies on that order: a unit
    that is called out of turn is fetched then.
    """

    def __init__(self, units: Iterable[nn.Module], device: torch.device, transfer: Transfer):
        self.device, self.transfer = device, transfer
        self.weights: list[PackedWeights] = []  # of each unit
        self.slots: list[Tensor] = []
        self.holds: list[int | None] = []  # the unit whose weights each slot has
        for number, unit in enumerate(units):
            self.weights.append(PackedWeights(unit, pin=device.type == "cuda"))
            unit.register_forward_pre_hook(lambda *_, number=number: self.before(number))
            unit.register_forward_hook(lambda *_, number=number: self.after(number))

    def enter(self) -> None:
        size = max(weights.size for weights in self.weights)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self.holds = [None, None]

    @torch.inference_mode(False)
    def before(self, number: int) -> None:
        if number not in self.holds:
            self.fetch(number, 0)
        self.transfer.join()
        slot = self.holds.index(number)
        self.weights[number].unpack(self.slots[slot])
        following = (number + 1) % len(self.weights)
        if following not in self.holds:
            self.fetch(following, 1 - slot)

    @torch.inference_mode(False)
    def after(self, number: int) -> None:
        self.weights[number].unpack(self.weights[number].home)

    def fetch(self, number: int, slot: int) -> None:
        self.holds[slot] = number
        self.transfer.copy(self.weights[number].home, self.slots[slot][: self.weights[number].size])

    def leave(self) -> None:
        self.transfer.join()  # a copy may still be on its way into a slot
        for weights in self.weights:
            weights.unpack(weights.home)
        self.slots, self.holds = [], []


class Stage:
    """Holds the one part that is on the device; the next one to enter sends it away."""

    def __init__(self) -> None:
        self.part: Whole | Layered | None = None

    @torch.inference_mode(False)  # weights are no inference tensors, whoever calls
    def enter(self, part: Whole | Layered) -> None:
        if part is not self.part:
            self.leave()
            part.enter()
            self.part = part

    @torch.inference_mode(False)
    def leave(self) -> None:
        if self.part is not None:
            self.part.leave()
            self.part = None


def unet_units(unet: nn.Module) -> list[nn.Module]:
    """A UNet's children in the order in which they are called, each list of blocks replaced by its blocks."""
    return [
        unit for child in unet.children() for unit in (child if isinstance(child, nn.ModuleList) else [child])
    ]


def offload(
    model: LatentDiffusion, device: torch.device, by_layer: bool = False, transfer: Transfer | None = None
) -> None:
    """Keep `model`'s weights in host memory, and on `device` only while they are used.

    Of the text encoder, the UNet, the first stage and a depth estimator the one in use is on `device`, until
    another is called. With `by_layer` two blocks of the UNet at a time are, the second being copied while the
    first computes. `model.device` becomes `device`, where inputs are expected and outputs come. Call the
    parts through `model`'s methods, change the first stage's precision with `model.first_stage_to` (a cast of
    the module itself would last only until it leaves the device), and record no graphs, which know weights by
    address. `transfer` is for tests.
    """
    transfer = transfer or (StreamTransfer(device) if device.type == "cuda" else PlainTransfer())
    stage = Stage()

    def staged(method: Callable[..., Any], part: Whole | Layered) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            stage.enter(part)
            return method(*args, **kwargs)

        return call

    parts = {}
    with torch.inference_mode(False):
        for name, methods in PARTS.items():
            module = getattr(model, name, None)
            if module is None:
                continue
            if name == "model" and by_layer:
                part = Layered(unet_units(module.diffusion_model), device, transfer)
            else:
                part = Whole(module, device, transfer)
            parts[name] = part
            for method in methods:
                setattr(model, method, staged(getattr(model, method), part))
        noise_schedule = getattr(model, "low_scale_model", nn.Module()).buffers()  # an upscaler's second one
        for buffer in (*model.buffers(recurse=False), *noise_schedule):  # a few kilobytes
            buffer.data = buffer.data.to(device)

    @torch.inference_mode(False)
    def first_stage_to(dtype: torch.dtype) -> None:
        """Cast the weights in host memory, from which every later use copies them."""
        stage.leave()
        model.first_stage_model.to(dtype)
        parts["first_stage_model"].pack()

    model.first_stage_to = first_stage_to
    model.bring_home = stage.leave  # all weights to host memory, where they may be changed in place
