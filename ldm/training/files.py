"""Files that training writes: whole or not at all, and one line where the system refuses them."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from ldm.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(OSError):
    """There is no room for a file. What was there before is whole."""


@contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Turns an OSError of the block into an InputError that begins with `what`; DiskFull for a full disk."""
    try:
        yield
    except DiskFull:
        raise
    except OSError as error:
        line = f"{what} cannot be written: {error.strerror or error}"
        raise (DiskFull if error.errno in FULL else InputError)(line) from error


@contextmanager
def writing_below(folder: Path) -> Iterator[None]:
    """`writing` for a block that does more than write: OSErrors about other files are not the folder's."""
    try:
        with writing(folder):
            yield
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, OSError):
            name = cause.filename
            if name is None or not Path(os.fsdecode(name)).absolute().is_relative_to(folder.absolute()):
                raise cause from None
        raise


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. It takes its name when the block ends well, and is removed if not."""
    # Processes on several machines, or in containers, may have the same number.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield unfinished
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())  # else a power cut may leave an empty file of the new name
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def move(path: Path, target: Path) -> Path:
    """Give a file another name, on another file system, too. The target is whole or as it was before."""
    with writing(target):
        try:
            return path.replace(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
    with whole(target) as unfinished:
        shutil.copyfile(path, unfinished)
    path.unlink()
    return target


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. The same tensors and metadata give the same bytes."""
    header, values = _split(save({name: t.contiguous() for name, t in tensors.items()}, metadata))
    with whole(path) as unfinished:
        unfinished.write_bytes(header)
        with unfinished.open("ab") as file:  # apart, as joining them would copy gigabytes
            file.write(values)


def _split(content: bytes) -> tuple[bytes, memoryview]:
    """A safetensors file's header, with its metadata in the order of their names, and the tensors' values.

    The library writes metadata in another order each time.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, memoryview(content)[8 + size :]
