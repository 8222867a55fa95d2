"""Calls of a small UNet in one thread, where that is measured to be faster than all of them.

The layers of a small model take microseconds, which is what threads need to wait for each other.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.optimize.calls import Call, CallState
from ldm.optimize.kernels import choose

# Guided images of the model's size, whose calls are measured one after the other; more of them
# are work enough for several threads.
IMAGES = (1, 2, 4)
# Weights times latents of the largest call that is measured, a tenth of a second on two cores: one to four
# images of a bundled model. v1 has a thousand times as much in a call for one.
MOST_WORK = 4e9
ALL, ONE = "all threads", "one thread"
TOKENS = 77  # of a prompt


class OneThread(CallState):
    """A UNet's calls on a CPU, of which those of at most so many `latents` run in one thread.

    The number of threads is a setting of the calling thread, which each call puts back. A further thread of
    the program begins with that of the moment in which it first computes with torch.
    """

    def __init__(self, unet: UNetModel, latents: int):
        super().__init__(unet)
        self.latents = latents
        self.before: int | None = None

    def begin(self, call: Call) -> None:
        batch, _, height, width = call.shape
        if batch * height * width <= self.latents:
            self.before = torch.get_num_threads()
            torch.set_num_threads(1)

    def end(self) -> None:
        if self.before is not None:
            torch.set_num_threads(self.before)
        self.before = None


def count_weights(unet: UNetModel) -> int:
    """The weights of a UNet, before kernels have replaced some by copies of their own."""
    return sum(weight.numel() for weight in unet.parameters())


def use_one_thread(model: LatentDiffusion, weights: int) -> None:
    """Run calls of `model`'s UNet, of so many weights, in one thread for as many images as that is faster.

    Nothing is changed where torch has a single thread, for a large model, and for one with class labels.
    Results change by rounding, as kernels may sum in another order.
    """
    unet, side = model.model.diffusion_model, model.image_size
    if torch.get_num_threads() == 1 or unet.num_classes is not None:
        return
    largest = 0
    for batch in (2 * images for images in IMAGES):
        latents = batch * side**2
        work = f"threads, UNet of {weights} weights, {batch}x{side}x{side}, {unet.dtype}"
        if (
            latents * weights > MOST_WORK
            or choose(work, (ALL, ONE), partial(calls, unet, batch, side)) == ALL
        ):
            break
        largest = latents
    if largest:
        OneThread(unet, largest)


def calls(unet: UNetModel, batch: int, side: int) -> Mapping[str, Callable[[], object]]:
    """A call of this size with all threads, and one with a single thread."""
    width = next(m.attn2.to_k.in_features for m in unet.modules() if isinstance(m, BasicTransformerBlock))
    x = torch.zeros(batch, unet.in_channels, side, side, dtype=unet.dtype)
    timesteps, context = torch.zeros(batch), torch.zeros(batch, TOKENS, width, dtype=unet.dtype)
    number = torch.get_num_threads()

    def call(threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            unet(x, timesteps, context)
        finally:
            torch.set_num_threads(number)

    return {ALL: partial(call, number), ONE: partial(call, 1)}
