"""Files of weights: written whole or not at all, in a precision of choice.

A `.safetensors` file is written tensor by tensor, so that a conversion takes the memory of one. torch writes
a `.ckpt` from tensors that are all there; in the file's own precision they are only mapped.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ldm.errors import InputError
from ldm.weights.diffusers_layout import is_diffusers_folder
from ldm.weights.files import exists, user_file
from ldm.weights.header import DTYPES, let_go

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    State = Mapping[str, Tensor]

Report = Callable[[int], Any]  # is given the count of bytes that were written since the last time

FORMATS = ("safetensors", "ckpt", "diffusers")
SUFFIXES = {".safetensors": "safetensors", ".ckpt": "ckpt", ".pt": "ckpt", ".pth": "ckpt"}
# What bitsandbytes keeps beside the bytes of a weight that it has quantised, to read them by.
TABLES = re.compile(r".+\.((nested_)?(absmax|quant_map)|SCB)")
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # torch's names


def target_format(target: Path, to: str | None) -> str:
    """One of FORMATS: `to`, or what the target's suffix says; a name without suffix is a folder.

    InputError where the two contradict each other, or the suffix says nothing.
    """
    by_suffix = SUFFIXES.get(target.suffix.lower())
    if to is None:
        if by_suffix is None and target.suffix:
            raise InputError(f"{target}: the suffix {target.suffix} is no format; choose one with --to")
        return by_suffix or "diffusers"
    if by_suffix not in (None, to):
        raise InputError(f"{target} is named like a {by_suffix} file, at odds with --to {to}")
    return to


def check_target(target: Path, source: Path, force: bool) -> None:
    """InputError if a target cannot be written, or is there already and not to be replaced."""
    with user_file(target):
        parent = target.absolute().parent
        if not parent.is_dir():
            raise InputError(f"{target} cannot be written: there is no folder {parent}")
        if not os.access(parent, os.W_OK):
            raise InputError(f"{target} cannot be written: {parent} is not writable")
        if not (exists(target) or target.is_symlink()):
            return
        if exists(target) and not (target.is_file() or target.is_dir()):  # a device could be replaced, too
            raise InputError(f"{target} is neither a file nor a folder: choose another name")
        if not force:
            raise InputError(f"{target} is there already: choose another name, or --force replaces it")
        if target.is_dir() and not is_diffusers_folder(target):
            raise InputError(f"{target} is a folder of other things: --force replaces only diffusers folders")
        if source.resolve().is_relative_to(target.resolve()) and target.is_dir():
            raise InputError(f"{source} cannot be replaced while it is read: choose another name")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file or folder to, which takes its name when the block ends well.

    Otherwise it is removed. InputError where the system refuses.
    """
    stem = f".{target.name[:50]}.{os.getpid()}"  # a name may be as long as the system allows
    unfinished = target.with_name(f"{stem}.tmp")
    try:
        yield unfinished
        if target.is_dir():  # which cannot be replaced at once
            replaced = target.with_name(f"{stem}.old")
            target.rename(replaced)
            unfinished.rename(target)
            if replaced.is_symlink():  # of a link the folder that it leads to stays
                replaced.unlink()
            else:
                shutil.rmtree(replaced)
        else:
            unfinished.replace(target)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)


def precision_of(name: str, tensor: Tensor, precision: str | None) -> torch.dtype:
    """The dtype to write a tensor in; None keeps its own.

    What a model computes itself keeps its precision as well: rounded schedules are of no use to anyone.
    Single numbers, such as the latents' scale, are not rounded either, nor are the tables of quantised
    weights, whose bytes stay as well.
    """
    import torch

    from ldm.weights.checkpoint import COMPUTED

    kept = COMPUTED.fullmatch(name) or TABLES.fullmatch(name)
    if precision is None or not tensor.is_floating_point() or kept:
        return tensor.dtype
    wanted = getattr(torch, PRECISIONS[precision])
    return wanted if tensor.shape else torch.promote_types(tensor.dtype, wanted)


def size_of(state: State, precision: str | None) -> int:
    """Bytes of the tensors in a precision."""
    return sum(t.numel() * precision_of(name, t, precision).itemsize for name, t in state.items())


def write_safetensors(
    state: State,
    path: Path,
    precision: str | None = None,
    metadata: Mapping[str, str] | None = None,
    report: Report = lambda count: None,
) -> None:
    """Write tensors, one after the other, so that a conversion takes the memory of one.

    InputError for a dtype that the format does not have.

    The format: the header's length as 8 bytes, the header in JSON, and the values in its order.
    """
    import torch

    dtypes = {name: precision_of(name, t, precision) for name, t in state.items()}
    # values of large items come first: the library wants each aligned to its size
    order = sorted(state, key=lambda name: (-dtypes[name].itemsize, name))
    codes = {name: code for code, name in DTYPES.items()}
    for name in order:
        if (dtype := str(dtypes[name]).removeprefix("torch.")) not in codes:
            raise InputError(
                f"the tensor {name[:200]!r} is of {dtype}, which a .safetensors cannot hold: write a .ckpt"
            )
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        start, end = end, end + state[name].numel() * dtypes[name].itemsize
        header[name] = {
            "dtype": codes[str(dtypes[name]).removeprefix("torch.")],
            "shape": list(state[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            # a view may change the sign of what is stored
            values = state[name].to(dtypes[name]).resolve_conj().resolve_neg().contiguous()
            if values.numel():
                file.write(values.reshape(-1).view(torch.uint8).numpy())
            report(values.nbytes)
            let_go(state[name])


class _Counted:
    """A binary file that reports what is written to it, and keeps the error that ends it."""

    def __init__(self, file: BinaryIO, report: Report):
        self.file, self.report = file, report
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            count = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.report(count)
        return count

    def flush(self) -> None:
        self.file.flush()


def write_ckpt(
    state: State,
    path: Path,
    precision: str | None = None,
    facts: Mapping[str, Any] | None = None,
    report: Report = lambda count: None,
) -> None:
    """Write `{"state_dict": …}` and further `facts` as torch.save does."""
    import torch

    tensors = {}
    for name, tensor in state.items():
        values = tensor.to(precision_of(name, tensor, precision))
        is_part = values.untyped_storage().nbytes() != values.nbytes  # all of its storage would be written
        tensors[name] = values.clone(memory_format=torch.contiguous_format) if is_part else values
        if tensors[name] is not tensor:
            let_go(tensor)
    with path.open("xb") as file:
        counted = _Counted(file, report)
        try:
            torch.save({"state_dict": tensors, **(facts or {})}, counted)
        except RuntimeError:  # which torch makes of the system's error
            raise counted.error or OSError(errno.EIO, "torch.save failed") from None
