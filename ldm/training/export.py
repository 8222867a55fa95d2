"""The weights that a finished run leaves: what txt2img.py, convert.py and other programs load."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.training.files import write_tensors
from ldm.weights.checkpoint import COMPUTED
from ldm.weights.prediction import PREDICTION, RESOLUTION, markers


def export_weights(
    state: Mapping[str, Tensor],
    path: Path,
    half: bool = False,
    parameterization: str | None = None,
    zero_terminal_snr: bool = False,
    size: int | None = None,
) -> Path:
    """Write a model's weights as safetensors, without the schedule, which every model computes itself.

    In half precision scalars such as the latents' scale stay in single precision. The metadata say what a
    UNet predicts, and a file with zero terminal SNR has the markers that loaders look for. `size` is the side
    in pixels of the images that the model was made for.
    """
    state = {name: tensor for name, tensor in state.items() if not COMPUTED.fullmatch(name)}
    if half:
        state = {name: t.half() if t.ndim and t.is_floating_point() else t for name, t in state.items()}
    metadata = {"format": "pt"}
    if parameterization is not None:
        metadata[PREDICTION] = "v" if parameterization == "v" else "epsilon"
    if size is not None:
        metadata[RESOLUTION] = f"{size}x{size}"
    if zero_terminal_snr:
        state |= markers("v", True)
    write_tensors(state, path, metadata)
    return path
