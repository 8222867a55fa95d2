"""Which model to run, and how to build it: a YAML file and a checkpoint become a LatentDiffusion."""

from __future__ import annotations

import copy
import errno
import filecmp
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import InputError
from ldm.log import notice
from ldm.weights.description import describe
from ldm.weights.families import (
    FAMILIES,
    LAION,
    V1,
    Family,
    Shapes,
    family_of,
    in_words,
    recognise,
    shapes_of,
    supported,
    variants,
)
from ldm.weights.files import exists, user_file

if TYPE_CHECKING:
    import torch

    from ldm.models.diffusion.ddpm import LatentDiffusion

ROOT = Path(__file__).resolve().parents[2]
LINKED = "models/ldm"  # where users link weights, in a folder for each family
V1_CONFIG = V1.config
V1_WEIGHTS = tuple(f"{LINKED}/{V1.folder}/model.{suffix}" for suffix in ("ckpt", "safetensors"))
LAION_CONFIG = LAION.config
SAFETY_FOLDER = "models/safety-checker"
BUNDLED_CONFIG = "configs/scenes/scenes-128.yaml"
BUNDLED_WEIGHTS = "models/scenes-128/model.safetensors"
SMALL_CONFIG = "configs/scenes/scenes-64.yaml"  # the bundled model of 64x64 pixels, for quick experiments
SMALL_WEIGHTS = "models/scenes-64/model.safetensors"

# The tasks of the families that can do a task: with a mask over the whole image an inpainting model makes
# images of text, and the sampler repaints a part of an image with any model.
ABLE = {
    "text": ("text", "inpaint"),
    "inpaint": ("inpaint", "text"),
    "depth": ("depth",),
    "upscale": ("upscale",),
}
COMMANDS = {
    "text": "txt2img.py or img2img.py",
    "inpaint": "inpaint.py",
    "depth": "depth2img.py",
    "upscale": "upscale.py",
}
TITLES = {"text": "a text-to-image model", "inpaint": "an inpainting model", "depth": "a depth model"}
TITLES["upscale"] = "an upscaler"


@dataclass(frozen=True)
class ModelFiles:
    config: Path
    weights: Path
    notice: str | None = None  # a line for the user about the choice
    # The config was chosen for the shapes of the weights, which do not show whether their UNet predicts eps
    # or v; nor does anything else in the file. See `load_model`.
    undecided: bool = False


def find(path: str) -> Path:
    """A path of this repository, from whatever folder a script is run; the working folder comes first."""
    return Path(path) if exists(Path(path)) else ROOT / path


def choose_model(config: str | None, ckpt: str | None, task: str | None = "text") -> ModelFiles:
    """The files for `--config` and `--ckpt`, for a command that does `task`; None allows any.

    A checkpoint without a config is recognised by the names and shapes of its weights. Without both the
    weights are those that are linked for the task, or else the bundled model's. The weights themselves are
    not read. InputError for a checkpoint of a family that cannot be run, or does something else, and for a
    config that does not fit it.
    """
    if config is not None and task is not None and exists(find(config)):
        does = describe(read_config(find(config))).task
        if does not in ABLE[task]:
            raise InputError(f"{config} is of {TITLES[does]}: use {COMMANDS[does]}")
    if ckpt is None:
        return _files_without_ckpt(config, task or "text")
    weights = find(ckpt)
    family = bundled_family(weights)
    if config is None and family:
        _check_task(weights, family, task)
        return ModelFiles(find(family.config), weights)
    if config is not None and not exists(weights):
        return ModelFiles(find(config), weights)  # loading it will say so, after all that costs less
    family, shapes = recognise_file(weights)
    if config is not None:
        if exists(find(config)):
            _check_fit(find(config), weights, family, shapes)
        return ModelFiles(find(config), weights)
    if family.config is None:
        what = f"{weights} looks like {family.name}"
        if "unlisted" in family.name:
            raise InputError(f"{what}: give its config with --config")
        raise InputError(f"{what}, which cannot be run: give a checkpoint of {supported()}")
    _check_task(weights, family, task)
    return _files_of(weights, family)


