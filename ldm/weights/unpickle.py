"""Read what a pickle of torch.save describes, without running it.

A `.ckpt` is a pickle, and unpickling runs whatever program the file holds. Here no global of a pickle is
imported or called. The few that describe tensors are known by name, plain containers are kept, and everything
else (a Lightning callback, omegaconf, numpy, a function) becomes an inert stand-in. A pickle that names a
known means of running code is refused besides: it has no business in a checkpoint.

torch is imported only where tensors are made: what a file holds can be read without it.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import InputError

if TYPE_CHECKING:
    import torch

# fmt: off
CODE_MODULES = {
    "asyncio", "bdb", "cProfile", "code", "codeop", "commands", "ctypes", "imp", "importlib", "marshal", "nt",
    "os", "_pickle", "pdb", "pickle", "pip", "popen2", "posix", "profile", "pty", "pydoc", "runpy", "shutil",
    "socket", "subprocess", "sys", "timeit", "webbrowser",
}
CODE_BUILTINS = {"__import__", "apply", "breakpoint", "compile", "eval", "exec", "execfile", "input", "open"}
# fmt: on
# Bytes of a value, by torch's name of the dtype. Others can be no weight: with quantised ones, or those
# smaller than a byte, torch crashes the program or can do nothing.
# fmt: off
ITEM_SIZES = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "int64": 8,
    "uint64": 8, "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1,
    "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1, "float16": 2, "bfloat16": 2,
    "float32": 4, "float64": 8, "complex64": 8, "complex128": 16,
}
# of these only the size is needed, to find what comes next in the old format
QUANTISED_SIZES = {"qint8": 1, "qint32": 4, "quint8": 1, "quint4x2": 1, "quint2x4": 1}
# fmt: on


class Inert:
    """Stands in for an object of an unknown class: takes whatever a pickle gives it and keeps nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __call__(self, *args, **kwargs):
        return self

    __init__ = __setstate__ = __setitem__ = append = extend = add = lambda self, *args, **kwargs: None


class Tuple(tuple):
    """A tuple that is hashed, compared and shown without a look at what it holds.

    A pickle may nest them a million deep, at which Python crashes, or have the same one twice on each of a
    hundred levels, at which it never ends.
    """

    __hash__, __eq__, __repr__ = object.__hash__, object.__eq__, object.__repr__
    __setstate__ = Inert.__setstate__


class StoredValues(Inert):
    """`numel` values under `key`, a zip record's name or the old format's number. A view has a `start`."""

    def __init__(self, dtype: str, key: str, numel: int, start: int = 0):
        self.dtype, self.key, self.numel, self.start = dtype, key, numel, start

    @property
    def nbytes(self) -> int:
        return self.numel * (ITEM_SIZES | QUANTISED_SIZES)[self.dtype]


class StoredTensor(Inert):
    """A tensor, by the arguments of `torch._utils._rebuild_tensor_v2`; dtypes are torch's names of them.

    `flags` may have "conj" or "neg": torch stored a view whose values are conjugated or negated on use.
    """

    def __init__(self, values: StoredValues, offset, size, stride, _requires_grad, _hooks, flags=None, *_):
        self.values, self.offset, self.size, self.stride = values, offset, size, stride
        self.dtype = values.dtype
        self.flags = flags if isinstance(flags, dict) else {}

    @property
    def shape(self) -> tuple[int, ...]:
        """() where a damaged file has something else than whole numbers."""
        sizes = self.size if isinstance(self.size, tuple | list) else ()
        return tuple(sizes) if all(type(n) is int for n in sizes) else ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_usable(self) -> bool:
        """Whether torch can compute with the dtype, see ITEM_SIZES."""
        dtypes = self.values.dtype, self.dtype
        return all(isinstance(dtype, str) and dtype in ITEM_SIZES for dtype in dtypes)

    @property
    def unusable_dtype(self) -> str:
        """The dtype for which it is not usable, in words: a damaged file may have anything in its place."""
        dtype = self.values.dtype
        return dtype if isinstance(dtype, str) and dtype in QUANTISED_SIZES else "one that is not known"

    @property
    def is_repeated(self) -> bool:
        """Whether it has more values than are stored: by a stride of 0 four bytes may stand for gigabytes."""
        return self.numel * ITEM_SIZES[self.dtype] > self.values.nbytes

    def map(self, buffer, position: int) -> torch.Tensor:
        """The tensor whose values begin at byte `position` of `buffer`, in the same memory; ValueError or
        RuntimeError where it would reach beyond them."""
        import torch

        values, dtype = self.values, getattr(torch, self.values.dtype)
        if values.numel == 0:  # which frombuffer refuses
            flat = torch.empty(0, dtype=dtype)
        else:
            flat = torch.frombuffer(buffer, dtype=dtype, count=values.numel, offset=position)
        if position % dtype.itemsize:  # the old format aligns nothing
            flat = flat.clone()
        dtype = getattr(torch, self.dtype)
        tensor = flat.view(dtype).as_strided(self.size, self.stride, values.start + self.offset)
        # views, as copies of a hostile stride 0 could take any amount of memory
        tensor = tensor.conj() if "conj" in self.flags else tensor
        return torch._neg_view(tensor) if "neg" in self.flags else tensor


class StoredBytes(StoredTensor):
    """A tensor, by the arguments of `torch._utils._rebuild_tensor_v3`: bytes, and their dtype."""

    def __init__(self, values: StoredValues, offset, size, stride, grad, hooks, dtype, flags=None, *_):
        super().__init__(values, offset, size, stride, grad, hooks, flags)
        self.dtype = dtype


