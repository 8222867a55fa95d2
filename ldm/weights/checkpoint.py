"""Read a checkpoint safely, pick its weights, load them strictly.

Tensors are mapped from the file, not read: a 4 GB checkpoint opens in a fraction of a second, and of a
training checkpoint with its optimizer only the weights are ever touched.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.log import notice
from ldm.weights.diffusers_layout import is_diffusers_folder, read_folder
from ldm.weights.families import family_of, identify, in_words
from ldm.weights.float8 import multiplied, split_scales
from ldm.weights.header import let_go, read_header

State = dict[str, Tensor]


def read_state_dict(path: str | Path) -> State:
    """The tensors of a `.safetensors`, a `.ckpt` or a diffusers folder by name: on the CPU, in its dtypes.

    The content decides which format it is, not the extension. The tensors are mapped: pages load when used,
    writing to one never reaches the file, and the file must stay unchanged while they live. A `state_dict` or
    `model` wrapper is removed. Whatever is not a tensor is dropped, and so are tensors of dtypes that no
    weight can have (quantised ones). The weights of a folder have the names that they have in single files.

    Raises InputError for a file that is missing, another folder, empty, cut short, damaged, of another kind,
    or that carries code.
    """
    if is_diffusers_folder(path):
        return read_folder(Path(path), read_state_dict)
    return read_header(path).map()


EMA_COUNTERS = {"model_ema.decay", "model_ema.num_updates"}  # which sd-v1-4.ckpt has without any average


def averages_in(names: Iterable[str]) -> set[str]:
    """The names of averaged (EMA) weights among `names`."""
    return {name for name in names if name.startswith("model_ema.")} - EMA_COUNTERS


def pick_weights(
    state: Mapping[str, Tensor], which: str, *, path: str | Path, names: Iterable[str] = ()
) -> State:
    """The state dict with its "raw" or averaged ("ema") UNet weights as `model.*`, and without `model_ema.*`.

    Training keeps each UNet weight twice: `model.a.b.weight` and, averaged over the steps,
    `model_ema.abweight`. `names` are the model's weight names, needed for a file that has only the latter.

    Raises InputError where the file lacks the weights asked for.
    """
    if which not in ("ema", "raw"):
        raise InputError(f"unknown weights {which!r}: choose ema or raw")
    ema = {name for name in state if name.startswith("model_ema.")}
    averaged = averages_in(ema)
    picked = {name: tensor for name, tensor in state.items() if name not in ema}
    unet = [name for name in picked if name.startswith("model.")]
    if which == "raw":
        if averaged and not unet:
            raise InputError(f"{path} has only EMA weights for its UNet: use --weights ema")
        return picked
    if ema and not averaged:  # sd-v1-4.ckpt and others
        raise InputError(f"{path} keeps its EMA weights as its plain ones: use --weights raw")
    if not averaged:
        raise InputError(f"{path} has no EMA weights: use --weights raw")
    twins = {name: _ema_name(name) for name in unet or names if name.startswith("model.")}
    lacking = [name for name, twin in twins.items() if twin not in averaged]
    if lacking:
        count = f"{len(lacking)} of {len(twins)} EMA weights"
        raise InputError(f"{path} lacks {count}, first that of {lacking[0]}: use --weights raw")
    # the text encoder, where it was trained, too
    twins |= {name: twin for name in picked if (twin := _ema_name(name)) in averaged}
    return picked | {name: state[twin] for name, twin in twins.items()}


def _ema_name(name: str) -> str:
    """`model.diffusion_model.out.0.bias` -> `model_ema.diffusion_modelout0bias` (CompVis `LitEma`)."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


# The file's copies of what the model computes itself. They are never loaded: merge tools round them to half.
COMPUTED = re.compile(
    r"(low_scale_model\.|noise_augmentor\.)?(betas|alphas_cumprod(_prev)?|(sqrt|log)_one_minus_alphas_cumprod"
    r"|sqrt_(recip_|recipm1_)?alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights)"
    r"|.*\.position_ids|cond_stage_model\..*\.attn_mask"
)
# What training and conversion leave in files, ignored by a model that has no such weight.
LEFTOVER = re.compile(
    r"logvar|scale_factor|v_pred|ztsnr|(first_stage_model\.)?(loss|model_ema)\..*"
    r"|cond_stage_model\.(model\.|transformer\.)?(logit_scale|text_projection(\.weight)?)"
)


def unused_weights(model: nn.Module) -> set[str]:
    """The weights that original checkpoints carry and the model never reads, by its parts' `unused_weights`.

    Files converted from another layout lack them.
    """
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, part in model.named_modules()
        for name in getattr(part, "unused_weights", ())
    }


