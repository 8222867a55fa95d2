"""scripts/train.py: mistakes of the user are one line that names them, before anything is trained."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import script
from PIL import Image
from tiny_training import ESTIMATOR, FIRST_STAGE, SECOND_STAGE, run_train, scenes, write_yaml

from ldm.errors import InputError
from ldm.training import checkpoints, loop, processes
from ldm.training.config import training_config
from ldm.training.tasks import FirstStageTask

DATA = scenes(8)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr without progress bars."""
    return capsys.readouterr().err.splitlines()[-1].rpartition("\r")[2]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"learning_rat": 1}, "no parameter 'learning_rat'; did you mean 'learning_rate'?"),
        ({"steps": "abc"}, "training: steps: abc is not a whole number in range: at least 1"),
        ({"device_batch": 3}, "batch_size 4 is no multiple of 3 = device_batch 3 x devices 1 x nodes 1"),
        ({"init": "absent.ckpt"}, "training: init: there is no file"),
        ({"validation_every": 2}, "validation_every needs a data.validation, or a data.validation_share"),
        ({"strategy": "fsdp"}, "training: strategy: fsdp needs GPUs; choose ddp"),
        ({"precision": "fp16"}, "training: precision: fp16 needs a GPU; choose bf16 or full"),
    ],
)
def test_a_bad_training_section(
    changes: dict,
    why: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_train(*write_yaml(tmp_path / "bad.yaml", FIRST_STAGE, DATA, **changes)) == 2
    assert why in error_line(capsys)
    assert not (tmp_path / "bad" / "last.ckpt").exists()


def test_a_base_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_train("--base", str(tmp_path / "absent.yaml"), "--logdir", str(tmp_path)) == 2
    assert "absent.yaml: No such file or directory" in error_line(capsys)


def test_a_logdir_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_yaml(tmp_path / "first.yaml", FIRST_STAGE)[:2]
    (tmp_path / "file").touch()
    assert run_train(*base, "--logdir", str(tmp_path / "file")) == 2
    assert f"--logdir {tmp_path / 'file'} cannot be written: " in error_line(capsys)


def test_an_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was found out when the training had ended."""
    arguments = write_yaml(tmp_path / "first.yaml", FIRST_STAGE)
    assert run_train(*arguments, "--output", str(tmp_path)) == 2
    assert f"--output {tmp_path} cannot be written: it is a folder" in error_line(capsys)


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ({"target": "torch.nn.Identity"}, "the model is Identity, which is not trained here"),
        ({"target": "os.system"}, "config target 'os.system' is not allowed"),
        (SECOND_STAGE, "a latent diffusion model needs the weights of its first_stage, or of init"),
    ],
)
def test_a_model_that_is_not_trained(
    section: dict, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(*write_yaml(tmp_path / "none.yaml", section)) == 2
    assert why in error_line(capsys)


def test_an_autoencoder_has_no_cached_latents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_train(*write_yaml(tmp_path / "a.yaml", FIRST_STAGE, DATA | {"latents": True})) == 2
    assert "data: latents: a AutoencoderKL is trained on images" in error_line(capsys)


def test_a_depth_estimator_needs_depths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_train(*write_yaml(tmp_path / "a.yaml", ESTIMATOR, DATA)) == 2
    assert "data: its examples have no depth maps" in error_line(capsys)


def test_a_resume_with_another_model_or_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of the earlier run is lost. Settings may change, and a notice says which."""
    arguments = write_yaml(tmp_path / "a.yaml", FIRST_STAGE, DATA, steps=1)
    assert run_train(*arguments, "--output", str(tmp_path / "new" / "first.safetensors")) == 0
    assert (tmp_path / "new" / "first.safetensors").exists()
    before = (tmp_path / "a" / "last.ckpt").read_bytes()
    for override, why in (
        ("model.params.ddconfig.ch=16", "last.ckpt has another model, "),
        ("data.train.params.seed=5", "last.ckpt has another data: "),
        ("data.size=16", "last.ckpt has another size: 32, not 16"),
    ):
        assert run_train(*arguments, override) == 2
        line = error_line(capsys)
        assert why in line
        assert "choose another --logdir" in line
    assert (tmp_path / "a" / "last.ckpt").read_bytes() == before
    assert run_train(*arguments, "model.params.ddconfig.dropout=0.25") == 0, "a finished run"
    assert "model.params.ddconfig.dropout" in capsys.readouterr().err
    assert run_train(*arguments, "training.steps=2", "training.weight_decay=0.5") == 0
    assert "the run goes on with steps 1 -> 2, weight_decay 0.01 -> 0.5" in capsys.readouterr().err


def test_a_folder_that_stops_to_be_writable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints, images and metrics that the system refuses are the user's to mend, not internal errors."""
    arguments = write_yaml(tmp_path / "first.yaml", FIRST_STAGE, DATA, sample_every=3)
    (tmp_path / "first" / "step-000003.png").mkdir(parents=True)
    assert run_train(*arguments) == 2
    assert "step-000003.png cannot be written: Is a directory" in error_line(capsys)


def test_a_disk_that_fills_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint stays whole, and the run goes on from it once there is room."""
    arguments = write_yaml(tmp_path / "a.yaml", FIRST_STAGE, DATA, steps=4, checkpoint_every=2)
    write, steps = checkpoints.write_ckpt, []

    def full(state: dict, path: Path, facts: dict) -> None:
        steps.append(facts["global_step"])
        if len(steps) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(state, path, facts=facts)

    monkeypatch.setattr(checkpoints, "write_ckpt", full)
    assert run_train(*arguments) == 1
    assert "last.ckpt cannot be written: No space left on device" in error_line(capsys)
    assert torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert not [path for path in (tmp_path / "a").iterdir() if path.name.startswith(".")]
    assert run_train(*arguments) == 0
    assert steps == [2, 4, 4]


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_no_number_ends_the_run(
    where: str,
    clip: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two rows of the logs nobody looked, and broken weights took the last checkpoint's place."""
    losses = FirstStageTask.losses

    def broken(self: FirstStageTask, batch: dict) -> torch.Tensor:
        value = losses(self, batch)
        if batch["step"] < 2:
            return value
        return value * float("nan") if where == "loss" else value + (0 * value.detach() * value).sqrt()

    monkeypatch.setattr(FirstStageTask, "losses", broken)
    settings = {"checkpoint_every": 2, "log_every": 100, "gradient_clip": clip, "steps": 5}
    assert run_train(*write_yaml(tmp_path / "a.yaml", FIRST_STAGE, DATA, **settings)) == 1
    assert "the loss or the gradient of step 3 is no number; " in error_line(capsys)
    assert torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)["global_step"] == 2


