"""Cross-attention's keys and values, computed once for a prompt instead of at every step.

They are a small part of the arithmetic, 0.4 % of a v1 call, but 32 of its kernels, and 38 MB of weights to
read: on a GPU that replays graphs both are time, on a CPU they are not.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import BasicTransformerBlock
from ldm.optimize import graph
from ldm.optimize.calls import Call, CallState

# Shapes of contexts that are kept: more than there can be recordings, which read the kept tensors. The margin
# is for calls that are not recorded.
MOST = graph.MOST + 4


class Kept:
    """The projections of one shape of context. They stay where they are: a recorded graph reads them."""

    def __init__(self) -> None:
        self.context: Tensor | None = None
        self.projections: dict[nn.Linear, Tensor] = {}

    def update(self, context: Tensor, layers: list[nn.Linear]) -> None:
        if context is self.context:
            return
        self.context = None  # if memory ends half-way, this is neither the old context's nor the new one's
        for layer in layers:
            new = nn.functional.linear(context, layer.weight, layer.bias)
            if layer in self.projections:
                self.projections[layer].copy_(new)
            else:
                self.projections[layer] = new
        self.context = context


class KeptContext(CallState):
    """A UNet's calls with kept keys and values of the context that is given to it.

    A context is recognised as an object, so one that is passed from step to step is projected once. It may
    not change in place; where the UNet's weights do, call `forget`. With gradients, or without a context, the
    plain layers are called.
    """

    def __init__(self, unet: nn.Module):
        super().__init__(unet)
        blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
        attentions = [block.attn2 for block in blocks]
        attentions += [block.attn1 for block in blocks if block.disable_self_attn]
        self.layers = [layer for attention in attentions for layer in (attention.to_k, attention.to_v)]
        self.kept: OrderedDict[tuple, Kept] = OrderedDict()
        self.current: Kept | None = None
        for layer in self.layers:
            layer.forward = self.reading(layer)

    def reading(self, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        """The layer's forward, which computes nothing during a call with a context."""
        plain = layer.forward

        def forward(context: Tensor) -> Tensor:
            return plain(context) if self.current is None else self.current.projections[layer]

        return forward

    def begin(self, call: Call) -> Kept | None:
        """What the call reads; a recording that read it, too, keeps it alive."""
        context = call.context
        if context is None or torch.is_grad_enabled():
            return None
        key = (context.shape, context.dtype, context.device, graph.autocast_state(context.device.type))
        kept = self.kept.setdefault(key, Kept())
        self.kept.move_to_end(key)
        while len(self.kept) > MOST:
            self.kept.popitem(last=False)
        with torch.inference_mode(False), torch.no_grad():  # they outlive the caller's mode
            kept.update(context, self.layers)
        self.current = kept
        return kept

    def end(self) -> None:
        self.current = None

    def forget(self) -> None:
        for kept in self.kept.values():
            kept.context = None


def keep_context(model: LatentDiffusion) -> None:
    """Project each context of `model`'s UNet once. Its weights must not change any more.

    The result is the plain one, bit for bit. Recordings of `graph_unet` read what is kept.
    """
    KeptContext(model.model.diffusion_model)
