"""A checkpoint in another form: read, merged, given another autoencoder, and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import InputError
from ldm.log import notice
from ldm.weights.description import prediction_of
from ldm.weights.families import family_of, variants
from ldm.weights.float8 import SCALE, without_scales
from ldm.weights.header import Header, read_header
from ldm.weights.loading import bundled_family, choose_model, load_model, model_without_values, read_config
from ldm.weights.prediction import (
    METADATA,
    NAMES_OF,
    PREDICTION,
    RESOLUTION,
    markers,
    prediction_hint,
    stated_size,
)
from ldm.weights.writing import Report, check_target, size_of, write_ckpt, write_safetensors, written_whole

if TYPE_CHECKING:
    from torch import Tensor

    State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Conversion:
    """What is to become of which checkpoint. None keeps what is there.

    Without `weights` a file keeps the raw and the averaged ones, and a folder holds the raw ones.
    """

    source: Path
    target: Path
    to: str  # one of FORMATS
    precision: str | None = None  # of PRECISIONS
    weights: str | None = None  # "raw" or "ema"
    vae: Path | None = None
    other: Path | None = None  # to merge with
    ratio: float = 0.5
    base: Path | None = None  # what is subtracted from `other`
    config: str | None = None  # YAML, needed only for a folder of a model that is not recognised
    force: bool = False


def convert(job: Conversion, progress: Callable[[int], AbstractContextManager[Report]]) -> None:
    """Carry out a conversion; `progress(bytes)` gives what is called with the count of bytes written.

    InputError for whatever cannot be read, merged, held by the target or written, before anything is written.
    """
    from ldm.weights.checkpoint import check_weights, read_state_dict
    from ldm.weights.diffusers_writing import not_held, with_text_model, write_folder
    from ldm.weights.merge import merge
    from ldm.weights.vae import vae_file, with_vae

    check_target(job.target, job.source, job.force)
    header = read_header(job.source)  # all that can be said without values comes first
    vae = vae_file(job.vae) if job.vae else None
    for path in filter(None, (job.source, job.other, job.base, vae)):
        read_header(path).check_dtypes()
    stated = _stated_prediction(header)
    _check_predictions(stated, [path for path in (job.other, job.base) if path], job.source)
    files = choose_model(job.config, str(job.source), task=None) if job.to == "diffusers" else None
    config = read_config(files.config) if files else None
    state = read_state_dict(job.source)
    if job.vae:
        with_vae(state, job.vae)
    state = without_scales(_picked(state, job, config), job.source)
    if job.other:
        unet = [name for name in state if name.startswith("model.")]
        others = [_to_merge(read_state_dict(path), path, job, unet) for path in (job.other, job.base) if path]
        # the text encoders of one family have their weights under two names
        state, *others = map(with_text_model, (state, *others))
        paths = tuple(path for path in (job.source, job.other, job.base) if path)
        state = merge(state, others[0], job.ratio, *others[1:], paths=paths)
    if job.vae:
        state = without_scales(with_vae(state, job.vae), job.vae)

    if config is None:
        if header.path.is_dir() and "scale_factor" in header.tensors:
            factor = float(state["scale_factor"])
            notice(
                f"{job.source}: no checkpoint holds its scaling_factor: use it with scale_factor {factor:g} "
                "in its YAML"
            )
        with written_whole(job.target) as path, progress(size_of(state, job.precision)) as report:
            if job.to == "ckpt":
                facts = {} if header.global_step is None else {"global_step": header.global_step}
                # a .ckpt has no metadata, and no marker of eps
                state = {**state, **markers(stated or "eps", "ztsnr" in state)}
                write_ckpt(state, path, job.precision, facts, report)
            else:
                write_safetensors(
                    state, path, job.precision, _metadata(header, state, stated, job.other), report
                )
        return
    state = with_text_model(state)
    # a folder's configs are made for the whole model
    check_weights(model_without_values(config, state), state, path=job.source)
    lost = not_held(state, config)
    prediction = _prediction(config, job, files.undecided)
    with written_whole(job.target) as path, progress(size_of(state, job.precision)) as report:
        write_folder(state, path, config, *prediction, job.precision, report)
    if lost:
        what = ", ".join(f"{words} ({count})" for words, count in lost.items())
        notice(f"A diffusers folder cannot hold {sum(lost.values())} of the tensors: {what}")


def _picked(state: State, job: Conversion, config: Mapping[str, Any] | None) -> State:
    """The weights that are asked for; a file keeps both kinds, a folder takes the raw ones."""
    import torch

    from ldm.util import instantiate_from_config
    from ldm.weights.checkpoint import pick_weights

    has_ema = any(name.startswith("model_ema.") for name in state)
    which = job.weights or ("raw" if has_ema and job.to == "diffusers" else None)
    if which is None:
        return state
    if job.weights is None:
        notice(f"{job.source}: its raw weights are written; --weights ema takes the averaged ones")
    unet = [name for name in state if name.startswith("model.")]
    if which == "ema" and not unet:  # the names of averages have lost their dots
        config = config or read_config(choose_model(job.config, str(job.source), task=None).config)
        with torch.device("meta"):
            unet = [name for name, _ in instantiate_from_config(config).named_parameters()]
    return pick_weights(state, which, path=job.source, names=unet)


def _to_merge(state: State, path: Path, job: Conversion, unet: Sequence[str]) -> State:
    """Another file's weights for a merge into those of the kind that is asked for; `unet` are their names.

    With "ema" they are its averages in place of its raw weights, if it has any.
    """
    from ldm.weights.checkpoint import averages_in, pick_weights

    which = job.weights or ("raw" if job.to == "diffusers" else None)
    if which is None or (which == "ema" and not averages_in(state)):
        return without_scales(state, path)
    return without_scales(pick_weights(state, which, path=path, names=unet), path)


def _stated_prediction(header: Header) -> str | None:
    """What a file, its name included, says of its UNet's output: "v", or "eps" where its family has both.

    None if it says nothing, or is of a family that predicts eps.
    """
    is_open = len({row.predicts for row in variants(family_of(header.tensors), stated_size(header))}) > 1
    hint = prediction_hint(header, by_name=is_open)
    return hint.parameterization if hint and (is_open or hint.parameterization == "v") else None


def _check_predictions(own: str | None, others: Sequence[Path], source: Path) -> None:
    """InputError if one of the files to be merged is known to predict something else."""
    for path in others:
        found = _stated_prediction(read_header(path))
        if own and found and own != found:
            raise InputError(f"{source} predicts {own} and {path} {found}: their sum would predict neither")


def _metadata(header: Header, state: State, stated: str | None, other: Path | None) -> dict[str, str]:
    """What a file's metadata still say of the weights `state`: not the hashes that some trainers write there.

    The size of a bundled model's images is added: its file need not state it, as it is known by its
    content. A merged model takes that of the one that it was merged with.
    """
    gone = {"format"}
    if not any(SCALE.fullmatch(name) for name in state):  # all weights have been multiplied by theirs
        gone.add("_quantization_metadata")
    kept = {name: text for name, text in header.metadata.items() if "hash" not in name and name not in gone}
    if stated and not any(str(kept.get(name)).lower() in NAMES_OF[stated] for name in METADATA):
        kept[PREDICTION] = NAMES_OF[stated][0]  # of a marker, a name, or a YAML file that stays behind
    size = (other and _size(read_header(other))) or _size(header)
    return kept if size is None else kept | {RESOLUTION: f"{size}x{size}"}


def _size(header: Header) -> int | None:
    """The side in pixels of a model's images, if its file states it or came with this repository."""
    family = bundled_family(header.path)
    return family.size if family else stated_size(header)


def _prediction(config: Mapping[str, Any], job: Conversion, undecided: bool) -> tuple[str, bool]:
    """What the UNet predicts, "eps" or "v", if need be by a test on the model; and its zero terminal SNR."""
    found = prediction_of(config, job.source, undecided)
    if found.parameterization:
        return found.parameterization, found.zero_snr
    model = load_model(dict(config), job.source, job.weights, undecided=True)
    return model.parameterization, model.zero_terminal_snr
