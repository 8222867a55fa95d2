"""Latents that are encoded once, and what they depend on."""

import json
import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import encoded, in_memory, write_folder
from tiny_training import DEPTH, INPAINTING, SECOND_STAGE, TRAINING, UPSCALER

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.config import training_config
from ldm.training.data import latents
from ldm.training.data.config import DataConfig
from ldm.training.data.example import Example, InMemory
from ldm.training.data.folder import ImageFolder
from ldm.training.data.latents import Latents, cached, dependencies, fingerprint
from ldm.training.data.loader import loader
from ldm.util import instantiate_from_config

DATA = DataConfig(train={"target": "nothing"}, size=32, latents=True, workers=0)
SIZES = [(32, 32), (64, 16), (32, 30), (16, 60), (40, 40)]


def built(config: dict[str, Any] = SECOND_STAGE) -> LatentDiffusion:
    torch.manual_seed(0)
    return instantiate_from_config(config)


@pytest.fixture
def model() -> LatentDiffusion:
    return built()


def values(found: Latents) -> dict[str, tuple[str, dict[str, torch.Tensor]]]:
    """Caption and tensors by key."""
    generator = torch.Generator().manual_seed(0)
    loaded = {found.key(k): found.load(k, 0, generator) for k in range(len(found))}
    return {key: (one.pop("caption"), one) for key, one in loaded.items()}


Values = dict[str, tuple[str, dict[str, torch.Tensor]]]


def assert_equal(one: Latents | Values, other: Latents | Values) -> None:
    a, b = (values(found) if isinstance(found, Latents) else found for found in (one, other))
    assert a.keys() == b.keys()
    for key, (caption, tensors) in a.items():
        assert caption == b[key][0]
        assert tensors.keys() == b[key][1].keys()
        assert all(torch.equal(x, b[key][1][name]) for name, x in tensors.items())


