"""Runs: what they leave, and that neither a stop nor the number of devices changes the curve."""

import csv
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SCRIPTS, script
from diffusers_pipelines import tiny_config, tiny_pipeline
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.plugins.precision import Precision
from safetensors.torch import load_file
from tiny_training import (
    DEPTH,
    ESTIMATOR,
    FIRST_STAGE,
    INPAINTING,
    TRAINING,
    run_train,
    scenes,
    second_stage,
    write_yaml,
)

from ldm.cli import entry
from ldm.modules.encoders import modules as encoders
from ldm.training.averages import Averages
from ldm.training.config import training_config
from ldm.training.data.config import data_config
from ldm.training.loop import train
from ldm.training.objective import learning_rate
from ldm.training.processes import Autocast
from ldm.training.sections import read_sections
from ldm.training.start import new_task
from ldm.training.tasks import FirstStageTask
from ldm.weights.loading import load_model, read_config

DATA = scenes(16) | {"latents": True}
HERE = Path(__file__).parent
CLIPTokenizer = functools.cache(encoders.CLIPTokenizer)  # it takes longer to make than to train


def column(folder: Path, name: str = "loss") -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of the last checkpoint, raw and averaged."""
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def assert_same(a: Path, b: Path, atol: float = 1e-5) -> None:
    """Two runs have the same curve and the same weights, raw and averaged."""
    assert column(a) == pytest.approx(column(b), abs=atol)
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert any(name.startswith("model_ema.") for name in first)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=atol, msg=name)


def start(*arguments: str, program: Path = SCRIPTS / "train.py") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(program), *arguments],
        env={**os.environ, "PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out[-3000:]


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "CLIPTokenizer", CLIPTokenizer)


@pytest.fixture(scope="module")
def whole(first_stage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_train(*second_stage(folder, first_stage, DATA)) == 0
    return folder / "second"


def test_first_stage_saves_images_and_metrics(first_stage: Path) -> None:
    images = sorted(path.name for path in first_stage.parent.glob("*.png"))
    assert images == ["step-000003-raw.png", "step-000003.png", "step-000006-raw.png", "step-000006.png"]
    assert len(column(first_stage.parent, "psnr")) == 6
    assert all(tensor.isfinite().all() for tensor in load_file(first_stage).values())


def test_the_curve_has_the_learning_rate_of_each_step(whole: Path) -> None:
    config = read_sections([whole.parent / "second.yaml"], []).training
    assert column(whole, "learning_rate") == pytest.approx([learning_rate(config, k) for k in range(6)])


def test_what_a_run_leaves_loads_like_any_checkpoint(whole: Path) -> None:
    """model.safetensors has the averaged weights, last.ckpt both."""
    model, config = whole / "model.safetensors", read_config(whole.parent / "second.yaml")
    state, last = load_file(model), weights(whole)
    assert state["model.diffusion_model.out.2.weight"].dtype == torch.float16
    assert state["scale_factor"].dtype == torch.float32
    name, twin = "model.diffusion_model.out.2.weight", "model_ema.diffusion_modelout2weight"
    assert last[name].abs().max() > 0, "the zero-initialised layer was trained"
    assert not torch.equal(last[name], last[twin])
    for path, which, expected in (
        (model, None, last[twin].half().float()),
        (whole / "last.ckpt", "raw", last[name]),
        (whole / "last.ckpt", "ema", last[twin]),
    ):
        loaded = load_model(config, path, which)
        assert torch.equal(loaded.model.diffusion_model.out[2].weight, expected)
        assert loaded.get_learned_conditioning(["a red cube"]).shape == (1, 77, 8)


def test_averages_are_updated_once_a_step(
    first_stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the accumulation. Those in the checkpoint follow the original's schedule."""
    seen: list[torch.Tensor] = []
    update = Averages.update

    def observed(self: Averages) -> None:
        if not seen:
            seen.append(self.averages[-1].clone())  # the weight before the first step
        seen.append(self.weights[-1].detach().clone())
        update(self)

    monkeypatch.setattr(Averages, "update", observed)
    arguments = second_stage(tmp_path, first_stage, DATA, ema_decay=0.3, device_batch=1)
    assert run_train(*arguments) == 0
    expected, *values = seen
    assert len(values) == 6
    for n, value in enumerate(values, start=1):
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    final = [t for name, t in weights(tmp_path / "second").items() if name.startswith("model_ema.")][-1]
    torch.testing.assert_close(final, expected)


