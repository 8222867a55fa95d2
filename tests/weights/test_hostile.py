"""Checkpoints by someone who wants their code run, or the reader to crash, to swallow all memory or to hang.

They are written opcode by opcode. Those that carry code are given to torch.load, too, which does run it.
"""

import copyreg
import io
import json
import pickle
import struct
import sys
import tarfile
import time
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ldm.errors import InputError
from ldm.pipeline.safety import load_safety_checker
from ldm.weights import header
from ldm.weights.checkpoint import read_state_dict
from ldm.weights.unpickle import KNOWN_GLOBALS

FORMS = ["zip", "legacy"]
HEAD = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]  # of the old format
VALUES = struct.pack("<2f", 1, 2)


def text(value: str | Path) -> bytes:
    content = str(value).encode()
    return b"X" + struct.pack("<I", len(content)) + content


def name(dotted: str) -> bytes:
    """What a dotted name stands for."""
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(function: str | bytes, *arguments: bytes) -> bytes:
    function = name(function) if isinstance(function, str) else function
    return function + b"(" + b"".join(arguments) + b"tR"


def storage(form: str, key: bytes = text("0"), count: bytes = b"K\x02", kind: str = "FloatStorage") -> bytes:
    view = b"N" if form == "legacy" else b""
    return b"(" + text("storage") + name(f"torch.{kind}") + key + text("cpu") + count + view + b"tQ"


def tensor(values: bytes) -> bytes:
    hooks = call("collections.OrderedDict")
    return call(
        "torch._utils._rebuild_tensor_v2", values, b"K\x00", b"K\x02\x85", b"K\x01\x85", b"\x89", hooks
    )


def state(form: str, *items: bytes) -> bytes:
    """A dict with the tensor [1, 2] as "w" and more items."""
    return b"".join([b"}", text("w"), tensor(storage(form)), b"s", *(item + b"s" for item in items)])


def legacy(*parts: bytes) -> bytes:
    """The old format: pickles of HEAD, unless other opcodes are given, of the content and of its keys."""
    pickles = [
        b"\x80\x04" + part + b"." if part else pickle.dumps(HEAD[i], 2) for i, part in enumerate(parts)
    ]
    return b"".join(pickles) + struct.pack("<q", 2) + VALUES


def zipped(program: bytes) -> bytes:
    file = io.BytesIO()
    with ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x04" + program + b".")
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/data/0", VALUES)
    return file.getvalue()


def write(path: Path, form: str, program: bytes) -> Path:
    """A checkpoint with the content that the opcodes make."""
    path.write_bytes(
        zipped(program) if form == "zip" else legacy(b"", b"", b"", program, b"]" + text("0") + b"a")
    )
    return path


def outcome(path: Path, read: Callable[[Path], object] = read_state_dict) -> str:
    """The refusal: one line, not too long, that names the file. Empty if the tensor came out."""
    try:
        found = read(path)
    except InputError as error:
        message = str(error)
        assert message.isprintable()
        assert message.startswith(str(path))
        assert len(message) < len(str(path)) + 500
        return message
    assert list(found) == ["w"]
    assert found["w"].tolist() == [1, 2]
    return ""


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """The file that a payload makes. A module `canary` has classes that make it, whatever is done to them."""
    path = tmp_path / "marker"

    class Module(nn.Module):
        def __setstate__(self, state):
            path.touch()

    class Object:
        def __init__(self, *_):
            path.touch()

        __call__ = __setattr__ = __setitem__ = append = extend = add = __init__

    canary = types.ModuleType("canary")
    canary.Module, canary.Object = Module, Object
    monkeypatch.setitem(sys.modules, "canary", canary)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # for a torch.load within
    return path


def runs_in_torch(path: Path, marker: Path) -> bool:
    with suppress(Exception):
        torch.load(path, weights_only=False)
    for _ in range(100):  # a process may be at it
        if marker.exists():
            marker.unlink()
            return True
        time.sleep(0.01)
    return False


