"""Pickles are read without being run, and every tensor of torch.save comes out of them."""

import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import assert_same, raw_zip, refusal, save, small_state
from torch import nn

from ldm.weights.checkpoint import read_state_dict


@pytest.fixture
def lightning(monkeypatch):
    """A checkpoint as Lightning writes it, made with classes that no longer exist when it is read."""
    module = types.ModuleType("pytorch_lightning_gone.callbacks")

    def define(name, bases=(), **members):
        cls = type(name, bases, {"__module__": module.__name__, **members})
        setattr(module, name, cls)
        return cls

    callback = define("ModelCheckpoint")()
    callback.best, callback.scores = Path("last.ckpt"), {"val/loss": torch.tensor(0.1)}
    settings_dict = define("AttributeDict", (dict,))(lr=1e-4)
    settings_list = define("ListConfig", (list,))([1, 2])
    reduced = define(
        "Reduced", __reduce__=lambda self: (type(self), (1,), {"a": 2}), __init__=lambda *_: None
    )()
    slots = define("Slots", __slots__=("a",))()
    slots.a = 1
    monkeypatch.setitem(sys.modules, "pytorch_lightning_gone", types.ModuleType("pytorch_lightning_gone"))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def write(path, state, **options):
        extras = {
            "callbacks": {type(callback): callback, "list": settings_list},
            "hyper_parameters": settings_dict,
            "optimizer_states": [
                {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"betas": (0.9, 0.99)}]}
            ],
            "lr_schedulers": [reduced, slots],
            "loops": {"best": np.float64(0.5), "array": np.arange(3), "set": {1}, "bytes": b"\xff", "z": 1j},
            "pytorch-lightning_version": "1.4.2",
        }
        torch.save({**extras, "state_dict": state}, path, **options)
        for name in [name for name in sys.modules if name.startswith("pytorch_lightning_gone")]:
            monkeypatch.delitem(sys.modules, name)

    return write


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_lightning_objects_are_inert(tmp_path, lightning, legacy, protocol):
    """A full training .ckpt needs the pytorch-lightning of its day, and weights_only=True refuses it."""
    state = small_state()
    state["model_ema.decay"] = torch.tensor(0.9999)
    lightning(tmp_path / "w", state, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    modules = set(sys.modules)
    assert_same(read_state_dict(tmp_path / "w"), state)
    assert not any("lightning_gone" in name for name in set(sys.modules) - modules)


class Payload:
    """Calls `function(*args)` when unpickled."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("form", ["zip", "zip wrapped", "legacy", "legacy wrapped", "plain pickle"])
@pytest.mark.parametrize("where", ["beside the weights", "as a tensor", "as a key", "in an attribute"])
def test_code_is_refused_and_not_run(tmp_path, form, where):
    """The originals run torch.load, that is whatever program a downloaded .ckpt carries."""
    marker = tmp_path / "run"
    for payload, name in [
        (Payload(os.system, f"touch {marker}"), "system"),
        (Payload(eval, f"open({str(marker)!r}, 'w')"), "eval"),
        (Payload(exec, f"open({str(marker)!r}, 'w')"), "exec"),
        (Payload(__import__, "antigravity"), "__import__"),
        (Payload(pickle.loads, pickle.dumps(1)), "loads"),
    ]:
        state = OrderedDict(small_state())
        if where == "as a key":
            state[payload] = 1
        elif where == "in an attribute":
            state._metadata = payload
        elif where == "as a tensor":
            state["model.x"] = payload
        content = {"state_dict": state, "callbacks": payload} if where == "beside the weights" else state
        if form == "plain pickle":
            content = {name: value for name, value in content.items() if isinstance(value, Payload)} or [
                payload
            ]
            (tmp_path / "w").write_bytes(pickle.dumps(content))
        else:
            save(content, tmp_path / "w", form)
        message = refusal(tmp_path / "w")
        assert name in message
        assert "carries code" in message
        assert not marker.exists()


def test_unknown_functions_are_not_called(tmp_path):
    """Any library may hold a function that runs code (numpy's runstring did): none of them is imported."""
    calls = []
    module = types.ModuleType("innocent")
    module.function = lambda *args: calls.append(args)
    module.function.__module__, module.function.__qualname__ = "innocent", "function"
    sys.modules["innocent"] = module
    try:
        save({"a": torch.ones(2), "b": Payload(module.function, 1)}, tmp_path / "w", "zip")
        assert_same(read_state_dict(tmp_path / "w"), {"a": torch.ones(2)})
    finally:
        del sys.modules["innocent"]
    assert not calls


def test_getattr_chain_finds_nothing(tmp_path):
    """`getattr` alone is harmless and occurs in Lightning files; here it reaches only stand-ins."""
    program = (
        b"\x80\x02cbuiltins\ngetattr\n(cbuiltins\ndict\nX\x0b\x00\x00\x00__globals__tR(X\x01\x00\x00\x00atR."
    )
    assert "no state dict" in refusal(raw_zip(tmp_path / "w", program))


def test_a_pickle_cannot_change_the_reader(tmp_path):
    """BUILD sets attributes on whatever a pickle names: also on classes of the program that reads it."""
    state = small_state()
    path = save(state, tmp_path / "good", "zip")
    for name in [
        "torch._utils\n_rebuild_tensor_v2",
        "torch._utils\n_rebuild_parameter",
        "some\nthing",
        "torch\nfloat16",
    ]:
        program = b"\x80\x02c" + name.encode() + b"\n(N}X\x03\x00\x00\x00map]stb."
        refusal(raw_zip(tmp_path / "bad", program))
        assert_same(read_state_dict(path), state)


def test_self_containing_wrapper_ends(tmp_path):
    """Unwrapping with `while "state_dict" in d` never ends on a dict that contains itself."""
    content = {}
    content["state_dict"] = content
    torch.save(content, tmp_path / "w")
    assert "no tensors" in refusal(tmp_path / "w")


def test_tensor_beyond_its_storage(tmp_path):
    """A view past its storage would read other memory."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(300.0)}, buffer)
    program = zipfile.ZipFile(buffer).read("archive/data.pkl")
    big = program.replace(b"M\x2c\x01\x85", b"M\xff\x7f\x85")  # its size: (300,) -> (32767,)
    assert big != program
    assert "damaged" in refusal(raw_zip(tmp_path / "w", big, **{"data/0": bytes(1200)}))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_archive_is_not_run(tmp_path):
    """torch.load hands such a zip to torch.jit.load, whose __setstate__ methods are programs too."""
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "w"))
    refusal(tmp_path / "w")


FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def stored(path: Path, state, legacy: bool) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    return path


@FORMATS
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_tensors(tmp_path, legacy, dtype):
    """One of them made the whole file "damaged": the name of its storage was not known."""
    state = {"before": torch.randn(3), "z": torch.randn(2, 3, dtype=dtype), "after": torch.randn(4)}
    assert_same(read_state_dict(stored(tmp_path / "w", state, legacy)), state)


@FORMATS
def test_conjugated_and_negated_views(tmp_path, legacy):
    """torch stores the values as they were and says beside them that the view changes their sign."""
    z, other = torch.randn(2, 3, dtype=torch.complex64), torch.randn(3, dtype=torch.complex64)
    state = {"conjugated": z.conj(), "negated": other.conj().imag}
    assert state["conjugated"].is_conj()
    assert state["negated"].is_neg()
    assert_same(read_state_dict(stored(tmp_path / "w", state, legacy)), state)


QUANTISED = {
    "per tensor": lambda: torch.quantize_per_tensor(torch.randn(2, 3), 0.1, 0, torch.qint8),
    "unsigned": lambda: torch.quantize_per_tensor(torch.randn(5), 0.1, 0, torch.quint8),
    "32 bits": lambda: torch.quantize_per_tensor(torch.randn(5), 0.1, 0, torch.qint32),
    "4 bits": lambda: torch.quantize_per_channel(
        torch.randn(3, 3), torch.full((3,), 0.1), torch.zeros(3), 0, torch.quint4x2
    ),
    "per channel": lambda: torch.quantize_per_channel(
        torch.randn(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.qint8
    ),
}


@FORMATS
@pytest.mark.parametrize("form", QUANTISED)
@pytest.mark.skipif(not hasattr(torch, "quantize_per_tensor"), reason="a torch that no longer makes them")
@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors_are_no_weights(tmp_path, legacy, form):
    """In the old format one of them made the whole file "damaged": the size of its values was unknown."""
    state = {"before": torch.randn(3), "q": QUANTISED[form](), "after": torch.randn(4)}
    found = read_state_dict(stored(tmp_path / "w", state, legacy))
    assert_same(found, {name: state[name] for name in ("before", "after")})


@FORMATS
def test_other_dtypes_are_no_weights(tmp_path, legacy):
    """Bytes of a dtype that is not read here came out as a tensor of bytes: half of a complex number's."""
    state = {"a": torch.randn(3), "z": torch.zeros(2, dtype=torch.complex32)}
    assert_same(read_state_dict(stored(tmp_path / "w", state, legacy)), {"a": state["a"]})


@FORMATS
@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_with_attributes(tmp_path, legacy, protocol):
    """A tensor on which somebody had set an attribute was dropped, so its weight was missing."""
    state = {
        "noted": torch.randn(2, 3),
        "buffer": nn.Buffer(torch.randn(4)),
        "parameter": nn.Parameter(torch.randn(2)),
        "float8": torch.randn(3).to(torch.float8_e4m3fn),
        "plain": torch.randn(3),
    }
    state["noted"].note = state["float8"].note = {"from": "a merge"}
    state["parameter"].note = [1]
    path = tmp_path / "w"
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    found = read_state_dict(path)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name].float(), tensor.detach().float())
        assert type(found[name]) is torch.Tensor


def test_only_known_functions_make_a_tensor_with_attributes(tmp_path):
    """`_rebuild_from_type_v2` calls the function that the pickle names with the arguments that it gives."""
    program = (
        b"\x80\x02}X\x01\x00\x00\x00actorch._tensor\n_rebuild_from_type_v2\n"
        b"(ctorch._tensor\n_rebuild_from_type_v2\nctorch\nTensor\n(NN)}t}tRs."
    )
    assert "no tensors" in refusal(raw_zip(tmp_path / "w", program))