def bundled_family(weights: Path) -> Family | None:
    """The family of a file that came with this repository, or of a copy of one."""
    rows = {ROOT / family.bundled: family for family in FAMILIES if family.bundled}
    try:
        here = rows.get(weights.resolve())
    except (OSError, ValueError):  # whoever reads the file will say so
        return None
    return here or next((family for path, family in rows.items() if _same_content(weights, path)), None)


def _same_content(one: Path, other: Path) -> bool:
    try:
        sizes_agree = one.is_file() and other.is_file() and one.stat().st_size == other.stat().st_size
        return sizes_agree and filecmp.cmp(one, other, shallow=False)
    except OSError:  # whoever reads the file will say so
        return False


def recognise_file(weights: Path) -> tuple[Family, Shapes]:
    """The family of a checkpoint or diffusers folder, and its shapes; only its header is read."""
    from ldm.weights.header import read_header

    tensors = read_header(weights).tensors
    return family_of(tensors), shapes_of(tensors)


def _files_of(weights: Path, family: Family) -> ModelFiles:
    """The files of a checkpoint that was recognised, with the config that its hints ask for."""
    from ldm.weights.prediction import file_hints

    undecided, why = False, ""
    if len(variants(family)) > 1:
        hint, _, _, size = file_hints(weights, by_name=True)
        rows = variants(family, size)
        family = rows[0]
        if len({row.predicts for row in rows}) > 1:
            undecided = hint is None
            family = next(row for row in rows if hint is None or row.predicts == hint.parameterization)
            why = f" that predicts {hint.parameterization} by {hint.why}" if hint else ""
    config = find(V1_CONFIG if family is V1 else family.config)
    is_default = weights.absolute() in [find(path).absolute() for path in V1_WEIGHTS]
    line = None if is_default else f"{weights} is taken for {family.name}{why}: its config is {family.config}"
    return ModelFiles(config, weights, line, undecided)


def _files_without_ckpt(config: str | None, task: str) -> ModelFiles:
    """The files for `--config` alone, or for neither."""
    if config is not None:
        path = find(config)
        known = {(ROOT / family.config).resolve(): family for family in FAMILIES if family.config}
        family = known.get(path.resolve(), V1)
        if family.bundled:
            return ModelFiles(path, find(family.bundled))
        return ModelFiles(path, _linked(family) or find(f"{LINKED}/{family.folder}/model.ckpt"))
    for does in ABLE[task] if task == "inpaint" else [task]:
        for family in FAMILIES:
            if family.folder and family.task == does and (weights := _linked(family)):
                line = None if family is V1 else f"using {family.name}, which is linked at {weights}"
                return ModelFiles(find(V1_CONFIG if family is V1 else family.config), weights, line)
    bundled, wanted = bundled_for(task), published_for(task)
    folder = f"{LINKED}/{wanted.folder}"
    what = "Stable Diffusion" if task == "text" else wanted.name
    line = (
        f"No weights are linked at {folder}/model.ckpt: using {bundled.name} of coloured solids. "
        f"For {what}, mkdir -p {folder} && ln -s /path/to/{wanted.download} {folder}/model.ckpt"
    )
    return ModelFiles(ROOT / bundled.config, ROOT / bundled.bundled, line)


def bundled_for(task: str) -> Family:
    """The model that a command for a task takes where no weights are linked for it."""
    return next(family for family in FAMILIES if family.bundled and family.task == task)


def published_for(task: str) -> Family:
    """The first of the published models that do a task."""
    return next(family for family in FAMILIES if family.folder and family.task == task)


