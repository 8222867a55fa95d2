"""Checkpoints: whole or not at all, loaded by other programs, and refused where they are another run's."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.errors import InputError
from ldm.training import checkpoints
from ldm.training.checkpoints import (
    Checkpoints,
    averaged_name,
    check_options,
    check_resumed,
    read_checkpoint,
    write_checkpoint,
)
from ldm.training.files import DiskFull
from ldm.weights.checkpoint import pick_weights, read_state_dict

STATE = {"model.a.weight": torch.ones(2, 3), "cond_stage_model.b": torch.zeros(4)}
FACTS = {"global_step": 7, "identity": {"model": "M", "data": "d"}, "settings": {"seed": 0, "batch_size": 4}}


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last.ckpt", STATE, FACTS, keep=0)
    found = read_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(found["state_dict"]["model.a.weight"], torch.ones(2, 3))
    assert {name: found[name] for name in FACTS} == FACTS
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_averages_have_the_originals_names(tmp_path: Path) -> None:
    """So that the loader finds them: of the UNet, and of a text encoder that was trained, too."""
    names = {name: averaged_name(name) for name in STATE}
    assert names["model.a.weight"] == "model_ema.aweight"
    averages = {names[name]: tensor + 5 for name, tensor in STATE.items()}
    write_checkpoint(tmp_path / "last.ckpt", STATE | averages, FACTS, keep=0)
    state = read_state_dict(tmp_path / "last.ckpt")
    for which, shift in (("raw", 0), ("ema", 5)):
        picked = pick_weights(state, which, path="last.ckpt")
        assert picked.keys() == STATE.keys()
        assert all(torch.equal(picked[name], tensor + shift) for name, tensor in STATE.items())


def test_some_earlier_ones_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        write_checkpoint(tmp_path / "last.ckpt", STATE, FACTS | {"global_step": step}, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["last.ckpt", "step-000015.ckpt", "step-000020.ckpt"]
    assert [read_checkpoint(tmp_path / name)["global_step"] for name in names] == [20, 15, 20]


def test_kept_ones_of_a_run_that_was_given_up(tmp_path: Path) -> None:
    """After a start anew the old run's later files made each new one vanish at once, by their names."""
    for name in ("step-009000.ckpt", "step-1000000.ckpt", "step-best.ckpt", "step-000001.ckpt"):
        (tmp_path / name).touch()
    for step in (5, 10, 15):
        write_checkpoint(tmp_path / "last.ckpt", STATE, FACTS | {"global_step": step}, keep=2)
    kept = {"step-000010.ckpt", "step-000015.ckpt", "step-009000.ckpt", "step-1000000.ckpt", "step-best.ckpt"}
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "last.ckpt"}


