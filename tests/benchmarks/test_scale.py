"""The simulation of a run's workers, in little; no timing is asserted."""

import importlib
import sys
from pathlib import Path

from ldm.runs.manifest import MANIFEST, parts, read_lines

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
scale = importlib.import_module("scale")
measuring = importlib.import_module("measuring")


def test_simulated_workers_make_one_run(tmp_path: Path) -> None:
    """Every image is dealt once, counted, and recorded in the one manifest."""
    found = measuring.in_fresh_process(scale.simulate, 3, 500.0, 200, tmp_path)
    assert found["images"] == 200
    assert 0 < found["seconds between images"] < found["seconds an image"]
    assert found["line: calls an image"] == 1
    assert found["store: calls an image"] > 1
    assert sorted(line["image"] for line in read_lines(tmp_path / MANIFEST)) == list(range(200))
    assert parts(tmp_path) == []


def test_planning_and_resuming(tmp_path: Path) -> None:
    planned = scale.plan_million(100, 10_000)
    assert planned["images"] == 10_000
    resumed = scale.resume_million(10_000, 4, tmp_path)
    assert resumed["batches"] == 1000
    assert list(tmp_path.iterdir()) == []


def test_a_few_workers_beside_the_load_of_many(tmp_path: Path) -> None:
    """What 64 workers lost on two cores was mostly their want of cores, and the table did not say so."""
    found = measuring.in_fresh_process(scale.simulate, 2, 100.0, 100, tmp_path, 6)
    assert found["images"] == 100
    assert found["images/s of the others"] > 0
    assert sum(path.stat().st_size for path in tmp_path.glob("others-*")) > 0
    assert len(list(read_lines(tmp_path / MANIFEST))) == 100
