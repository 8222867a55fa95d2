"""The safety checker: scores, files, what is refused, and what a pipeline does with its verdicts."""

import functools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from commands import Result, refused
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from run_helpers import manifest
from tiny_safety import (
    CONCEPT,
    CONFIG,
    ENCODER,
    IMAGES,
    PUBLISHED_PREPROCESSING,
    SIDE,
    SPECIAL,
    VISION,
    colour_blocks,
    embeddings,
    prepared,
    reference_checker,
    write_checker,
)
from torch.nn.functional import normalize

from ldm.errors import InputError
from ldm.images.watermark import read_watermark
from ldm.pipeline.safety import Safety, SafetyChecker, load_safety_checker
from ldm.weights import loading

ROOT = Path(__file__).parents[2]


def reference_scores(
    reference: StableDiffusionSafetyChecker, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
    """(special care, concepts, flags). diffusers keeps the scores to itself: its `round` is recorded."""
    scores = []

    def listening(value: float, digits: int) -> float:
        scores.append(round(value, digits))
        return scores[-1]

    module = sys.modules[StableDiffusionSafetyChecker.__module__]
    monkeypatch.setattr(module, "round", listening, raising=False)
    _, flags = reference(prepared(images), [np.zeros(1)] * len(images))
    found = torch.tensor(np.array(scores, np.float32)).reshape(len(images), 20)
    return found[:, :3], found[:, 3:], flags


Write = Callable[..., Path]


@pytest.fixture(scope="module")
def reference() -> StableDiffusionSafetyChecker:
    return reference_checker()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return functools.partial(write_checker, tmp_path)


def fault(folder: Path) -> str:
    """The message of the InputError that loading raises: one line."""
    with pytest.raises(InputError) as error:
        load_safety_checker(folder)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_flags_and_scores_are_those_of_diffusers(write, reference, monkeypatch):
    checker = load_safety_checker(write())
    special, concepts, flags = reference_scores(reference, IMAGES, monkeypatch)
    found_special, found_concepts = checker.scores(IMAGES)
    torch.testing.assert_close(found_special, special, rtol=0, atol=1e-6)
    torch.testing.assert_close(found_concepts, concepts, rtol=0, atol=1e-6)
    assert checker(IMAGES) == flags
    assert 60 < sum(flags) < 240  # of 300
    assert 30 < (special > 0).any(dim=1).sum() < 270


def test_special_care_changes_the_outcome(write, reference, monkeypatch):
    """Two images are equally near to a concept, just below its threshold; one is near special care, too."""
    x = embeddings(reference, IMAGES)
    other = int((x @ x[0]).argmin())
    images, first, second = [IMAGES[0], IMAGES[other]], x[0], x[other]
    assert first @ second < 0.9
    between = normalize(first + second, dim=0)
    embeds = {SPECIAL: torch.stack([-first, first, first]), CONCEPT: torch.stack([between] * 17)}
    never = {f"{SPECIAL}_weights": torch.full((3,), 2.0), f"{CONCEPT}_weights": torch.full((17,), 2.0)}
    never[f"{CONCEPT}_weights"][9] = between @ first + 0.005
    assert load_safety_checker(write(**embeds, **never))(images) == [False, False]

    special_care = {f"{SPECIAL}_weights": torch.tensor([2.0, 0.99, 1.005])}
    changes = embeds | never | special_care
    checker = load_safety_checker(write(**changes))
    assert checker(images) == [True, False]
    special, concepts = checker.scores(images)
    # what stands to the left of the first positive score is not adjusted, what stands to its right is
    torch.testing.assert_close(special[0], torch.tensor([-3, 0.01, 0.005]))
    torch.testing.assert_close(concepts[:, 9], torch.tensor([0.005, -0.005]))

    for name, value in changes.items():
        monkeypatch.setattr(getattr(reference, name), "data", value)
    expected = reference_scores(reference, images, monkeypatch)
    torch.testing.assert_close((special, concepts), expected[:2], rtol=0, atol=1e-6)
    assert checker(images) == expected[2]


def test_scores_have_three_digits(write):
    for scores in load_safety_checker(write()).scores(IMAGES[:50]):
        torch.testing.assert_close(scores * 1000, (scores * 1000).round(), rtol=0, atol=1e-4)


def test_a_score_rounded_to_zero_is_not_flagged(write, reference):
    cosines = embeddings(reference, IMAGES[:1])[0] @ normalize(reference.concept_embeds).T
    thresholds = {f"{SPECIAL}_weights": torch.ones(3), f"{CONCEPT}_weights": cosines.detach() - 0.0004}
    assert load_safety_checker(write(**thresholds))(IMAGES[:1]) == [False]
    thresholds[f"{CONCEPT}_weights"][5] -= 0.0002
    assert load_safety_checker(write(**thresholds))(IMAGES[:1]) == [True]


def test_each_image_counts_for_itself(write):
    """Of any size, alone or in a batch, in a list or an array; none at all is no error."""
    checker = load_safety_checker(write())
    images = [colour_blocks(seed, 8 + 9 * seed, 300 - 11 * seed) for seed in range(20)]
    assert [checker([image])[0] for image in images] == checker(images)
    assert checker(np.stack(IMAGES[:9])) == checker(IMAGES[:9])
    assert checker([]) == []


def test_half_precision_around_it_changes_nothing(write):
    checker = load_safety_checker(write())
    expected = checker.scores(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(*pair) for pair in zip(checker.scores(IMAGES), expected, strict=True))


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_published_layout(write, reference, form, dtype):
    folder = write(form, dtype)
    (folder / "preprocessor_config.json").write_text(json.dumps(PUBLISHED_PREPROCESSING))
    checker = load_safety_checker(folder)
    weights = checker.clip.state_dict()
    assert weights.keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(weights[name], tensor.to(dtype).float())
    special, concepts = checker.scores(IMAGES)
    assert special.dtype == concepts.dtype == torch.float32
    flags = reference(prepared(IMAGES), [np.zeros(1)] * 300)[1]
    assert np.mean(np.array(checker(IMAGES)) == flags) >= (1 if dtype == torch.float32 else 0.9)


def test_folder_written_by_diffusers(reference, tmp_path):
    """transformers 5 leaves out a part of the encoder's names."""
    reference.save_pretrained(tmp_path)
    assert load_safety_checker(tmp_path)(IMAGES) == reference(prepared(IMAGES), [np.zeros(1)] * 300)[1]


def test_safetensors_come_first(write):
    folder = write()
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    load_safety_checker(folder)


def test_pretrained_class_reads_our_spelling_of_the_published_names(write):
    """The fixture is what it says: diffusers itself reads it and gives the same flags."""
    folder = write()
    other = StableDiffusionSafetyChecker.from_pretrained(folder, local_files_only=True).eval()
    expected = other(prepared(IMAGES), [np.zeros(1)] * 300)[1]
    assert load_safety_checker(folder)(IMAGES) == expected


@pytest.mark.parametrize("shape", [(40, 48), (97, 33), (32, 32), (16, 20), (64, 64), (31, 200)])
def test_preprocessing_is_that_of_transformers(write, shape):
    images = [np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)]
    found = load_safety_checker(write()).preprocess(images)
    assert found.shape == (1, 3, SIDE, SIDE)
    assert torch.equal(found, prepared(images))
    images[0] = images[0] // 3 + 80  # so that bicubic overshoots are not clipped, once or twice
    found = load_safety_checker(write()).preprocess(images)
    by_torchvision = transformers.CLIPImageProcessor(size=SIDE, crop_size=SIDE)(images, return_tensors="pt")
    two_levels = 2.01 / 255 / 0.26
    torch.testing.assert_close(found, by_torchvision.pixel_values, rtol=0, atol=two_levels)


