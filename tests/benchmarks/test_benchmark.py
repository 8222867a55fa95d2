"""The benchmark's helpers; no timing is asserted."""

import importlib
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.errors import InputError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
benchmark = importlib.import_module("benchmark")
report = importlib.import_module("report")
weights_cache = importlib.import_module("weights_cache")
approximations = importlib.import_module("parts.approximations")
model_loading = importlib.import_module("parts.model_loading")
runs = importlib.import_module("parts.runs")
unet = importlib.import_module("parts.unet")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A YAML file of a tiny v1, with two blocks a level as the full one has, and its weights beside it."""
    config = OmegaConf.load(ROOT / "tests/golden/configs/mini-v1.yaml")
    config.model.params.unet_config.params.num_res_blocks = 2
    config.model.params.unet_config.params.context_dim = 64
    config.model.params.cond_stage_config.params = {"width": 64, "layers": 1, "heads": 4}
    path = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    OmegaConf.save(config, path)
    weights_cache.write_weights(path, path.with_suffix(".safetensors"))
    return path


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *argv: str) -> dict:
    monkeypatch.setattr(report, "RESULTS", folder)
    assert benchmark.main([*argv, "--name", "test"]) == 0
    return json.loads((folder / "test.json").read_text())


def test_the_script_itself_imports_no_torch():
    """Each process of a measurement imports the script, too: its memory and time would count."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "benchmarks/benchmark.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"parts.unet", "peers"} <= imported
    assert not {"torch", "numpy", "diffusers"} & imported


def test_calls_are_counted_and_written(monkeypatch, tmp_path, capsys):
    record = run(monkeypatch, tmp_path, "--only", "calls")
    assert [row["met"] for row in record["parts"]["calls"]] == [True] * 4
    assert capsys.readouterr().out == (tmp_path / "test.md").read_text()
    assert "| model calls, plms, N = 20, guided | N + 1 | 21 |" in (tmp_path / "test.md").read_text()


def test_parts_do_not_take_the_place_of_all_results(monkeypatch, tmp_path):
    """`--only` without `--name` wrote a part over the committed results of all."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert benchmark.main(["--only", "calls"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls.json", "calls.md"]


def test_a_device_that_is_not_there_is_named(monkeypatch, tmp_path):
    """It was torch's own error, after the first measurements, or a process that did not start."""
    with pytest.raises(InputError, match=r"meta is not there; this machine has .*cpu"):
        benchmark.main(["--only", "calls", "--device", "meta"])
    with pytest.raises(InputError, match=r"meta is not there; this machine has .*cpu"):
        importlib.import_module("gpu_check").main(["--out", str(tmp_path), "--device", "meta"])


def test_results_name_the_machine_but_not_whose_it_is(monkeypatch, tmp_path):
    record = run(monkeypatch, tmp_path, "--only", "calls")
    assert record["machine"]["torch"] == torch.__version__.partition("+")[0]
    for text in ((tmp_path / name).read_text() for name in ("test.json", "test.md")):
        assert str(ROOT) not in text
        assert socket.gethostname() not in text


def test_a_missed_target_shows():
    row = report.Row("a", "< 1 s", "2 s", met=False)
    assert report.markdown({}, [row]).splitlines()[-1] == "| a | < 1 s | 2 s **(missed)** |"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_loading_is_measured_stage_by_stage(tiny):
    readings = model_loading.load_and_use(tiny, tiny.with_suffix(".safetensors"), latents=8, dtype="float32")
    assert list(readings["memory"]) == ["imports", "load", "touch", "UNet", "decoder"]
    assert 0 < readings["load"] <= readings["load and touch"]


def test_stand_in_weights_are_made_once(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(weights_cache, "in_fresh_process", lambda function, *args: function(*args))
    weights = weights_cache.stand_in_weights(tiny, tmp_path / "cache/tiny.safetensors")
    assert list(weights.parent.iterdir()) == [weights]
    monkeypatch.setattr(weights_cache, "write_weights", None)
    assert weights_cache.stand_in_weights(tiny, weights) == weights
    with pytest.raises(InputError, match="--cache"):
        weights_cache.stand_in_weights(tiny, weights / "file as folder.safetensors")


def test_the_diffusers_twin_computes_the_same(tiny):
    pytest.importorskip("diffusers")
    readings = unet.time_unets(tiny, tiny.with_suffix(".safetensors"), 8, True, repeats=1)
    assert readings["largest output"] > 0.1
    assert readings["difference"] < 1e-5 * readings["largest output"]


def test_what_a_resumed_run_lacks_is_found():
    """The measured function itself asserts that half of the images are missing."""
    assert runs.resume_seconds(20) > 0


def test_json_lines_with_options_are_planned():
    """The measured function itself asserts that every line has its image."""
    assert runs.planning_seconds(20) > 0


@pytest.mark.slow
def test_approximations_are_compared_with_the_exact_images(monkeypatch):
    monkeypatch.setattr(approximations, "APPROXIMATIONS", ("--deepcache 2", "--guidance_end 0.6"))
    found = approximations.approximations(steps=4, images=2)
    assert list(found) == ["", "--deepcache 2", "--guidance_end 0.6"]
    assert all(len(times) == 3 and len(psnr) == 2 for times, psnr in found.values())
    exact = found.pop("")[1]
    assert min(exact) > 100  # the same command twice
    assert all(5 < value < 80 for _, psnr in found.values() for value in psnr)


@pytest.mark.slow
def test_bookkeeping_is_a_part_of_a_run(monkeypatch):
    from ldm.runs import worker

    monkeypatch.setattr(worker, "save", worker.save)  # which the measurement replaces
    spent, whole = runs.bookkeeping_share(4)
    assert 0 < spent < whole
