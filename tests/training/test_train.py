"""scripts/train.py: mistakes of the user are one line that names them, before anything is trained."""

from pathlib import Path

import pytest
from tiny_training import FIRST_STAGE, run_train, write_yaml


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"learning_rat": 1}, "no parameter 'learning_rat'; did you mean 'learning_rate'?"),
        ({"steps": "abc"}, "training: steps must be a whole number of at least 1, not 'abc'"),
    ],
)
def test_a_bad_training_section(
    changes: dict, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(*write_yaml(tmp_path / "bad.yaml", FIRST_STAGE, **changes)) == 2
    assert error_line(capsys).endswith(why)
    assert not (tmp_path / "bad").exists()


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


def test_a_model_that_is_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_train(*write_yaml(tmp_path / "none.yaml", {"target": "torch.nn.Identity"})) == 2
    assert "none.yaml: the model is Identity, which is not trained here" in error_line(capsys)


def test_a_folder_that_stops_to_be_writable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints, images and metrics that the system refuses are the user's to mend, not internal errors."""
    arguments = write_yaml(tmp_path / "first.yaml", FIRST_STAGE)
    (tmp_path / "first" / "step-000003.png").mkdir(parents=True)
    assert run_train(*arguments) == 2
    assert f"{tmp_path / 'first'} cannot be written: Is a directory" in capsys.readouterr().err
