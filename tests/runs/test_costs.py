"""The calculator's formula, its tables, and what is measured where the hardware has counters."""

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from commands import Result, refused
from run_helpers import manifest

from ldm.errors import InputError
from ldm.runs import costs
from ldm.runs.costs import (
    MEASURED,
    REGIONS,
    Costs,
    Meter,
    cpu_name,
    duration,
    energy,
    factor_of,
    mass,
    power_of,
)
from ldm.runs.manifest import RUNS, read_lines

CPU = torch.device("cpu")


def test_the_card_of_stable_diffusion_v1() -> None:
    """Its 150,000 hours of an A100 PCIe in US-east, at 0.3 kg per kWh, are its 11,250 kg."""
    found = Costs(150_000, power_of("NVIDIA A100-PCIE-40GB"), factor_of("0.3"))
    assert (found.watts, found.kwh, found.co2_kg) == (250, 37_500, 11_250)
    assert str(found) == "37,500 kWh and 11,250 kg CO2 (estimated)"
    assert found.record() == {
        "hours": 150_000,
        "watts": 250,
        "kwh": 37_500,
        "kg_co2_per_kwh": 0.3,
        "co2_kg": 11_250,
        "energy": "estimated",
    }


@pytest.mark.parametrize(
    ("name", "watts"),
    [
        ("NVIDIA A100-SXM4-80GB", 400),
        ("NVIDIA H100 80GB HBM3", 700),
        ("NVIDIA H100 PCIe", 350),
        ("NVIDIA H200", 700),
        ("NVIDIA A10G", 150),
        ("Tesla T4", 70),
        ("Tesla V100-SXM2-16GB", 250),
        ("Tesla V100-SXM2-32GB", 300),
        ("NVIDIA GeForce RTX 3090", 350),
        ("NVIDIA GeForce RTX 3080 Ti", 350),
        ("NVIDIA GeForce RTX 3080", 320),
        ("NVIDIA GeForce RTX 2080 Ti", 250),
        ("NVIDIA L40S", 350),
        ("NVIDIA L40", 300),
        ("NVIDIA B200", 1000),
        ("NVIDIA GeForce RTX 4060", 115),
        ("NVIDIA GeForce RTX 3060", 170),
        ("AMD Instinct MI210", 300),
        ("AMD Instinct MI250", 500),
        ("AMD Instinct MI250X", 560),
        ("NVIDIA L4", 72),
        ("something new", 250),
    ],
)
def test_power_by_name(name: str, watts: float) -> None:
    assert power_of(name) == watts


def test_a_processor_has_the_power_of_its_cores() -> None:
    assert power_of("AMD EPYC 7763 64-Core Processor", 64) == pytest.approx(280)
    assert power_of("Intel(R) Xeon(R) Gold 6148 CPU @ 2.40GHz", 20) == pytest.approx(150)
    assert power_of("anything", 2) == 20
    assert cpu_name()


def test_regions() -> None:
    assert factor_of("us-east") == factor_of("US East") == factor_of("us_east") == 0.3678
    assert factor_of("0") == 0
    assert all(0 < factor <= costs.MOST_CO2 for factor in REGIONS.values())


@pytest.mark.parametrize(
    ("region", "words"),
    [
        ("us-eats", "the nearest are us-east, us-west"),
        ("canada", "canada-ontario, canada-quebec"),
        ("", "or one of world, australia"),
        ("367", "367 g are 0.367"),
        ("-1", "in range: 0 … 2"),
        ("nan", "in range: 0 … 2"),
        ("inf", "in range: 0 … 2"),
    ],
)
def test_a_region_that_is_none(region: str, words: str) -> None:
    with pytest.raises(InputError, match=r"^region: ") as error:
        factor_of(region)
    assert words in str(error.value)


def test_words() -> None:
    assert [duration(s) for s in (0.84, 12.3, 90, 3600 * 3 + 720)] == [
        "0.8 s",
        "12 s",
        "1 min 30 s",
        "3 h 12 min",
    ]
    assert [mass(kg) for kg in (0, 2.04e-5, 0.0098, 11_250)] == ["0 g", "0.020 g", "9.8 g", "11,250 kg"]
    assert [energy(kwh) for kwh in (4.1e-6, 0.021, 37_500)] == ["0.0041 Wh", "21 Wh", "37,500 kWh"]


