"""A separately shipped autoencoder in the place of a checkpoint's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import InputError
from ldm.weights.diffusers_layout import VAE, VAE_PART, is_diffusers_folder, read_part, weight_files
from ldm.weights.diffusers_names import AUTOENCODER
from ldm.weights.files import check_file, user_file

if TYPE_CHECKING:
    from torch import Tensor

    State = dict[str, Tensor]

# Autoencoders differ by the width of their first level, that of their last, and their latents.
TYPICAL = (
    "encoder.conv_in.weight",
    "encoder.conv_out.weight",
    "decoder.conv_in.weight",
    "decoder.conv_out.weight",
)


def vae_file(path: str | Path) -> Path:
    """The file that stands for an autoencoder, for a hash: of a folder that of its weights.

    InputError if there is none.
    """
    path = Path(path)
    folder = path / "vae" if is_diffusers_folder(path) else path
    with user_file(path):
        if folder.is_dir():
            return weight_files(folder)[0]
    check_file(path)
    return path


def read_vae(path: str | Path) -> State:
    """The weights `first_stage_model.*` of an autoencoder.

    `path` is a file of it alone, in any of the usual spellings, a whole checkpoint, a diffusers `vae` folder
    or a whole diffusers folder.

    InputError for a file without an autoencoder, and as `read_state_dict`.
    """
    from ldm.weights.checkpoint import read_state_dict

    path = Path(path)
    if is_diffusers_folder(path):
        path = path / "vae"
    if path.is_dir():
        return read_part(path, VAE_PART, read_state_dict)
    state = read_state_dict(path)
    bare = {}
    for prefix in (VAE, "vae.", ""):
        inside = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        bare = {name: t for name, t in inside.items() if name.startswith(AUTOENCODER)}
        if bare:
            break
    if any(name.startswith("encoder.down_blocks.") for name in bare):
        bare = VAE_PART.to_ours(bare)
    if "decoder.conv_in.weight" not in bare:
        raise InputError(f"{path} holds no autoencoder: give one with encoder.* and decoder.* weights")
    return {VAE + name: t for name, t in bare.items()}


def with_vae(state: State, path: str | Path) -> State:
    """`state`, a model's weights, with the autoencoder of a file or folder as its `first_stage_model.*`.

    InputError if it is of another shape than the one that it replaces.
    """
    vae = read_vae(path)
    own = tuple(VAE + half for half in AUTOENCODER)  # what its training left, its loss, its averages, is not
    _check(path, vae, {name: tuple(t.shape) for name, t in state.items() if name.startswith(own)})
    return {name: t for name, t in state.items() if not name.startswith(VAE)} | vae


def check_vae(path: str | Path, config: Mapping[str, Any]) -> None:
    """InputError if an autoencoder does not fit a `model:` section; nothing is loaded for it.

    The model's first stage is built without values, and only the headers of the file are read.
    """
    import torch

    from ldm.util import instantiate_from_config

    with torch.device("meta"):
        stage = instantiate_from_config(config["params"]["first_stage_config"])
    _check(path, read_vae(path), {VAE + name: tuple(t.shape) for name, t in stage.state_dict().items()})


def _check(path: str | Path, vae: State, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """InputError if the weights of an autoencoder are not those of the shapes `wanted`."""
    given = {name: tuple(t.shape) for name, t in vae.items()}
    for name in (VAE + name for name in TYPICAL):
        if name in given and name in wanted and given[name] != wanted[name]:
            raise InputError(
                f"the autoencoder {path} does not fit the model: {name} is {list(given[name])} instead of "
                f"{list(wanted[name])}"
            )
    missing = [name for name in wanted if name not in given]
    misshapen = [name for name in given if name in wanted and given[name] != wanted[name]]
    if missing or misshapen:
        first = (misshapen or missing)[0]
        count = len(missing) + len(misshapen)
        raise InputError(
            f"the autoencoder {path} does not fit the model: {count} of its weights are missing or have "
            f"another shape (first {first})"
        )
