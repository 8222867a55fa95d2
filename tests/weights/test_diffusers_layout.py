"""Reading diffusers folders: against diffusers itself, in every form that such folders have."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import assert_same
from diffusers_pipelines import KINDS, outputs, tiny_config, tiny_pipeline
from safetensors.torch import load_file, save_file

from ldm.errors import InputError
from ldm.weights.checkpoint import read_state_dict
from ldm.weights.diffusers_layout import folder_hints, unet_file
from ldm.weights.hashes import file_hash, quick_hash
from ldm.weights.header import read_header
from ldm.weights.loading import load_model
from ldm.weights.prediction import file_hints

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[object, Path]]:
    """A tiny pipeline of a kind, and the folder that diffusers made of it."""
    root, made = tmp_path_factory.mktemp("pipelines"), {}

    def get(kind: str) -> tuple[object, Path]:
        if kind not in made:
            made[kind] = tiny_pipeline(kind)
            made[kind].save_pretrained(root / kind)
        return made[kind], root / kind

    return get


@pytest.fixture
def folder(saved: Callable, tmp_path: Path) -> Path:
    """A v1 folder to change."""
    return shutil.copytree(saved("v1")[1], tmp_path / "folder")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(path: Path) -> str:
    """The message of the InputError for a folder, the same for its header and its values: one line."""
    messages = set()
    for read in (read_header, read_state_dict):
        with pytest.raises(InputError) as caught:
            read(path)
        messages.add(str(caught.value))
    (message,) = messages
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_the_networks_equal_those_of_diffusers(saved: Callable, kind: str) -> None:
    pipeline, path = saved(kind)
    model = load_model(tiny_config(kind), path)
    assert_equal(outputs(model, kind), outputs(pipeline, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_is_that_of_the_tensors(saved: Callable, kind: str) -> None:
    _, path = saved(kind)
    found = {name: (t.dtype, tuple(t.shape), t.numel) for name, t in read_header(path).tensors.items()}
    expected = {
        name: (str(t.dtype).removeprefix("torch."), tuple(t.shape), t.numel())
        for name, t in read_state_dict(path).items()
    }
    assert found == expected
    assert read_header(path).map().keys() == found.keys()


def test_the_tokenizer_gives_the_same_ids(saved: Callable) -> None:
    """transformers takes v2's padding, "!", for no part of a text; so there is none in these."""
    texts = ["a red cube", "Two  BLUE spheres, über-sharp & 3.5 m", ""]
    for kind in ("v1", "v2"):
        pipeline, path = saved(kind)
        ids = pipeline.tokenizer(texts, padding="max_length", max_length=77, truncation=True).input_ids
        model = load_model(tiny_config(kind), path)
        assert torch.equal(model.cond_stage_model.tokenizer(texts), torch.tensor(ids))