def _linked(family: Family) -> Path | None:
    """The weights in a family's folder: model.ckpt, model.safetensors, or the only checkpoint there."""
    named = [find(f"{LINKED}/{family.folder}/model.{suffix}") for suffix in ("ckpt", "safetensors")]
    # a link to nowhere is an error to report, not a reason to run another model
    if found := next((path for path in named if exists(path) or path.is_symlink()), None):
        return found
    folder = find(f"{LINKED}/{family.folder}")
    if not exists(folder):
        return None
    if exists(folder / "model_index.json"):
        return folder
    with user_file(folder):
        single = [path for path in folder.iterdir() if path.suffix in (".ckpt", ".safetensors")]
    return single[0] if len(single) == 1 else None


def _check_task(weights: Path, family: Family, task: str | None) -> None:
    if task is not None and family.task not in ABLE[task]:
        raise InputError(f"{weights} is {family.name}: use {COMMANDS[family.task]}")


def _check_fit(config: Path, weights: Path, family: Family, found: Shapes) -> None:
    """InputError if a config describes a model of other shapes than the file's, where both are known."""
    described = describe(read_config(config))
    asked = Shapes(described.in_channels, described.context_dim, described.factor)
    words = ("input channels of its UNet", "numbers a word for its UNet", "pixels to a latent")
    faults = [
        f"{have} instead of {want} {what}"
        for have, want, what in zip(found, asked, words, strict=True)
        if None not in (have, want) and have != want
    ]
    if faults:
        raise InputError(
            f"{weights} looks like {in_words(family)}, the model is {recognise(asked).name}: "
            f"{', '.join(faults)}"
        )


@functools.lru_cache(maxsize=8)
def _read_yaml(path: Path, _mtime_ns: int, _size: int) -> Any:
    """The content of a YAML file, parsed anew only when the file has changed."""
    from omegaconf import OmegaConf

    return OmegaConf.load(path)


def read_section(path: Path, name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A top-level section of a YAML file, as the caller's own copy; InputError if the file is missing,
    malformed or without it.

    With a default the section may be missing. What the other sections refer to need not exist: training
    files name the paths and variables of another machine.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not exists(path):
        raise InputError(f"{path}: {os.strerror(errno.ENOENT)}")
    try:
        status = path.stat()
        content = _read_yaml(path.absolute(), status.st_mtime_ns, status.st_size)
        section = content.get(name) if isinstance(content, DictConfig) else None
        if OmegaConf.is_config(section):
            section = OmegaConf.to_container(section, resolve=True)
        elif isinstance(content, DictConfig) and name not in content:
            section = copy.deepcopy(default)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(section, dict):
        raise InputError(f"{path} has no {name}: section")
    return section


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
    undecided: bool = False,
    vae: str | None = None,
) -> LatentDiffusion:
    """A LatentDiffusion in eval mode on the CPU, built without values and filled from the mapped checkpoint.

    `config` is a `model:` section. `which` is "raw" or "ema", by default what its `use_ema` says or,
    where it says nothing, "ema" if the file has averaged weights; the model's `weights_used` is the one that
    was taken. Floating-point weights become `dtype`, by default float32; those of that type in the file are
    not copied, and of the others the file's pages are let go.

    Unless the config sets the parameterization, a file that is marked as v-prediction, or says so in its
    metadata, makes a model that predicts v, with a notice. `undecided` is that of ModelFiles: without a hint
    a test on the model decides. The model's `zero_terminal_snr` says whether its schedule is to be rescaled
    because the file is marked as trained on such a one. `vae` is a file or folder whose autoencoder takes the
    place of the checkpoint's. InputError for a config or a checkpoint that cannot be used.
    """
    import torch

    from ldm.modules.encoders.modules import BERTEmbedder
    from ldm.modules.encoders.tokenizer import bert_vocabulary_file
    from ldm.weights.checkpoint import load_weights, pick_weights, read_state_dict
    from ldm.weights.diffusers_layout import is_diffusers_folder

    params = config.get("params") or {}
    state = read_state_dict(weights)
    which = which or default_weights(config, state)
    if vae:
        from ldm.weights.vae import with_vae

        state = with_vae(state, vae)
    model = model_without_values(config, state, allow_target)
    if isinstance(model.cond_stage_model, BERTEmbedder) and model.cond_stage_model.use_tokenizer:
        bert_vocabulary_file()  # a missing one need not wait for gigabytes of weights
    model.register_schedule()  # now with values
    names = [name for name, _ in model.named_parameters()]
    picked = pick_weights(state, which, path=weights, names=names)
    load_weights(model, picked, path=weights, dtype=dtype or torch.float32)
    if is_diffusers_folder(weights) and "scale_factor" in state and not params.get("scale_by_std"):
        model.scale_factor = float(state["scale_factor"])  # which a folder has only if it is an unusual one
    model.weights_used = which
    model.eval().requires_grad_(False)
    set_prediction(model, weights, params.get("parameterization"), undecided)
    return model


