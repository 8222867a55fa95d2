"""Points of an evaluation: their files, what is refused, the plot."""

import csv
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.errors import InputError
from ldm.evaluation.intervals import Figure
from ldm.evaluation.pareto import ACCURACY, CLIP_SCORE, FID, Point, Results, plot
from ldm.runs.manifest import folder_lock

SETTINGS = {"images": 10, "steps": 50}


def point(name: str, scale: float | None, fid: float = 12.5) -> Point:
    distance, agreement = Figure(fid, fid - 1, fid + 2), Figure(0.25, 0.24, 0.27)
    return Point(name, scale, "plms", 50, 10, 0, distance, agreement, f"{name}/scale-{scale}")


def limit(name: str) -> Point:
    return replace(point(name, None), sampler=None, steps=None, folder=None)


def test_points_are_kept_and_found_again(tmp_path: Path) -> None:
    results = Results(tmp_path, SETTINGS, FID, CLIP_SCORE)
    for each in (limit("renders"), point("b", 3.0), point("a", 5.0), point("b", 1.5), point("b", 3.0, 20.0)):
        results.add(each)
    again = Results(tmp_path, SETTINGS, FID, CLIP_SCORE)
    assert again.points == results.points
    assert [each.key for each in again.points] == [("b", 1.5), ("b", 3.0), ("a", 5.0), ("renders", None)]
    assert again.find("b", 3.0).distance.value == 20.0
    assert again.find("b", 4.0) is None
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["results.csv", "results.json"]
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["scale"] for row in rows] == ["1.5", "3.0", "5.0", ""]
    assert [rows[1][name] for name in ("fid", "fid_low", "fid_high")] == ["20", "19", "22"]
    assert [rows[1][f"clip_score{end}"] for end in ("", "_low", "_high")] == ["0.25", "0.24", "0.27"]
    assert rows[1]["folder"] == "b/scale-3.0"


def test_other_settings(tmp_path: Path) -> None:
    Results(tmp_path, SETTINGS, FID, CLIP_SCORE).add(point("a", 3.0))
    with pytest.raises(InputError, match="other settings: images 10, now 20; give another folder"):
        Results(tmp_path, SETTINGS | {"images": 20}, FID, CLIP_SCORE)


def test_another_checkpoint_of_the_same_name(tmp_path: Path) -> None:
    """Points went by name alone: the figures of an earlier file were reported as those of a new one."""
    results = Results(tmp_path, SETTINGS, FID, CLIP_SCORE)
    results.use("a", {"weights": "0123456789"})
    results.add(point("a", 3.0))
    again = Results(tmp_path, SETTINGS, FID, CLIP_SCORE)
    again.use("a", {"weights": "0123456789"})
    again.use("b", {"weights": "abcdef0123"})
    why = r"of another a \(weights 0123456789, not abcdef0123\): give another folder"
    with pytest.raises(InputError, match=why):
        again.use("a", {"weights": "abcdef0123"})


@pytest.mark.parametrize("name", ["config", "sampler"])
def test_the_same_checkpoint_with_another_config_or_sampler(tmp_path: Path, name: str) -> None:
    """Points went by the checkpoint alone: those of another config counted as this one's."""
    facts = {"weights": "0123456789", "config": "4567", "sampler": "plms"}
    results = Results(tmp_path, SETTINGS, FID, CLIP_SCORE)
    results.use("a", facts)
    results.add(point("a", 3.0))
    again = Results(tmp_path, SETTINGS, FID, CLIP_SCORE)
    again.use("a", facts)
    with pytest.raises(InputError, match=rf"of another a \({name} {facts[name]}, not other\)"):
        again.use("a", facts | {name: "other"})


def test_results_without_hashes_are_read(tmp_path: Path) -> None:
    """Files of before there were hashes count as measured on the checkpoints that are there."""
    results = Results(tmp_path, SETTINGS, FID, CLIP_SCORE)
    results.add(point("a", 3.0))
    content = json.loads((tmp_path / "results.json").read_text())
    del content["models"]
    (tmp_path / "results.json").write_text(json.dumps(content))
    again = Results(tmp_path, SETTINGS, FID, CLIP_SCORE)
    again.use("a", {"weights": "0123456789"})
    assert again.points == results.points


