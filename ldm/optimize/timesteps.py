"""The UNet's offsets of a timestep, computed once for a run instead of once for each of its images.

The time embedding and the residual blocks' projections of it are 0.007 % of a v1 call's arithmetic, but 56 of
its kernels and 56 MB of weights to read: where a GPU replays graphs that is time, on a CPU it is not.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from ldm.optimize.calls import Call, CallState
from ldm.optimize.graph import autocast_state

LARGEST = 32  # a batch: beyond it the arithmetic hides the launches
MOST = 1000  # timesteps that are kept; 80 kB each for one guided image of a v1 model in 16 bits


class KeptTimesteps(CallState):
    """A UNet's calls with kept offsets of the timesteps that are given to it.

    Timesteps are recognised as an object: `ldm.sampling.denoiser.timesteps` gives the same one for the same
    number. Neither it nor the UNet's weights may change in place. The plain layers are called with class
    labels, which are part of the embedding, with gradients, and for a large batch.
    """

    def __init__(self, unet: UNetModel):
        super().__init__(unet)
        self.plain_embed = unet.embed
        layers = [block.emb_layers for block in unet.modules() if isinstance(block, ResBlock)]
        self.plain = {layer: layer.forward for layer in layers}
        self.widths = [layer[-1].out_features for layer in layers]
        self.kept: OrderedDict[tuple, tuple[Tensor, Tensor]] = OrderedDict()  # timesteps, their offsets
        self.buffers: dict[tuple, Tensor] = {}  # one for each kind of call; recorded graphs read them
        self.current: dict[nn.Module, Tensor] | None = None
        for layer in layers:
            layer.forward = self.reading(layer)
        unet.embed = self.embed

    def embed(self, timesteps: Tensor, y: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The time embedding; while kept offsets are in use no layer reads it."""
        return self.plain_embed(timesteps, y, dtype) if self.current is None else timesteps

    def reading(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        plain = self.plain[layer]

        def forward(embedding: Tensor) -> Tensor:
            return plain(embedding) if self.current is None else self.current[layer]

        return forward

    def begin(self, call: Call) -> None:
        if call.y is None and len(call.timesteps) <= LARGEST and not torch.is_grad_enabled():
            with torch.inference_mode(False), torch.no_grad():  # they outlive the caller's mode
                self.current = self.offsets(call.timesteps, call.dtype)

    def end(self) -> None:
        self.current = None

    def forget(self) -> None:
        self.kept.clear()

    def offsets(self, timesteps: Tensor, dtype: torch.dtype) -> dict[nn.Module, Tensor]:
        """What each residual block adds, [b, c], at the address where calls of this kind always read it."""
        device = timesteps.device
        kind = (len(timesteps), dtype, device, autocast_state(device.type))
        key = (id(timesteps), *kind)
        if key not in self.kept:
            embedding = self.plain_embed(timesteps, None, dtype)
            offsets = torch.cat([plain(embedding) for plain in self.plain.values()], dim=1)
            self.kept[key] = timesteps, offsets  # no other object has the id of one that is held
            while len(self.kept) > MOST:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        offsets = self.kept[key][1]
        if kind not in self.buffers:
            self.buffers[kind] = torch.empty_like(offsets)
        self.buffers[kind].copy_(offsets)
        return dict(zip(self.plain, self.buffers[kind].split(self.widths, dim=1), strict=True))


def keep_timesteps(model: LatentDiffusion) -> None:
    """Compute the offsets that `model`'s UNet derives from each timestep once. Its weights must not change.

    The result is the plain one, bit for bit. Recordings of `graph_unet` read what is kept.
    """
    KeptTimesteps(model.model.diffusion_model)
