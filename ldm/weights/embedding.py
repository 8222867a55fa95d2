"""Textual inversions: learned vectors that take the place of a word (Gal et al. 2022, arXiv:2208.01618).

Files come in three layouts: AUTOMATIC1111's {"string_to_param": {"*": tensor}} with a name beside it,
diffusers' {"<token>": tensor}, and a tensor alone, as `emb_params` in a .safetensors or without any name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import InputError
from ldm.weights.files import check_file, user_file
from ldm.weights.header import Header, read_header
from ldm.weights.unpickle import check_stored

if TYPE_CHECKING:
    from torch import Tensor

PARAMETERS = "string_to_param."
NAMELESS = ("emb_params", "*", "tensor")  # no words that anyone would call an embedding by
SDXL = {"clip_l", "clip_g"}  # one for each of its text encoders
WIDTHS = {768: "Stable Diffusion v1", 1024: "Stable Diffusion v2"}
MOST_VECTORS = 75
WORD = re.compile(r"[^\W_]|^<.+>$")  # in a token that no prompt has by chance, as a space or a comma


@dataclass(frozen=True)
class Embedding:
    """Vectors [k, width] and the words that prompts call them by."""

    path: Path
    names: tuple[str, ...]
    vectors: Tensor


def read_embedding(path: str | Path, name: str = "") -> Embedding:
    """The textual inversion in a file; it is called `name`, by default as the file and as its token.

    A token without a letter or digit is left out, but for one such as "<*>".

    Nothing in the file is run. InputError for one that is missing or damaged, or holds something else.
    """
    path = Path(path)
    with user_file(path):
        if not path.is_file():
            raise InputError(f"no textual inversion at {path}: name a .pt, .bin or .safetensors file")
    check_file(path)
    header = read_header(path)
    tensors = _vectors(header)
    if SDXL & tensors.keys():
        raise InputError(
            f"{path} is a textual inversion for Stable Diffusion XL, which has two text encoders"
        )
    if len(tensors) != 1:
        found = ", ".join(repr(each)[:40] for each in list(tensors)[:4]) or "no tensor"
        raise InputError(f"{path} is not a textual inversion: it is to hold one tensor, and holds {found}")
    check_stored(path, tensors)
    (token, stored), *_ = tensors.items()
    token = token.removeprefix(PARAMETERS)
    shape = tuple(stored.shape)
    if len(shape) not in (1, 2) or not 0 < (shape[0] if len(shape) == 2 else 1) <= MOST_VECTORS:
        raise InputError(
            f"{path} is not a textual inversion: its tensor is {list(shape)} instead of one to "
            f"{MOST_VECTORS} vectors"
        )
    (vectors,) = replace(header, tensors=tensors).map().values()
    if not vectors.is_floating_point() or not vectors.isfinite().all():
        raise InputError(f"{path} is damaged: its vectors are no finite numbers")
    own = (token,) if token not in NAMELESS and WORD.search(token) else ()
    names = (name,) if name else tuple(dict.fromkeys((path.stem, *own)))
    return Embedding(path, names, vectors.reshape(-1, shape[-1]).clone())


def _vectors(header: Header) -> dict:
    """The stored tensors of a file that may be vectors, by name."""
    inner = {name: t for name, t in header.nested.items() if name.startswith(PARAMETERS)}
    return inner or dict(header.tensors) or dict(header.nested)


def check_width(embedding: Embedding, width: int) -> None:
    """InputError for a textual inversion of another text encoder."""
    own = embedding.vectors.shape[1]
    if own != width:

        def of(width: int) -> str:
            return f"{width} numbers" + (f" ({WIDTHS[width]})" if width in WIDTHS else "")

        raise InputError(
            f"{embedding.path} does not fit the model: its vectors have {of(own)}, those of the model's text "
            f"encoder {of(width)}"
        )
