"""Converting checkpoints: what diffusers makes of our folders, and what comes back."""

import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoints import Tiny, assert_same
from diffusers_pipelines import KINDS, outputs, predicts_v, tiny_config, tiny_pipeline
from golden_files import manifest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.errors import InputError
from ldm.util import instantiate_from_config
from ldm.weights import diffusers_configs as configs
from ldm.weights.checkpoint import COMPUTED, read_state_dict
from ldm.weights.convert import Conversion, convert
from ldm.weights.diffusers_writing import folder_parts, not_held
from ldm.weights.header import read_header
from ldm.weights.loading import ROOT, choose_model, load_model, read_config
from ldm.weights.prediction import prediction_hint
from ldm.weights.writing import check_target, target_format, write_ckpt, write_safetensors, written_whole

PIPELINES = {
    "v1-inpainting": "StableDiffusionInpaintPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "depth": "StableDiffusionDepth2ImgPipeline",
    "x4": "StableDiffusionUpscalePipeline",
}
YAMLS = {
    "sd-v1": "v1-inference",
    "sd-v1-inpainting": "v1-inpainting-inference",
    "sd-v2": "v2-inference",
    "sd-v2-inpainting": "v2-inpainting-inference",
    "sd-v2-depth": "v2-midas-inference",
    "x4-upscaler": "x4-upscaling",
}


@functools.cache
def checkpoint(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A whole state dict of the original's layout, random, with schedules and unused weights."""
    with torch.device("meta"):
        model = instantiate_from_config(tiny_config(kind))
    model.register_schedule()
    generator = torch.Generator().manual_seed(2)
    return {
        name: t if COMPUTED.fullmatch(name) else torch.randn(t.shape, generator=generator).mul_(0.1).to(dtype)
        for name, t in model.state_dict().items()
    }


def write_yaml(path: Path, kind: str) -> str:
    """The config of a kind as a file (JSON is YAML)."""
    path.write_text(json.dumps({"model": tiny_config(kind)}))
    return str(path)


@contextmanager
def no_progress(size: int) -> Iterator[Callable[[int], None]]:
    yield lambda count: None


def run(source: Path, target: Path, **options: object) -> Path:
    convert(Conversion(source, target, target_format(target, None), **options), no_progress)
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_our_folders(tmp_path: Path, kind: str) -> None:
    import diffusers

    source = tmp_path / "model.ckpt"
    torch.save({"state_dict": checkpoint(kind)}, source)
    folder = run(source, tmp_path / "folder", config=write_yaml(tmp_path / "tiny.yaml", kind))
    name = PIPELINES.get(kind, "StableDiffusionPipeline")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline).__name__ == name
    expected = outputs(load_model(tiny_config(kind), source), kind)
    found = outputs(pipeline, kind)
    assert found.keys() == expected.keys()
    for part, tensor in expected.items():
        torch.testing.assert_close(found[part], tensor, rtol=1e-4, atol=1e-4, msg=f"the {part} differs")

    made = tiny_pipeline(kind)  # by diffusers alone
    for part in ("scheduler", "low_res_scheduler"):
        if part in made.components:
            assert torch.equal(getattr(pipeline, part).alphas_cumprod, getattr(made, part).alphas_cumprod)
    assert pipeline.scheduler.config.prediction_type == ("v_prediction" if predicts_v(kind) else "epsilon")
    assert pipeline.vae.config.scaling_factor == made.vae.config.scaling_factor
    texts = ["a red cube", ""]
    assert (
        pipeline.tokenizer(texts, padding="max_length")["input_ids"]
        == (made.tokenizer(texts, padding="max_length")["input_ids"])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["v1", "v2", "depth", "x4"])