def test_a_full_disk_leaves_the_last_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint(path, STATE, FACTS, keep=0)
    before, write = path.read_bytes(), checkpoints.write_ckpt

    def half(state: Any, unfinished: Path, facts: Any) -> None:
        write(state, unfinished, facts=facts)
        unfinished.write_bytes(unfinished.read_bytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_ckpt", half)
    with pytest.raises(DiskFull, match=r"last\.ckpt cannot be written: No space left on device"):
        write_checkpoint(path, STATE, FACTS | {"global_step": 8}, keep=1)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_a_file_that_is_no_checkpoint(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    if content is None:
        torch.save({"state_dict": STATE}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"last\.ckpt (cannot be read|is no checkpoint of a training)"):
        read_checkpoint(path)


SHAPES = {name: list(tensor.shape) for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    ("identity", "shapes", "why"),
    [
        ({"model": "N"}, {}, "has another model: M, not N"),
        ({"data": "e"}, {}, "has another data: files, captions or filters changed"),
        ({"parameterization": "v"}, {}, "has another parameterization: none, not v"),
        ({}, {"model.a.weight": [2, 4]}, "1 weights differ (model.a.weight is [2, 3], not [2, 4])"),
        ({}, {"model.c": [1]}, "has another model (it has no model.c)"),
    ],
)
def test_another_runs_checkpoint(identity: dict, shapes: dict, why: str) -> None:
    found = FACTS | {"state_dict": STATE}
    with pytest.raises(InputError) as error:
        check_resumed(Path("last.ckpt"), found, FACTS["identity"] | identity, SHAPES | shapes, {})
    assert why in str(error.value)
    assert str(error.value).endswith("choose another --logdir, or move it away to start anew")


def test_settings_that_have_changed_are_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(checkpoints, "notice", lines.append)
    found = FACTS | {"state_dict": STATE | {"model_ema.aweight": torch.ones(2, 3)}}
    check_resumed(Path("a"), found, FACTS["identity"], SHAPES, {"seed": 1, "batch_size": 4, "devices": 2})
    assert lines == ["a: the run goes on with seed 0 -> 1"]


def test_markers_are_no_weights() -> None:
    found = FACTS | {"state_dict": STATE | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}}
    check_resumed(Path("a"), found, FACTS["identity"], SHAPES, FACTS["settings"])


def test_other_weights_of_the_file_are_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA went on beside the raw UNet that had begun beside the averaged one."""
    monkeypatch.setattr(checkpoints, "notice", pytest.fail)
    now = {"method": "lora", "weights": "raw"}
    check_options(Path("a"), {"options": {"method": "lora"}}, now, "--output")  # of an older version
    with pytest.raises(InputError, match="has another --weights: ema, not raw"):
        check_options(Path("a"), {"options": now | {"weights": "ema"}}, now, "--output")


OPTIONS = {"method": "dreambooth", "class_prompt": "a cube", "prior_weight": 1.0, "class_images": 50}


def test_options_of_fine_tuning_that_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run went on silently with another class prompt, or another weight of its loss."""
    lines: list[str] = []
    monkeypatch.setattr(checkpoints, "notice", lines.append)
    found = FACTS | {"options": OPTIONS}
    check_options(Path("a"), found, OPTIONS, "--output")
    check_options(Path("a"), FACTS, OPTIONS, "--output")  # of before they were kept
    assert not lines
    check_options(Path("a"), found, OPTIONS | {"prior_weight": 0.5, "class_images": 9}, "--output")
    assert lines == ["a: the run goes on with --prior_weight 1.0 -> 0.5, --class_images 50 -> 9"]
    with pytest.raises(InputError, match="another --class_prompt: a cube, not a cone: choose another --out"):
        check_options(Path("a"), found, OPTIONS | {"class_prompt": "a cone"}, "--output")


def test_errors_name_the_option_of_the_command(tmp_path: Path) -> None:
    """finetune.py has no --logdir."""
    found = FACTS | {"state_dict": STATE}
    with pytest.raises(InputError, match="choose another --output, or move it away"):
        check_resumed(Path("a"), found, FACTS["identity"] | {"model": "N"}, SHAPES, {}, "--output")
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match="give it as --ckpt, with another --output"):
        read_checkpoint(tmp_path / "last.ckpt", "--output")


def test_a_resumed_optimiser_has_the_options_of_now() -> None:
    """A notice said that weight_decay and betas had changed, and those of the checkpoint were used."""
    task, module = SimpleNamespace(device=torch.device("cpu")), torch.nn.Linear(2, 2)

    def adamw(**options: object) -> torch.optim.AdamW:
        found = torch.optim.AdamW(module.parameters(), lr=1e-3, **options)
        module(torch.ones(1, 2)).sum().backward()
        found.step()
        return found

    before, now = adamw(weight_decay=0.01, fused=True), adamw(weight_decay=0.5, betas=(0.5, 0.9))
    state = Checkpoints(task, {}, module, before).optimizer_state()
    Checkpoints(task, {}, module, now).load_optimizer_state(state)
    (group,) = now.param_groups
    assert (group["weight_decay"], tuple(group["betas"]), group["fused"]) == (0.5, (0.5, 0.9), None)
    for weight in module.parameters():
        assert torch.equal(now.state[weight]["exp_avg"], before.state[weight]["exp_avg"])


def test_an_option_is_compared_by_those_that_wrote_it_into_the_identity() -> None:
    """A LoRA for few steps could not go on: it "has another sampler: tcd, not none"."""
    now = FACTS["identity"] | {"sampler": "tcd"}
    for earlier in (now, FACTS["identity"]):  # some versions kept it among the options alone
        check_resumed(Path("a"), FACTS | {"state_dict": STATE, "identity": earlier}, now, SHAPES, {"seed": 0})
    other = FACTS | {"state_dict": STATE, "identity": now | {"sampler": "lcm"}}
    with pytest.raises(InputError, match="has another sampler: lcm, not tcd"):
        check_resumed(Path("a"), other, now, SHAPES, {})