def touch(marker: Path) -> bytes:
    return text(f"touch '{marker}'")


def python_touch(marker: Path) -> bytes:
    return text(f"open({str(marker)!r}, 'w').close()")


def system(marker: Path) -> bytes:
    return call("os.system", touch(marker))


def inner(marker: Path) -> Path:
    """Another checkpoint, in the old format, that carries code."""
    return write(marker.parent / "inner", "legacy", system(marker))


def inner_bytes(marker: Path) -> bytes:
    content = inner(marker).read_bytes()
    return b"B" + struct.pack("<I", len(content)) + content


def inner_zip(marker: Path) -> bytes:
    return call("torch._C.PyTorchFileReader", text(write(marker.parent / "inner", "zip", system(marker))))


def hub(marker: Path) -> bytes:
    (marker.parent / "hubconf.py").write_text(f"open({str(marker)!r}, 'w').close()")
    return text(marker.parent)


OBJECT = name("canary.Object") + b")\x81"  # made with __new__ alone
PICKLE = name("torch.serialization.pickle")

# What names a way to run code is refused; what stands for anything else is neither imported nor called.
NAMED = {
    "posix.system": lambda m: call("posix.system", touch(m)),
    "Popen": lambda m: call("subprocess.Popen", b"]" + text("touch") + b"a" + text(m) + b"a"),
    "eval of Python 2": lambda m: b"\x80\x02" + call("__builtin__.eval", python_touch(m)) + b"\x80\x04",
    "eval by STACK_GLOBAL": lambda m: text("builtins") + text("eval") + b"\x93" + python_touch(m) + b"\x85R",
    "INST": lambda m: b"(" + touch(m) + b"ios\nsystem\n",
    "OBJ": lambda m: b"(" + name("subprocess.Popen") + b"(" + text("touch") + text(m) + b"lo",
    "partial": lambda m: call(call("functools.partial", name("os.system"), touch(m))),
    "partial by NEWOBJ_EX": lambda m: (
        name("functools.partial")
        + name("subprocess.run")
        + touch(m)
        + b"\x86}"
        + text("shell")
        + b"\x88s\x92)R"
    ),
    "map": lambda m: call("builtins.list", call("builtins.map", name("os.system"), b"]" + touch(m) + b"a")),
    "a storage": lambda m: tensor(system(m)),
    "a persistent id": lambda m: system(m) + b"Q",
    "part of a persistent id": lambda m: (
        b"(" + text("storage") + system(m) + text("1") + text("cpu") + b"K\x02tQ"
    ),
    "a state": lambda m: call("collections.OrderedDict") + system(m) + b"b",
    "state of an nn.Module": lambda m: name("torch.nn.Linear") + b")\x81}" + text("a") + system(m) + b"sb",
    "backward hooks": lambda m: call("torch._utils._rebuild_parameter", b"N", b"\x88", system(m)),
    "_rebuild_from_type_v2": lambda m: call(
        "torch._tensor._rebuild_from_type_v2",
        name("os.system"),
        name("torch.Tensor"),
        touch(m) + b"\x85",
        b"}",
    ),
}
INERT = {
    "dotted name": lambda m: text("torch") + text("os.system") + b"\x93" + touch(m) + b"\x85R",
    "getattr": lambda m: call(call("builtins.getattr", name("torch.os"), text("system")), touch(m)),
    "getattr chain": lambda m: call(
        call(
            "builtins.getattr",
            call("builtins.getattr", name("torch.serialization"), text("os")),
            text("system"),
        ),
        touch(m),
    ),
    "attrgetter": lambda m: call(
        call(call("operator.attrgetter", text("os.system")), name("torch.serialization")), touch(m)
    ),
    "methodcaller": lambda m: call(call("operator.methodcaller", text("system"), touch(m)), name("torch.os")),
    "itemgetter": lambda m: call(
        call(call("operator.itemgetter", text("eval")), name("torch.__builtins__")), python_touch(m)
    ),
    "torch.load": lambda m: call("torch.load", text(inner(m))),
    "torch.serialization.load": lambda m: call("torch.serialization.load", text(inner(m))),
    "_legacy_load": lambda m: call(
        "torch.serialization._legacy_load", call("io.BytesIO", inner_bytes(m)), b"N", PICKLE
    ),
    "_load": lambda m: call("torch.serialization._load", inner_zip(m), b"N", PICKLE),
    "_load_from_bytes": lambda m: call("torch.storage._load_from_bytes", inner_bytes(m)),
    "hub": lambda m: call("torch.hub._load_local", hub(m), text("model")),
    "collect_env": lambda m: call("torch.utils.collect_env.run", touch(m)),
    "_rebuild_from_type_v2 of it": lambda m: call(
        "torch._tensor._rebuild_from_type_v2",
        name("torch.utils.collect_env.run"),
        name("torch.Tensor"),
        touch(m) + b"\x85",
        b"}",
    ),
    "numpy": lambda m: call("numpy.f2py.crackfortran.myeval", python_touch(m)),
    "nn.Module with __setstate__": lambda m: name("canary.Module") + b")\x81}b",
    "BUILD": lambda m: OBJECT + b"N}" + text("a") + b"Ns\x86b",
    "APPEND": lambda m: OBJECT + b"Na",
    "APPENDS": lambda m: OBJECT + b"(NNe",
    "SETITEM": lambda m: OBJECT + b"NNs",
    "SETITEMS": lambda m: OBJECT + b"(NNu",
    "ADDITEMS": lambda m: OBJECT + b"(N\x90",
    "REDUCE of an object": lambda m: OBJECT + b")R",
    "OBJ of a class": lambda m: b"(" + name("canary.Object") + b"No",
    "INST of a class": lambda m: b"(Nicanary\nObject\n",
}
PLACES = {
    "a value": lambda form, payload: state(form, text("x") + payload),
    "a key": lambda form, payload: state(form, payload + b"N"),
    "deep": lambda form, payload: (
        b"}"
        + text("state_dict")
        + state(form)
        + b"s"
        + text("a")
        + b"}"
        + text("b")
        + b"]"
        + payload
        + b"ass"
    ),
    "nowhere": lambda form, payload: payload + b"0" + state(form),
}


@pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", NAMED | INERT)
def test_code_is_not_run(tmp_path, marker, form, way):
    payload = (NAMED | INERT)[way](marker)
    for place, program in PLACES.items():
        path = write(tmp_path / "w.ckpt", form, program(form, payload))
        message = outcome(path)
        assert not marker.exists()
        assert ("carries code" in message) == (way in NAMED), place
        if way in INERT:
            assert message == "", place
        assert runs_in_torch(path, marker), place


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("form", FORMS)
def test_torchscript_within_is_not_loaded(tmp_path, form):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "inner"))
    program = state(form, text("x") + call("torch.jit.load", text(tmp_path / "inner")))
    assert outcome(write(tmp_path / "w", form, program)) == ""


def test_a_state_of_functions_changes_nothing(tmp_path):
    """BUILD sets attributes of an OrderedDict, its methods among them, to stand-ins and known classes."""
    for member in ("get", "items", "keys", "__class__", "__getitem__", "__iter__", "__reduce__"):
        for value in (
            name("some.thing"),
            call("some.thing"),
            name("torch.Size"),
            name("collections.OrderedDict"),
        ):
            for attributes in (text(member) + value + b"s", b"N}" + text(member) + value + b"s\x86"):
                start = b"}" if attributes.startswith(b"X") else b""
                content = call("collections.OrderedDict") + text("w") + tensor(storage("zip")) + b"s"
                outcome(write(tmp_path / "w", "zip", content + start + attributes + b"b"))
    assert outcome(write(tmp_path / "w", "zip", state("zip"))) == ""