@pytest.mark.parametrize("kind", ["v1", "v2-v"])
def test_ten_steps_give_the_image_of_diffusers(saved: Callable, kind: str) -> None:
    from ldm.models.diffusion.ddim import DDIMSampler

    pipeline, path = saved(kind)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 10, "guidance_scale": 7.5, "latents": start, "output_type": "pt"}
    expected = pipeline("a red cube", height=64, width=64, **call).images
    model = load_model(tiny_config(kind), path)
    with torch.inference_mode():
        uncond, cond = (model.get_learned_conditioning([text]) for text in ("", "a red cube"))
        latents, _ = DDIMSampler(model).sample(
            10,
            1,
            (4, 8, 8),
            cond,
            verbose=False,
            x_T=start,
            unconditional_guidance_scale=7.5,
            unconditional_conditioning=uncond,
        )
        found = ((model.decode_first_stage(latents) + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert expected.std() > 0.01  # not the same grey everywhere


def test_old_names_of_attention_and_text_encoder(folder: Path) -> None:
    """diffusers before 0.15, and transformers with and without `text_model.`."""
    expected = read_state_dict(folder)
    new = load_file(folder / VAE)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    names = {
        name: re.sub(r"(to_q|to_k|to_v|to_out\.0)(?=\.(weight|bias)$)", lambda m: old[m[1]], name)
        for name in new
    }
    assert sum(name != names[name] for name in new) == 16  # four of the encoder's, four of the decoder's
    save_file({names[name]: t for name, t in new.items()}, folder / VAE)
    text = {name.removeprefix("text_model."): t for name, t in load_file(folder / TEXT).items()}
    for prefix in ("", "text_model."):
        save_file({prefix + name: t for name, t in text.items()}, folder / TEXT)
        assert_same(read_state_dict(folder), expected)


def test_bin_files(folder: Path) -> None:
    expected = read_state_dict(folder)
    for name, binary in (
        (UNET, "unet/diffusion_pytorch_model.bin"),
        (VAE, "vae/diffusion_pytorch_model.bin"),
        (TEXT, "text_encoder/pytorch_model.bin"),
    ):
        torch.save(load_file(folder / name), folder / binary)
        (folder / name).unlink()
    assert_same(read_state_dict(folder), expected)


def test_half_precision_variants_are_read_where_there_is_nothing_else(folder: Path, saved: Callable) -> None:
    expected = read_state_dict(folder)
    saved("v1")[0].save_pretrained(folder, variant="bf16")
    for name in (UNET, VAE, TEXT):
        path = folder / name
        half = {name: t.half() for name, t in load_file(path).items()}
        save_file(half, path.with_suffix(".fp16.safetensors"))
    assert_same(read_state_dict(folder), expected)  # of all these the full precision
    for name in (UNET, VAE, TEXT):
        (folder / name).unlink()
    assert unet_file(folder).name == "diffusion_pytorch_model.fp16.safetensors"
    assert_same(read_state_dict(folder), {name: t.half() for name, t in expected.items()})


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(saved: Callable, tmp_path: Path, variant: str | None) -> None:
    pipeline, path = saved("v2")
    pipeline.save_pretrained(tmp_path, max_shard_size="300KB", variant=variant)
    shards = [path for path in (tmp_path / "unet").glob("*.safetensors") if "of" in path.name]
    assert len(shards) > 2
    assert_same(read_state_dict(tmp_path), read_state_dict(path))
    assert unet_file(tmp_path) == min(shards)
    missing = shards[1]
    missing.unlink()
    message = refusal(tmp_path)
    assert missing.name in message
    assert shards[0].name not in message


def test_a_folder_has_the_hash_of_its_unet(folder: Path) -> None:
    assert quick_hash(folder) == quick_hash(folder / UNET)
    assert file_hash(folder) == file_hash(folder / UNET)


def test_what_the_scheduler_says_of_the_prediction(saved: Callable, folder: Path) -> None:
    assert folder_hints(saved("v1")[1]).parameterization == "eps"
    assert folder_hints(saved("v2-v")[1]).parameterization == "v"
    assert read_header(saved("v2-v")[1]).metadata == {"prediction_type": "v_prediction"}
    assert file_hints(saved("v2-v")[1]).hint.parameterization == "v"
    scheduler = folder / "scheduler/scheduler_config.json"
    config = tiny_config("v1")
    del config["params"]["parameterization"]
    change_json(scheduler, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert folder_hints(folder).zero_snr
    assert "ztsnr" in read_header(folder).tensors
    model = load_model(config, folder)
    assert (model.parameterization, model.zero_terminal_snr) == ("v", True)
    change_json(scheduler, prediction_type="sample")
    assert "sample" in refusal(folder)
    scheduler.unlink()
    assert folder_hints(folder).parameterization is None


def test_another_scale_of_the_latents_is_a_weight(folder: Path) -> None:
    assert "scale_factor" not in read_state_dict(folder)
    change_json(folder / "vae/config.json", scaling_factor=0.5)
    assert read_state_dict(folder)["scale_factor"] == torch.tensor(0.5)
    assert read_header(folder).tensors["scale_factor"].shape == ()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_half_a_folder(folder: Path, part: str) -> None:
    for path in (folder / part).glob("*.safetensors"):
        path.unlink()
    assert f"{folder / part} has no weights" in refusal(folder)
    shutil.rmtree(folder / part)
    assert f"{folder} lacks {part}/ of its StableDiffusionPipeline" in refusal(folder)


def test_a_text_encoder_without_its_config(folder: Path) -> None:
    """OpenCLIP's weights were taken for CLIP's, and all of the text encoder was said to be missing."""
    (folder / "text_encoder/config.json").unlink()
    assert "lacks text_encoder/config.json" in refusal(folder)


@pytest.mark.parametrize("suffix", ["safetensors", "fp16.safetensors", "bin"])
def test_shards_without_their_index(folder: Path, suffix: str) -> None:
    """The refusal named a file that no whole folder of shards has."""
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    whole.rename(folder / f"unet/diffusion_pytorch_model-00001-of-00002.{suffix}")
    assert "unet has shards of weights without their index" in refusal(folder)


def test_depth_without_its_estimator(saved: Callable, tmp_path: Path) -> None:
    path = shutil.copytree(saved("depth")[1], tmp_path / "depth")
    shutil.rmtree(path / "depth_estimator")
    assert "lacks depth_estimator/" in refusal(path)


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "FluxPipeline", "LDMTextToImagePipeline"])
def test_other_pipelines_are_named(folder: Path, name: str) -> None:
    change_json(folder / "model_index.json", _class_name=name)
    message = refusal(folder)
    assert f"{folder} is a {name}, which cannot be run here" in message
    assert "StableDiffusionDepth2ImgPipeline" in message


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("model_index.json", "{", "is not valid JSON"),
        ("model_index.json", "[]", "holds list instead of a JSON object"),
        ("model_index.json", "{}", "is of no pipeline class"),
        ("text_encoder/config.json", "\xff", "is not valid JSON"),
        ("scheduler/scheduler_config.json", '{"prediction_type": ["epsilon"]}', "has prediction_type"),
        (UNET, "", "is empty"),
        (UNET, "version https://git-lfs.github.com/spec/v1", "a git-LFS pointer"),
    ],
)
def test_damaged_folders(folder: Path, file: str, content: str, expected: str) -> None:
    (folder / file).write_bytes(content.encode("latin-1"))
    message = refusal(folder)
    assert expected in message
    assert str(folder) in message


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({}, "lists no weights"),
        ({"weight_map": []}, "lists no weights"),
        ({"weight_map": {"a": "../../other.safetensors"}}, "which is not a file of its folder"),
        (
            {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}},
            "one.safetensors, two.safetensors",
        ),
    ],
)
def test_indices_without_their_shards(folder: Path, index: dict, expected: str) -> None:
    (folder / UNET).unlink()
    (folder / f"{UNET}.index.json").write_text(json.dumps(index))
    assert expected in refusal(folder)


def test_weights_that_are_missing_or_strange(saved: Callable, tmp_path: Path) -> None:
    """A key without query and value, a layer of an absurd number: the loader names what it does not find."""
    path = shutil.copytree(saved("v2")[1], tmp_path / "v2")
    text = load_file(path / TEXT)
    del text[next(name for name in text if name.endswith("layers.1.self_attn.k_proj.bias"))]
    save_file(text, path / TEXT)
    strange = {"down_blocks.999999999.resnets.0.norm1.weight": torch.zeros(1)}
    save_file(load_file(path / UNET) | strange, path / UNET)
    with pytest.raises(InputError, match=r"resblocks\.1\.attn\.in_proj_bias.*999999999"):
        load_model(tiny_config("v2"), path)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    assert "a folder without model_index.json" in refusal(tmp_path)
