"""What a checkpoint says about itself: the names, shapes and dtypes of its tensors, and where they lie.

The values are not read, and torch is not imported: the file of any size answers in a fraction of a second.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import re
import struct
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from safetensors import safe_open

from ldm.errors import InputError
from ldm.weights.files import check_file, user_file
from ldm.weights.unpickle import StoredTensor, StoredValues, Unpickler

if TYPE_CHECKING:
    import torch

# What people have instead of a checkpoint, by its first bytes.
OTHER_FILES = (
    (rb"version https://git-lfs", "a git-LFS pointer instead of the weights: run `git lfs pull`"),
    (rb"\s*<(!doctype|html|head|\?xml)", "a web page, often a login or error page: download the file itself"),
    (rb"\s*[\[{]", "JSON text: give the .ckpt or .safetensors file itself"),
    (rb"\x1f\x8b|BZh|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "a compressed archive: unpack it first"),
    (rb"GGUF", "a GGUF file: give the .ckpt or .safetensors that it was made from"),
    (rb"\x89HDF", "a Keras (HDF5) file: give the .ckpt or .safetensors that it was made from"),
    (rb"", "not a checkpoint: its content is neither that of a .safetensors nor of a .ckpt"),
)
WRAPPERS = ("state_dict", "model", "params_ema", "params")  # the last two are of pixel upscalers
SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes, the library's own
PICKLE_LIMIT = 100_000_000  # bytes; a full training checkpoint's has less than one
# torch's names of the dtypes of .safetensors
# fmt: off
DTYPES = {
    "BOOL": "bool", "I8": "int8", "U8": "uint8", "I16": "int16", "U16": "uint16", "I32": "int32",
    "U32": "uint32", "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32",
    "F64": "float64", "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}
# fmt: on


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of a `.safetensors` file, whose values are at byte `position`."""

    dtype: str  # torch's name of it
    shape: tuple[int, ...]
    position: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def map(self, buffer: mmap.mmap) -> torch.Tensor:
        """The tensor in the memory of `buffer`."""
        import torch

        dtype = getattr(torch, self.dtype)
        if self.numel == 0:  # which frombuffer refuses
            return torch.empty(self.shape, dtype=dtype)
        size = self.numel * dtype.itemsize
        values = torch.frombuffer(buffer, dtype=torch.uint8, count=size, offset=self.position)
        return values.view(dtype).view(self.shape)


@dataclass(frozen=True)
class Header:
    """The tensors of a checkpoint's state dict by name, without their values, and what lies beside them."""

    path: Path
    tensors: Mapping[str, StoredTensor | DenseTensor]
    buffer: mmap.mmap  # the whole file, to be read only
    # the position of a StoredTensor's values in the file, or the values where they are packed there
    locate: Callable[[StoredValues], int | bytearray] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a .safetensors
    global_step: int | None = None  # of training, in a .ckpt
    others: tuple[str, ...] = ()  # names of what else the dict around the tensors holds
    nested: Mapping[str, StoredTensor] = field(default_factory=dict)  # where there is no state dict
    dropped: Mapping[str, str] = field(default_factory=dict)  # dtypes of tensors that torch cannot use

    @property
    def is_pickle(self) -> bool:
        return self.locate is not None

    def check_dtypes(self) -> None:
        """InputError if a tensor was dropped for its dtype, which a file made of the others would lack."""
        for name, dtype in self.dropped.items():
            raise InputError(
                f"{self.path}: its tensor {name[:200]!r} has a dtype that cannot be read here ({dtype}); "
                "give the model in float32, float16 or bfloat16"
            )

    def map(self, copy: bool = False) -> dict[str, torch.Tensor]:
        """The tensors, in the memory of the mapped file: pages load when used, and nothing is written back.

        With `copy` they are in memory of their own, so that the file may be written to later. InputError for
        a damaged file or one without tensors.
        """
        if not self.tensors:
            self.check_dtypes()
            found = ", ".join(repr(name)[:60] for name in self.others[:5]) or "nothing"
            raise InputError(f"{self.path} is not a model checkpoint: it holds no tensors (found: {found})")
        with user_file(self.path), self.path.open("rb") as file:
            if copy:
                buffer = bytearray(self.path.stat().st_size)
                file.readinto(buffer)
            else:
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        with _damage_named(self.path, self.buffer):
            if self.locate is None:
                state = {name: each.map(buffer) for name, each in self.tensors.items()}
            else:
                state = {}
                for name, each in self.tensors.items():
                    place = self.locate(each.values)
                    state[name] = each.map(buffer, place) if isinstance(place, int) else each.map(place, 0)
        if not copy:
            _register(buffer)
        return state