def check_stored(path: Path, tensors: Mapping[str, Any]) -> None:
    """InputError if one of a file's tensors has more values than are stored, which take memory when used."""
    for name, each in tensors.items():
        if isinstance(each, StoredTensor) and each.is_repeated:
            raise InputError(f"{path} is damaged: its {name[:200]!r} has more values than are stored of it")


class StoredParameter(Inert):
    """`torch._utils._rebuild_parameter(tensor, …)`: just the tensor."""

    def __new__(cls, tensor, *args):
        return tensor


class StoredWithAttributes(Inert):
    """`torch._tensor._rebuild_from_type_v2(function, class, arguments, attributes)`, written for a tensor of
    another class or with attributes of Python: just the tensor that the function stands for."""

    def __new__(cls, function, _type, arguments, *_):
        known = function in (StoredTensor, StoredBytes, StoredParameter)
        return function(*arguments) if known else super().__new__(cls)


class StoredParameters(dict):
    """A `torch.nn.ParameterDict`: what is in it, by name."""

    def __init__(self, *_: object):
        super().__init__()

    def __setstate__(self, state: object) -> None:
        inside = state.get("_parameters") if isinstance(state, dict) else None
        if isinstance(inside, dict):
            self.update(inside)


KNOWN_GLOBALS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): Tuple,
    ("torch.nn.modules.container", "ParameterDict"): StoredParameters,
    ("torch._utils", "_rebuild_tensor_v2"): StoredTensor,
    ("torch._utils", "_rebuild_tensor_v3"): StoredBytes,
    ("torch._utils", "_rebuild_qtensor"): StoredTensor,  # which its dtype makes unusable
    ("torch._utils", "_rebuild_parameter"): StoredParameter,
    ("torch._utils", "_rebuild_parameter_with_state"): StoredParameter,
    ("torch._tensor", "_rebuild_from_type"): StoredWithAttributes,
    ("torch._tensor", "_rebuild_from_type_v2"): StoredWithAttributes,
    ("torch.storage", "UntypedStorage"): "uint8",
    ("torch", "DoubleStorage"): "float64",
    ("torch", "FloatStorage"): "float32",
    ("torch", "HalfStorage"): "float16",
    ("torch", "BFloat16Storage"): "bfloat16",
    ("torch", "LongStorage"): "int64",
    ("torch", "IntStorage"): "int32",
    ("torch", "ShortStorage"): "int16",
    ("torch", "CharStorage"): "int8",
    ("torch", "ByteStorage"): "uint8",
    ("torch", "BoolStorage"): "bool",
    ("torch", "ComplexDoubleStorage"): "complex128",
    ("torch", "ComplexFloatStorage"): "complex64",
    ("torch", "QInt8Storage"): "qint8",
    ("torch", "QInt32Storage"): "qint32",
    ("torch", "QUInt8Storage"): "quint8",
    ("torch", "QUInt4x2Storage"): "quint4x2",
    ("torch", "QUInt2x4Storage"): "quint2x4",
}


class Unpickler(pickle._Unpickler):
    """`load()` gives plain containers, numbers, strings, `StoredTensor`s and `Inert` objects.

    It builds on Python's own unpickler, as the one in C allocates 32 GB for a single damaged memo index.
    """

    def __init__(self, file, path: Path):
        super().__init__(file)
        self.path = path
        self.values: dict[str, StoredValues] = {}  # by key

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global. InputError for one that runs code."""
        is_builtin = module in ("builtins", "__builtin__")  # as Python 3 and 2 call it
        if module.partition(".")[0] in CODE_MODULES or (is_builtin and name in CODE_BUILTINS):
            raise InputError(
                f"{self.path} carries code: its pickle calls {module + '.' + name!r}. It was refused and "
                "nothing in it was run; use a .safetensors file from a source you trust"
            )
        if module == "torch" and name in ITEM_SIZES:
            return name
        return KNOWN_GLOBALS.get((module, name), Inert)

    def persistent_load(self, pid: tuple) -> Any:
        """The values of ("storage", dtype, key, device, count); before torch 1.6, a view or None follows."""
        if pid[0] == "module":  # before 1.6: a class and its source text
            return StoredParameters if pid[1] is StoredParameters else Inert
        _, dtype, key, _, numel, *view = pid
        if numel < 0:
            raise ValueError(f"a storage of {numel} values")
        self.values.setdefault(key, StoredValues(dtype, key, numel))
        start = view[0][1] if view and view[0] else 0  # view: (key, start, count)
        return StoredValues(dtype, key, self.values[key].numel, start)

    def get_extension(self, code: int) -> None:
        raise ValueError("extension codes mean nothing outside of the program that wrote them")

    # What some opcodes do:

    def load_tuple(self) -> None:
        items = self.pop_mark()  # which changes what self.append appends to
        self.append(Tuple(items))

    def load_tuple1(self) -> None:
        self.stack[-1:] = [Tuple(self.stack[-1:])]

    def load_tuple2(self) -> None:
        self.stack[-2:] = [Tuple(self.stack[-2:])]

    def load_tuple3(self) -> None:
        self.stack[-3:] = [Tuple(self.stack[-3:])]

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Inert())  # like a Tuple, it could be nested

    def load_bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))  # Python's own allocates what the file promises

    dispatch = pickle._Unpickler.dispatch | {
        pickle.TUPLE[0]: load_tuple,
        pickle.TUPLE1[0]: load_tuple1,
        pickle.TUPLE2[0]: load_tuple2,
        pickle.TUPLE3[0]: load_tuple3,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }
