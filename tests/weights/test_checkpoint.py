"""Checkpoints: every format read, no pickle run, every bad file named, weights picked and loaded strictly."""

import hashlib
import io
import os
import pickle
import re
import resource
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import golden_files
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from ldm.errors import InputError
from ldm.weights.checkpoint import fingerprint, identify, load_weights, pick_weights, read_state_dict


def small_state(dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A few weights of every kind: dense, transposed view, scalar, empty, integer."""
    return {
        "model.diffusion_model.out.0.weight": torch.randn(3, 5).to(dtype),
        "model.diffusion_model.out.0.bias": torch.arange(6.0).reshape(2, 3).T.to(dtype),
        "model.scalar": torch.tensor(0.25).to(dtype),
        "model.empty": torch.empty(0, 4).to(dtype),
        "position_ids": torch.arange(77)[None],
    }


def save(state, path: Path, form: str) -> Path:
    """Write `state` in one of FORMS."""
    if form == "safetensors":
        save_file({name: t.contiguous() for name, t in state.items()}, path)
    else:
        torch.save(
            {"state_dict": state, "global_step": 470000} if "wrapped" in form else state,
            path,
            _use_new_zipfile_serialization="legacy" not in form,
        )
    return path


FORMS = ["safetensors", "zip", "zip wrapped", "legacy", "legacy wrapped"]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def refusal(path) -> str:
    with pytest.raises(InputError) as caught:
        read_state_dict(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# --- Formats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path, form, dtype):
    """The originals index ["state_dict"]: a bare state dict was a KeyError and a .safetensors unreadable."""
    state = small_state(dtype)
    assert_same(read_state_dict(save(state, tmp_path / "weights", form)), state)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("extension", ["ckpt", "safetensors", "bin"])
def test_content_decides_not_extension(tmp_path, form, extension):
    """Sites rename files freely; tools that trust the extension hand a .ckpt to the safetensors reader."""
    state = small_state()
    assert_same(read_state_dict(str(save(state, tmp_path / f"w.{extension}", form))), state)


@pytest.mark.parametrize("legacy", [False, True])
def test_float8_and_unsigned(tmp_path, legacy):
    """Newer dtypes come as bytes and a dtype (`_rebuild_tensor_v3`)."""
    state = {"a": torch.randn(3, 4).to(torch.float8_e4m3fn), "b": torch.arange(5).to(torch.uint16)}
    torch.save(state, tmp_path / "w.ckpt", _use_new_zipfile_serialization=not legacy)
    found = read_state_dict(tmp_path / "w.ckpt")
    assert found["a"].dtype == torch.float8_e4m3fn
    assert torch.equal(found["a"].float(), state["a"].float())
    assert torch.equal(found["b"], state["b"])


@pytest.mark.parametrize("legacy", [False, True])
def test_parameters_views_and_shared_storage(tmp_path, legacy):
    base = torch.randn(4, 6)
    state = OrderedDict(p=nn.Parameter(base), row=base[1], part=base[1:3, 2:], tied=base)
    nested = {"state_dict": {"state_dict": state}}
    torch.save(nested, tmp_path / "w", _use_new_zipfile_serialization=not legacy)
    found = read_state_dict(tmp_path / "w")
    assert_same(found, {name: t.detach() for name, t in state.items()})
    assert not any(t.requires_grad for t in found.values())


def test_empty_storage_backs_no_values(tmp_path):
    """A hostile shape over an empty storage would allocate at will."""
    buffer = io.BytesIO()
    torch.save({"a": torch.empty(0, 300)}, buffer)
    program = zipfile.ZipFile(buffer).read("archive/data.pkl")
    full = program.replace(b"K\x00M\x2c\x01\x86", b"K\x09M\x2c\x01\x86")  # its size: (0, 300) -> (9, 300)
    assert full != program
    assert "damaged" in refusal(raw_zip(tmp_path / "w", full, **{"data/0": b""}))


def test_wrapped_in_model(tmp_path):
    torch.save({"model": small_state(), "optimizer": {"lr": 1e-4}}, tmp_path / "w")
    assert read_state_dict(tmp_path / "w").keys() == small_state().keys()


def test_module_state_dict_with_metadata(tmp_path):
    """`Module.state_dict()` is an OrderedDict with a `_metadata` attribute, which a pickle sets on it."""
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()
    torch.save(state, tmp_path / "w")
    assert_same(read_state_dict(tmp_path / "w"), state)


def test_zip_packed_again(tmp_path):
    """A .ckpt unpacked and zipped by hand is compressed: its records cannot be mapped as they are."""
    state = small_state()
    torch.save(state, tmp_path / "w")
    with (
        zipfile.ZipFile(tmp_path / "w") as old,
        zipfile.ZipFile(tmp_path / "z", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert_same(read_state_dict(tmp_path / "z"), state)


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path):
    path = save(small_state(), tmp_path / "w", "zip")
    before = path.read_bytes()
    read_state_dict(path)["model.diffusion_model.out.0.weight"].zero_()
    assert path.read_bytes() == before


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("form", ["safetensors", "zip wrapped"])
def test_memory_is_mapped(tmp_path, form):
    """torch.load read a .ckpt of 4 to 8 GB whole into memory; on small machines the originals were killed."""
    save(small_state(), tmp_path / "warm-up", form)
    read_state_dict(tmp_path / "warm-up")
    state = {f"model.{i}": torch.ones(1024, 1024) for i in range(50)}  # 200 MB
    path = save(state, tmp_path / "w", form)
    del state
    before = resident_mb()
    found = read_state_dict(path)
    assert resident_mb() - before < 20
    assert (
        found["model.7"].untyped_storage().nbytes() == 4 * 2**20
    )  # a storage of its own, not the whole file
    assert found["model.7"].sum() == 2**20


# --- Pickles ----------------------------------------------------------------------------------------


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


def raw_zip(path: Path, program: bytes, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return path


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


# --- Bad files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html><head><title>Log in</title>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:fe4ef\nsize 4265380512\n", "git lfs pull"),
        (b'{"error": "Invalid username or password."}', "JSON"),
        (b"\x1f\x8b\x08\x00" + bytes(50), "unpack it"),
        (b"Rar!\x1a\x07\x01", "unpack it"),
        (bytes(4096), "not a checkpoint"),
        (b"just some text", "not a checkpoint"),
        (b"x", "not a checkpoint"),
        (b"cos\nsystem\n(S'true'\ntR.", "not a checkpoint"),
        (pickle.dumps({"a": 1}), "not of torch.save"),
    ],
)
def test_other_files_are_named(tmp_path, content, words):
    """The originals answered all of these with an UnpicklingError such as "invalid load key, '<'"."""
    (tmp_path / "w.ckpt").write_bytes(content)
    assert words in refusal(tmp_path / "w.ckpt")


def test_missing_link_and_folder(tmp_path):
    assert "--ckpt" in refusal(tmp_path / "none.ckpt")
    (tmp_path / "link.ckpt").symlink_to(tmp_path / "gone.ckpt")
    assert "gone.ckpt" in refusal(tmp_path / "link.ckpt")
    assert "a folder" in refusal(tmp_path)
    (tmp_path / "model_index.json").touch()
    assert "diffusers" in refusal(tmp_path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.99])
def test_truncated(tmp_path, form, kept):
    """A download that broke off was "PytorchStreamReader failed finding central directory"."""
    path = save({f"w{i}": torch.randn(50, 50) for i in range(20)}, tmp_path / "w", form)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert "is cut short" in refusal(path)


@pytest.mark.parametrize("kept", range(16, 300, 7))
def test_truncated_in_the_pickle(tmp_path, kept):
    path = save(small_state(), tmp_path / "w", "legacy")
    path.write_bytes(path.read_bytes()[:kept])
    assert "is cut short" in refusal(path)


def test_no_tensors(tmp_path):
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "a")
    assert "no tensors" in refusal(tmp_path / "a")
    torch.save({"string_to_param": {"*": torch.ones(3)}, "name": "cat"}, tmp_path / "b")
    assert "string_to_param" in refusal(tmp_path / "b")
    torch.save([torch.ones(3)], tmp_path / "c")
    assert "no state dict" in refusal(tmp_path / "c")
    save_file({}, tmp_path / "d")
    assert "no tensors" in refusal(tmp_path / "d")
    with zipfile.ZipFile(tmp_path / "e", "w") as archive:
        archive.writestr("model.ckpt", b"")
    assert "unpack" in refusal(tmp_path / "e")


def test_big_endian(tmp_path):
    path = save(small_state(), tmp_path / "w", "zip")
    with zipfile.ZipFile(path) as archive:
        records = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    program = records.pop("data.pkl")
    assert "big-endian" in refusal(raw_zip(tmp_path / "b", program, **(records | {"byteorder": b"big"})))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_bytes_give_one_clear_error(tmp_path_factory, form, data):
    """Whatever happens to a file, it is read or refused with an InputError."""
    content = bytearray(valid_bytes(tmp_path_factory, form))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content)
    try:
        state = read_state_dict(path)
    except InputError:
        return
    assert state
    for tensor in state.values():
        if tensor.numel() < 1e6:  # a zero stride can promise any size
            tensor.float().sum()


def valid_bytes(tmp_path_factory, form, made={}) -> bytes:  # noqa: B006 (a cache)
    if form not in made:
        torch.manual_seed(0)
        made[form] = save(small_state(), tmp_path_factory.mktemp("valid") / "w", form).read_bytes()
    return made[form]


# --- EMA --------------------------------------------------------------------------------------------

RAW = {"model.diffusion_model.out.0.bias": torch.zeros(2), "model.diffusion_model.in.weight": torch.zeros(3)}
AVERAGED = {
    "model_ema.diffusion_modelout0bias": torch.ones(2),
    "model_ema.diffusion_modelinweight": torch.ones(3),
}
NUMBERS = {
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.num_updates": torch.tensor(5, dtype=torch.int32),
}
REST = {"first_stage_model.quant_conv.bias": torch.full((1,), 7.0)}


def test_pick_raw_and_ema():
    """CompVis inference configs have no use_ema: a full checkpoint silently ran its non-averaged weights."""
    state = RAW | AVERAGED | NUMBERS | REST
    assert_same(pick_weights(state, "raw", path="f"), RAW | REST)
    assert_same(
        pick_weights(state, "ema", path="f"), {name: torch.ones_like(t) for name, t in RAW.items()} | REST
    )
    assert len(state) == 7


def test_ema_of_a_file_without_it():
    """use_ema: True on an EMA-only file copied random shadow weights into the model: noise, and no error."""
    with pytest.raises(InputError, match=r"f has no EMA weights: use --weights raw"):
        pick_weights(RAW | REST, "ema", path="f")
    with pytest.raises(InputError, match=r"f keeps its EMA weights as its plain ones: use --weights raw"):
        pick_weights(RAW | REST | NUMBERS, "ema", path="f")
    assert_same(pick_weights(RAW | REST | NUMBERS, "raw", path="f"), RAW | REST)


def test_ema_that_lacks_some():
    del (some := AVERAGED | RAW)["model_ema.diffusion_modelinweight"]
    with pytest.raises(
        InputError, match=r"lacks 1 of 2 EMA weights, first that of model\.diffusion_model\.in\.weight"
    ):
        pick_weights(some, "ema", path="f")


def test_file_with_ema_alone():
    with pytest.raises(InputError, match=r"only EMA weights for its UNet: use --weights ema"):
        pick_weights(AVERAGED | REST, "raw", path="f")
    found = pick_weights(AVERAGED | REST, "ema", path="f", names=[*RAW, *REST])
    assert_same(found, {name: torch.ones_like(t) for name, t in RAW.items()} | REST)


def test_unknown_choice():
    with pytest.raises(InputError, match=r"'EMA': choose ema or raw"):
        pick_weights(RAW, "EMA", path="f")


# --- Strict loading ---------------------------------------------------------------------------------

UNET_BLOCK = "model.diffusion_model.input_blocks"
UNET_INPUT = f"{UNET_BLOCK}.0.0.weight"


class Tiny(nn.Module):
    """The skeleton of a latent diffusion model: its parts, a schedule buffer, keys that tell the family."""

    def __init__(self, channels=4, context=768):
        super().__init__()

        def part(**children):
            module = nn.Module()
            for name, child in children.items():
                module.add_module(name, child)
            return module

        attention = part(attn2=part(to_k=nn.Linear(context, 8, bias=False)))
        spatial = part(transformer_blocks=nn.ModuleList([attention]))
        self.model = part(
            diffusion_model=part(
                input_blocks=nn.ModuleList(
                    [nn.ModuleList([nn.Conv2d(channels, 8, 3)]), nn.ModuleList([nn.Conv2d(8, 8, 3), spatial])]
                )
            )
        )
        self.first_stage_model = part(quant_conv=nn.Conv2d(8, 8, 1))
        self.cond_stage_model = part(transformer=part(text_model=part(final_layer_norm=nn.LayerNorm(16))))
        self.register_buffer("betas", torch.linspace(0, 1, 10, device="cpu"), persistent=False)
        self.requires_grad_(False)


def meta(**options) -> Tiny:
    with torch.device("meta"):
        return Tiny(**options)


def test_load_assigns_and_converts(tmp_path):
    """Building with random values and copying over them took 9 s and twice the memory."""
    state = {name: t.half() for name, t in Tiny().state_dict().items()}
    state = read_state_dict(save(state, tmp_path / "w", "safetensors"))
    load_weights(model := meta(), state, path="f")
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == state[name].data_ptr()
    load_weights(model := meta(), state, path="f", dtype=torch.float32)
    assert_same(model.state_dict(), {name: t.float() for name, t in state.items()})
    assert not any(p.requires_grad for p in model.parameters())
    assert model.betas.sum() == 5


EXTRAS = [
    "model_ema.decay",
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
    "logvar",
    "scale_factor",
    "low_scale_model.betas",
    "loss.logvar",
    "first_stage_model.loss.discriminator.main.0.weight",
    "first_stage_model.model_ema.decay",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "cond_stage_model.transformer.text_projection.weight",
    "cond_stage_model.model.attn_mask",
    "cond_stage_model.model.logit_scale",
]


@pytest.mark.parametrize("name", EXTRAS)
def test_tolerated_extras(name):
    """position_ids, model_ema.* and schedule buffers made strict loaders refuse good files."""
    load_weights(model := meta(), Tiny().state_dict() | {name: torch.zeros(3)}, path="f")
    assert model.betas.sum() == 5


@pytest.mark.parametrize(
    "name", ["alphas", "betas.weight", "model.x", "control_model.y", "text_model.z", "xbetas"]
)
def test_unknown_extras(name):
    with pytest.raises(
        InputError, match=rf"f looks like .* 1 weights are not of this model \(first '{re.escape(name)}'\)"
    ):
        load_weights(meta(), Tiny().state_dict() | {name: torch.zeros(3)}, path="f")


def test_text_encoder_spelt_without_text_model():
    """transformers 5.6 dropped `text_model.`; strict=False then skipped every weight of the text encoder."""
    state = {name.replace("text_model.", ""): t + 1 for name, t in Tiny().state_dict().items()}
    assert "cond_stage_model.transformer.final_layer_norm.weight" in state
    state["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77.0)[None]
    load_weights(model := meta(), state, path="f")
    assert torch.equal(model.cond_stage_model.transformer.text_model.final_layer_norm.bias, torch.ones(16))


def test_another_family_is_named():
    """The originals loaded with strict=False and only printed the missing keys: the images were noise."""
    with pytest.raises(InputError) as caught:
        load_weights(meta(), Tiny(context=1024).state_dict(), path="768.ckpt")
    assert str(caught.value) == (
        "768.ckpt looks like Stable Diffusion v2 (its config is v2-inference.yaml, or v2-inference-v.yaml "
        "for 768 pixels), the model is Stable Diffusion v1: 1 of 9 weights have another shape (first "
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight: [8, 1024] instead of "
        "[8, 768])"
    )


@pytest.mark.parametrize("part", ["model.diffusion_model", "first_stage_model", "cond_stage_model"])
def test_missing_weights(part):
    state = {name: t for name, t in Tiny().state_dict().items() if not name.startswith(part)}
    with pytest.raises(InputError, match=rf"\d of 9 weights are missing \(first {part}"):
        load_weights(meta(), state, path="f")


@pytest.mark.parametrize("name", [UNET_INPUT, f"{UNET_BLOCK}.1.1.transformer_blocks.0.attn2.to_k.weight"])
@pytest.mark.parametrize("shape", [(), (2,), (1, 1, 1)])
def test_weights_without_the_dimensions_that_tell_the_family(name, shape):
    """A scalar in their place was an IndexError."""
    state = Tiny().state_dict()
    assert name in state
    with pytest.raises(InputError, match="1 of 9 weights have another shape"):
        load_weights(meta(), state | {name: torch.zeros(shape)}, path="f")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers(dtype):
    """An eight-bit quantized file of the right shapes was loaded, and failed in the first layer."""
    state = {name: t.to(dtype) for name, t in Tiny().state_dict().items()}
    with pytest.raises(
        InputError, match=rf"9 of 9 weights are no floating-point numbers \(first .*: {dtype}\)"
    ):
        load_weights(meta(), state, path="f", dtype=torch.float16)


def test_nothing_stays_on_meta():
    """A buffer that no file carries would fail much later, in the middle of sampling."""
    model = meta()
    model.register_buffer("forgotten", torch.zeros(3, device="meta"), persistent=False)
    with pytest.raises(RuntimeError, match="forgotten"):
        load_weights(model, Tiny().state_dict(), path="f")


# --- Families ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "context", "name"),
    [
        (4, 768, "Stable Diffusion v1"),
        (9, 768, "Stable Diffusion v1 inpainting"),
        (8, 768, "InstructPix2Pix"),
        (4, 1024, "Stable Diffusion v2"),
        (9, 1024, "Stable Diffusion v2 inpainting"),
        (5, 1024, "Stable Diffusion v2 depth"),
        (7, 1024, "the Stable Diffusion x4 upscaler"),
        (4, 1280, "LAION-400M text2img-large"),
        (4, 2048, "Stable Diffusion XL"),
        (3, 512, "a latent diffusion model of an unlisted kind"),
    ],
)
def test_identify_by_shapes(channels, context, name):
    assert identify(meta(channels=channels, context=context).state_dict()) == name


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "Stable Diffusion XL"),
        ("down_blocks.0.resnets.0.conv1.weight", "a diffusers UNet"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("emb_params", "a textual inversion"),
        ("control_model.input_hint_block.0.bias", "a ControlNet"),
        ("encoder.conv_in.weight", "an autoencoder alone"),
        ("first_stage_model.decoder.conv_in.weight", "an autoencoder alone"),
        ("text_model.encoder.layers.0.mlp.fc1.bias", "a text encoder alone"),
        ("model_ema.diffusion_modelout0bias", "a latent diffusion model of an unlisted kind"),
        ("layer.0.weight", "an unknown model"),
    ],
)
def test_identify_by_names(key, name):
    assert identify({key: torch.empty(4, 4, device="meta")}) == name


def test_identify_unclip():
    state = meta(context=1024).state_dict()
    state["model.diffusion_model.label_emb.0.0.weight"] = torch.empty(1280, 2048, device="meta")
    assert identify(state) == "Stable unCLIP"


@pytest.mark.parametrize(
    ("manifest", "name"),
    [
        ("sd-v1", "Stable Diffusion v1"),
        ("mini-v1-ema", "Stable Diffusion v1"),
        ("sd-v1-inpainting", "Stable Diffusion v1 inpainting"),
        ("sd-v2", "Stable Diffusion v2"),
        ("sd-v2-inpainting", "Stable Diffusion v2 inpainting"),
        ("sd-v2-depth", "Stable Diffusion v2 depth"),
        ("x4-upscaler", "the Stable Diffusion x4 upscaler"),
        ("ldm-text2img-large", "LAION-400M text2img-large"),
    ],
)
def test_identify_published_layouts(manifest, name):
    layout = golden_files.manifest(manifest)
    state = {key: torch.empty(shape, device="meta") for key, (_, shape) in layout.items()}
    assert identify(state) == name
    if "ema" in manifest:
        pick_weights(state, "ema", path="f")


# --- Fingerprint ------------------------------------------------------------------------------------


def test_fingerprint(tmp_path):
    """A1111's `Model hash` before 2023: 64 KiB at 1 MiB. A short file would all hash to e3b0c442 there."""
    content = struct.pack("<I", 7) * 500_000
    (tmp_path / "long").write_bytes(content)
    assert fingerprint(tmp_path / "long") == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    (tmp_path / "short").write_bytes(b"abc")
    assert fingerprint(tmp_path / "short") == "ba7816bf"