@torch.no_grad()
def test_latents_are_those_of_the_first_stage(model: LatentDiffusion, tmp_path: Path) -> None:
    source = in_memory([(32, 32)] * 3)
    found = cached(DATA, source, model, tmp_path)
    assert found.captions == ["image 0", "image 1", "image 2"]
    for index in range(3):
        x = torch.from_numpy(source[index].image.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        posterior = model.encode_first_stage(x)
        one = found.load(index, 0, torch.Generator())
        assert one["mean"].dtype == torch.float32
        assert torch.allclose(one["mean"], posterior.mean[0], atol=0.02)
        assert torch.allclose(one["std"], posterior.std[0], rtol=0.02)
    whole = found.first(99)
    assert whole["mean"].shape == (3, 4, 4, 4)
    assert pickle.loads(pickle.dumps(found)).load(1, 0, torch.Generator())["caption"] == "image 1"


def test_the_loader_takes_them(model: LatentDiffusion, tmp_path: Path) -> None:
    data = replace(DATA, buckets=True, bucket_step=8)
    found = cached(data, in_memory(SIZES), model, tmp_path)
    assert len(found.groups) >= 3
    config = training_config(TRAINING | {"steps": 10, "batch_size": 2})
    sizes = set()
    for batch in loader(data, found, config):
        assert batch["mean"].shape == batch["std"].shape
        assert batch.keys() == {"step", "row", "caption", "mean", "std"}
        sizes.add(tuple(batch["mean"].shape[2:]))
    assert len(sizes) >= 3


def test_the_files_are_used_again(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached(DATA, in_memory(SIZES), model, tmp_path)
    monkeypatch.setattr(latents, "_encode", None)
    assert_equal(cached(replace(DATA, workers=3, prefetch=5), in_memory(SIZES), model, tmp_path), first)
    assert list(tmp_path.rglob("*.lock")) == []


CHANGES: dict[str, Callable[[LatentDiffusion], Any] | dict[str, Any]] = {
    "size": {"size": 16},
    "crop": {"crop": "random"},
    "masks": {"masks": True},
    "mirrored images": {"flip": 0.5},
    "buckets": {"buckets": True, "bucket_step": 8},
    "first stage": lambda model: model.first_stage_model.quant_conv.bias.data.add_(1),
}


@pytest.mark.parametrize("named", CHANGES)
def test_what_they_depend_on(
    model: LatentDiffusion, tmp_path: Path, caplog: pytest.LogCaptureFixture, named: str
) -> None:
    """The latents of an old first stage were once used for a new one."""
    source = in_memory(SIZES)
    cached(DATA, source, model, tmp_path / "run")
    change = CHANGES[named]
    data = replace(DATA, **change) if isinstance(change, dict) else DATA
    if callable(change):
        with torch.no_grad():
            change(model)
    other = cached(data, source, model, tmp_path / "run")
    assert len(caplog.messages) == 1
    assert f" have another {named}: encoding the images again" in caplog.messages[0]
    assert_equal(other, cached(data, source, model, tmp_path / "alone"))
    assert len(caplog.messages) == 1


def test_other_examples_are_encoded_anew(model: LatentDiffusion, tmp_path: Path) -> None:
    write_folder(tmp_path / "set", 2)
    before = cached(DATA, ImageFolder(str(tmp_path / "set")), model, tmp_path)
    (tmp_path / "set" / "01.png").write_bytes(encoded(7))
    (tmp_path / "set" / "00.txt").write_text("other words")
    after = cached(DATA, ImageFolder(str(tmp_path / "set")), model, tmp_path)
    assert after.captions == ["other words", "image 1"]
    assert not torch.equal(values(before)["01.png"][1]["mean"], values(after)["01.png"][1]["mean"])


def test_a_depth_models_estimator_is_one_of_the_dependencies() -> None:
    model, source = built(DEPTH), in_memory([(32, 32)])
    before = dependencies(DATA, source, model)
    with torch.no_grad():
        next(model.depth_model.parameters()).add_(1)
    after = dependencies(DATA, source, model)
    assert {name for name in before if before[name] != after[name]} == {"depth estimator"}


def test_a_killed_run_goes_on_where_it_was(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents, "PART", 2)
    source = in_memory([(32, 32)] * 7)
    expected = cached(DATA, source, model, tmp_path / "alone")
    done: list[list[int]] = []
    plain = latents._encoded

    def encode(*arguments: Any) -> dict[str, torch.Tensor]:
        done.append(arguments[2])
        if len(done) == 3 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments)

    monkeypatch.setattr(latents, "_encoded", encode)
    parent = os.getpid()
    if (child := os.fork()) == 0:
        cached(DATA, source, model, tmp_path / "run")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    parts = sorted(file.name for file in (tmp_path / "run").rglob("*.safetensors"))
    assert parts == ["part-00000.safetensors", "part-00001.safetensors"], "whole files or none"
    assert_equal(cached(DATA, source, model, tmp_path / "run"), expected)
    assert done == [[4, 5], [6]], "nothing is encoded twice"


def test_worker_processes_change_nothing(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents, "_PIXELS", 2 * 32**2)
    source = in_memory([(32, 32)] * 7)
    alone = cached(DATA, source, model, tmp_path / "alone")
    assert_equal(cached(replace(DATA, workers=2), source, model, tmp_path / "workers"), alone)


def test_torn_files_are_encoded_again(
    model: LatentDiffusion, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that a full disk or another program tore made every later run fail."""
    source = in_memory([(32, 32)] * 3)
    first = values(cached(DATA, source, model, tmp_path / "run"))
    (file,) = (tmp_path / "run").rglob("*.safetensors")
    for torn in (file.read_bytes()[:-10], b"", b"nonsense" * 9):
        caplog.clear()
        file.write_bytes(torn)
        assert_equal(cached(DATA, source, model, tmp_path / "run"), first)
        (message,) = caplog.messages
        assert message.startswith(f"{file} cannot be used")
        assert message.endswith("its images are encoded again")


def test_processes_share_the_work(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that another process is at is not waited for, until there is nothing else to do."""
    monkeypatch.setattr(latents, "PART", 1)
    source = in_memory([(32, 32)] * 3)
    expected = cached(DATA, source, model, tmp_path / "alone")
    order: list[int] = []
    plain = latents._encode

    def encode(*arguments: Any) -> None:
        order.append(int(arguments[4][0]))
        if order == [0]:  # while this process is at the first part, another one does the last
            last = arguments[5].with_name("part-00002.safetensors")
            plain(*arguments[:4], np.array([2]), last, arguments[6])
        plain(*arguments)

    monkeypatch.setattr(latents, "_encode", encode)
    assert_equal(cached(DATA, source, model, tmp_path / "run"), expected)
    assert order == [0, 1], "what is there by now is not encoded again"


def test_damaged_images_are_left_out_and_named(model: LatentDiffusion, tmp_path: Path) -> None:
    write_folder(tmp_path / "set", 4)
    for number in (0, 2):
        (tmp_path / "set" / f"{number:02}.png").write_bytes(encoded(number)[:200])
    found = cached(DATA, ImageFolder(str(tmp_path / "set")), model, tmp_path)
    assert found.captions == ["image 1", "image 3"]
    assert set(found.left_out) == {"00.png", "02.png"}
    assert set(loader(DATA, found, training_config(TRAINING)).damaged) == {"00.png", "02.png"}
    for number in (1, 3):
        (tmp_path / "set" / f"{number:02}.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match="data: all 4 examples are damaged"):
        cached(DATA, ImageFolder(str(tmp_path / "set")), model, tmp_path)


def test_mirrored_images_have_latents_of_their_own(model: LatentDiffusion, tmp_path: Path) -> None:
    source = in_memory([(32, 32)])
    found = cached(replace(DATA, flip=0.5), source, model, tmp_path / "both")
    upright = cached(DATA, source, model, tmp_path).load(0, 0, torch.Generator())["mean"]
    mirror = InMemory([Example("0", np.ascontiguousarray(source[0].image[:, ::-1]), "")])
    mirrored = cached(DATA, mirror, model, tmp_path).load(0, 0, torch.Generator())["mean"]
    generator = torch.Generator().manual_seed(0)
    seen = [found.load(0, 0, generator)["mean"] for _ in range(60)]
    count = sum(torch.equal(x, mirrored) for x in seen)
    assert 15 < count < 45
    assert count + sum(torch.equal(x, upright) for x in seen) == 60


def test_patches_are_parts_of_the_latents_and_all_that_belongs_to_them(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    """The maps of a part lie where its latents do."""
    columns = np.arange(32, dtype=np.uint8).repeat(32).reshape(32, 32).T
    control = np.stack([columns, columns.T, columns], -1)
    source = InMemory([Example("a", in_memory([(32, 32)])[0].image, "x", {"control": control})])
    whole = cached(DATA, source, model, tmp_path).load(0, 0, torch.Generator())
    found = cached(replace(DATA, patch=16), source, model, tmp_path)
    generator = torch.Generator().manual_seed(0)
    places = set()
    for _ in range(40):
        one = found.load(0, 0, generator)
        left, top = (round(255 * one["control"][k, 0, 0].item()) for k in (0, 1))
        assert left % 8 == top % 8 == 0
        places.add((left // 8, top // 8))
        rows, columns = slice(top // 8, top // 8 + 2), slice(left // 8, left // 8 + 2)
        assert torch.equal(one["mean"], whole["mean"][:, rows, columns])
        assert torch.equal(one["control"], whole["control"][:, top : top + 16, left : left + 16])
    assert places == {(x, y) for x in range(3) for y in range(3)}


@pytest.mark.parametrize("config", [INPAINTING, DEPTH, UPSCALER], ids=["inpainting", "depth", "upscaler"])
def test_further_channels_are_kept_with_them(config: dict[str, Any], tmp_path: Path) -> None:
    model = built(config)
    data = replace(DATA, masks=config is INPAINTING)
    found = cached(data, in_memory([(32, 32)] * 3), model, tmp_path)
    one = found.load(1, 0, torch.Generator())
    channels = model.model.diffusion_model.in_channels - model.channels
    assert one["concat"].shape == (channels, *one["mean"].shape[1:])
    assert_equal(found, cached(data, in_memory([(32, 32)] * 3), model, tmp_path / "again"))


def test_an_inpainting_model_without_masks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an inpainting model is trained with masks: set `masks: true` in"):
        cached(DATA, in_memory([(32, 32)]), built(INPAINTING), tmp_path)


def test_a_folder_of_their_own(model: LatentDiffusion, tmp_path: Path) -> None:
    cached(replace(DATA, cache=str(tmp_path / "large-disk")), in_memory([(32, 32)]), model, tmp_path / "run")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("*.safetensors"))
    (about,) = (tmp_path / "large-disk").rglob("about.json")
    assert json.loads(about.read_text())["size"] == 32


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


@torch.no_grad()
def test_latents_are_encoded_in_float32(model: LatentDiffusion, tmp_path: Path) -> None:
    """bfloat16 was off by twice the posterior's standard deviation, for the whole training."""
    source = in_memory([(32, 32)] * 2)
    x = torch.from_numpy(np.stack([source[k].image for k in range(2)])).permute(0, 3, 1, 2) / 127.5 - 1
    expected = model.encode_first_stage(x)
    found = cached(DATA, source, model, tmp_path)
    for k in range(2):
        one = found.load(k, 0, torch.Generator())
        assert torch.allclose(one["mean"], expected.mean[k], rtol=2**-10, atol=1e-5)
        assert torch.allclose(one["std"], expected.std[k], rtol=2**-10, atol=1e-5)
    assert dependencies(DATA, source, model)["precision"] == "float32"


def test_control_images_stay_with_their_latents(model: LatentDiffusion, tmp_path: Path) -> None:
    """Where some examples had none, those after them silently had the control images of others."""
    examples = []
    for k in range(4):
        control = np.full((16, 16, 3), 10 * k, np.uint8)
        examples.append(
            Example(f"{k}", in_memory([(32, 32)])[0].image, "", {"control": control} if k != 1 else {})
        )
    found = cached(DATA, InMemory(examples), model, tmp_path)
    assert found.keys == ["0", "2", "3"]
    assert found.left_out == {"1": "it has no control"}
    for index, key in enumerate(found.keys):
        control = found.load(index, 0, torch.Generator())["control"]
        assert torch.allclose(control, torch.tensor(int(key) * 10 / 255))


@pytest.mark.parametrize("torn", ["", "[1]", "{"])
def test_a_torn_description_is_written_again(
    model: LatentDiffusion, tmp_path: Path, caplog: pytest.LogCaptureFixture, torn: str
) -> None:
    """A file of no bytes, which a full disk left, ended every later run with a traceback."""
    source = in_memory([(32, 32)] * 2)
    first = cached(DATA, source, model, tmp_path)
    (about,) = tmp_path.rglob("about.json")
    about.write_text(torn)
    caplog.clear()
    cached(replace(DATA, size=40), source, model, tmp_path)
    assert caplog.messages == [f"{about} cannot be read: it is passed over"]
    assert_equal(cached(DATA, source, model, tmp_path), first)
    assert json.loads(about.read_text()) == dependencies(DATA, source, model)