@pytest.mark.parametrize("shape", [(3, 40), (40, 1), (3, 3), (1, 1)])
def test_narrow_images_are_not_taken_for_channels_first(write, shape):
    image = np.full((*shape, 3), (255, 0, 0), np.uint8)
    mean, std = (torch.tensor(PUBLISHED_PREPROCESSING[name]) for name in ("image_mean", "image_std"))
    expected = (torch.tensor([1.0, 0, 0]) - mean) / std
    found = load_safety_checker(write()).preprocess([image])
    torch.testing.assert_close(found, expected[None, :, None, None].expand(found.shape))


def test_preprocessor_config_is_followed(write):
    folder = write()
    settings = {"size": {"shortest_edge": 36}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.1]}
    settings |= {"resample": 2, "crop_size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    assert torch.equal(load_safety_checker(folder).preprocess(IMAGES[:3]), prepared(IMAGES[:3], **settings))


def test_missing_files(write, tmp_path):
    advice = "put the files of the published safety checker there"
    lacks = "no model.safetensors or pytorch_model.bin in"
    assert fault(tmp_path / "nowhere") == f"{lacks} {tmp_path / 'nowhere'}: {advice}"
    (tmp_path / "file").touch()
    assert fault(tmp_path / "file") == f"{lacks} {tmp_path / 'file'}: {advice}"
    folder = write()
    (folder / "config.json").unlink()
    assert fault(folder) == f"no config.json in {folder}: {advice}"
    folder = write()
    (folder / "model.safetensors").unlink()
    assert fault(folder) == f"{lacks} {folder}: {advice}"
    (folder / "model.safetensors").symlink_to("/nowhere")
    assert fault(folder) == f"{lacks} {folder}: {advice}"


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"null", b'"clip"', b"[" * 100_000])
def test_broken_json(write, name, content):
    folder = write()
    (folder / name).write_bytes(content)
    assert fault(folder).startswith(f"{folder / name} holds no settings (")