def test_extension_codes(tmp_path, marker):
    """A number that a program has registered for a function stood for the function, once it had been used."""
    copyreg.add_extension("os", "system", 0xF0)
    try:
        program = state("zip", text("x") + b"\x82\xf0" + touch(marker) + b"\x85R")
        path = write(tmp_path / "w", "zip", program)
        for _ in range(2):
            assert "is damaged" in outcome(path)
            assert not marker.exists()
            assert runs_in_torch(path, marker)
    finally:
        copyreg.remove_extension("os", "system", 0xF0)


@pytest.mark.parametrize("part", range(5), ids=["magic", "version", "system", "content", "keys"])
def test_every_pickle_of_the_old_format(tmp_path, marker, part):
    parts = [b"", b"", b"", state("legacy"), b"]" + text("0") + b"a"]
    parts[part] = system(marker)
    (tmp_path / "w").write_bytes(legacy(*parts))
    assert "carries code" in outcome(tmp_path / "w")
    assert not marker.exists()
    assert runs_in_torch(tmp_path / "w", marker)


def test_tar_files_are_not_read(tmp_path, marker):
    """torch.save of 2016 wrote them."""
    with tarfile.open(tmp_path / "w", "w") as archive:
        for member in ("sys_info", "storages", "tensors", "pickle"):
            content = b"\x80\x02" + system(marker) + b"."
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert "not a checkpoint" in outcome(tmp_path / "w")
    assert not marker.exists()
    assert runs_in_torch(tmp_path / "w", marker)


def test_other_pickles_of_a_zip_are_not_read(tmp_path, marker):
    (tmp_path / "w").write_bytes(zipped(state("zip")))
    with ZipFile(tmp_path / "w", "a") as archive:
        for record in ("archive/constants.pkl", "archive/code/data.pkl", "other/data.pkl", "data.pkl"):
            archive.writestr(record, b"\x80\x02" + system(marker) + b".")
    assert outcome(tmp_path / "w") == ""
    assert not marker.exists()


CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP |= {"image_size": 32, "patch_size": 8}


@pytest.mark.parametrize("form", FORMS)
def test_the_safety_checker_runs_nothing(tmp_path, marker, form):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "clip", "projection_dim": 8, "vision_config": CLIP})
    )
    for way in (
        "Popen",
        "partial",
        "a storage",
        "methodcaller",
        "_load_from_bytes",
        "nn.Module with __setstate__",
    ):
        payload = (NAMED | INERT)[way](marker)
        path = write(tmp_path / "pytorch_model.bin", form, state(form, text("x") + payload))
        message = outcome(path, lambda path: load_safety_checker(path.parent))
        assert ("carries code" if way in NAMED else "weights are missing") in message
        assert not marker.exists()


def put(i: int) -> bytes:
    """Remember what is on top of the stack, and take it off."""
    return b"r" + struct.pack("<I", i) + b"0"


def get(i: int) -> bytes:
    return b"j" + struct.pack("<I", i)


def tower_of_sets(first: int, levels: int = 40) -> bytes:
    """Two frozensets on each level, which both hold the two below."""
    program = b"(K\x00\x91" + put(first) + b"(K\x01\x91" + put(first + 1)
    for i in range(first, first + 2 * levels, 2):
        both = get(i) + get(i + 1)
        program += b"(" + both + b"\x91" + put(i + 2) + b"(" + both + b"N\x91" + put(i + 3)
    return program + get(first + 2 * levels)


