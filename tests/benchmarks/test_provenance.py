"""The table of which mark survives what, on one small image."""

import importlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("c2pa")

from certificates import Authority

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
provenance = importlib.import_module("provenance")


def test_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(provenance, "RUNS", 1)
    keys = map(str, Authority().files(tmp_path))
    output = tmp_path / "counts.json"
    argv = ["--sign", *keys, "--images", "1", "--size", "256", "--output", str(output)]
    assert provenance.main(argv) == 0
    found = json.loads(output.read_text())["found"]
    everything = {mark: {"there": 1} for mark in ("watermark", "settings", "XMP")} | {"C2PA": {"valid": 1}}
    assert found["copied"] == found["written as PNG"] == everything
    nothing: dict[str, dict] = {mark: {} for mark in provenance.MARKS}
    assert found["resized to 0.5"] == nothing
    assert found["screenshot, cut to the image"] == nothing | {"watermark": {"there": 1}}
    altered = found["one level brighter, all chunks kept"]
    assert (altered["settings"], altered["C2PA"]) == ({"there": 1}, {"altered": 1})
    carried = found["saved as JPEG 75, EXIF and XMP copied"]
    assert (carried["settings"], carried["XMP"], carried["C2PA"]) == ({"there": 1}, {"there": 1}, {})
    out = capsys.readouterr().out.splitlines()
    assert "| copied | yes | yes | yes | yes |" in out
    assert "| resized to 0.5 | no | no | no | no |" in out