def test_json_that_cannot_be_opened(write):
    folder = write()
    (folder / "preprocessor_config.json").mkdir()
    assert "holds no settings ([Errno 21] Is a directory" in fault(folder)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_type": "bert"}, "model_type is 'bert' instead of 'clip'"),
        ({"model_type": None}, "model_type is None instead of 'clip'"),
        ({"vision_config": None}, "TypeError"),
        ({"vision_config": [1]}, "TypeError"),
        ({"vision_config": {**VISION, "hidden_size": "16"}}, "hidden_size"),
        ({"vision_config": {**VISION, "num_attention_heads": 3}}, "16"),
        ({"vision_config": {**VISION, "patch_size": [8]}}, "TypeError"),
        ({"vision_config": {**VISION, "hidden_act": "new\nline"}}, "KeyError"),
        ({"projection_dim": "wide"}, "projection_dim"),
        ({"projection_dim": -1}, "negative dimension"),
    ],
)
def test_wrong_config(write, changes, why):
    folder = write()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    message = fault(folder)
    assert message.startswith(f"the settings in {folder} do not make a safety checker (")
    assert why in message


@pytest.mark.parametrize("name", ["projection_dim", "vision_config", "model_type"])
def test_incomplete_config(write, name):
    folder = write()
    (folder / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != name}))
    assert name in fault(folder)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"crop_size": 24}, "images are prepared as [3, 24, 24], the encoder takes [3, 32, 32]"),
        ({"do_center_crop": False}, "images are prepared as [3, 32, 64]"),
        ({"image_mean": [0.5, 0.5]}, "mean"),
        ({"image_std": "one"}, "one"),
        ({"resample": 99}, "99"),
        ({"size": {"side": 32}}, "side"),
    ],
)
def test_wrong_preprocessing(write, settings, why):
    folder = write()
    (folder / "preprocessor_config.json").write_text(json.dumps(PUBLISHED_PREPROCESSING | settings))
    message = fault(folder)
    assert message.startswith(f"the settings in {folder} do not make a safety checker (")
    assert why in message


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({CONCEPT: None}, "1 of 44 weights are missing (first concept_embeds)"),
        ({"visual_projection.weight": None}, "missing (first visual_projection.weight)"),
        ({CONCEPT: torch.zeros(16, 8)}, "(first concept_embeds: [16, 8] instead of [17, 8])"),
        ({f"{SPECIAL}_weights": torch.zeros(3, 1)}, "[3, 1] instead of [3]"),
        (
            {"text_model.a": torch.zeros(1), CONCEPT: None},
            "1 weights are not of this model (first 'text_model.a')",
        ),
        ({f"{CONCEPT}_weights": torch.full((17,), torch.nan)}, "holds NaN or infinity"),
        ({"visual_projection.weight": torch.full((8, 16), torch.inf)}, "holds NaN or infinity"),
    ],
)
def test_wrong_weights(write, changes, why):
    folder = write(**changes)
    message = fault(folder)
    assert message.startswith(str(folder / "model.safetensors"))
    assert why in message


