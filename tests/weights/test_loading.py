"""From a YAML file and a checkpoint to a model: which files, and what their markers mean."""

import errno
import os
from pathlib import Path

import omegaconf
import pytest
import tiny
import torch
from safetensors.torch import save_file

from ldm.errors import InputError
from ldm.weights import loading
from ldm.weights.description import describe
from ldm.weights.loading import (
    advised_scale,
    choose_model,
    find,
    load_model,
    read_config,
    read_section,
)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return tiny.state_dict()


@pytest.fixture
def load(tmp_path, weights):
    """Loads the miniature: its config with `changes`, its file with more tensors."""

    def call(extra=None, changes=None, **options):
        path = tmp_path / "model.safetensors"
        save_file(weights | (extra or {}), path)
        return load_model(tiny.model_section(changes or {}), path, **options)

    return call


MARKED = "is marked as v-prediction"


def test_unmarked_file(load, caplog):
    model = load()
    assert (model.parameterization, model.zero_terminal_snr, model.weights_used) == ("eps", False, "raw")
    assert not caplog.messages


@pytest.mark.parametrize("ztsnr", [False, True])
def test_marked_file_predicts_v(load, caplog, ztsnr):
    """Such a file was run as eps without a notice: the images were noise."""
    markers = {"v_pred": torch.tensor([])} | ({"ztsnr": torch.tensor([])} if ztsnr else {})
    model = load(markers)
    assert (model.parameterization, model.zero_terminal_snr) == ("v", ztsnr)
    first, *rest = caplog.messages
    assert f"{MARKED}: its UNet is taken to predict v" in first
    assert [message.partition(" is marked as ")[2] for message in rest] == (
        ["trained with zero terminal SNR: its schedule is rescaled"] if ztsnr else []
    )


def test_marked_file_and_config_agree(load, caplog):
    model = load({"v_pred": torch.tensor([])}, {"parameterization": "v"})
    assert model.parameterization == "v"
    assert not caplog.messages


def test_marked_file_and_config_at_odds(load, caplog):
    """What the user has written counts, and is said to be at odds with the file."""
    model = load({"v_pred": torch.ones(1), "ztsnr": torch.ones(1)}, {"parameterization": "eps"})
    assert (model.parameterization, model.zero_terminal_snr) == ("eps", False)
    first, second = caplog.messages
    assert f"{MARKED}, at odds with the config's parameterization: eps, which is used" in first
    assert "zero terminal SNR: ignored, as its UNet predicts eps" in second


def test_zero_terminal_snr_of_a_config_that_says_v(load, caplog):
    assert load({"ztsnr": torch.ones(1)}, {"parameterization": "v"}).zero_terminal_snr
    assert len(caplog.messages) == 1


def averaged(weights) -> dict[str, torch.Tensor]:
    """The weights of the UNet once more, as averages that are all zero."""
    names = [name for name in weights if name.startswith("model.")]
    return {
        "model_ema." + name.removeprefix("model.").replace(".", ""): torch.zeros_like(weights[name])
        for name in names
    }


@pytest.mark.parametrize(
    ("use_ema", "which", "used"),
    [(False, None, "raw"), (True, None, "ema"), (True, "raw", "raw"), (False, "ema", "ema")],
)
def test_weights_used(load, weights, use_ema, which, used):
    """An image's settings had null for the weights that the config chose."""
    model = load(averaged(weights), {"use_ema": use_ema}, which=which)
    assert model.weights_used == used
    assert (model.model.diffusion_model.out[2].weight.abs().sum() == 0) == (used == "ema")


def test_more_weights_than_the_model_has(load, weights, caplog):
    """Merges and textual inversions trained into a file were refused."""
    model = load({"embedding_manager.string_to_param.x": torch.zeros(2, 32)})
    name = "model.diffusion_model.out.2.weight"
    assert torch.equal(model.state_dict()[name], weights[name])
    assert len(caplog.messages) == 1
    assert "'embedding_manager.string_to_param.x'" in caplog.text


@pytest.fixture
def parsed(monkeypatch) -> list[Path]:
    """The YAML files that are read, one after the other."""
    paths, load = [], omegaconf.OmegaConf.load
    monkeypatch.setattr(omegaconf.OmegaConf, "load", lambda path: paths.append(path) or load(path))
    return paths