# The files whose tensors are in use, by the address of their first byte.
_mapped: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()


def _register(buffer: mmap.mmap) -> None:
    import torch

    _mapped[torch.frombuffer(buffer, dtype=torch.uint8, count=1).data_ptr()] = buffer


def let_go(tensor: torch.Tensor) -> None:
    """Free the memory of a mapped tensor's pages; they are read from the file again if they are used.

    Nothing happens to a tensor that is not mapped.
    """
    storage = tensor.untyped_storage()
    for base, buffer in list(_mapped.items()):
        start = storage.data_ptr() - base
        if 0 <= start < len(buffer) and hasattr(buffer, "madvise"):
            # inwards: other tensors have a part in the pages at both ends, and may have been written to
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            end = min(start + storage.nbytes(), len(buffer)) // mmap.PAGESIZE * mmap.PAGESIZE
            if first < end:
                buffer.madvise(mmap.MADV_DONTNEED, first, end - first)


def read_header(path: str | Path) -> Header:
    """The header of a `.safetensors`, a `.ckpt` or a diffusers folder; the content decides which it is.

    The file is mapped, and must stay unchanged while the header lives. A `state_dict` or `model` wrapper is
    removed. What is not a tensor is dropped, and so are tensors of dtypes that no weight can have (quantised
    ones), of which `dropped` has the names. InputError for a file that is missing, another folder, empty, cut
    short, damaged, of another kind, or that carries code.
    """
    from ldm.weights import diffusers_layout  # which uses this module

    path = Path(path)
    check_file(path)
    if path.is_dir():
        return diffusers_layout.read_folder_header(path)
    with user_file(path), path.open("rb") as file:
        # a mapping that can be written to is refused for files that are larger than the memory
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    head = buffer[:512]
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= SAFETENSORS_HEADER_LIMIT:
        read = _read_safetensors
    elif head.startswith(b"PK"):
        read = _read_zip
    elif head.startswith(b"\x80"):
        read = _read_legacy
    else:
        what = next(what for start, what in OTHER_FILES if re.match(start, head, re.I))
        raise InputError(f"{path} is {what}")
    with _damage_named(path, buffer):
        return read(path, buffer)


@contextmanager
def _damage_named(path: Path, buffer: mmap.mmap) -> Iterator[None]:
    """Turn whatever a parser raises in the block into an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # there is nothing that damaged or hostile bytes cannot make a parser raise
        if buffer.tell() == len(buffer):  # only the old format's pickles are read from the buffer itself
            raise _cut_short(path, "its pickle ends early") from error
        # str(error) fails where the error is about a number of thousands of digits
        why = "".join(traceback.format_exception_only(error)).partition("\n")[0][:300]
        raise InputError(f"{path} is damaged ({why}): download or copy it again") from error


def _read_safetensors(path: Path, buffer: mmap.mmap) -> Header:
    start = end = 8 + int.from_bytes(buffer[:8], "little")
    if start <= len(buffer):
        header = json.loads(buffer[8:start])
        metadata = header.pop("__metadata__", None) or {}
        end += max((each["data_offsets"][1] for each in header.values()), default=0)
    if end > len(buffer):
        raise _cut_short(path, f"its header promises {end:,} bytes and it holds {len(buffer):,}")
    with safe_open(path, "np"):  # the library checks that shapes, dtypes and offsets fit each other
        tensors = {
            name: DenseTensor(DTYPES[each["dtype"]], tuple(each["shape"]), start + each["data_offsets"][0])
            for name, each in header.items()
            if each["dtype"] in DTYPES
        }
    dropped = {name: each["dtype"] for name, each in header.items() if name not in tensors}
    others = ("__metadata__",) * bool(metadata)
    return Header(path, tensors, buffer, metadata=metadata, others=others, dropped=dropped)


def _read_zip(path: Path, buffer: mmap.mmap) -> Header:
    """torch.save since 1.6: a zip of `<name>/data.pkl` and one record `<name>/data/<key>` per storage."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise _cut_short(path, "it begins like a .ckpt but lacks the directory at its end") from error
    names = archive.namelist()
    roots = [name.removesuffix("data.pkl") for name in names if re.fullmatch("[^/]+/data.pkl", name)]
    if not roots:
        raise InputError(f"{path} is a zip archive, but not of torch.save: unpack the checkpoint inside")
    root = roots[0]
    if f"{root}byteorder" in names:
        with archive.open(f"{root}byteorder") as file:
            if file.read(7) != b"little":
                raise _big_endian(path)
    program = archive.getinfo(f"{root}data.pkl")
    if program.file_size > PICKLE_LIMIT:  # a few kB of a zip can stand for gigabytes
        size = f"{program.file_size:,} bytes"
        raise InputError(f"{path} is no ordinary checkpoint: it has {size} besides the tensors")

    def locate(values: StoredValues) -> int | bytearray:
        record = archive.getinfo(f"{root}data/{values.key}")
        if record.file_size < values.nbytes:
            raise ValueError(f"{record.filename!r} is too short")
        if record.compress_type != zipfile.ZIP_STORED:  # packed again by another program
            with archive.open(record) as file:  # a few kB may stand for gigabytes, of which none is used
                return bytearray(file.read(values.nbytes))
        name_and_extra = struct.unpack_from("<HH", buffer, record.header_offset + 26)  # lengths
        return record.header_offset + 30 + sum(name_and_extra)

    content = Unpickler(io.BytesIO(archive.read(program)), path).load()
    return _header_of(content, locate, path, buffer)


