"""The encoded training set, and the file that keeps it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import TRAINING, new_model

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.scenes import scene
from ldm.training import latents
from ldm.training.config import training_config
from ldm.training.dataset import render_scenes
from ldm.training.latents import cached_latents, encode_scenes, fingerprint

SMALL = TRAINING | {"images": 3}


@pytest.fixture
def model() -> LatentDiffusion:
    torch.manual_seed(0)
    return new_model()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_encoded(model: LatentDiffusion) -> None:
    config = training_config(SMALL)
    data = encode_scenes(model, config)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in data.items()} == {
        "mean": (torch.float16, (3, 4, 4, 4)),
        "std": (torch.float16, (3, 4, 4, 4)),
        "tokens": (torch.int32, (3, 77)),
    }
    assert (data["std"] > 0).all()
    _, captions, _ = render_scenes(config)
    assert torch.equal(data["tokens"].long(), model.cond_stage_model.tokenizer(captions))


def test_the_file_is_used_again(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, config = tmp_path / "latents.safetensors", training_config(SMALL)
    first = cached_latents(model, config, path)
    monkeypatch.setattr(latents, "encode_scenes", None)
    assert equal(cached_latents(model, config, path), first)
    other_steps = training_config(SMALL | {"steps": 9, "learning_rate": 0.5, "batch_size": 1})
    assert equal(cached_latents(model, other_steps, path), first)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"images": 4}, "images"),
        ({"image_size": 40}, "image_size"),
        (lambda model, _: model.first_stage_model.quant_conv.bias.data.add_(1), "first stage"),
        (lambda _, patch: patch.setattr(scene, "VERSION", scene.VERSION + 1), "version of the scenes"),
    ],
    ids=["seed", "images", "image_size", "first stage", "scenes"],
)
def test_the_file_of_other_settings_is_not_used(
    model: LatentDiffusion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any] | Callable,
    named: str,
) -> None:
    """The file was used whatever it had been made from: latents of an old first stage for a new one."""
    path = tmp_path / "latents.safetensors"
    cached_latents(model, training_config(SMALL), path)
    if callable(change):
        change(model, monkeypatch)
        change = {}
    config = training_config(SMALL | change)
    expected = encode_scenes(model, config)
    assert equal(cached_latents(model, config, path), expected)
    assert caplog.messages == [
        f"the latents in {path} cannot be used (another {named}): encoding the scenes again"
    ]
    caplog.clear()
    assert equal(cached_latents(model, config, path), expected)
    assert caplog.messages == []


def test_a_damaged_file_is_not_used(
    model: LatentDiffusion, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file torn by a killed run made every later run fail."""
    path, config = tmp_path / "latents.safetensors", training_config(SMALL)
    first = cached_latents(model, config, path)
    path.write_bytes(path.read_bytes()[:-10])
    assert equal(cached_latents(model, config, path), first)
    assert len(caplog.messages) == 1
    assert equal(cached_latents(model, config, path), first)
    assert len(caplog.messages) == 1


def test_a_fingerprint_is_of_names_shapes_and_values() -> None:
    layer = torch.nn.Linear(2, 3)
    whole = fingerprint(layer)
    assert whole == fingerprint(layer)
    assert whole != fingerprint(torch.nn.Sequential(layer))
    with torch.no_grad():
        layer.weight[1, 1] = torch.nextafter(layer.weight[1, 1], torch.tensor(9.0))
    changed = fingerprint(layer)
    assert changed != whole
    layer.weight = torch.nn.Parameter(layer.weight.detach().reshape(2, 3))
    assert fingerprint(layer) != changed