def test_a_stopped_run_goes_on_in_the_same_curve(whole: Path, first_stage: Path, tmp_path: Path) -> None:
    """In the middle of an epoch, and with other checkpoints than at the stop."""
    arguments = second_stage(tmp_path, first_stage, DATA)
    for stop in (2, 3, 6):
        assert run_train(*arguments, "--stop_at", str(stop)) == 0
    assert_same(tmp_path / "second", whole, atol=0)
    assert (tmp_path / "second/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert column(tmp_path / "second", "step") == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_killed_run_goes_on_in_the_same_curve(whole: Path, first_stage: Path, tmp_path: Path) -> None:
    arguments = second_stage(tmp_path, first_stage, DATA)
    slow = ["training.checkpoint_every=2", "training.steps=100000"]  # it will not end by itself
    process = start(*arguments, *slow, "training.schedule=constant")
    last = tmp_path / "second" / "last.ckpt"
    end = time.monotonic() + 240
    while not last.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    stopped = torch.load(last, weights_only=True)["global_step"]
    assert stopped >= 2
    steps = stopped + 3
    constant = {"schedule": "constant", "checkpoint_every": 0, "steps": steps}
    assert run_train(*second_stage(tmp_path, first_stage, DATA, **constant)) == 0
    assert run_train(*second_stage(tmp_path / "whole", first_stage, DATA, **constant)) == 0
    assert_same(tmp_path / "second", tmp_path / "whole" / "second", atol=0)
    assert column(tmp_path / "second", "step") == list(range(1, steps + 1))


def test_accumulation_equals_one_batch(whole: Path, first_stage: Path, tmp_path: Path) -> None:
    assert run_train(*second_stage(tmp_path, first_stage, DATA, device_batch=1)) == 0
    assert_same(tmp_path / "second", whole)


@pytest.mark.slow
def test_two_processes_equal_one(whole: Path, first_stage: Path, tmp_path: Path) -> None:
    """Two gloo processes that take half of each batch; a run may go on with another number of them."""
    arguments = second_stage(tmp_path, first_stage, DATA)
    finish(start(*arguments, "training.devices=2", "--stop_at", "4"))
    assert_same_so_far(tmp_path / "second", whole, 4)
    assert run_train(*arguments) == 0
    assert_same(tmp_path / "second", whole)


def assert_same_so_far(folder: Path, whole: Path, count: int) -> None:
    assert column(folder) == pytest.approx(column(whole)[:count], abs=1e-5)


@pytest.mark.slow
def test_sharded_weights_equal_whole_ones(whole: Path, first_stage: Path, tmp_path: Path) -> None:
    """FSDP, stopped and resumed, ends with the weights of one process; its files are the same."""
    base = second_stage(tmp_path, first_stage, DATA)[1]
    for stop in ("3", "6"):
        finish(start(base, str(tmp_path / "second"), stop, program=HERE / "sharded_run.py"))
    assert_same(tmp_path / "second", whole)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "second", whole))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-3)


def test_validation_of_raw_and_averaged_weights(first_stage: Path, tmp_path: Path) -> None:
    data = DATA | {"validation_share": 0.3}
    settings = {"validation_every": 3, "sample_every": 6, "sample_prompts": ["a red cube"]}
    assert run_train(*second_stage(tmp_path, first_stage, data, **settings)) == 0
    folder = tmp_path / "second"
    raw, averaged = column(folder, "validation_loss"), column(folder, "validation_loss_ema")
    assert len(raw) == len(averaged) == 2
    assert raw != averaged
    assert {"step-000006.png", "step-000006-raw.png"} <= {path.name for path in folder.iterdir()}