def test_there_and_back_again(
    tmp_path: Path, kind: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """.ckpt -> folder -> .ckpt -> .safetensors keeps every tensor's bits, but for those that are named.

    What a folder's scheduler says of the UNet becomes a tensor.
    """
    state = checkpoint(kind, dtype)
    source = tmp_path / "model.ckpt"
    torch.save({"state_dict": state}, source)
    folder = run(source, tmp_path / "folder", config=write_yaml(tmp_path / "tiny.yaml", kind))
    notice = caplog.messages[-1]
    back = run(run(folder, tmp_path / "back.ckpt"), tmp_path / "back.safetensors")
    found = read_state_dict(back)
    marked = state | {name: torch.zeros(0) for name in (["v_pred"] if predicts_v(kind) else [])}
    assert_same(found, {name: marked[name] for name in found})
    assert ("v_pred" in found) == predicts_v(kind)

    lost = state.keys() - found.keys()
    unused = {name for name in lost if not COMPUTED.fullmatch(name)}
    if kind == "v1":
        assert not unused
    else:  # OpenCLIP's twelve of the last block, its projection and its scale
        assert len(unused) == 14
        assert all(re.search(r"resblocks\.2\.|text_projection|logit_scale", name) for name in unused)
        assert "the text encoder's unused last block (12)" in notice
    assert f"cannot hold {len(lost)} of the tensors" in notice
    assert "buffers of the schedule" in notice
    assert "others" not in notice


@pytest.mark.parametrize("family", YAMLS)
def test_the_networks_of_full_size(tmp_path: Path, family: str) -> None:
    """Without values: every name and shape is diffusers' own, comes back, and is recognised in a folder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, DPTConfig, DPTForDepthEstimation

    yaml = f"configs/stable-diffusion/{YAMLS[family]}.yaml"
    config = read_config(ROOT / yaml)
    state = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (dtype, shape) in manifest(family).items()
    }
    parts, depth = folder_parts(state, config)
    is_open_clip = "v1" not in family
    params = config["params"]
    made = {
        "unet": configs.unet_config(params, parts["unet"]),
        "vae": configs.vae_config(params, parts["vae"], params["scale_factor"]),
        "text_encoder": configs.text_config(params, parts["text_encoder"], is_open_clip),
    }
    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel.from_config(made["unet"]),
            "vae": AutoencoderKL.from_config(made["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**made["text_encoder"])),
        }
        if depth:
            networks["depth_estimator"] = DPTForDepthEstimation(DPTConfig(**depth))
    assert parts.keys() == networks.keys()
    for part, network in networks.items():
        found = {name.removeprefix("text_model."): t.shape for name, t in parts[part].items()}
        expected = {name.removeprefix("text_model."): t.shape for name, t in network.state_dict().items()}
        assert found == expected, part
    lost = not_held(state, config)
    assert "others" not in lost
    assert lost.get("EMA weights") is None

    pipeline = configs.pipeline_of(parts["unet"], parts)
    configs.write_json(tmp_path / "model_index.json", configs.model_index(pipeline))
    scheduler = configs.scheduler_config(params, "eps", False)
    configs.write_json(tmp_path / "scheduler/scheduler_config.json", scheduler)
    for part, weights in parts.items():
        configs.write_json(tmp_path / part / "config.json", made.get(part, depth))
        header_alone(tmp_path / part / "model.safetensors", weights)
    header = read_header(tmp_path)
    assert {name: tuple(t.shape) for name, t in header.tensors.items()} == {
        name: tuple(t.shape) for name, t in state.items() if name in header.tensors
    }
    assert len(header.tensors) == len(state) - sum(lost.values())
    assert choose_model(None, str(tmp_path), task=None).config.resolve() == ROOT / yaml


def header_alone(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """A .safetensors of full length whose values take no room on the disk."""
    header, end = {}, 0
    for name, tensor in weights.items():
        start, end = end, end + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + end)


# Files


@pytest.mark.parametrize("write", [write_safetensors, write_ckpt])
def test_precision(tmp_path: Path, write: Callable) -> None:
    """Weights are rounded; integers, schedules and single numbers, which no one may round, are not.

    The scale of the bundled models' latents, 0.2619, was rounded to eleven bits.
    """
    state = {
        "model.diffusion_model.a": torch.randn(3, 5)[:, 1:3],  # a part of its storage
        "model.diffusion_model.b": torch.randn(4, dtype=torch.float64),
        "model.diffusion_model.empty": torch.empty(0, 4),
        "betas": torch.linspace(0, 1, 1000),
        "position_ids": torch.arange(77)[None],
        "scale": torch.tensor(0.2619),
    }
    for precision, dtype in (
        (None, None),
        ("fp32", torch.float32),
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
    ):
        path, counts = tmp_path / f"{precision}", []
        write(state, path, precision, report=counts.append)
        expected = {
            name: t if dtype is None or name in ("betas", "position_ids", "scale") else t.to(dtype)
            for name, t in state.items()
        }
        assert_same(read_state_dict(path), expected)
        assert sum(counts) >= sum(t.nbytes for t in expected.values())
        if write is write_safetensors:
            assert_same(load_file(path), expected)  # by the library itself
        else:
            assert path.stat().st_size < 20_000  # and not more than the part


def write_few_bits(path: Path, name: str, dtype: str = "F4") -> Path:
    """A file with four values of less than a byte each, which torch cannot read, and one of float32."""
    size = 4 * int(dtype[1]) // 8
    header = {
        "plain": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        name: {"dtype": dtype, "shape": [4], "data_offsets": [4, 4 + size]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4 + size))
    return path


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
@pytest.mark.parametrize("target", ["out.safetensors", "out.ckpt", "out"])
def test_a_tensor_of_a_dtype_that_is_not_read_is_refused(tmp_path: Path, dtype: str, target: str) -> None:
    """It was left out of the new file without a word."""
    source = write_few_bits(tmp_path / "four.safetensors", "model.w", dtype)
    with pytest.raises(
        InputError, match=rf"its tensor 'model.w' has a dtype .*\({dtype}\); give the model in"
    ):
        run(source, tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["four.safetensors"]


def test_so_is_one_of_another_file_of_the_conversion(tmp_path: Path) -> None:
    """The sum of a merge, and another autoencoder, lacked it as well."""
    save_file({"plain": torch.zeros(1)}, source := tmp_path / "plain.safetensors")
    four = write_few_bits(tmp_path / "four.safetensors", "model.w")
    for options in ({"other": four}, {"other": source, "base": four}, {"vae": four}):
        with pytest.raises(InputError, match=r"four.safetensors: its tensor 'model.w' .*\(F4\)"):
            run(source, tmp_path / "out.safetensors", **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not hasattr(torch, "quantize_per_tensor"), reason="a torch that no longer makes them")
def test_so_is_a_quantised_tensor_of_a_ckpt(tmp_path: Path) -> None:
    """It was left out, too, as its pickle calls a function that was not known."""
    state = {"plain": torch.zeros(1), "w": torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)}
    torch.save({"state_dict": state}, tmp_path / "q.ckpt")
    with pytest.raises(InputError, match=r"q.ckpt: its tensor 'w' .*\(qint8\)"):
        run(tmp_path / "q.ckpt", tmp_path / "out.safetensors")


def test_so_is_one_in_a_diffusers_folder(tmp_path: Path) -> None:
    tiny_pipeline("v1").save_pretrained(tmp_path / "folder")
    (file,) = (tmp_path / "folder/unet").glob("*.safetensors")
    write_few_bits(file, "conv_in.weight")
    with pytest.raises(InputError, match=r"folder: its tensor 'unet.conv_in.weight' .*\(F4\)"):
        run(tmp_path / "folder", tmp_path / "out.safetensors")


def test_a_file_of_nothing_else_says_so_wherever_it_is_read(tmp_path: Path) -> None:
    """It was said to hold no tensors."""
    header = {"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    (tmp_path / "w").write_bytes(len(text).to_bytes(8, "little") + text + bytes(2))
    with pytest.raises(InputError, match=r"its tensor 'w' .*\(F4\)"):
        read_state_dict(tmp_path / "w")


def test_a_dtype_that_only_a_ckpt_has(tmp_path: Path) -> None:
    """A KeyError came of it; a .ckpt takes it as it is."""
    torch.save({"z": torch.randn(2, dtype=torch.complex128)}, source := tmp_path / "z.ckpt")
    with pytest.raises(
        InputError, match=r"the tensor 'z' is of complex128, which a .safetensors cannot hold"
    ):
        run(source, tmp_path / "out.safetensors")
    assert_same(read_state_dict(run(source, tmp_path / "out.ckpt")), read_state_dict(source))


def test_views_that_change_signs_are_written_as_they_read(tmp_path: Path) -> None:
    """A conjugated view ended the conversion with an error of torch's."""
    state = {"z": torch.randn(3, dtype=torch.complex64).conj()}
    state["n"] = torch.randn(3, dtype=torch.complex64).conj().imag
    torch.save(state, source := tmp_path / "views.ckpt")
    assert_same(read_state_dict(run(source, tmp_path / "out.safetensors")), read_state_dict(source))


def test_small_floats_and_scales_are_carried_as_they_are(tmp_path: Path) -> None:
    """Float8 weights, their powers of two, and the bytes and tables of bitsandbytes are ordinary tensors."""
    state = {
        "w": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "w_scale": torch.ones(4).to(torch.float8_e8m0fnu),
        "b": torch.randint(0, 255, (8, 1), dtype=torch.uint8),
        "b.absmax": torch.randn(2),
        "b.quant_state.bitsandbytes__nf4": torch.randint(0, 255, (9,), dtype=torch.uint8),
    }
    save_file(state, source := tmp_path / "small.safetensors")
    for target in ("out.safetensors", "out.ckpt"):
        found = read_state_dict(run(source, tmp_path / target))
        assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in state.items()}
        assert all(
            torch.equal(found[name].view(torch.uint8), t.view(torch.uint8)) for name, t in state.items()
        )


