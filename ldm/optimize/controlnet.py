"""ControlNets on the kernels that were chosen for the UNet they are beside."""

import torch
from torch import nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.controlnet import ControlNet
from ldm.optimize.layers import KERNELS, alone, use_kernels


class Layers(nn.ModuleList):
    """A network's layers in the place of a UNet, for functions that change layers."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def use_kernels_of(model: LatentDiffusion, net: ControlNet) -> None:
    """Let `net`, on a CPU, run on the kernels that `model`'s UNet runs on.

    It is for inference only then: its weights must not change any more.
    """
    use_kernels(alone(Layers(net.children())), getattr(model, "kernels", KERNELS["torch"]))
