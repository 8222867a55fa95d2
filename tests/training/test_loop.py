"""Runs of scripts/train.py: the files that they write, and that a resumed run equals an undisturbed one."""

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import DEPTH, ESTIMATOR, INPAINTING, run_train, second_stage, write_yaml

from ldm.training.loop import MetricsFile
from ldm.training.tasks import step_generator
from ldm.weights.loading import load_model, read_config


def steps(path: Path) -> list[int]:
    """The steps of a metrics.csv."""
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_first_stage_saves_images_and_metrics(first_stage: Path) -> None:
    images = sorted(path.name for path in first_stage.parent.glob("*.png"))
    assert images == ["step-000003.png", "step-000006.png"]
    header, row = (first_stage.parent / "metrics.csv").read_text().splitlines()
    assert header == "epoch,loss,psnr,step"
    assert row.endswith(",5")
    assert all(tensor.isfinite().all() for tensor in load_file(first_stage).values())


def test_second_stage_loads_like_any_checkpoint(first_stage: Path, tmp_path: Path) -> None:
    assert run_train(*second_stage(tmp_path, first_stage)) == 0
    weights = tmp_path / "second" / "model.safetensors"
    state = load_file(weights)
    assert state["model.diffusion_model.out.2.weight"].dtype == torch.float16
    assert state["model.diffusion_model.out.2.weight"].abs().max() > 0, (
        "the zero-initialised layer was trained"
    )
    assert state["scale_factor"].dtype == torch.float32
    model = load_model(read_config(tmp_path / "second.yaml"), weights)
    assert model.get_learned_conditioning(["a red cube"]).shape == (1, 77, 8)


def test_resumed_run_equals_undisturbed_run(first_stage: Path, tmp_path: Path) -> None:
    """Training that is stopped and started again ends with the weights of a run that never stopped."""
    for name, stops in (("whole", [6]), ("parts", [3, 6])):
        arguments = second_stage(tmp_path / name, first_stage)
        for stop in stops:
            assert run_train(*arguments, "--stop_at", str(stop)) == 0
    whole, parts = (tmp_path / name / "second" / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    assert steps(parts.parent / "metrics.csv") == [2, 5], "the resumed run kept the first part's rows"


def test_zero_means_only_at_the_end_and_never(first_stage: Path, tmp_path: Path) -> None:
    arguments = second_stage(tmp_path, first_stage, checkpoint_every=0, sample_every=0, warmup=0)
    assert run_train(*arguments) == 0
    names = ["last.ckpt", "latents.safetensors", "metrics.csv", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == names


def test_a_run_can_start_from_the_weights_of_another(first_stage: Path, tmp_path: Path) -> None:
    """Its YAML goes over the first one's: other captions, timesteps and steps, no first stage of its own."""
    arguments = second_stage(tmp_path, first_stage)
    assert run_train(*arguments) == 0
    init = tmp_path / "second" / "model.safetensors"
    changes = {"init": str(init), "first_stage": None, "steps": 2, "learning_rate": 0.0}
    write_yaml(tmp_path / "drill.yaml", **changes, drill=["left"], drill_timesteps=[200, 950])
    bases = [str(tmp_path / name) for name in ("second.yaml", "drill.yaml")]
    assert run_train("--base", *bases, "--logdir", str(tmp_path)) == 0
    before, after = load_file(init), load_file(tmp_path / "drill" / "model.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0, msg=name)


def test_metrics_of_a_resumed_run_are_appended(tmp_path: Path) -> None:
    """Lightning's own logger deleted the file of the run before."""
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path)
    for step in (49, 99, 149):
        first.log_metrics({"loss": step / 100, "epoch": 0}, step)
    path.write_text(path.read_text() + "0,1.9")  # the process was killed while it wrote a row
    second = MetricsFile(path)
    for step in (99, 149, 199):  # resumed from the checkpoint at step 50
        second.log_metrics({"loss": step / 50, "epoch": 0}, step)
    assert path.read_text().splitlines() == [
        "epoch,loss,step",
        "0,0.49,49",
        "0,1.98,99",
        "0,2.98,149",
        "0,3.98,199",
    ]


def test_training_anew_begins_a_new_metrics_file(first_stage: Path, tmp_path: Path) -> None:
    arguments = second_stage(tmp_path, first_stage)
    assert run_train(*arguments, "--stop_at", "2") == 0
    (tmp_path / "second" / "last.ckpt").unlink()
    assert run_train(*arguments, "--stop_at", "3") == 0
    assert steps(tmp_path / "second" / "metrics.csv") == [2]


def test_the_numbers_of_a_step_depend_on_seed_and_step() -> None:
    first, again, *others = (
        torch.rand(1, generator=step_generator(seed, step)) for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1))
    )
    assert first == again
    assert first not in others


@pytest.mark.parametrize("config", [INPAINTING, DEPTH], ids=["inpainting", "depth"])
def test_a_resumed_sibling_equals_an_undisturbed_one(config: dict, first_stage: Path, tmp_path: Path) -> None:
    """Its masks and depth maps, too, depend on seed and step alone."""
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        (tmp_path / name).mkdir()
        settings = {"first_stage": str(first_stage), "images": 16, "sample_every": 4}
        arguments = write_yaml(tmp_path / name / "sibling.yaml", config, **settings)
        for stop in stops:
            assert run_train(*arguments, "--stop_at", str(stop)) == 0
    whole, parts = (tmp_path / name / "sibling" for name in ("whole", "parts"))
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    assert (whole / "step-000004.png").exists()


def test_a_depth_estimator_learns_the_depths_of_renders(tmp_path: Path) -> None:
    settings = {"steps": 30, "images": 16, "learning_rate": 3e-3, "sample_every": 30, "ema_decay": 0.5}
    arguments = write_yaml(tmp_path / "depth.yaml", ESTIMATOR, **settings)
    assert run_train(*arguments) == 0
    rows = list(csv.DictReader((tmp_path / "depth" / "metrics.csv").open(newline="")))
    assert float(rows[-1]["loss"]) < 2, "estimates of 0 are 3.8 away"
    state = load_file(tmp_path / "depth" / "model.safetensors")
    assert any(name.startswith("model.pretrained.") for name in state)
    assert (tmp_path / "depth" / "step-000030.png").exists()
