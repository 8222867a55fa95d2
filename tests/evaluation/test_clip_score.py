"""The CLIP score against transformers' own model; folders that hold none."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tiny_evaluation import pictures, write_clip

from ldm.errors import InputError
from ldm.evaluation.clip_score import ClipScore, check_clip

PROMPTS = ["a cat", "a photograph of an astronaut riding a horse", "a cat", "red " * 100]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_it_is_transformers_similarity(folder: Path) -> None:
    images = pictures(4, 0)
    images[3] = images[3][:40]  # of another size
    mine = ClipScore(folder, torch.device("cpu"))(images, PROMPTS)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        for image, prompt, found in zip(images, PROMPTS, mine, strict=True):  # one at a time
            inputs = tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt")
            inputs["pixel_values"] = processor([image], return_tensors="pt")["pixel_values"]
            output = model(**inputs)
            wanted = output.logits_per_image.item() / model.logit_scale.exp().item()
            assert found == pytest.approx(wanted, abs=1e-5)
    assert mine.std() > 0.01


def test_float32_is_not_rounded_on_a_gpu(folder: Path, events: list[object]) -> None:
    """The embedding of patches, a convolution, had TF32 on CUDA."""
    score = ClipScore(folder, torch.device("cpu"))
    score.model.text_model.register_forward_hook(lambda *_: events.append("text"))
    score.model.vision_model.register_forward_hook(lambda *_: events.append("image"))
    score(pictures(1, 0), PROMPTS[:1])
    cpu = torch.device("cpu")
    assert events == [cpu, "text", "left", cpu, "image", "left"]


def test_tokens_are_clips(folder: Path) -> None:
    """The stand-in's vocabulary is the published one: else another tokenizer would pass the test above."""
    ids = ClipScore(folder, torch.device("cpu")).tokenizer("a photo of a cat")["input_ids"]
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda folder: shutil.rmtree(folder), "is not there"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "has no preprocessor_config.json"),
        (lambda folder: (folder / "vocab.json").unlink(), "has no tokenizer.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "has a config.json that cannot be read"),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "siglip"})),
            "is a model of type 'siglip', not 'clip'",
        ),
    ],
)
def test_folders_of_another_kind(folder: Path, tmp_path: Path, change, why: str) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    change(other)
    with pytest.raises(InputError) as error:
        check_clip(other)
    assert why in str(error.value)
    assert "openai/clip-vit-large-patch14" in str(error.value)


def test_a_file_in_place_of_the_folder(folder: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        check_clip(folder / "config.json")


def test_damaged_weights(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"clip .*other: .*; give a folder in transformers' layout"):
        ClipScore(other, torch.device("cpu"))
