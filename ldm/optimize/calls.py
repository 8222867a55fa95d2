"""What the host decides about a call of the UNet before it, for layers that have another forward during it.

A replayed CUDA graph runs no Python, so such decisions are made outside of what is recorded (`graph.py`), and
those that change the kernels choose the recording.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """What is known of a UNet's call before it."""

    shape: torch.Size  # of the latents, both halves of guidance
    dtype: torch.dtype  # that the UNet is given
    timesteps: Tensor
    context: Tensor | None
    y: Tensor | None


class CallState:
    """A state that `begin` sets up for one call of a UNet and `end` clears.

    It is entered by the UNet's forward, unless a caller has entered it around more than that.
    """

    def __init__(self, unet: nn.Module):
        self.plain_forward = unet.forward
        self.entered = False
        unet.forward = self.forward
        vars(unet).setdefault("call_states", []).append(self)

    def begin(self, call: Call) -> Hashable:
        """Set up the state; returns what a recording of the call depends on besides shapes and types.

        That is which kernels the call runs, and the kept tensors that it reads.
        """
        raise NotImplementedError

    def end(self) -> None:
        """Clear the state, also after a `begin` that failed."""

    def forget(self) -> None:
        """Drop what was computed with weights that have changed since."""

    @contextmanager
    def around(self, call: Call) -> Iterator[Hashable]:
        """Inside, `call` may be made, or a recording of it replayed; gives what `begin` returns."""
        self.entered = True
        try:
            yield self.begin(call)
        finally:
            self.entered = False
            self.end()

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        if self.entered:
            return self.plain_forward(x, timesteps, context, y)
        with self.around(Call(x.shape, x.dtype, timesteps, context, y)):
            return self.plain_forward(x, timesteps, context, y)


def call_states(unet: nn.Module) -> list[CallState]:
    """The states that calls of a UNet have, in the order in which they were added."""
    return vars(unet).get("call_states", [])
