"""The GPU check's own logic, and a dry run of its items on a CPU; no figure is asserted."""

import importlib
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
gpu_check = importlib.import_module("gpu_check")
Check = importlib.import_module("gpu.check").Check
Row = importlib.import_module("report").Row

SLOW = ("replay", "oom", "compiled", "diffusers_compiled", "first", "first_compiled")
# without a GPU "diffusers" does what "diffusers_compiled" does
QUICK = [name for name in gpu_check.ITEMS if name not in (*SLOW, "diffusers")]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the command dry: exit code, gpu.json and gpu.md."""
    for name in ("HF_HUB_OFFLINE", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that what the command sets is taken back

    def call(*argv: str) -> tuple[int, dict, str]:
        code = gpu_check.main(["--device", "cpu", "--tiny", "--out", str(tmp_path), *argv])
        return code, json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()

    return call


class FakeWorker:
    """Yields what a test has put down for each item's function."""

    facts = {"GPU": "one"}  # noqa: RUF012
    found: dict = {}  # noqa: RUF012
    started = ended = 0

    def __init__(self, check: Check):
        FakeWorker.started += 1

    def rows(self, item: gpu_check.Item, deadline: float) -> Iterator[Row]:
        for one in self.found[item.function]:
            if isinstance(one, Exception):
                raise one
            yield one

    def end(self) -> None:
        FakeWorker.ended += 1


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    monkeypatch.setattr(gpu_check, "Worker", FakeWorker)
    FakeWorker.started = FakeWorker.ended = 0
    return FakeWorker


def test_a_failed_item_is_written_down_and_the_next_goes_on(run, worker) -> None:
    worker.found = {
        "exact.replay": [Row("bits", "every bit", "all", True), RuntimeError("Traceback …\nCUDA error: 700")],
        "speed.image": [Row("image", "", "0.3 s")],
        "speed.v2": [TimeoutError()],
    }
    code, record, table = run("--only", "replay", "image", "v2")
    states = {name: outcome["state"] for name, outcome in record["items"].items()}
    assert states == {"replay": "failed", "image": "done", "v2": "stopped"}
    assert "CUDA error: 700" in record["items"]["replay"]["why"]
    assert [row["what"] for row in record["items"]["replay"]["rows"]] == ["bits"]
    assert (code, worker.started, worker.ended) == (1, 2, 2)  # a new process after the failed one
    assert "| bits | every bit | all |" in table
    assert "`replay` failed after 0 s: CUDA error: 700" in table


def test_what_does_not_fit_into_the_minutes_is_skipped(run, worker, monkeypatch) -> None:
    worker.found = {"speed.image": [Row("image", "", "0.3 s")]}
    monkeypatch.setattr(Check, "left", lambda self: 0.5)
    code, record, table = run("--only", "image")
    assert record["items"]["image"]["state"] == "skipped"
    assert (code, worker.started) == (1, 0)
    assert "`image` skipped" in table


def test_results_are_there_after_each_row(run, worker, tmp_path) -> None:
    """A machine that is taken away leaves what was found until then."""
    seen = []

    class Watching(list):
        def __iter__(self):
            yield Row("first", "", "1 s")
            seen.append((tmp_path / "gpu.md").read_text())
            yield Row("second", "< 1 s", "2 s", False)

    worker.found = {"speed.image": Watching()}
    code, _, table = run("--only", "image")
    assert "| first |" in seen[0]
    assert "| second |" not in seen[0]
    assert "| second | < 1 s | 2 s **(missed)** |" in table
    assert code == 1


def test_a_process_that_ends_is_an_error_of_its_item(tmp_path) -> None:
    check = Check("cpu", True, tmp_path, tmp_path, time.time() + 60)
    worker = gpu_check.Worker(check)
    try:
        with pytest.raises(RuntimeError, match="no_such_item"):
            list(worker.rows(gpu_check.Item("exact.no_such_item", 1, ""), check.deadline))
        with pytest.raises((RuntimeError, OSError)):  # it has ended after that
            list(worker.rows(gpu_check.Item("exact.replay", 1, ""), check.deadline))
    finally:
        worker.end()
    assert worker.facts["dry run"] is True
    assert worker.facts["commit"]


def test_every_item_has_its_function() -> None:
    for item in gpu_check.ITEMS.values():
        module, _, name = item.function.partition(".")
        assert callable(getattr(importlib.import_module(f"gpu.{module}"), name))


def test_a_comparison_finds_a_bit_and_what_is_not_finite() -> None:
    import torch

    exact = importlib.import_module("gpu.exact")
    x = torch.ones(2, 3)
    wrong = x.clone()
    wrong[0, 0] = 1 + 2**-23
    assert exact.exactness_row("x", [exact.comparison("same", [x], [x.clone()])]).met
    row = exact.exactness_row("x", [exact.comparison("one bit", [wrong], [x])])
    assert not row.met
    assert "not one bit" in row.measured
    nan = torch.full((2,), torch.nan)
    assert not exact.exactness_row("x", [exact.comparison("nan", [nan], [nan])]).met
    lines = ["no CUDA graph, going on without: why"]
    assert not exact.exactness_row("x", [exact.comparison("same", [x], [x])], lines).met


@pytest.mark.slow
@pytest.mark.parametrize("items", [QUICK, SLOW[:2], SLOW[2:]], ids=["quick", "exact", "in new processes"])
def test_a_dry_run_of_every_item(run, items: list[str]) -> None:
    """What only a GPU can settle must not fail there by a mistake that any machine shows."""
    _, record, table = run("--only", *items)
    found = {name: (each["state"], each["why"]) for name, each in record["items"].items()}
    assert found == dict.fromkeys(items, ("done", ""))
    exact = [row for each in record["items"].values() for row in each["rows"] if row["target"] == "every bit"]
    assert all(row["met"] for row in exact), table
    assert str(ROOT) not in json.dumps(record)
    assert socket.gethostname() not in json.dumps(record)