DEEP = 100_000
TOWER = b")" + b"2\x86" * 100  # each level holds the one below twice
LONG = b"\x8b" + struct.pack("<I", 3000) + b"\x7f" * 3000  # a number of 7,000 digits
ORDERED = call("collections.OrderedDict") + b"N"
ITEMS = {  # keys and values beside the tensor
    "deep key": b")" + b"\x85" * 5 * DEEP + b"N",
    "deep key of other opcodes": b"(" * DEEP + b"t" * DEEP + b"N",
    "deep torch.Size as key": (name("torch.Size") + b"(]") * DEEP + b"N" + b"atR" * DEEP + b"N",
    "tower as key": TOWER + b"N",
    "equal towers as keys": TOWER + b"Ns" + TOWER + b"N",
    "equal towers of sets as keys": tower_of_sets(1000) + b"Ns" + tower_of_sets(2000) + b"N",
    "tower in an OrderedDict": text("x") + call("collections.OrderedDict", b"]]" + TOWER + b"aNaa"),
    "deep list": text("x") + b"]" * DEEP + b"a" * (DEEP - 1),
    "deep tuple": text("x") + b")" + b"\x85" * DEEP,
    "deep dict": text("x") + b"}N" * DEEP + b"N" + b"s" * DEEP,
    "deep OrderedDict": text("x") + ORDERED * DEEP + b"N" + b"s" * DEEP,
    "deep state": text("x") + name("some.Thing") * DEEP + b"N" + b"b" * DEEP,
    "deep tensor": b"N"
    + (name("torch._utils._rebuild_tensor_v2") + b"(") * DEEP
    + storage("legacy")
    + b"NNNNNtR" * DEEP,
    "a list in itself": text("x") + b"]2a",
    "a dict in itself": text("x") + b"}q\x07Nh\x07s",
    "marks": text("x") + b"(" * DEEP + b"1" * DEEP + b"N",
    "far memo": text("x") + b"Nr\xff\xff\xff\xff",
    "large number": text("x") + LONG,
    "infinity": text("x") + b"G\x7f\xf0\0\0\0\0\0\0",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("item", ITEMS)
def test_nesting_neither_crashes_nor_hangs(tmp_path, form, item):
    """A tuple in a tuple in … as a key crashed the program, and one of 40 levels never ended."""
    assert outcome(write(tmp_path / "w", form, state(form, ITEMS[item]))) == ""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "start",
    [
        *(
            opcode + struct.pack("<Q", size)
            for opcode in (b"\x8d", b"\x8e", b"\x96", b"\x95")
            for size in (2**40, 2**63)
        ),
        *(opcode + struct.pack("<I", 2**31 - 1) for opcode in (b"X", b"B", b"T", b"\x8b")),
    ],
)
def test_declared_sizes_take_no_memory(tmp_path, form, start):
    """For a bytearray all that was declared was set to zero first: 8 GB in 7 seconds."""
    message = outcome(write(tmp_path / "w", form, state(form, text("x") + start + b"abc")))
    assert "is damaged" in message or "is cut short" in message
    assert "MemoryError" not in message


def test_a_pickle_of_gigabytes_in_a_small_zip(tmp_path, monkeypatch):
    """A few kB of a zip file can stand for a thousand times as many."""
    monkeypatch.setattr(header, "PICKLE_LIMIT", 10_000_000)
    with ZipFile(tmp_path / "w", "w", ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 6_000_000 + state("zip") + b".")
        archive.writestr("archive/data/0", VALUES)
    assert (tmp_path / "w").stat().st_size < 50_000
    assert "12,000" in outcome(tmp_path / "w")


