"""Logs: one row a step, continued by a resumed run."""

from pathlib import Path

import pytest

from ldm.training import logs
from ldm.training.logs import MetricsFile, Plot, open_logs, read_rows


def test_rows_of_a_resumed_run_are_appended(tmp_path: Path) -> None:
    """Rows after the last checkpoint are repeated by the resumed run: their old ones are dropped."""
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path, 0)
    for step in (50, 100, 150):
        first.write(step, {"loss": step / 100})
    path.write_text(path.read_text() + "2")  # the process was killed while it wrote a row
    second = MetricsFile(path, 100)
    for step in (150, 200):
        second.write(step, {"loss": step / 50})
    assert path.read_text().splitlines() == ["step,loss", "50,0.5", "100,1.0", "150,3.0", "200,4.0"]


def test_a_run_that_begins_anew_begins_a_new_file(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.csv", 0).write(50, {"loss": 1.0})
    MetricsFile(tmp_path / "metrics.csv", 0).write(10, {"loss": 2.0})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.csv")] == ["10"]


def test_columns_that_come_later(tmp_path: Path) -> None:
    """The validation loss comes only every now and then, and psnr only in a first stage."""
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, 0)
    file.write(1, {"loss": 1.0})
    file.write(2, {"loss": 2.0, "validation_loss": 3.0})
    file.write(3, {"loss": 4.0})
    assert path.read_text().splitlines() == ["step,loss,validation_loss", "1,1.0,", "2,2.0,3.0", "3,4.0,"]


def test_an_image_of_the_curve(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    file = MetricsFile(tmp_path / "metrics.csv", 0)
    for step in range(1, 5):
        file.write(step, {"loss": 1 / step, "validation_loss": 1.1 / step})
    Plot(tmp_path / "loss.png", tmp_path / "metrics.csv").close()
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (800, 450)
        assert len(set(image.convert("RGB").get_flattened_data())) > 10


def test_events_of_a_resumed_run_go_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        (log,) = open_logs(tmp_path, ["tensorboard"], first)
        for step in steps:
            log.write(step, {"loss": step + first / 10})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("loss")] == [
        (1, 1),
        (2, 2),
        (3, 3.2),
        (4, 4.2),
    ]


def test_a_package_that_is_missing_is_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda _: None)
    lines: list[str] = []
    monkeypatch.setattr(logs, "notice", lines.append)
    assert [type(log) for log in open_logs(tmp_path, ["csv", "tensorboard", "plot"], 0)] == [MetricsFile]
    assert [line.partition(" is missing")[0] for line in lines] == [
        "no tensorboard: tensorboard",
        "no plot: matplotlib",
    ]


def test_events_of_a_run_that_was_given_up_are_hidden(tmp_path: Path) -> None:
    """TensorBoard drew a run that began anew over the one before it."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for run, steps in enumerate(((1, 2, 3), (1, 2))):
        (log,) = open_logs(tmp_path, ["tensorboard"], 0)
        for step in steps:
            log.write(step, {"loss": step + run / 10})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("loss")] == [(1, 1.1), (2, 2.1)]


def test_a_plot_alone_has_a_curve(tmp_path: Path) -> None:
    """It is drawn from the CSV file, which was not there: the image was empty."""
    pytest.importorskip("matplotlib")
    opened = open_logs(tmp_path, ["plot"], 0)
    for log in opened:
        log.write(1, {"loss": 1.0})
    assert [type(log) for log in opened] == [MetricsFile, Plot]
    assert len(read_rows(tmp_path / "metrics.csv")) == 1