def test_further_weights_are_left_out_with_a_notice(write, reference, caplog):
    checker = load_safety_checker(write(**{"text_model.a": torch.zeros(1)}))
    assert checker.clip.state_dict().keys() == reference.state_dict().keys()
    assert "1 of its weights are not of this model and are left out ('text_model.a')" in caplog.text


def test_another_clip_model(tmp_path):
    """CLIP without concepts has the same model_type."""
    text = {**ENCODER, "vocab_size": 4, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig.from_dict({**CONFIG, "text_config": text})
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    assert "4 of 44 weights are missing (first special_care_embeds)" in fault(tmp_path)


def test_damaged_weights(write):
    folder = write()
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert "cut short" in fault(folder)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git-LFS pointer" in fault(folder)
    weights.write_bytes(b"")
    assert "is empty" in fault(folder)


class Hostile:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_code_in_a_bin_is_refused_and_never_runs(write, tmp_path, options):
    folder, mark = write("pytorch_model.bin"), tmp_path / "it-ran"
    state = {CONCEPT: torch.zeros(17, 8), "code": Hostile(mark)}
    torch.save(state, folder / "pytorch_model.bin", **options)
    assert str(folder / "pytorch_model.bin") in fault(folder)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists()  # it would have worked


ALONE = """
import socket, sys
def refuse(*arguments): raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = refuse
from pathlib import Path
import ldm.pipeline.safety
heavy = [name for name in ("torch", "transformers", "PIL", "safetensors") if name in sys.modules]
assert not heavy, heavy
import numpy as np
print(ldm.pipeline.safety.load_safety_checker(Path(sys.argv[1]))([np.zeros((9, 9, 3), np.uint8)]))
assert "diffusers" not in sys.modules
"""


def test_alone_without_network_and_without_a_word(write, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ALONE, str(write())]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
    assert result.stdout in ("[True]\n", "[False]\n")
    assert result.returncode == 0


# A run's images, checked.

Command = Callable[..., Result]


@pytest.fixture
def txt2img(command: Command, model: tuple[Path, Path]) -> Command:
    """Run the command: two steps, a batch of four images of 16x16 pixels."""
    base = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 2, "--n_samples", 4, "--n_iter", 1]
    base += ["--prompt", "a cat", "--watermark", "none"]
    return lambda *argv, folder="out": command("txt2img", *base, *argv, folder=folder)


@pytest.fixture
def linked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write) -> Path:
    """A linked safety checker that finds everything: all images are nearer than -2 to all concepts."""
    (tmp_path / "root/models").mkdir(parents=True)
    folder = write(concept_embeds_weights=torch.full((17,), -2.0))
    (tmp_path / "root/models/safety-checker").symlink_to(folder)
    monkeypatch.setattr(loading, "ROOT", tmp_path / "root")
    return folder


