"""Which model to run, and how to build it: a YAML file and a checkpoint become a LatentDiffusion."""

from __future__ import annotations

import copy
import errno
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import InputError
from ldm.log import notice
from ldm.weights.files import exists

if TYPE_CHECKING:
    import torch

    from ldm.models.diffusion.ddpm import LatentDiffusion

ROOT = Path(__file__).resolve().parents[2]
V1_CONFIG = "configs/stable-diffusion/v1-inference.yaml"
V1_WEIGHTS = ("models/ldm/stable-diffusion-v1/model.ckpt", "models/ldm/stable-diffusion-v1/model.safetensors")
SAFETY_FOLDER = "models/safety-checker"
BUNDLED_CONFIG = "configs/scenes/scenes-64.yaml"
BUNDLED_WEIGHTS = "models/scenes-64/model.safetensors"


@dataclass(frozen=True)
class ModelFiles:
    config: Path
    weights: Path
    notice: str | None = None  # a line for the user about the choice


def find(path: str) -> Path:
    """A path of this repository, from whatever folder a script is run; the working folder comes first."""
    return Path(path) if exists(Path(path)) else ROOT / path


def choose_model(config: str | None, ckpt: str | None) -> ModelFiles:
    """The files for `--config` and `--ckpt`; without either the linked v1 weights or the bundled model."""
    if ckpt is None and config is not None and find(config).resolve() == (ROOT / BUNDLED_CONFIG):
        ckpt = BUNDLED_WEIGHTS
    if ckpt is not None:
        is_bundled = find(ckpt).resolve() == ROOT / BUNDLED_WEIGHTS
        return ModelFiles(find(config or (BUNDLED_CONFIG if is_bundled else V1_CONFIG)), find(ckpt))
    # a link to nowhere is an error to report, not a reason to run another model
    linked = next((path for path in map(find, V1_WEIGHTS) if exists(path) or path.is_symlink()), None)
    if linked or config is not None:
        return ModelFiles(find(config or V1_CONFIG), linked or find(V1_WEIGHTS[0]))
    folder = Path(V1_WEIGHTS[0]).parent
    notice = (
        f"No weights are linked at {V1_WEIGHTS[0]}: using the bundled 64x64 model of coloured solids. "
        f"For Stable Diffusion, mkdir -p {folder} && ln -s /path/to/sd-v1-4.ckpt {V1_WEIGHTS[0]}"
    )
    return ModelFiles(ROOT / BUNDLED_CONFIG, ROOT / BUNDLED_WEIGHTS, notice)


@functools.lru_cache(maxsize=8)
def _read_yaml(path: Path, _mtime_ns: int, _size: int) -> Any:
    """The content of a YAML file, parsed anew only when the file has changed."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(path), resolve=True)


def read_section(path: Path, name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A top-level section of a YAML file, as the caller's own copy; InputError if the file is missing,
    malformed or without it.

    With a default the section may be missing.
    """
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not exists(path):
        raise InputError(f"{path}: {os.strerror(errno.ENOENT)}")
    try:
        status = path.stat()
        content = _read_yaml(path.absolute(), status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    section = content.get(name, default) if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise InputError(f"{path} has no {name}: section")
    return copy.deepcopy(section)


def read_config(path: Path) -> dict[str, Any]:
    """The `model:` section of a YAML file."""
    model = read_section(path, "model")
    if "target" not in model:
        raise InputError(f"the model: section of {path} has no target")
    return model


def load_model(
    config: dict[str, Any],
    weights: Path,
    which: str | None = None,
    allow_target: Iterable[str] = (),
    dtype: torch.dtype | None = None,
) -> LatentDiffusion:
    """A LatentDiffusion in eval mode on the CPU, built without values and filled from the mapped checkpoint.

    `config` is a `model:` section; `which` is "raw" or "ema", by default what the section's `use_ema` says.
    The model's `weights_used` is the one that was taken. Floating-point weights become `dtype`, by default
    float32; those of that type in the file are not copied.

    With a notice, a file that is marked as v-prediction makes a model that predicts v, unless the config sets
    the parameterization. The model's `zero_terminal_snr` says whether its schedule is to be rescaled because
    the file is marked as trained on such a one. InputError for a config or a checkpoint that cannot be used.
    """
    import torch

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.util import instantiate_from_config
    from ldm.weights.checkpoint import load_weights, pick_weights, read_state_dict
    from ldm.weights.families import prediction_markers

    params = config.get("params") or {}
    which = which or ("ema" if params.get("use_ema", True) else "raw")
    # the weights are chosen when they are read; a second set of averages would only take memory
    section = {"target": config["target"], "params": {**params, "use_ema": False}}
    try:
        with torch.device("meta"):
            model = instantiate_from_config(section, allow_target)
    except InputError:
        raise
    except Exception as error:  # a value of the wrong kind fails in whatever way the layer it reaches has
        raise InputError(f"the config's model cannot be built ({type(error).__name__}: {error})") from error
    if not isinstance(model, LatentDiffusion):
        raise InputError(f"the config's model is {type(model).__name__}, not a LatentDiffusion")
    model.register_schedule()  # now with values
    state = read_state_dict(weights)
    names = [name for name, _ in model.named_parameters()]
    picked = pick_weights(state, which, path=weights, names=names)
    load_weights(model, picked, path=weights, dtype=dtype or torch.float32)

    v_pred, ztsnr = prediction_markers(state)
    if v_pred and "parameterization" not in params:
        model.parameterization = "v"
        notice(f"{weights} is marked as v-prediction: its UNet is taken to predict v")
    elif v_pred and model.parameterization != "v":
        notice(
            f"{weights} is marked as v-prediction, at odds with the config's parameterization: "
            f"{model.parameterization}, which is used"
        )
    model.zero_terminal_snr = ztsnr and model.parameterization == "v"  # pure noise says nothing about eps
    if ztsnr:
        how = "its schedule is rescaled" if model.zero_terminal_snr else "ignored, as its UNet predicts eps"
        notice(f"{weights} is marked as trained with zero terminal SNR: {how}")
    model.weights_used = which
    return model.eval().requires_grad_(False)


def advised_scale(path: Path, default: float) -> float:
    """The guidance scale that a YAML file's `sampling:` section asks for, if it has one."""
    scale = read_section(path, "sampling", {}).get("scale", default)
    if not isinstance(scale, int | float):
        raise InputError(f"{path}: the scale {scale!r} of its sampling: section is not a number")
    return scale
