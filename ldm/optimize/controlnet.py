"""ControlNets on the kernels that were chosen for the UNet they are beside."""

import torch
from torch import nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.controlnet import ControlNet
from ldm.optimize.layers import KERNELS, use_kernels


class Layers(nn.ModuleList):
    """A network's layers in the place of a UNet, for functions that change layers."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def use_kernels_of(model: LatentDiffusion, net: ControlNet) -> None:
    """Let `net`, on a CPU, run on the kernels that `model`'s UNet runs on.

    It is for inference only then: its weights must not change any more.
    """
    stand_in = nn.Module()
    stand_in.model, stand_in.first_stage_model = nn.Module(), nn.Module()
    stand_in.model.diffusion_model = Layers(net.children())
    use_kernels(stand_in, getattr(model, "kernels", KERNELS["torch"]))