def test_results_with_hashes_of_weights_alone_are_read(tmp_path: Path) -> None:
    """Files of before configs were compared still refuse other weights."""
    results = Results(tmp_path, SETTINGS, FID, CLIP_SCORE)
    results.add(point("a", 3.0))
    content = json.loads((tmp_path / "results.json").read_text())
    del content["models"]
    (tmp_path / "results.json").write_text(json.dumps(content | {"weights": {"a": "0123456789"}}))
    again = Results(tmp_path, SETTINGS, FID, CLIP_SCORE)
    with pytest.raises(InputError, match=r"weights 0123456789, not abcdef0123"):
        again.use("a", {"weights": "abcdef0123", "config": "4567"})
    again.use("a", {"weights": "0123456789", "config": "4567"})
    again.write()
    written = json.loads((tmp_path / "results.json").read_text())["models"]
    assert written == {"a": {"weights": "0123456789", "config": "4567"}}
    assert again.points == results.points


def test_two_commands_in_one_folder(tmp_path: Path) -> None:
    """Each overwrote the points that the other had measured since it started."""
    one, two = (Results(tmp_path, SETTINGS, FID, CLIP_SCORE) for _ in range(2))
    one.use("a", {"weights": "0123456789"})
    two.use("b", {"weights": "abcdef0123"})
    one.add(point("a", 3.0))
    two.add(point("b", 1.5))
    one.add(point("a", 5.0))
    found = Results(tmp_path, SETTINGS, FID, CLIP_SCORE)
    assert {each.key for each in found.points} == {("a", 3.0), ("a", 5.0), ("b", 1.5)}
    assert found.models == {"a": {"weights": "0123456789"}, "b": {"weights": "abcdef0123"}}
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 4
    two.use("c", {"weights": "0"})
    one.use("c", {"weights": "1"})
    one.write()
    with pytest.raises(InputError, match=r"of another c \(weights 1, not 0\)"):
        two.write()


def test_a_command_waits_for_another_that_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one had added between the other's reading and writing was lost."""
    results, order = Results(tmp_path, SETTINGS, FID, CLIP_SCORE), []
    asked, plain_read, plain_lock = threading.Event(), results._take_in, folder_lock

    @contextmanager
    def watched(folder: Path) -> Iterator[None]:
        asked.set()
        with plain_lock(folder):
            yield

    monkeypatch.setattr("ldm.runs.manifest.folder_lock", watched)
    monkeypatch.setattr(results, "_take_in", lambda: (order.append("read"), plain_read()))
    with ThreadPoolExecutor(1) as pool:
        with plain_lock(tmp_path):
            waiting = pool.submit(results.add, point("a", 3.0))
            assert asked.wait(60)
            time.sleep(0.05)  # in which one that does not wait would read
            order.append("the other has written")
        waiting.result()
    assert order == ["the other has written", "read"]
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": {}}', '{"settings": {}, "points": [{}]}'])
def test_another_file_of_that_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match="has no results of an evaluation"):
        Results(tmp_path, SETTINGS, FID, CLIP_SCORE)
    assert (tmp_path / "results.json").read_text() == content


def test_the_table(tmp_path: Path) -> None:
    results = Results(tmp_path, SETTINGS, FID, ACCURACY)
    results.add(point("a", 3.0))
    assert results.markdown().splitlines()[2] == "| a | 3 | 12.50 (11.50 to 14.50) | 25.0 (24.0 to 27.0) |"
    assert results.in_words(point("a", 3.0)).startswith("a, scale 3: FID 12.50 (11.50 to 14.50), images")


def test_the_plot_has_each_point_with_its_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn, plain = [], Axes.errorbar

    def errorbar(self, *args, **style):
        drawn.append((args, style))
        return plain(self, *args, **style)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    results = Results(tmp_path, SETTINGS, FID, ACCURACY)
    for each in (point("a", 1.5), point("a", 3.0), point("b", 3.0), limit("renders")):
        results.add(each)
    plot(results, tmp_path / "pareto.png")
    assert [style["label"] for _, style in drawn] == ["a", "b", "renders"]
    assert len({(style["color"], style["fmt"]) for _, style in drawn}) == 3
    across, up, up_bars, across_bars = drawn[0][0]
    assert (across, up) == ([25.0, 25.0], [12.5, 12.5])
    assert np.allclose(up_bars, [[1, 1], [2, 2]])
    assert np.allclose(across_bars, [[1, 1], [2, 2]])
    image = np.asarray(Image.open(tmp_path / "pareto.png").convert("L"))
    assert image.shape[1] >= 900
    assert (image < 100).sum() > 500


def test_matplotlib_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r'pip install -e "\.\[evaluation\]"'):
        plot(Results(tmp_path, SETTINGS, FID, CLIP_SCORE), tmp_path / "pareto.png")


def test_what_is_written_is_json(tmp_path: Path) -> None:
    Results(tmp_path, SETTINGS, FID, CLIP_SCORE).add(point("ä", 3.0))
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert content["settings"] == SETTINGS
    assert content["points"][0]["distance"] == {"value": 12.5, "low": 11.5, "high": 14.5}