ODD = {
    "nothing": b"N",
    "true": b"\x88",
    "negative": b"J\xff\xff\xff\xff",
    "large": b"\x8a\x08" + struct.pack("<q", 2**62),
    "very large": LONG,
    "NaN": b"G\x7f\xf8\0\0\0\0\0\0",
    "text": text("a\n\x1b[2J/../\ud7ff"),
    "bytes": b"C\x01a",
    "tuple": b")",
    "tower": TOWER,
    "list": b"]",
    "dict": b"}",
    "stand-in": call("some.thing"),
    "class": name("some.thing"),
    "dtype": name("torch.float16"),
    "tensor": tensor(storage("zip")),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("odd", ODD)
def test_odd_parts_of_a_tensor(tmp_path, form, odd):
    """A negative count was taken for the rest of the file."""
    part, usual = ODD[odd], [storage(form), b"K\x00", b"K\x02\x85", b"K\x01\x85", b"\x89", b"}"]
    for i in range(4):
        if i == 3 or odd not in ("stand-in", "true", "tuple"):  # a scalar
            arguments = [*usual[:i], part, *usual[i + 1 :]]
            path = write(
                tmp_path / "w",
                form,
                b"}" + text("w") + call("torch._utils._rebuild_tensor_v2", *arguments) + b"s",
            )
            assert "is damaged" in outcome(path)
    for i in range(5):
        parts = [text("storage"), name("torch.FloatStorage"), text("0"), text("cpu"), b"K\x02"]
        if i == 1 and odd == "dtype":  # which is as good as a storage's class
            continue
        parts[i] = part
        for view in (b"", b"N", part, b"(" + text("0") + part + b"K\x02t"):
            pid = b"(" + b"".join(parts) + view + b"tQ"
            outcome(write(tmp_path / "w", form, b"}" + text("w") + tensor(pid) + b"s"))
    for pid in (part + b"Q", b"(" + part + b"tQ", b"Pabc\n", b"P\n"):
        assert "is damaged" in outcome(write(tmp_path / "w", form, state(form, text("x") + pid)))


@pytest.mark.parametrize("odd", ODD)
def test_odd_parts_of_the_old_format(tmp_path, odd):
    """A key of thousands of digits was a ValueError, from the attempt to show it."""
    for i, part in [(i, ODD[odd]) for i in range(5)] + [(4, b"]" + ODD[odd] + b"a")]:
        parts = [b"", b"", b"", state("legacy"), b"]" + text("0") + b"a"]
        parts[i] = part
        (tmp_path / "w").write_bytes(legacy(*parts))
        assert outcome(tmp_path / "w") or i == 1


DTYPES = sorted(
    {str(dtype).removeprefix("torch.") for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
)


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_of_use_or_refused(tmp_path, dtype):
    """torch crashed on values of a quantized dtype."""
    bytes_, hooks = (
        storage("zip", count=b"K\x08", kind="storage.UntypedStorage"),
        call("collections.OrderedDict"),
    )
    shape = b"K\x00", b"K\x01\x85", b"K\x01\x85", b"\x89", hooks
    for values in (
        call("torch._utils._rebuild_tensor_v2", storage("zip", count=b"K\x01", kind=dtype), *shape),
        call("torch._utils._rebuild_tensor_v3", bytes_, *shape, name(f"torch.{dtype}")),
    ):
        path = write(tmp_path / "w", "zip", b"}" + text("w") + values + b"s")
        with suppress(InputError):
            assert read_state_dict(path)["w"].to(torch.float32).shape == (1,)


OPCODES = st.sampled_from(
    [
        *(
            opcode.encode("latin-1")
            for opcode in "(.012NQRabdlosetu)]}\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"
        ),
        *(b"q\0", b"q\1", b"h\0", b"h\1", b"K\0", b"K\2", b"\x82\xf0", b"\x98", b"M\xff\xff"),
        *(
            text(word)
            for word in ("0", "w", "cpu", "storage", "state_dict", "canary", "Object", "__setstate__")
        ),
        *(
            name(word)
            for word in ("canary.Object", "canary.Module", "os.system", "some.thing", "torch.float16")
        ),
        *(name(".".join(known)) for known in KNOWN_GLOBALS),
        *(b"(icanary\nObject\n", call("canary.Object"), OBJECT, b"}N", b"](", b"}(", b")R", b"}b"),
        *(storage("zip"), storage("legacy"), tensor(storage("zip")), state("zip"), state("legacy")),
        *ODD.values(),
    ]
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=st.sampled_from(FORMS), before=st.lists(OPCODES), after=st.lists(OPCODES), keep=st.booleans())
def test_any_program_is_read_or_refused(tmp_path, marker, form, before, after, keep):
    content = state(form) if keep else b"}" + text("w")
    with suppress(InputError):
        read_state_dict(write(tmp_path / "w", form, b"".join([*before, content, *after])))
    assert not marker.exists()