def default_weights(config: dict[str, Any], names: Iterable[str]) -> str:
    """Which weights of a checkpoint with these names a `model:` section takes by itself, "raw" or "ema"."""
    averaged = any(name.startswith("model_ema.diffusion_model") for name in names)
    return "ema" if (config.get("params") or {}).get("use_ema", averaged) else "raw"


def model_without_values(
    config: dict[str, Any], names: Iterable[str], allow_target: Iterable[str] = ()
) -> LatentDiffusion:
    """The model of a `model:` section on the meta device, for a checkpoint with weights of these names.

    InputError for a section that describes none.
    """
    import torch

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.util import instantiate_from_config

    # the weights are chosen when they are read; a second set of averages would only take memory
    section = {"target": config["target"], "params": {**(config.get("params") or {}), "use_ema": False}}
    if not any(name.startswith("depth_model.") for name in names):
        # a file without the estimator works on depth maps that are given
        section["params"].pop("depth_stage_config", None)
    try:
        with torch.device("meta"):
            model = instantiate_from_config(section, allow_target)
    except InputError:
        raise
    except Exception as error:  # a value of the wrong kind fails in whatever way the layer it reaches has
        raise InputError(f"the config's model cannot be built ({type(error).__name__}: {error})") from error
    if not isinstance(model, LatentDiffusion):
        raise InputError(f"the config's model is {type(model).__name__}, not a LatentDiffusion")
    return model


def set_prediction(model: LatentDiffusion, weights: Path, stated: str | None, undecided: bool) -> None:
    """Set a built model's `parameterization` and `zero_terminal_snr` by its file, with a notice.

    `stated` is what its config says. `undecided`: where the file has no hint, a test decides.
    """
    from ldm.weights.prediction import file_hints, measured_prediction

    found = file_hints(weights, by_name=undecided)
    hint = found.hint
    if undecided and hint is None and stated is None:
        hint = measured_prediction(model, weights)
    if hint is not None:
        what = (
            "is marked as v-prediction"
            if found.is_marked
            else f"predicts {hint.parameterization} by {hint.why}"
        )
        if stated not in (None, hint.parameterization):
            odds = f"at odds with the config's parameterization: {stated}, which is used"
            notice(f"{weights} {what}, {odds}")
        elif stated is None and (undecided or hint.parameterization != model.parameterization):
            model.parameterization = hint.parameterization
            notice(f"{weights} {what}: its UNet is taken to predict {hint.parameterization}")
    model.zero_terminal_snr = found.zero_snr and model.parameterization == "v"  # it says nothing about eps
    if found.zero_snr:
        how = "its schedule is rescaled" if model.zero_terminal_snr else "ignored, as its UNet predicts eps"
        notice(f"{weights} is marked as trained with zero terminal SNR: {how}")


def advised_scale(path: Path, default: float) -> float:
    """The guidance scale that a YAML file's `sampling:` section asks for, if it has one."""
    scale = read_section(path, "sampling", {}).get("scale", default)
    if not isinstance(scale, int | float):
        raise InputError(f"{path}: the scale {scale!r} of its sampling: section is not a number")
    return scale