def _read_legacy(path: Path, buffer: mmap.mmap) -> Header:
    """torch.save before 1.6: pickles of a magic number, the version, the system, the object and its storages'
    keys; then for each key a count (int64) and the values."""
    if Unpickler(buffer, path).load() != 0x1950A86A20F9469CFC6C:
        raise InputError(f"{path} is a pickle, but not of torch.save: save the state dict with torch.save")
    _version, system = (Unpickler(buffer, path).load() for _ in range(2))
    if not system["little_endian"]:
        raise _big_endian(path)
    unpickler = Unpickler(buffer, path)
    content = unpickler.load()
    keys = Unpickler(buffer, path).load()
    positions, end = {}, buffer.tell()
    for key in keys:
        positions[key] = end + 8
        end = positions[key] + unpickler.values[key].nbytes
    if end > len(buffer):
        raise _cut_short(path, f"its tensors need {end:,} bytes and it holds {len(buffer):,}")
    return _header_of(content, lambda values: positions[values.key], path, buffer)


def _header_of(
    content: Any, locate: Callable[[StoredValues], int | bytearray], path: Path, buffer: mmap.mmap
) -> Header:
    """The header of the innermost state dict of a pickle's content."""
    step = None
    for _ in range(8):  # not `while`: a hostile file may contain itself
        if isinstance(content, dict) and type(content.get("global_step")) is int:
            step = content["global_step"]
        inner = [content.get(key) for key in WRAPPERS] if isinstance(content, dict) else []
        content = next((value for value in inner if isinstance(value, dict)), content)
    if isinstance(content, StoredTensor) and content.is_usable:  # as an embedding may be saved
        return Header(path, {}, buffer, locate, nested={"tensor": content})
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no state dict: save the model's state_dict() instead of the model")
    tensors = _tensors(content)
    nested = {}
    if not tensors:  # as in an embedding's {"string_to_param": {"*": tensor}}
        inner = {key: value for key, value in content.items() if isinstance(value, dict)}
        nested = {f"{key}.{name}": t for key, value in inner.items() for name, t in _tensors(value).items()}
    others = tuple(key for key in content if not (isinstance(key, str) and key in tensors))
    dropped = {
        name: each.unusable_dtype
        for name, each in content.items()
        if isinstance(name, str) and isinstance(each, StoredTensor) and not each.is_usable
    }
    return Header(path, tensors, buffer, locate, {}, step, others, nested, dropped)


def _tensors(content: dict) -> dict[str, StoredTensor]:
    return {
        name: each
        for name, each in content.items()
        if isinstance(name, str) and isinstance(each, StoredTensor) and each.is_usable
    }


def _cut_short(path: Path, how: str) -> InputError:
    return InputError(f"{path} is cut short: {how}. Download or copy it again")


def _big_endian(path: Path) -> InputError:
    return InputError(f"{path} was written on a big-endian machine: save it again on an ordinary one")