@pytest.fixture
def checker(monkeypatch: pytest.MonkeyPatch, linked: Path) -> Path:
    """One that finds the second and third of every four images."""
    monkeypatch.setattr(
        SafetyChecker, "__call__", lambda self, images: [False, True, True, False][: len(images)]
    )
    return linked


@pytest.mark.parametrize("mode", ["auto", "on", "flag"])
def test_found_images_are_black_or_marked(txt2img: Command, checker, mode: str) -> None:
    plain = txt2img("--safety", "off", folder="plain")
    result = txt2img("--safety", mode)
    assert (result.code, result.err) == (0, [])
    flags = [False, True, True, False]
    assert [s["nsfw_content_detected"] for s in result.settings] == flags
    assert [line["nsfw_content_detected"] for line in manifest(result.folder)] == flags
    for image, other, found in zip(result.images, plain.images, flags, strict=True):
        assert np.array_equal(image, other * (not found or mode == "flag"))
    assert all("nsfw_content_detected" not in s for s in plain.settings)


def test_black_images_have_a_watermark(txt2img: Command, checker) -> None:
    """As in the original, which checked before it marked."""
    argv = ["--H", 256, "--W", 256, "--watermark", "StableDiffusionV1", "--ddim_steps", 1]
    result = txt2img(*argv, "--safety", "on")
    assert 0 < result.images[1].max() < 60
    assert read_watermark(result.images[0].astype(np.uint8)) == "StableDiffusionV1"


def test_without_a_checker(txt2img: Command) -> None:
    result = txt2img("--safety", "auto")
    assert result.code == 0
    found = [line for line in result.err if "unchecked" in line]
    assert found == [
        "The images are unchecked: there is no models/safety-checker (--safety off: no such notice)"
    ]
    for mode in ("on", "flag"):
        refused(
            txt2img("--safety", mode, folder="other"), f"--safety {mode}: there is no models/safety-checker"
        )
    refused(txt2img("--safety", "maybe", folder="other"), "invalid choice: 'maybe'")


def test_a_broken_checker_is_refused_before_anything_is_made(txt2img: Command, checker) -> None:
    (checker / "config.json").write_text("{")
    refused(txt2img("--safety", "auto"), "config.json holds no settings")


def test_other_safety_is_another_run(txt2img: Command, checker) -> None:
    txt2img("--safety", "on")
    result = txt2img("--safety", "flag", "--resume")
    assert (result.code, len(result.err)) == (2, 1)
    assert 'safety "on", now "flag"' in result.err[0]


def test_nan_images_are_not_checked() -> None:
    image = np.full((8, 8, 3), 7, np.uint8)
    safety = Safety(lambda images: [True] * len(images))
    (first, found), second = safety([image, None])
    assert (first.max(), found, second) == (0, True, (None, None))
    assert safety([None]) == [(None, None)]


def test_without_a_checker_nothing_is_said_about_images() -> None:
    image = np.full((8, 8, 3), 7, np.uint8)
    (same, found), second = Safety()([image, None])
    assert (same is image, found, second) == (True, None, (None, None))


@pytest.mark.parametrize("name", ["compare", "img2img"])
def test_the_others_check_as_well(command: Command, model, linked, tmp_path, name: str) -> None:
    argv = ["--config", model[0], "--ckpt", model[1], "--safety", "on"]
    if name == "compare":
        argv += ["--x", "steps", 1, 2, "--y", "scale", 1, 2]
    else:
        Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
        argv += ["--init-img", tmp_path / "red.png", "--steps", 2, "--H", 16]
    checked = command(name, *argv)
    assert checked.code == 0
    assert len(checked.paths) > 1
    for image, settings in zip(checked.images, checked.settings, strict=True):
        assert settings["nsfw_content_detected"] is True
        assert image.max() == 0
