"""`--low_vram`: weights stay in host memory and are on the compute device only while they work.

The text encoder, the UNet and the first stage move as wholes, or (`--low_vram max`) the UNet goes through the
device block by block, the next block copied while one computes. The work itself is the same, and so are the
bits.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize.override import Undo, override, undo_all

ALIGNMENT = 512  # bytes, as torch's own allocations: kernels are chosen by it
PARTS = {
    "cond_stage_model": ("get_learned_conditioning",),
    "model": ("apply_model",),
    "first_stage_model": ("encode_first_stage", "decode_first_stage"),
}


class Transfer(Protocol):
    """Copies host memory to the device."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Begin once all work queued so far, which may still read `target`, is done."""

    def join(self) -> None:
        """Let all work queued from now on wait for the copies begun."""


class PlainTransfer:
    """Copies in the order of the work, for a device without streams."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def join(self) -> None:
        pass


class StreamTransfer:
    """Copies on a CUDA stream of their own, beside the work."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def copy(self, source: Tensor, target: Tensor) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


class Luggage:
    """A module's parameters and buffers in one block of host memory, which travels in one copy.

    The block is page-locked (`pin`) where a GPU is to read it while the host goes on.
    """

    def __init__(self, module: nn.Module, pin: bool):
        self.tensors = list({id(t): t for t in [*module.parameters(), *module.buffers()]}.values())
        self.layouts, self.size = [], 0
        for tensor in self.tensors:
            stop = self.size + tensor.numel() * tensor.element_size()
            # the order in memory stays, channels_last too: kernels are chosen by it
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
        """Let the module use the weights in `block`, uint8 [size or more], on any device."""
        for tensor, view in zip(self.tensors, self.views(block), strict=True):
            tensor.data = view


class Whole:
    """A part that is on the device with all its weights."""

    def __init__(self, module: nn.Module, device: torch.device, transfer: Transfer):
        self.device, self.transfer = device, transfer
        self.luggage = Luggage(module, pin=device.type == "cuda")

    def enter(self) -> None:
        block = torch.empty(self.luggage.size, dtype=torch.uint8, device=self.device)
        self.transfer.copy(self.luggage.home, block)
        self.transfer.join()
        self.luggage.unpack(block)

    def leave(self) -> None:
        self.luggage.unpack(self.luggage.home)

    close = leave


class Layered:
    """A part that goes through the device unit by unit: one works while the next is copied.

    `units` are modules in the order in which they work. That order is only expected, for the prefetch: a unit
    that is called out of turn is fetched then.
    """

    def __init__(self, units: Iterable[nn.Module], device: torch.device, transfer: Transfer):
        self.device, self.transfer = device, transfer
        units = list(units)
        self.luggage = [Luggage(unit, pin=device.type == "cuda") for unit in units]
        self.slots: list[Tensor] = []
        self.holds: list[int | None] = []  # the unit whose weights each slot has
        self.hooks = []
        for number, unit in enumerate(units):
            self.hooks += [
                unit.register_forward_pre_hook(lambda *_, number=number: self.before(number)),
                unit.register_forward_hook(lambda *_, number=number: self.after(number)),
            ]

    def enter(self) -> None:
        size = max(luggage.size for luggage in self.luggage)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self.holds = [None, None]

    @torch.inference_mode(False)
    def before(self, number: int) -> None:
        if number not in self.holds:
            self.fetch(number, 0)
        self.transfer.join()
        slot = self.holds.index(number)
        self.luggage[number].unpack(self.slots[slot])
        following = (number + 1) % len(self.luggage)
        if following not in self.holds:
            self.fetch(following, 1 - slot)

    @torch.inference_mode(False)
    def after(self, number: int) -> None:
        self.luggage[number].unpack(self.luggage[number].home)

    def fetch(self, number: int, slot: int) -> None:
        self.holds[slot] = number
        self.transfer.copy(self.luggage[number].home, self.slots[slot][: self.luggage[number].size])

    def leave(self) -> None:
        self.transfer.join()  # a copy may still be on its way into a slot
        for luggage in self.luggage:
            luggage.unpack(luggage.home)
        self.slots, self.holds = [], []

    def close(self) -> None:
        self.leave()
        for hook in self.hooks:
            hook.remove()


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
    """A UNet's children in the order in which they work, lists of blocks as their blocks."""
    return [
        unit for child in unet.children() for unit in (child if isinstance(child, nn.ModuleList) else [child])
    ]


def offload(
    model: LatentDiffusion, device: torch.device, by_layer: bool = False, transfer: Transfer | None = None
) -> Undo:
    """Keep `model`'s weights in host memory, and on `device` only while they work; returns the undo.

    Of the text encoder, the UNet and the first stage the one in use is on `device`, until another is called.
    With `by_layer` two blocks of the UNet at a time are, the second on its way while the first works.
    `model.device` becomes `device`, where inputs are expected and outputs come. The parts are to be called
    through `model`'s methods, and not recorded as graphs, which know weights by address. `transfer` is for
    tests.
    """
    transfer = transfer or (StreamTransfer(device) if device.type == "cuda" else PlainTransfer())
    stage = Stage()

    def staged(method: Callable[..., Any], part: Whole | Layered) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            stage.enter(part)
            return method(*args, **kwargs)

        return call

    steps = []
    with torch.inference_mode(False):
        for name, methods in PARTS.items():
            module = getattr(model, name)
            if name == "model" and by_layer:
                part = Layered(unet_units(module.diffusion_model), device, transfer)
            else:
                part = Whole(module, device, transfer)
            steps.append(part.close)
            steps += [override(model, method, staged(getattr(model, method), part)) for method in methods]
        for buffer in model.buffers(recurse=False):  # the schedule, a few kilobytes
            home = buffer.data
            buffer.data = home.to(device)
            steps.append(lambda buffer=buffer, home=home: setattr(buffer, "data", home))
    steps.append(stage.leave)
    return undo_all(steps)
