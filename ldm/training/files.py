"""Files that training writes: whole or not at all, and an InputError where the system refuses them."""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from ldm.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Turns an OSError of the block into an InputError that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what} cannot be written: {error.strerror or error}") from error


@contextmanager
def writing_below(folder: Path) -> Iterator[None]:
    """`writing` for a block that does more than write: other OSErrors are not the user's to mend.

    A full disk counts as the folder's, because its error names no file.
    """
    try:
        with writing(folder):
            yield
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno not in FULL:
            name = cause.filename
            if name is None or not Path(os.fsdecode(name)).absolute().is_relative_to(folder.absolute()):
                raise cause from None
        raise


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file under another name first, so that a killed process leaves no torn `path`."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(save({name: t.contiguous() for name, t in tensors.items()}, metadata))
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
