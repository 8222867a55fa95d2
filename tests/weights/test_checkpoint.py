"""Checkpoints: every format read, every bad file named, weights picked and loaded strictly."""

import errno
import io
import os
import pickle
import re
import resource
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoints import (
    FORMS,
    UNET_BLOCK,
    UNET_INPUT,
    Tiny,
    assert_same,
    meta,
    raw_zip,
    refusal,
    save,
    small_state,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from ldm.errors import InputError
from ldm.weights.checkpoint import load_weights, pick_weights, read_state_dict
from ldm.weights.header import let_go


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


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("form", ["safetensors", "zip wrapped"])
def test_converting_lets_the_pages_of_the_file_go(tmp_path, form):
    """A file of float32 and the weights made of it were in memory together: 1.5 times the file."""
    save(small_state(), tmp_path / "warm-up", form)
    read_state_dict(tmp_path / "warm-up")
    weights = {f"{i}.weight": torch.full((1024, 1024), i + 0.5) for i in range(50)}  # 200 MB
    path = save(weights, tmp_path / "w", form)
    del weights
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(50))
    state = read_state_dict(path)
    before = resident_mb()
    load_weights(model, state, path=path, dtype=torch.bfloat16)
    assert resident_mb() - before < 100 + 30
    for i, layer in enumerate(model):
        assert layer.weight.dtype == torch.bfloat16
        assert (layer.weight == i + 0.5).all()
    assert (state["7.weight"] == 7.5).all()  # read again


def test_only_whole_pages_of_a_mapped_tensor_go(tmp_path):
    """What was written to its neighbours stays, and a tensor of another place is left alone."""
    state = read_state_dict(save({name: torch.ones(5000) for name in "abc"}, tmp_path / "w", "safetensors"))
    for name in "ac":
        state[name].fill_(2)
    let_go(state["b"])
    assert (state["a"] == 2).all()
    assert (state["b"] == 1).all()
    assert (state["c"] == 2).all()
    let_go(other := torch.full((5000,), 3.0))
    assert (other == 3).all()


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
    assert "or name another file" in refusal(tmp_path / "none.ckpt")
    (tmp_path / "link.ckpt").symlink_to(tmp_path / "gone.ckpt")
    assert "gone.ckpt" in refusal(tmp_path / "link.ckpt")
    assert "a folder" in refusal(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    assert "is a StableDiffusionXLPipeline, which cannot be run here" in refusal(tmp_path)


def test_what_the_system_refuses(tmp_path, monkeypatch):
    """An OSError of `stat` came through as it was, and is an internal error where it is not expected."""
    assert "cannot be opened: File name too long" in refusal(tmp_path / ("w" * 300))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be opened: " in refusal(tmp_path / "loop")
    assert "no checkpoint at" in refusal(tmp_path / "a\0b")
    path = save(small_state(), tmp_path / "w", "zip")
    for name in ("stat", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, refuse)
            assert refusal(path).endswith("cannot be opened: Permission denied")


def refuse(*_, **__):
    """In place of a method of Path, as the superuser, whom tests may run as, is permitted everything."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


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
def test_unknown_extras_are_left_out(caplog, name):
    """Files that have all of the model's weights and some more were refused; the original loaded them."""
    state = Tiny().state_dict()
    load_weights(model := meta(), state | {name: torch.zeros(3)}, path="f")
    assert_same(model.state_dict(), state)
    message = f"f: 1 of its weights are not of this model and are left out ({name!r})"
    assert caplog.messages == [message]


def test_many_extras_are_one_notice(caplog):
    extras = {f"embedding_manager.{i}\n": torch.zeros(3) for i in range(20)}
    load_weights(meta(), Tiny().state_dict() | extras, path="f")
    first = ", ".join(repr(f"embedding_manager.{i}\n") for i in range(3))
    assert caplog.messages == [f"f: 20 of its weights are not of this model and are left out ({first}, …)"]


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_extras_beside_a_fault(caplog, change):
    """They stay a hint at which model the file belongs to."""
    state = Tiny().state_dict() | {"control_model.y": torch.zeros(3)}
    if change == "missing":
        del state[UNET_INPUT]
    else:
        state[UNET_INPUT] = torch.zeros(2)
    with pytest.raises(
        InputError, match=r"a ControlNet .* 1 weights are not of this model \(first 'control_model.y'\)"
    ):
        load_weights(meta(), state, path="f")
    assert not caplog.messages


@pytest.mark.parametrize("name", EXTRAS)
def test_known_extras_need_no_notice(caplog, name):
    load_weights(meta(), Tiny().state_dict() | {name: torch.zeros(3)}, path="f")
    assert not caplog.messages


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.skipif(not hasattr(torch, "quantize_per_tensor"), reason="a torch that no longer makes them")
def test_a_quantised_weight_is_named(tmp_path):
    """It is dropped when the file is read, and missing where the model needs it."""
    state = Tiny().state_dict()
    state[UNET_INPUT] = torch.quantize_per_tensor(state[UNET_INPUT], 0.1, 0, torch.qint8)
    torch.save(state, tmp_path / "w")
    with pytest.raises(InputError, match=rf"1 of 9 weights are missing \(first {re.escape(UNET_INPUT)}\)"):
        load_weights(meta(), read_state_dict(tmp_path / "w"), path="f")


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
        "768.ckpt looks like Stable Diffusion v2 (its config is v2-inference.yaml or v2-inference-v.yaml), "
        "the model is Stable Diffusion v1: 1 of 9 weights have another shape (first "
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
def test_weights_without_the_dimensions_that_show_the_family(name, shape):
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