def test_yaml_is_read_once(tmp_path, parsed):
    """It was parsed anew for every line of a prompt file."""
    path = tiny.write_config(tmp_path / "model.yaml")
    for _ in range(3):
        assert read_config(path) == tiny.MODEL
        assert advised_scale(path, 7.5) == 7.5
    assert parsed == [path]


def test_a_changed_yaml_is_read_again(tmp_path, parsed):
    path = tmp_path / "model.yaml"
    path.write_text("sampling: {scale: 3.0}")
    assert advised_scale(path, 7.5) == 3
    path.write_text("sampling: {scale: 12.0}")
    assert advised_scale(path, 7.5) == 12
    path.write_text("sampling: {scale: 13.0}")
    os.utime(path, ns=(0, 0))  # the clock of a file system may not have moved on
    assert advised_scale(path, 7.5) == 13
    assert len(parsed) == 3


def test_sections_are_copies(tmp_path):
    path = tiny.write_config(tmp_path / "model.yaml")
    read_config(path)["params"].clear()
    assert read_config(path) == tiny.MODEL


def test_relative_paths_are_of_the_working_folder(tmp_path, monkeypatch):
    for name, scale in (("a", 3), ("b", 4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.yaml").write_text(f"sampling: {{scale: {scale}}}")
        os.utime(tmp_path / name / "m.yaml", ns=(0, 0))
        monkeypatch.chdir(tmp_path / name)
        assert advised_scale(Path("m.yaml"), 7.5) == scale


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [", "is not valid YAML"),
        ("a: ${b}", "is not valid YAML"),
        ("[1, 2]", "has no model: section"),
        ("model: 3", "has no model: section"),
        ("model: {params: {}}", "has no target"),
        ("\0", "is not valid YAML"),
    ],
)
def test_unusable_yaml(tmp_path, monkeypatch, content, words):
    """The message names the file as the user did."""
    monkeypatch.chdir(tmp_path)
    Path("model.yaml").write_text(content)
    with pytest.raises(InputError, match=words) as caught:
        read_config(Path("model.yaml"))
    assert " model.yaml " in f" {caught.value} "


def test_yaml_that_is_not_there(tmp_path):
    for path, why in (
        (tmp_path / "none.yaml", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / ("x" * 300), "too long"),
        (tmp_path / "a\0b", "No such file"),
    ):
        with pytest.raises(InputError, match=why):
            read_section(path, "model")


def refuse(*_, **__):
    """In place of a method of Path, as the superuser, whom tests may run as, is permitted everything."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_what_the_system_refuses(tmp_path, monkeypatch):
    """`exists()` raises the OSError of a folder without permission, which is an internal error elsewhere."""
    path = tiny.write_config(tmp_path / "model.yaml")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refuse)
        for call in (
            lambda: find(str(path)),
            lambda: choose_model(str(path), None),
            lambda: choose_model(None, str(path)),
            lambda: choose_model(None, None),
            lambda: read_section(path, "model"),
            lambda: load_model(tiny.model_section({}), path),
        ):
            with pytest.raises(InputError, match="Permission denied"):
                call()
    for name in ("x" * 300, "x/" * 4000):
        with pytest.raises(InputError, match="cannot be opened: File name too long"):
            choose_model(None, name)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="cannot be opened: "):
        choose_model(str(tmp_path / "loop"), None)


def test_find(tmp_path, monkeypatch):
    """The working folder comes first, then the repository."""
    monkeypatch.setattr(loading, "ROOT", tmp_path / "repository")
    monkeypatch.chdir(tmp_path)
    assert find("m.yaml") == tmp_path / "repository" / "m.yaml"
    (tmp_path / "m.yaml").touch()
    assert find("m.yaml") == Path("m.yaml")


def test_native_size():
    assert describe(tiny.MODEL).native_size == 16
    assert describe({"params": {}}).native_size == 512
    with pytest.raises(InputError, match="does not describe a latent diffusion model"):
        describe({"params": {"image_size": "large"}})


def test_advised_scale_that_is_no_number(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text("sampling: {scale: high}")
    with pytest.raises(InputError, match="'high' of its sampling: section is not a number"):
        advised_scale(path, 7.5)
