"""Does a UNet predict the noise (eps) or v? Its shapes do not show it; hints in the file do, or a test.

Nor do they show the size of its images, which a file may state, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ldm.errors import InputError
from ldm.weights.files import exists
from ldm.weights.header import Header, read_header

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.models.diffusion.ddpm import LatentDiffusion

# Names of the published files and of what was made from them, "v2-1_768-ema-pruned", "512-base-ema".
# A "v" with a number behind it, as in "512x768_v3", is a version.
NAMED_V = re.compile(r"(?<!x)768[-_]?v(?!\d)|v-?2[-_.]?[01]?[-_]768(?!\d)|v[-_]?pred", re.I)
NAMED_EPS = re.compile(r"512[-_]?base|v-?2[-_.]?[01]?[-_](512(?!\d)|base)|eps[-_]?pred|2[-_.][01]-base", re.I)
# of the Model Metadata Standard, https://github.com/Stability-AI/ModelSpec: "512x512"
RESOLUTION = "modelspec.resolution"
PREDICTION = "modelspec.prediction_type"
METADATA = (PREDICTION, "modelspec.predict_key", "prediction_type", "ss_prediction_type")  # second: ComfyUI
NAMES_OF = {"eps": ("epsilon", "eps"), "v": ("v", "v_prediction")}  # what is predicted, the standard's first
MARKERS = ("v_pred", "ztsnr")  # empty tensors: predicts v, on a schedule with zero terminal SNR
BASE_STEPS = 875_000  # of the training of 512-base-ema.ckpt
SURE = 0.5  # correlation with the noise; see `measured_prediction`


class Hint(NamedTuple):
    parameterization: str  # "eps" or "v"
    why: str  # "its name", in words


class FileHints(NamedTuple):
    """What a checkpoint says about its UNet's output, and about the size of its images."""

    hint: Hint | None
    is_marked: bool  # with a tensor named v_pred
    zero_snr: bool  # trained on a schedule with zero terminal SNR (Lin et al. 2023, arXiv 2305.08891)
    size: int | None  # side in pixels of the images that the model was made for


def file_hints(path: str | Path, by_name: bool = False) -> FileHints:
    """The hints of a checkpoint, of which only the header is read.

    `by_name` also takes the count of training steps and the names of file and folder for hints, which say
    something only where a family has both. InputError for what `read_header` refuses.
    """
    header = read_header(path)
    marked, zero_snr = "v_pred" in header.tensors, "ztsnr" in header.tensors
    return FileHints(prediction_hint(header, by_name), marked, zero_snr, stated_size(header))


def markers(parameterization: str, zero_snr: bool) -> dict[str, Tensor]:
    """The empty tensors that say in a file of any format that its UNet predicts v, and on which schedule."""
    import torch

    names = MARKERS if zero_snr else MARKERS[:1]
    return {name: torch.zeros(0) for name in names} if parameterization == "v" else {}


def stated_size(header: Header) -> int | None:
    """The shorter side that the metadata of a file state for its model's images, in pixels."""
    sides = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(header.metadata.get(RESOLUTION, "")).strip())
    return min(map(int, sides.groups())) if sides else None


def prediction_hint(header: Header, by_name: bool = False) -> Hint | None:
    """The first hint that a header gives, see `file_hints`."""
    if "v_pred" in header.tensors:
        return Hint("v", "its marker v_pred")
    for name in METADATA:
        stated = str(header.metadata.get(name, "")).lower()
        for parameterization, names in NAMES_OF.items():
            if stated in names:
                return Hint(parameterization, f"its metadata ({name})")
    if hint := _beside(header.path):
        return hint
    if not by_name:
        return None
    if "ztsnr" in header.tensors:  # pure noise says nothing about eps
        return Hint("v", "its marker ztsnr")
    if header.global_step == BASE_STEPS:
        return Hint("eps", f"its {BASE_STEPS:,} steps of training")
    for path in (header.path, header.path.resolve()):  # a link's name, then that of its target
        for name in (path.name, path.parent.name):
            if NAMED_V.search(name):
                return Hint("v", f"the name {name}")
            if NAMED_EPS.search(name):
                return Hint("eps", f"the name {name}")
    return None


def _beside(path: Path) -> Hint | None:
    """What a YAML file of the checkpoint's name says, where other programs look for its config.

    There is no other hint in most v1 files that predict v. A file that cannot be read says nothing.
    """
    from ldm.weights.loading import read_section

    for file in dict.fromkeys((path, path.resolve())):  # a link, then its target
        config = file.with_suffix(".yaml")
        try:
            if path.is_dir() or not exists(config):
                continue
            params = read_section(config, "model", {}).get("params") or {}
            stated = params.get("parameterization")
        except (InputError, AttributeError):
            continue
        if stated in ("eps", "v"):
            return Hint(stated, f"the file {config.name} beside it")
    return None


def noise_correlation(model: LatentDiffusion, size: int = 8) -> float:
    """The correlation of the UNet's output with its input where that is nothing but noise.

    One call at the last timestep on `size` x `size` latents, without a prompt. An eps-model gives the noise
    back; of v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512) the noise
    is the smaller part there, with a = 0.005.
    """
    import torch

    unet = model.model.diffusion_model
    weight = next(unet.parameters())
    keys = (weight for name, weight in unet.named_parameters() if name.endswith("attn2.to_k.weight"))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, unet.in_channels, size, size, generator=generator)
    context = torch.zeros(1, 77, next(keys).shape[1])
    t = torch.full((1,), model.num_timesteps - 1, device=weight.device)
    with torch.inference_mode():
        output = model.apply_model(noise.to(weight), t, context.to(weight))
    pair = torch.stack([noise[:, : output.shape[1]].flatten(), output.float().cpu().flatten()])
    return torch.corrcoef(pair)[0, 1].item()


def measured_prediction(model: LatentDiffusion, path: str | Path) -> Hint:
    """What the model's UNet predicts, by a test; InputError if its output is not finite."""
    correlation = noise_correlation(model)
    if correlation != correlation:
        raise InputError(
            f"{path}: its UNet's output on pure noise is not finite; give its config with --config"
        )
    found = "eps" if correlation > SURE else "v"
    return Hint(found, f"a test: its output on pure noise correlates with the noise by {correlation:.2f}")
