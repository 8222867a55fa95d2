"""RuntimeOptions: how images are computed, not what they show. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ldm.errors import FieldError
from ldm.fields import changed, check_fields, setting

APPROXIMATE = ("vae_tiling", "deepcache", "tome")  # recorded in an image, since they change it


@dataclass(frozen=True)
class RuntimeOptions:
    """Device, precision, speed and memory. None of them changes an image beyond rounding, but for the
    approximations `vae_tiling`, `deepcache` and `tome`. `ldm.optimize.apply` puts them on a model.
    """

    precision: str | None = setting(
        None,
        "of weights and activations; the samplers' arithmetic is always float32, and an autoencoder that "
        "yields NaN goes on in float32",
        choices=("full", "autocast", "half", "bf16"),
        default_text="half on a GPU, full on a CPU",
        group="model",
    )
    vae_tiling: bool = setting(
        False,
        "encode and decode large images in blended tiles: less memory, slightly other colours",
        group="model",
    )
    attention_slicing: bool = setting(
        False, "attention in slices where the device has no fused kernel: less memory", group="model"
    )
    low_vram: str | None = setting(
        None,
        "weights are on the GPU only while they work; max: the UNet block by block",
        choices=("parts", "max"),
        bare="parts",
        group="model",
    )
    deepcache: int = setting(
        1,
        "the UNet's deep features at every N-th call only: faster, approximate",
        low=1,
        high=1000,
        metavar="N",
        group="model",
    )
    tome: float = setting(
        0.0,
        "merge this share of self-attention's tokens: faster, approximate",
        low=0,
        high=0.75,
        metavar="RATIO",
        group="model",
    )
    compile: bool = setting(
        False,
        "compile the UNet and the decoder, on a CPU by OpenVINO: slow to start, faster after, kept on disk",
        group="model",
    )
    eager: bool = setting(
        False,
        "plain PyTorch, the reference: no kernels chosen, nothing folded, shared, recorded or compiled",
        group="model",
    )
    graphs: bool = setting(
        False,
        "record a step's kernels once and replay them (CUDA graphs); off until it has been proven on a GPU",
        group="model",
    )
    kernels: str = setting(
        "measured",
        "on a CPU: for each kind of layer the fastest, measured once on a machine; or all of torch's own; or "
        "all of oneDNN's, on weights in its layout; or oneDNN's, with fewer multiplications for 3x3 "
        "convolutions of fine maps in float32",
        choices=("measured", "torch", "onednn", "winograd"),
        group="model",
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", group="model")
    batch_size: int | str | None = setting(
        None,
        "images sampled together; auto: as many as fit into memory",
        low=1,
        words=("auto",),
        metavar="N",
        default_text="n_samples",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("compile", "graphs"):
            if getattr(self, name) and self.eager:
                raise FieldError("{" + name + "} and {eager} exclude each other; give one of them")

    def recorded(self) -> dict[str, Any]:
        """The approximations in use by name."""
        return {name: value for name, value in changed(self).items() if name in APPROXIMATE}