def test_zero_means_only_at_the_end_and_never(first_stage: Path, tmp_path: Path) -> None:
    settings = {"checkpoint_every": 0, "sample_every": 0, "warmup": 0, "ema_decay": 0, "gradient_clip": 0}
    assert run_train(*second_stage(tmp_path, first_stage, DATA, **settings)) == 0
    files = {path.name for path in (tmp_path / "second").iterdir() if path.is_file()}
    assert files == {"costs.json", "last.ckpt", "metrics.csv", "model.safetensors"}
    assert not any(name.startswith("model_ema.") for name in weights(tmp_path / "second"))


def test_checkpoints_that_are_kept(first_stage: Path, tmp_path: Path) -> None:
    assert run_train(*second_stage(tmp_path, first_stage, DATA, checkpoint_every=2, keep=2)) == 0
    names = sorted(path.name for path in (tmp_path / "second").glob("*.ckpt"))
    assert names == ["last.ckpt", "step-000004.ckpt", "step-000006.ckpt"]


def test_a_run_can_start_from_the_weights_of_another(whole: Path, tmp_path: Path) -> None:
    """Its YAML goes over the first one's: other captions, timesteps and steps, no first stage of its own."""
    init = whole / "model.safetensors"
    changes = {"init": str(init), "first_stage": None, "steps": 2, "learning_rate": 0.0}
    write_yaml(tmp_path / "drill.yaml", **changes, drill=["left", "right"], drill_timesteps=[200, 950])
    bases = [str(whole.parent / "second.yaml"), str(tmp_path / "drill.yaml")]
    assert run_train("--base", *bases, "--logdir", str(tmp_path)) == 0
    before, after = load_file(init), load_file(tmp_path / "drill" / "model.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(("config", "family"), [(INPAINTING, "masked"), (DEPTH, "deep")])
def test_a_resumed_sibling_equals_an_undisturbed_one(
    config: dict, family: str, first_stage: Path, tmp_path: Path
) -> None:
    """Its masks and depth maps, too, depend on seed and step alone."""
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        settings = {"first_stage": str(first_stage), "sample_every": 4, "steps": 4}
        arguments = write_yaml(tmp_path / name / "sibling.yaml", config, scenes(8, family=family), **settings)
        for stop in stops:
            assert run_train(*arguments, "--stop_at", str(stop)) == 0
    parts, undisturbed = (tmp_path / name / "sibling" for name in ("parts", "whole"))
    assert_same(parts, undisturbed, atol=0)
    assert (undisturbed / "step-000004.png").exists()


def test_a_depth_estimator_learns_the_depths_of_renders(tmp_path: Path) -> None:
    settings = {"steps": 30, "learning_rate": 3e-3, "sample_every": 30, "ema_decay": 0.5}
    arguments = write_yaml(tmp_path / "depth.yaml", ESTIMATOR, scenes(16, family="deep"), **settings)
    assert run_train(*arguments) == 0
    assert column(tmp_path / "depth")[-1] < 2, "estimates of 0 are 3.8 away"
    state = load_file(tmp_path / "depth" / "model.safetensors")
    assert any(name.startswith("model.pretrained.") for name in state)
    assert (tmp_path / "depth" / "step-000030.png").exists()


def test_from_a_diffusers_folder_and_back(tmp_path: Path) -> None:
    """A model of diffusers' files is trained, and convert.py makes a folder of it that diffusers opens."""
    from diffusers import StableDiffusionPipeline

    tiny_pipeline("v1").save_pretrained(tmp_path / "start", safe_serialization=True)
    settings = {"init": str(tmp_path / "start"), "steps": 2, "warmup": 0}
    arguments = write_yaml(tmp_path / "run.yaml", tiny_config("v1"), scenes(4), **settings)
    assert run_train(*arguments) == 0
    for source, which in (("model.safetensors", []), ("last.ckpt", ["--weights", "ema"])):
        target = tmp_path / source.partition(".")[0]
        argv = [tmp_path / "run" / source, target, "--config", tmp_path / "run.yaml", *which]
        assert entry.run(script("convert").main, list(map(str, argv))) == 0
        pipeline = StableDiffusionPipeline.from_pretrained(target)
        bias = pipeline.unet.conv_out.bias
        expected = load_file(tmp_path / "run/model.safetensors")["model.diffusion_model.out.2.bias"]
        torch.testing.assert_close(bias.float(), expected.float(), rtol=0, atol=1e-3)
        assert not torch.equal(bias, tiny_pipeline("v1").unet.conv_out.bias)


def test_precision_compile_and_checkpointing_run(first_stage: Path, tmp_path: Path, whole: Path) -> None:
    arguments = second_stage(tmp_path, first_stage, DATA, checkpointing=True)
    assert run_train(*arguments) == 0
    assert_same(tmp_path / "second", whole)
    assert run_train(*arguments, "--name", "half", "training.precision=bf16") == 0
    assert column(tmp_path / "half") == pytest.approx(column(whole), rel=0.05)
    assert TRAINING["precision"] == "full"


@pytest.mark.parametrize("precision", ["bf16", None])
def test_the_precision_is_that_of_the_computation(
    precision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a single device everything was computed in float32, whatever `precision` said."""
    seen: dict[str, set[bool]] = {}
    for name in ("training_step", "validation_losses", "sample_grid"):
        plain = getattr(FirstStageTask, name)

        def observed(self: FirstStageTask, *given: Any, name: str = name, plain: Any = plain) -> Any:
            seen.setdefault(name, set()).add(torch.is_autocast_enabled(self.device.type))
            assert not (torch.is_autocast_enabled(self.device.type) and torch.is_autocast_cache_enabled())
            return plain(self, *given)

        monkeypatch.setattr(FirstStageTask, name, observed)
    settings = {"steps": 1, "validation_every": 1, "validation_count": 2, "sample_every": 1}
    data = scenes(8) | {"validation_share": 0.3}
    arguments = write_yaml(tmp_path / "a.yaml", FIRST_STAGE, data, precision=precision, **settings)
    assert run_train(*arguments) == 0
    is_lower = precision == "bf16" or torch.cuda.is_available()
    assert seen == {name: {is_lower} for name in ("training_step", "validation_losses", "sample_grid")}
    settings = torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)["settings"]
    assert settings["precision"] == ("bf16" if is_lower else "full")


def test_a_run_goes_on_in_another_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Earlier versions recorded bf16 on a CPU, where the same command now computes in full precision."""
    settings = {"steps": 2, "precision": "bf16"}
    arguments = write_yaml(tmp_path / "a.yaml", FIRST_STAGE, scenes(8), **settings)
    assert run_train(*arguments, "--stop_at", "1") == 0
    assert run_train(*arguments, "training.precision=full") == 0
    assert "the run goes on with precision bf16 -> full" in capsys.readouterr().err


def test_a_run_in_another_precision_goes_on_in_fp16(tmp_path: Path) -> None:
    """It ended in a RuntimeError: the state of the loss scaling was empty."""
    config = training_config(TRAINING | {"steps": 1})
    for precision, plugin in (("full", Precision()), ("fp16", Autocast("16-mixed", "cpu"))):
        fabric = Fabric(accelerator="cpu", devices=1, plugins=[LightningEnvironment(), plugin])
        config = dataclasses.replace(config, precision=precision)
        task = new_task(FIRST_STAGE, config, data_config(scenes(8)))
        (path,) = train(task, tmp_path, fabric=fabric)
    assert path.exists()