PARTS = {
    "model": "UNet",
    "first_stage_model": "autoencoder",
    "cond_stage_model": "text encoder",
    "depth_model": "depth estimator",
}


def check_weights(
    model: nn.Module, state: Mapping[str, Tensor], *, path: str | Path
) -> tuple[State, list[str]]:
    """The weights of a state dict by the names of `model`, and the names of those that it does not have.

    CLIP's names fit with `text_model.` and without it (transformers >= 5.6, NovelAI). Schedule buffers are
    never taken from the file.

    Raises InputError for missing or misshapen ones, naming the model that the file looks like.
    """
    wanted = {name: t for name, t in model.state_dict().items() if not COMPUTED.fullmatch(name)}
    given = {_respell(name, wanted): t for name, t in state.items() if not COMPUTED.fullmatch(name)}
    spare = unused_weights(model)
    missing = [name for name in wanted if name not in given and name not in spare]
    misshapen = [name for name in wanted if name in given and given[name].shape != wanted[name].shape]
    unknown = [name for name in given if name not in wanted and not LEFTOVER.fullmatch(name)]
    no_floats = [
        name
        for name, t in wanted.items()
        if name in given and t.is_floating_point() and not given[name].is_floating_point()
    ]
    faults = []
    if missing:
        absent = [
            words
            for part, words in PARTS.items()
            if any(name.startswith(f"{part}.") for name in missing)
            and not any(name.startswith(f"{part}.") for name in wanted.keys() & given.keys())
        ]
        parts = f"; all of its {' and '.join(absent)}" if absent else ""
        faults.append(f"{len(missing)} of {len(wanted)} weights are missing (first {missing[0]}{parts})")
    if misshapen:
        first = misshapen[0]
        shapes = f"{list(given[first].shape)} instead of {list(wanted[first].shape)}"
        faults.append(
            f"{len(misshapen)} of {len(wanted)} weights have another shape (first {first}: {shapes})"
        )
    if no_floats:
        first = no_floats[0]
        faults.append(
            f"{len(no_floats)} of {len(wanted)} weights are no floating-point numbers "
            f"(first {first}: {given[first].dtype})"
        )
    if faults:
        if unknown:
            faults.append(f"{len(unknown)} weights are not of this model (first {unknown[0]!r})")
        raise InputError(
            f"{path} looks like {in_words(family_of(given))}, the model is {identify(wanted)}: "
            f"{', '.join(faults)}"
        )
    return given, unknown


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], *, path: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Assign every weight of `model`, built on the meta device: none is initialised or held twice.

    Floating-point weights become `dtype` (None: stay as stored); those that are already stay mapped. Those in
    float8 that have a scale are multiplied by it (None: they become float32). `requires_grad` stays as the
    model was built.

    Weights that the model does not have (merges carry `embedding_manager.*` and the like) are left out, with
    a notice. Raises InputError as `check_weights` and `split_scales`.
    """
    state, scales = split_scales(state, path)
    given, unknown = check_weights(model, state, path=path)
    if unknown:
        first = ", ".join(repr(name[:80]) for name in unknown[:3]) + (", …" if len(unknown) > 3 else "")
        notice(f"{path}: {len(unknown)} of its weights are not of this model and are left out ({first})")

    wanted = {name: t for name, t in model.state_dict().items() if not COMPUTED.fullmatch(name)}
    scales = {_respell(name, wanted): scale for name, scale in scales.items()}

    def convert(name: str, tensor: Tensor) -> Tensor:
        if name in scales:
            return multiplied(tensor, scales[name], dtype or torch.float32)
        if dtype in (None, tensor.dtype) or not tensor.is_floating_point():
            return tensor
        result = tensor.to(dtype)
        let_go(tensor)
        return result

    zero = torch.zeros((), dtype=dtype)  # expanded it takes no memory
    filled = {name: given[name] if name in given else zero.expand(t.shape) for name, t in wanted.items()}
    converted = {name: convert(name, t) for name, t in filled.items()}
    model.load_state_dict(converted, strict=False, assign=True)
    hollow = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if hollow:
        raise RuntimeError(f"{len(hollow)} tensors of the model are left without values (first {hollow[0]})")


def _respell(name: str, wanted: Mapping[str, Tensor]) -> str:
    """A text-encoder name as the model spells it: with `text_model.`"""
    full = name.replace("cond_stage_model.transformer.", "cond_stage_model.transformer.text_model.", 1)
    return full if name not in wanted and full in wanted else name
