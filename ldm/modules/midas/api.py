"""MiDaS's hybrid depth estimator (Ranftl et al. 2021, https://arxiv.org/abs/2103.13413), run by transformers.

The weights have the names of the checkpoint, which are those of MiDaS and of the timm library. The network is
transformers' DPTForDepthEstimation, which is called with them under its own names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.func import functional_call

from ldm.errors import InputError
from ldm.modules.midas.names import checkpoint_name

if TYPE_CHECKING:
    from transformers import DPTForDepthEstimation

MODEL_TYPES = ("dpt_hybrid",)
PATCH = 16  # pixels on a side of one of the transformer's tokens


class DepthNetwork(nn.Module):
    """transformers' network for images of any multiples of 32 pixels; by itself it takes square ones only."""

    def __init__(self, dpt: DPTForDepthEstimation):
        super().__init__()
        self.dpt = dpt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        embedded = self.dpt.dpt.embeddings(x, interpolate_pos_encoding=True)
        states, features = embedded.last_hidden_states, list(embedded.intermediate_activations)
        for number, layer in enumerate(self.dpt.dpt.encoder.layer):
            states = layer(states)
            if number in self.dpt.config.backbone_out_indices[2:]:
                features.append(states)
        # the final normalisation is the classifier's, and not applied
        features = self.dpt.neck(features, x.shape[2] // PATCH, x.shape[3] // PATCH)
        return self.dpt.head(features)[:, None]


class MiDaSInference(nn.Module):
    """Images [b, 3, h, w] in [-1, 1] -> relative inverse depth [b, 1, h, w], at least 0.

    h and w are multiples of 32; `image_size` is the side that suits the model best. That and the further
    parameters make a miniature: the transformer's `width`, `layers` and `heads`; the convolutional backbone's
    first `backbone_width`, its `backbone_depths` and the `groups` of its normalisations; the decoder's
    `features`; and the `classes` of the classifier that checkpoints carry, 0 for none.
    """

    def __init__(
        self,
        model_type: str = "dpt_hybrid",
        image_size: int = 384,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        backbone_width: int = 64,
        backbone_depths: tuple[int, int, int] = (3, 4, 9),
        groups: int = 32,
        features: int = 256,
        classes: int = 1000,
    ):
        from transformers import BitConfig, DPTConfig, DPTForDepthEstimation

        super().__init__()
        if model_type not in MODEL_TYPES:
            raise InputError(
                f"MiDaSInference model_type {model_type!r} is not one of {', '.join(MODEL_TYPES)}"
            )
        if image_size % 32:
            raise InputError(f"MiDaSInference image_size {image_size} is not a multiple of 32")
        self.image_size = image_size
        channels = [backbone_width * factor for factor in (4, 8, 16)]
        backbone = BitConfig(
            embedding_size=backbone_width,
            hidden_sizes=channels,
            depths=list(backbone_depths),
            num_groups=groups,
            layer_type="bottleneck",
            global_padding="same",
            embedding_dynamic_padding=True,
            out_features=["stage1", "stage2", "stage3"],
        )
        config = DPTConfig(
            is_hybrid=True,
            backbone_config=backbone,
            backbone_featmap_shape=[1, channels[-1], image_size // PATCH, image_size // PATCH],
            image_size=image_size,
            patch_size=PATCH,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            layer_norm_eps=1e-6,
            backbone_out_indices=[0, 1, 3 * layers // 4 - 1, layers - 1],
            neck_hidden_sizes=[channels[0], channels[1], width, width],
            reassemble_factors=[1, 1, 1, 0.5],
            fusion_hidden_size=features,
        )
        network = DepthNetwork(DPTForDepthEstimation(config)).eval()
        twins = defaultdict(list)
        for name, _ in network.named_parameters():
            twins[checkpoint_name(name.removeprefix("dpt."))].append(name)
        self.twins = dict(twins)  # the checkpoint's names -> transformers'
        self.model = nn.Module()
        for name, theirs in self.twins.items():
            parts = [network.get_parameter(twin).detach() for twin in theirs]
            place(self.model, name, nn.Parameter(torch.cat(parts) if len(parts) > 1 else parts[0]))
        self.network = (network.to("meta"),)  # in a tuple it is no part of the state dict
        if classes:
            self.model.pretrained.model.head = nn.Linear(width, classes)  # carried by checkpoints

    @property
    def unused_weights(self) -> Iterator[str]:
        """The weights that `forward` does not read."""
        return (f"model.{name}" for name, _ in self.model.named_parameters() if name not in self.twins)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = {}
        for name, theirs in self.twins.items():
            weights |= dict(zip(theirs, self.model.get_parameter(name).chunk(len(theirs)), strict=True))
        return functional_call(self.network[0], weights, (x,), strict=True)


def place(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name, with plain modules on the way to it."""
    *parents, last = name.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.register_parameter(last, parameter)