@pytest.mark.parametrize("target", ["out.safetensors", "out.ckpt"])
def test_tables_of_quantised_weights_are_not_rounded(tmp_path: Path, target: str) -> None:
    """`--precision fp16` rounded the tables of bitsandbytes, by which its bytes are read: no use any more."""
    tables = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB")
    state = {f"b.weight.{name}": torch.rand(16) for name in tables}
    state |= {"b.weight": torch.randint(0, 255, (8, 1), dtype=torch.uint8), "b.bias": torch.rand(4)}
    save_file(state, source := tmp_path / "nf4.safetensors")
    found = read_state_dict(run(source, tmp_path / target, precision="fp16"))
    assert_same(found, state | {"b.bias": state["b.bias"].half()})


def test_a_files_metadata_stay_without_its_hashes(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    save_file(checkpoint("v1"), source, {"prediction_type": "v", "sshs_model_hash": "12", "format": "pt"})
    with safe_open(run(source, tmp_path / "b.safetensors"), "pt") as file:
        assert file.metadata() == {"prediction_type": "v", "format": "pt"}


def test_the_count_of_steps_stays_in_a_ckpt(tmp_path: Path) -> None:
    source = tmp_path / "a.ckpt"
    torch.save({"state_dict": checkpoint("v1"), "global_step": 875000}, source)
    assert read_header(run(source, tmp_path / "b.ckpt")).global_step == 875000


def with_averages(state: dict[str, torch.Tensor], keep_raw: bool = True) -> dict[str, torch.Tensor]:
    """The state dict of a training checkpoint, whose averages are the raw weights and 1."""
    unet = [name for name in state if name.startswith("model.")]
    averages = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": state[name] + 1 for name in unet}
    raw = state if keep_raw else {name: t for name, t in state.items() if name not in unet}
    return raw | averages | {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}


def test_averaged_weights_are_merged(tmp_path: Path) -> None:
    """The raw ones were merged, and then the averages taken in their place as they had been."""
    state = checkpoint("v1")
    torch.save({"state_dict": with_averages(state)}, tmp_path / "a.ckpt")
    other = {name: t + 3 if t.is_floating_point() else t for name, t in state.items()}
    save_file(other, tmp_path / "b.safetensors")
    merged = run(
        tmp_path / "a.ckpt", tmp_path / "c.safetensors", weights="ema", other=tmp_path / "b.safetensors"
    )
    found = read_state_dict(merged)
    assert not any(name.startswith("model_ema.") for name in found)
    for name in (name for name in state if name.startswith("model.")):
        torch.testing.assert_close(found[name], state[name] + 2)  # of + 1 and + 3
    torch.save({"state_dict": with_averages(other)}, tmp_path / "d.ckpt")
    merged = run(tmp_path / "a.ckpt", tmp_path / "e.safetensors", weights="ema", other=tmp_path / "d.ckpt")
    found = read_state_dict(merged)
    for name in (name for name in state if name.startswith("model.")):
        torch.testing.assert_close(found[name], state[name] + 2.5)  # of + 1 and + 4


@pytest.mark.parametrize("keep_raw", [True, False])
def test_averages_of_files_that_have_only_such_are_merged(tmp_path: Path, keep_raw: bool) -> None:
    """The other file's were left out, so that what was written was the first one's UNet as it was."""
    state = checkpoint("v1")
    other = {name: t + 3 if t.is_floating_point() else t for name, t in state.items()}
    torch.save({"state_dict": with_averages(state, keep_raw)}, tmp_path / "a.ckpt")
    torch.save({"state_dict": with_averages(other, keep_raw=False)}, tmp_path / "b.ckpt")
    config = str(write_yaml(tmp_path / "tiny.yaml", "v1"))
    merged = run(
        tmp_path / "a.ckpt",
        tmp_path / "c.ckpt",
        weights="ema",
        other=tmp_path / "b.ckpt",
        config=config,
    )
    found = read_state_dict(merged)
    for name in (name for name in state if name.startswith("model.")):
        torch.testing.assert_close(found[name], state[name] + 2.5)  # of + 1 and + 4


def test_counters_without_averages_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """sd-v1-4.ckpt, which has them, was refused with --weights ema, or took all averages of a file away."""
    state = checkpoint("v1")
    counters = {name: torch.tensor(1.0) for name in ("model_ema.decay", "model_ema.num_updates")}
    torch.save({"state_dict": with_averages(state)}, tmp_path / "a.ckpt")
    torch.save({"state_dict": state | counters}, tmp_path / "b.ckpt")
    merged = run(tmp_path / "a.ckpt", tmp_path / "c.ckpt", weights="ema", other=tmp_path / "b.ckpt")
    found = read_state_dict(merged)
    for name in (name for name in state if name.startswith("model.")):
        torch.testing.assert_close(found[name], state[name] + 0.5)
    averages = {name: t for name, t in with_averages(state).items() if name not in counters}
    torch.save({"state_dict": averages}, tmp_path / "d.ckpt")
    caplog.clear()
    run(tmp_path / "a.ckpt", tmp_path / "e.ckpt", other=tmp_path / "d.ckpt")
    assert caplog.messages == []


def test_a_ckpt_says_what_its_unet_predicts(tmp_path: Path) -> None:
    """Metadata said so, for which a .ckpt has no place: v was read as eps, and images were noise."""
    for fact, found in (("v_prediction", "v"), ("epsilon", "eps"), (None, "eps")):
        metadata = {"modelspec.prediction_type": fact} if fact else {}
        save_file(checkpoint("v1"), tmp_path / "a.safetensors", metadata)
        path = run(tmp_path / "a.safetensors", tmp_path / f"{fact}.ckpt")
        hint = prediction_hint(read_header(path))
        assert (hint.parameterization if hint else "eps") == found
    (tmp_path / "None.yaml").write_text("model: {params: {parameterization: v}}")
    for name in ("b.safetensors", "b.ckpt"):  # which has no such file beside it
        hint = prediction_hint(read_header(run(tmp_path / "None.ckpt", tmp_path / name)))
        assert hint.parameterization == "v"


def test_what_a_name_or_a_count_says_goes_into_the_new_file(tmp_path: Path) -> None:
    """A v2 model's own name said what it predicts, and its converted file's did not."""
    state = Tiny(context=1024).state_dict()
    save_file(state, tmp_path / "v2-1_768-ema-pruned.safetensors")
    torch.save({"state_dict": state, "global_step": 875_000}, tmp_path / "base.ckpt")
    for source, target, expected in (
        ("v2-1_768-ema-pruned.safetensors", "a.safetensors", "v"),
        ("v2-1_768-ema-pruned.safetensors", "b.ckpt", "v"),
        ("base.ckpt", "c.safetensors", "eps"),
    ):
        hint = prediction_hint(read_header(run(tmp_path / source, tmp_path / target)))
        assert hint.parameterization == expected
    comfy = {"modelspec.predict_key": "v"}
    save_file(checkpoint("v1"), tmp_path / "comfy.safetensors", comfy)
    assert prediction_hint(read_header(tmp_path / "comfy.safetensors")).parameterization == "v"


def test_models_that_predict_different_things_are_not_merged(tmp_path: Path) -> None:
    """Their sum was written without a word, and said to predict what the first one does."""
    for name in ("v2-768", "512-base"):
        save_file(Tiny(context=1024).state_dict(), tmp_path / f"{name}.safetensors")
    first, second = (tmp_path / f"{name}.safetensors" for name in ("v2-768", "512-base"))
    with pytest.raises(InputError, match=r"v2-768.safetensors predicts v and .*512-base.safetensors eps"):
        run(first, tmp_path / "c.safetensors", other=second)
    assert not (tmp_path / "c.safetensors").exists()


def test_text_encoders_under_two_names_are_merged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """NovelAI's has no `text_model.` in its names: the text encoder stayed as it was."""
    state, clip = checkpoint("v1"), "cond_stage_model.transformer."
    other = {name: t + 1 if t.is_floating_point() else t for name, t in state.items()}
    save_file(state, tmp_path / "a.safetensors")
    bare = {name.replace(f"{clip}text_model.", clip): t for name, t in other.items()}
    save_file(bare, tmp_path / "b.safetensors")
    merged = run(tmp_path / "a.safetensors", tmp_path / "c.safetensors", other=tmp_path / "b.safetensors")
    found = read_state_dict(merged)
    names = [name for name in found if name.startswith(clip) and found[name].is_floating_point()]
    assert names
    for name in names:
        torch.testing.assert_close(found[name], state[name] + 0.5)
    assert caplog.messages == []


@pytest.mark.parametrize("keep_raw", [True, False])
def test_raw_and_averaged_weights(tmp_path: Path, keep_raw: bool, caplog: pytest.LogCaptureFixture) -> None:
    state = checkpoint("v1")
    averaged = {name: t + 1 if name.startswith("model.") else t for name, t in state.items()}
    both, config = with_averages(state, keep_raw), write_yaml(tmp_path / "tiny.yaml", "v1")
    source = tmp_path / "training.ckpt"
    torch.save({"state_dict": both}, source)
    assert_same(read_state_dict(run(source, tmp_path / "both.safetensors")), both)
    ema = run(source, tmp_path / "ema.safetensors", weights="ema", config=config)
    assert_same(read_state_dict(ema), averaged)
    folder = run(source, tmp_path / "ema", weights="ema", config=config)
    assert_same(read_state_dict(folder), {k: t for k, t in averaged.items() if not COMPUTED.fullmatch(k)})
    if keep_raw:
        assert_same(read_state_dict(run(source, tmp_path / "raw.ckpt", weights="raw")), state)
        caplog.clear()
        folder = run(source, tmp_path / "raw", config=config)
        assert_same(read_state_dict(folder), {k: t for k, t in state.items() if not COMPUTED.fullmatch(k)})
        assert "its raw weights are written; --weights ema" in caplog.messages[0]
    else:
        with pytest.raises(InputError, match="only EMA weights"):
            run(source, tmp_path / "raw.ckpt", weights="raw")


def test_a_model_that_was_trained_with_its_own_scale(tmp_path: Path) -> None:
    """The bundled model's latents have a scale that no config states."""
    bundled = ROOT / "models/scenes-64/model.safetensors"
    state = read_state_dict(bundled)
    assert "scale_factor" in state
    folder = run(bundled, tmp_path / "folder")
    back = read_state_dict(folder)
    assert_same(back, {name: state[name] for name in back} | {"scale_factor": state["scale_factor"].float()})
    assert (
        json.loads((folder / "vae/config.json").read_text())["scaling_factor"] == state["scale_factor"].item()
    )


def test_zero_terminal_snr_is_in_the_schedulers_config(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    source = tmp_path / "a.safetensors"
    markers = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    save_file(checkpoint("v2-v") | markers, source)
    folder = run(source, tmp_path / "folder", config=write_yaml(tmp_path / "tiny.yaml", "v2-v"))
    scheduler = StableDiffusionPipeline.from_pretrained(folder).scheduler
    assert scheduler.config.rescale_betas_zero_snr
    assert scheduler.alphas_cumprod[-1] < 1e-6
    assert "ztsnr" in read_state_dict(folder)


# Targets


@pytest.mark.parametrize(
    ("name", "to", "expected"),
    [
        ("a.safetensors", None, "safetensors"),
        ("a.ckpt", None, "ckpt"),
        ("a.PTH", None, "ckpt"),
        ("a", None, "diffusers"),
        ("a", "ckpt", "ckpt"),
        ("sd-v1.5", "diffusers", "diffusers"),
    ],
)
def test_formats(name: str, to: str | None, expected: str) -> None:
    assert target_format(Path(name), to) == expected


def test_names_that_say_no_format_or_another() -> None:
    with pytest.raises(InputError, match=r"the suffix \.5 is no format; choose one with --to"):
        target_format(Path("sd-v1.5"), None)
    with pytest.raises(InputError, match="named like a ckpt file, at odds with --to diffusers"):
        target_format(Path("a.ckpt"), "diffusers")


def test_nothing_is_overwritten_by_accident(tmp_path: Path) -> None:
    source, config = tmp_path / "a.safetensors", write_yaml(tmp_path / "tiny.yaml", "v1")
    save_file(checkpoint("v1"), source)
    with pytest.raises(InputError, match=r"a\.safetensors is there already"):
        run(source, source)
    before = source.read_bytes()
    assert read_header(run(source, source, precision="fp16", force=True)).tensors["betas"].dtype == "float32"
    assert source.stat().st_size < 0.6 * len(before)

    folder = run(source, tmp_path / "folder", config=config)
    with pytest.raises(InputError, match="folder is there already"):
        run(source, folder, config=config)
    run(source, folder, config=config, force=True)
    with pytest.raises(InputError, match="cannot be replaced while it is read"):
        check_target(folder, folder, force=True)
    other = tmp_path / "photographs"
    other.mkdir()
    with pytest.raises(InputError, match="a folder of other things"):
        run(source, other, config=config, force=True)
    with pytest.raises(InputError, match="there is no folder"):
        run(source, tmp_path / "nowhere/a.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {
        "a.safetensors",
        "tiny.yaml",
        "folder",
        "photographs",
    }


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    """--force put a file in the place of the pipe or device (/dev/full) that DST named."""
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    for force in (False, True):
        with pytest.raises(InputError, match="is neither a file nor a folder"):
            check_target(pipe, tmp_path / "a.safetensors", force)


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    """--force on a link to a folder replaced it, but ended with an error and left the link beside it."""
    for name in ("folder", "old.ckpt"):
        link = tmp_path / f"link to {name}"
        if name == "folder":
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_text("old")
        link.symlink_to(name)
        with written_whole(link) as path:
            path.mkdir() if name == "folder" else path.write_text("new")
        assert not link.is_symlink()
    assert (tmp_path / "old.ckpt").read_text() == "old"
    names = {"folder", "link to folder", "old.ckpt", "link to old.ckpt"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_tokenizer_that_cannot_be_written(tmp_path: Path) -> None:
    """On a full disk the library's plain Exception ended the command with exit code 1 instead of a line."""
    with (
        pytest.raises(InputError, match="folder cannot be written: No such file or directory"),
        written_whole(tmp_path / "folder") as path,
    ):
        configs.write_tokenizer(path / "nowhere", pads_with_zero=False)


def test_names_as_long_as_the_system_allows(tmp_path: Path) -> None:
    """The unfinished file's name was longer than DST's, which ended in an OSError with exit code 1."""
    target = tmp_path / f"{'a' * 243}.safetensors"
    with written_whole(target) as path:
        path.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize(
    ("kind", "config", "lost", "words"),
    [
        ("v2", "v2", "model.diffusion_model.middle_block.1.proj_in.weight", "1 of 508 weights are missing"),
        ("v2", "v2", "model.diffusion_model.input_blocks.1.0.out_layers.3.weight", "1 of 508 weights are"),
        ("v2", "v2", "cond_stage_model.", r"; all of its text encoder\)"),
        (
            "depth",
            "depth",
            "depth_model.model.scratch.",
            r"first depth_model.model.scratch.*weight\)",
        ),
        ("v1", "v2", "none", r"another shape \(first model.*\[32, 32, 1, 1\] instead of \[32, 32\]"),
    ],
)
def test_half_a_model_makes_no_folder(tmp_path: Path, kind: str, config: str, lost: str, words: str) -> None:
    """A file without some weights, or of another model, gave a KeyError or a folder that nothing loads."""
    source = tmp_path / "a.safetensors"
    save_file({name: t.clone() for name, t in checkpoint(kind).items() if not name.startswith(lost)}, source)
    yaml = write_yaml(tmp_path / "tiny.yaml", config)
    with pytest.raises(InputError, match=words):
        run(source, tmp_path / "folder", config=yaml)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("target", ["new", "old"])
def test_what_fails_leaves_nothing(tmp_path: Path, target: str) -> None:
    """A killed or failing conversion leaves what was there, or nothing."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old/file").write_text("kept")

    def fail(path: Path) -> None:
        path.mkdir()
        (path / "half").write_text("of it")
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(InputError, match="cannot be written: No space left"),
        written_whole(tmp_path / target) as path,
    ):
        fail(path)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old/file").read_text() == "kept"


def test_names_without_text_model(tmp_path: Path) -> None:
    state = checkpoint("v1")
    save_file(
        {name.replace("text_model.", ""): t for name, t in state.items()}, source := tmp_path / "a.ckpt"
    )
    folder = run(source, tmp_path / "folder", config=write_yaml(tmp_path / "tiny.yaml", "v1"))
    assert_same(read_state_dict(folder), {k: t for k, t in state.items() if not COMPUTED.fullmatch(k)})


def test_a_family_without_a_pipeline(tmp_path: Path) -> None:
    """The text encoder of LAION-400M is no part of any pipeline that is written here."""
    section = tiny_config("v1")
    bert = {"n_embed": 32, "n_layer": 1, "vocab_size": 100}
    target = "ldm.modules.encoders.modules.BERTEmbedder"
    section["params"]["cond_stage_config"] = {"target": target, "params": bert}
    with torch.device("meta"):
        model = instantiate_from_config(section)
    source, yaml = tmp_path / "a.safetensors", tmp_path / "tiny.yaml"
    save_file({name: torch.zeros(t.shape) for name, t in model.state_dict().items()}, source)
    yaml.write_text(json.dumps({"model": section}))
    with pytest.raises(InputError, match="diffusers has no pipeline for"):
        run(source, tmp_path / "folder", config=str(yaml))
    assert not (tmp_path / "folder").exists()


# Autoencoders


def autoencoder(kind: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = checkpoint(kind).items()
    return {
        name: torch.randn(t.shape, generator=generator)
        for name, t in state
        if name.startswith("first_stage_model.")
    }


@pytest.mark.parametrize("form", ["bare", "prefixed", "whole", "vae folder", "diffusers file", "pipeline"])
def test_another_autoencoder(tmp_path: Path, form: str) -> None:
    from ldm.weights.vae import check_vae, vae_file

    vae, state, source = autoencoder("v1", 5), checkpoint("v1"), tmp_path / "model.safetensors"
    save_file(state, source)
    path = tmp_path / "vae.safetensors"
    bare = {name.removeprefix("first_stage_model."): t for name, t in vae.items()}
    if form == "bare":  # with what training leaves
        torch.save({"state_dict": bare | {"loss.logvar": torch.zeros(())}}, path)
    elif form == "prefixed":
        save_file(vae, path)
    else:
        save_file(state | vae, path)
    if form in ("vae folder", "diffusers file", "pipeline"):
        folder = run(path, tmp_path / "folder", config=write_yaml(tmp_path / "tiny.yaml", "v1"))
        weights = folder / "vae/diffusion_pytorch_model.safetensors"
        path = {"vae folder": folder / "vae", "diffusers file": weights, "pipeline": folder}[form]
        assert vae_file(path) == weights
    else:
        assert vae_file(path) == path
    check_vae(path, tiny_config("v1"))
    found = read_state_dict(run(source, tmp_path / "out.safetensors", vae=path))
    assert_same(found, state | vae)


def test_autoencoders_that_do_not_fit(tmp_path: Path) -> None:
    from ldm.weights.vae import check_vae

    save_file(checkpoint("v1"), source := tmp_path / "model.safetensors")
    save_file(autoencoder("x4", 5), factor := tmp_path / "f4.safetensors")
    wide = autoencoder("v1", 5)
    for name in ("first_stage_model.decoder.conv_in.weight", "first_stage_model.encoder.conv_out.weight"):
        axis = 1 if "decoder" in name else 0
        wide[name] = torch.cat([wide[name]] * 4, dim=axis)
    save_file(wide, channels := tmp_path / "sixteen.safetensors")
    for path in (factor, channels):
        with pytest.raises(InputError, match=f"the autoencoder {path} does not fit the model") as caught:
            check_vae(path, tiny_config("v1"))
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match=f"the autoencoder {path} does not fit the model"):
            run(source, tmp_path / "out.ckpt", vae=path)
    save_file({"a": torch.zeros(1)}, none := tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="holds no autoencoder"):
        check_vae(none, tiny_config("v1"))
    with pytest.raises(InputError, match="no checkpoint at"):
        check_vae(tmp_path / "missing.pt", tiny_config("v1"))
    assert not (tmp_path / "out.ckpt").exists()