def damaged_folder(folder: Path) -> dict:
    """A `data:` section of eight images, of which 1 and 6 are damaged."""
    folder.mkdir()
    for number in range(8):
        path = folder / f"{number}.png"
        Image.new("RGB", (32, 32), (30 * number, 0, 0)).save(path)
        path.with_suffix(".txt").write_text("a square")
        if number in (1, 6):
            path.write_bytes(path.read_bytes()[:-40])
    source = {"target": "ldm.training.data.folder.ImageFolder", "params": {"path": str(folder)}}
    return {"train": source, "size": 32, "workers": 0}


def test_damage_of_all_parts_of_a_run_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what process 0 read between its start and its end was, and nothing of a run that was killed."""
    data = damaged_folder(tmp_path / "set")
    arguments = write_yaml(tmp_path / "a.yaml", FIRST_STAGE, data, batch_size=2, device_batch=1, steps=4)
    found = tmp_path / "a" / "damaged.txt"

    def of_two(fabric: object, value: object) -> list:
        return [value, {"other.png": "why"} if isinstance(value, dict) else value]

    monkeypatch.setattr(loop, "gathered", of_two)
    assert run_train(*arguments, "--stop_at", "1") == 0
    assert "other.png: why\n" in found.read_text()
    monkeypatch.setattr(loop, "gathered", lambda fabric, value: [value])
    found.write_text(found.read_text() + "earlier.png: why\n")
    assert run_train(*arguments) == 0
    lines = [line.partition(": ")[0] for line in found.read_text().splitlines()]
    assert sorted(lines) == ["1.png", "6.png", "earlier.png", "other.png"]
    assert "4 left out of the data, listed in " in capsys.readouterr().err
    (tmp_path / "a" / "last.ckpt").unlink()
    assert run_train(*arguments) == 0
    assert len(found.read_text().splitlines()) == 2, "a run that begins anew counts anew"


def test_another_checkpoint_on_another_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of different steps waited for each other for ever."""
    arguments = write_yaml(tmp_path / "a.yaml", FIRST_STAGE, DATA, steps=1)
    monkeypatch.setattr(loop, "gathered", lambda fabric, value: [value, 3 if value == 0 else value])
    assert run_train(*arguments) == 2
    line = error_line(capsys)
    assert "last.ckpt is of step 0 for process 0, and of step 3 for process 1: all machines need" in line


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a shell starts in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_says_how_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It spoke of images. SIGTERM, which a cluster sends, ended it with a traceback or without a word."""
    losses, at = FirstStageTask.losses, [0, signal.SIGTERM]

    def stopped(self: FirstStageTask, batch: dict) -> torch.Tensor:
        if batch["step"] == at[0]:
            signal.raise_signal(at[1])
        return losses(self, batch)

    monkeypatch.setattr(FirstStageTask, "losses", stopped)
    arguments = write_yaml(tmp_path / "a.yaml", FIRST_STAGE, DATA, checkpoint_every=1)
    before = signal.getsignal(signal.SIGTERM)
    assert run_train(*arguments) == 130
    assert error_line(capsys).endswith("interrupted; the same command starts anew")
    at[:] = 2, signal.SIGINT
    assert run_train(*arguments) == 130
    assert error_line(capsys).endswith("interrupted; the same command goes on from the last checkpoint")
    assert signal.getsignal(signal.SIGTERM) is before
    at[0] = 100
    assert run_train(*arguments) == 0


def test_data_is_looked_at_before_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is not there was found out after minutes of reading a checkpoint."""
    monkeypatch.chdir(tmp_path)
    data = {"train": {"target": "ldm.training.data.folder.ImageFolder", "params": {"path": "no"}}, "size": 32}
    assert run_train(*write_yaml(Path("a.yaml"), FIRST_STAGE, data, init="absent.ckpt")) == 2
    assert "no" in (line := error_line(capsys))
    assert "absent.ckpt" not in line
    assert run_train(*write_yaml(Path("a.yaml"), FIRST_STAGE, DATA, init="absent.ckpt")) == 2
    assert error_line(capsys).endswith(": error: training: init: there is no file absent.ckpt")


def test_an_existing_file_with_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for an override."""
    monkeypatch.chdir(tmp_path)
    Path("lr=1.yaml").touch()
    words = ["lr=1.yaml", "a.yaml", "training.steps=1"]
    files, overrides = script("train").split_overrides(words, ["data.size=8"])
    assert files == [Path("lr=1.yaml"), Path("a.yaml")]
    assert overrides == ["training.steps=1", "data.size=8"]


def test_processes_that_a_launcher_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch has to divide by their number, which torchrun says."""
    environment = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "3", "RANK": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = training_config({"steps": 1, "batch_size": 4, "learning_rate": 1e-3, "device_batch": 1})
    with pytest.raises(InputError, match="batch_size 4 is no multiple of 3 = device_batch 1 x devices 3"):
        processes.start_processes(config)


def test_help_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    """It imports nothing heavy: the help is there before torch is."""
    import subprocess

    code = "import sys; sys.argv = ['train.py', '--help']; import runpy\n"
    code += "try: runpy.run_path('scripts/train.py', run_name='__main__')\n"
    code += "except SystemExit: print('torch' in sys.modules, 'pytorch_lightning' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.splitlines()[-1] == "False False"