def test_a_meter_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1800.0, 3600.0])
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(clock))
    meter = Meter(CPU, 2, power=100, region="0.5")
    assert meter.costs() == Costs(0.5, 200, 0.5)
    assert meter.stop() == Costs(1, 200, 0.5)
    assert meter.watts * 0.5 == 100


class Tracker:
    """codecarbon's, which has counted 0.3 kWh of the processor and 2 kWh of GPUs."""

    final_emissions_data = SimpleNamespace(cpu_energy=0.3, gpu_energy=2.0)
    events: ClassVar[list[str]] = []

    def start(self) -> None:
        self.events.append("start")

    def stop(self) -> None:
        self.events.append("stop")


@pytest.mark.parametrize("energy", ["measured", "auto"])
def test_a_meter_measures(monkeypatch: pytest.MonkeyPatch, energy: str) -> None:
    monkeypatch.setattr(costs, "why_not_measured", lambda gpu, nodes: None)
    monkeypatch.setattr(costs, "codecarbon_tracker", Tracker)
    Tracker.events.clear()
    meter = Meter(CPU, power=1, region="0.5", energy=energy)
    assert Tracker.events == ["start"]
    meter._start -= 3600
    found = meter.stop()
    assert Tracker.events == ["start", "stop"]
    assert found.how == MEASURED
    assert found.kwh == pytest.approx(0.3)
    assert found.co2_kg == pytest.approx(0.15)
    assert found.hours == pytest.approx(1, abs=0.01)


def test_what_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "why_not_measured", lambda gpu, nodes: "there is no counter")
    with pytest.raises(InputError, match="energy measured: there is no counter"):
        Meter(CPU, energy="measured")
    assert Meter(CPU, energy="auto").stop().how == "estimated"
    assert costs.why_not_measured.__name__ == "<lambda>"


def test_codecarbon_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    monkeypatch.setitem(sys.modules, "codecarbon.core", None)
    assert "pip install -e" in costs.why_not_measured(gpu=False)


def test_codecarbon_as_it_is(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tracker counts without a file, and what it says of the processor is an energy."""
    pytest.importorskip("codecarbon")
    monkeypatch.chdir(tmp_path)
    assert costs.why_not_measured(gpu=False, nodes=2) == "each of 2 machines would have to be"
    costs.why_not_measured(gpu=False)
    tracker = costs.codecarbon_tracker()
    tracker.start()
    tracker.stop()
    assert tracker.final_emissions_data.cpu_energy >= 0
    assert tracker.final_emissions_data.gpu_energy >= 0
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def txt2img(command: Callable[..., Result], model) -> Callable[..., Result]:
    argv = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 2, "--n_samples", 2, "--n_iter", 1]
    return lambda *more: command("txt2img", *argv, "--prompt", "x", "--watermark", "none", *more)


def test_a_run_records_its_costs(txt2img: Callable[..., Result]) -> None:
    result = txt2img("--power", 360, "--region", 0.5)
    assert result.code == 0
    (line,) = (line["costs"] for line in read_lines(result.folder / RUNS) if "costs" in line)
    assert line["watts"] == 360
    assert line["energy"] == "estimated"
    assert line["kwh"] == pytest.approx(line["hours"] * 0.36, rel=1e-3)
    assert line["co2_kg"] == pytest.approx(line["kwh"] / 2, rel=1e-3)
    for image in manifest(result.folder):
        assert image["kwh"] == pytest.approx(image["seconds"] * 1e-4, abs=1e-7)
        assert image["co2_kg"] == pytest.approx(image["kwh"] / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--power", 0, "at least 0.1"),
        ("--power", -5, "at least 0.1"),
        ("--region", "moon", "'moon' is not known"),
        ("--energy", "guessed", "estimated"),
    ],
)
def test_bad_options(txt2img: Callable[..., Result], flag: str, value: object, words: str) -> None:
    refused(txt2img(flag, value), flag, words)


def test_measured_energy_without_a_counter(txt2img: Callable[..., Result], monkeypatch) -> None:
    """It is refused before anything is written."""
    monkeypatch.setattr(costs, "why_not_measured", lambda gpu, nodes: "there is no counter")
    refused(txt2img("--energy", "measured"), "--energy measured: there is no counter")


def test_records_are_json() -> None:
    assert json.loads(json.dumps(Costs(1, 2, 3).record()))["kwh"] == 0.002
