"""--plan: what a run will take, from earlier ones or a probe, and how far off that was."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Result, refused
from run_helpers import manifest

from ldm.cache import cache_folder
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import ImageRequest
from ldm.runs.forecast import (
    FILE,
    BatchTime,
    Sort,
    Speed,
    Speeds,
    Stopwatch,
    _parts,
    forecast,
    probed,
    remember,
)
from ldm.runs.manifest import RUNS, read_lines
from ldm.runs.plan import plan_run


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is remembered at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder() / FILE


@pytest.fixture
def txt2img(command: Callable[..., Result], model) -> Callable[..., Result]:
    argv = ["--config", model[0], "--ckpt", model[1], "--prompt", "x", "--watermark", "none"]
    return lambda *more: command("txt2img", *argv, *(more or ()))


SMALL = ("--ddim_steps", 4, "--n_samples", 2, "--n_iter", 2)


@pytest.fixture
def pipeline(model) -> Pipeline:
    return Pipeline.open(str(model[1]), str(model[0]), safety="off")


def run_of(pipeline: Pipeline, count: int = 1, n_iter: int = 3, **values: object):
    requests = [pipeline.resolve(ImageRequest(f"{k}", **values)) for k in range(count)]
    return plan_run(requests, 1, n_iter, count, None)


def test_a_stopwatch_counts_the_steps_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.5, 2.0, 3.0, 3.5, 4.0, 9.0])
    monkeypatch.setattr("ldm.runs.forecast.time.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    for _ in range(3):
        watch.step(2)
    watch.finish((0, 1))
    watch.step(2)
    watch.step(-2)  # it did not fit, and is made in halves
    watch.finish((2, 3))
    assert watch.batches == [((0, 1), 3.0, 0.5)]


def test_cfg_plus_plus_is_guided_at_any_scale(pipeline: Pipeline) -> None:
    """At scale 1, where it calls the model with both texts, too, its speed was that of one text alone."""
    given = {"sampler": "euler", "scale": 1.0, "steps": 4}
    plain, guided = (
        Sort.of(pipeline, pipeline.resolve(ImageRequest("x", cfg_pp=cfg_pp, **given)), 1)
        for cfg_pp in (False, True)
    )
    assert (dict(plain.facts)["guided"], dict(guided.facts)["guided"]) == (False, True)


def test_a_batch_in_parts() -> None:
    assert _parts(BatchTime((), 3.0, 0.5), 4) == (0.5, 1.0)
    assert _parts(BatchTime((), 3.0, None), 1) == (3.0, 0.0)
    assert _parts(BatchTime((), 3.0, None), 0) == (0.0, 3.0)
    assert _parts(BatchTime((), 1.0, 0.5), 4) == (0.5, 0.0)


def test_a_long_run_keeps_the_times_of_some_batches(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps of all batches were kept until the end: 1.8 GB for a million images of 50 steps.

    The seconds of what is left out still count, so that they are not taken for the start of the process.
    """
    monkeypatch.setattr("ldm.runs.forecast.KEPT_BATCHES", 4)
    clock = [0.0]
    monkeypatch.setattr("ldm.runs.forecast.time.perf_counter", lambda: clock[0])
    watch = Stopwatch()
    for k in range(20):
        for seconds in (60.0 if k == 0 else 2.0, 0.5, 0.5):
            clock[0] += seconds
            watch.step(1)
        watch.finish((k,))
    assert [batch.numbers for batch in watch.batches] == [(0,), (17,), (18,), (19,)]
    plan = run_of(pipeline, n_iter=20, steps=3)
    remember(pipeline, plan, watch, clock[0] + 5)
    assert forecast(pipeline, plan, plan.batches).seconds == clock[0] + 5


def test_a_forecast_adds_up(pipeline: Pipeline) -> None:
    plan = run_of(pipeline, 2, 3, steps=10)
    speeds = Speeds(pipeline)
    assert forecast(pipeline, plan, plan.batches) is None
    sort = Sort.of(pipeline, plan.requests.of_round[0], 2)
    speeds.add({sort: Speed(step=0.5, rest=2.0, start=4.0, memory=5)})
    found = forecast(pipeline, plan, plan.batches)
    assert (found.images, found.batches, found.steps, found.memory) == (6, 3, 30, 5)
    assert found.seconds == 4 + 3 * (2 + 10 * 0.5)
    assert found.by_sort == {sort: 7.0}
    assert forecast(pipeline, plan, plan.batches, processes=3).seconds == 4 + 7


@pytest.mark.parametrize(("processes", "batches"), [(1, 3), (2, 2), (3, 1), (4, 1)])
def test_a_batch_is_not_shared_by_processes(pipeline: Pipeline, processes: int, batches: int) -> None:
    """A run of one batch on four devices was planned to take a quarter of it."""
    plan = run_of(pipeline, steps=10)
    speeds = Speeds(pipeline)
    speeds.add({Sort.of(pipeline, plan.requests.of_round[0], 1): Speed(0.5, 2.0, 4.0, 5)})
    assert forecast(pipeline, plan, plan.batches, processes).seconds == 4 + 7 * batches


def test_another_number_of_images_is_in_proportion(pipeline: Pipeline) -> None:
    plan = run_of(pipeline, 4, 1, steps=10)
    sort = Sort.of(pipeline, plan.requests.of_round[0], 2)
    Speeds(pipeline).add({sort: Speed(0.5, 2.0, 0.0, 5)})
    assert forecast(pipeline, plan, plan.batches).seconds == 2 * (2 + 10 * 0.5)


def watched(batches: int) -> Stopwatch:
    """Batches of ten steps of half a second and two seconds of other work; the first takes 60 s more."""
    seconds = [7.0 + (60.0 if k == 0 else 0.0) for k in range(batches)]
    return Stopwatch(batches=[BatchTime((k,), each, 0.5) for k, each in enumerate(seconds)])


def test_one_batch_does_not_spoil_what_several_said(pipeline: Pipeline) -> None:
    """A single batch has all of the warm-up: after a run of one, the plan of many came out far too long."""
    plan = run_of(pipeline, n_iter=100, steps=10)
    remember(pipeline, plan, watched(1), 70.0)
    (entry,) = Speeds(pipeline).entries
    assert (entry["speed"]["step"], entry["speed"]["rest"], entry["speed"]["start"]) == (0.5, 0.0, 65.0)
    assert forecast(pipeline, plan, plan.batches).seconds == 65 + 100 * 5
    remember(pipeline, plan, watched(4), 90.0)
    assert forecast(pipeline, plan, plan.batches).seconds == 62 + 100 * 7
    remember(pipeline, plan, watched(1), 70.0)
    (entry,) = Speeds(pipeline).entries
    assert (entry["speed"]["batches"], entry["speed"]["rest"]) == (4, 2.0)
    assert forecast(pipeline, plan, plan.batches).seconds == 62 + 100 * 7


def test_one_batch_of_another_size_takes_the_rest_from_what_is_known(pipeline: Pipeline) -> None:
    """Its own is with the warm-up, which would be counted in each batch of a plan."""
    remember(pipeline, run_of(pipeline, n_iter=4, steps=10), watched(4), 90.0)
    two = run_of(pipeline, 2, 1, steps=10)
    remember(pipeline, two, Stopwatch(batches=[BatchTime((0, 1), 70.0, 1.0)]), 75.0)
    speed = Speeds(pipeline).find(Sort.of(pipeline, two.requests.of_round[0], 2))
    assert (speed.step, speed.rest, speed.start, speed.batches) == (1.0, 4.0, 61.0, 1)


@pytest.mark.parametrize("other", [{"sampler": "euler"}, {"scale": 1.0}, {"height": 128, "width": 128}])
def test_other_work_is_not_known(pipeline: Pipeline, other: dict) -> None:
    plan = run_of(pipeline)
    Speeds(pipeline).add({Sort.of(pipeline, plan.requests.of_round[0], 1): Speed(1, 1, 1, 1)})
    changed = run_of(pipeline, **other)
    assert forecast(pipeline, plan, plan.batches) is not None
    assert forecast(pipeline, changed, changed.batches) is None


def test_a_damaged_memory_counts_as_none(pipeline: Pipeline, cache: Path) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    for text in ("", "[1]", '[{"work": {}, "images": 1, "speed": {"walk": 1}}]', "{}"):
        cache.write_text(text)
        assert Speeds(pipeline).entries == []
        plan = run_of(pipeline)
        assert forecast(pipeline, plan, plan.batches) is None


def test_a_probe_takes_few_steps(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each sort of batch once; the next forecast remembers them."""
    plan, steps = run_of(pipeline, n_iter=5, steps=40), []
    plain = Pipeline.batches

    def batches(self, batches, on_step=None, on_x0=None):
        return plain(self, batches, lambda n: (steps.append(n), on_step(n)), on_x0)

    monkeypatch.setattr(Pipeline, "batches", batches)
    found = probed(pipeline, plan, 1)
    assert (found.source, found.images, found.steps) == ("measured in a probe", 5, 200)
    assert len(steps) == 2 * 3
    assert probed(pipeline, plan, 1).source == "remembered"
    assert len(steps) == 2 * 3


def test_plan_makes_nothing(txt2img: Callable[..., Result]) -> None:
    result = txt2img(*SMALL, "--plan", "--power", 100, "--region", "us-east")
    assert (result.code, result.files, result.folder.exists()) == (0, [], False)
    assert [line.split()[0] for line in result.out] == ["images", "time", "memory", "energy", "CO2"]
    assert result.out[0] == "images   4 in 2 batches, 8 steps"
    assert "measured in a probe" in result.out[1]
    assert "estimated: 100 W, given" in result.out[3]
    assert "us-east, 0.3678 kg per kWh" in result.out[4]
    facts = json.loads(txt2img(*SMALL, "--plan", "--json").out[0])
    assert (facts["images"], facts["source"]) == (4, "remembered")
    assert facts["kwh"] == pytest.approx(facts["hours"] * facts["watts"] / 1000, rel=1e-3)
    assert facts["memory_bytes"] > 1e6


def test_a_run_says_how_far_off_its_plan_was(txt2img: Callable[..., Result]) -> None:
    first = txt2img(*SMALL)
    assert all("planned_seconds" not in line for line in manifest(first.folder))
    again = txt2img(*SMALL)
    lines = manifest(again.folder)[4:]
    assert len({line["planned_seconds"] for line in lines}) == 1
    assert lines[0]["planned_seconds"] > 0
    *_, found = (line["costs"] for line in read_lines(again.folder / RUNS) if "costs" in line)
    more = found["seconds"] / found["planned_seconds"] - 1
    assert found["more_than_planned"] == pytest.approx(more, abs=2e-3)


def test_a_run_that_takes_minutes_says_what_it_took(txt2img, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.runs.run.WORTH_A_LINE", 0.0)
    assert not any("planned" in line for line in txt2img(*SMALL).err)
    (line,) = (line for line in txt2img(*SMALL).err if line.startswith("it took "))
    assert " planned: " in line
    assert line.endswith("CO2 (estimated)")


def test_a_file_of_speeds_that_cannot_be_written_is_done_without(txt2img, cache: Path) -> None:
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("")
    assert txt2img(*SMALL).code == 0
    assert txt2img(*SMALL, "--plan").code == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--sampler", "dpm_adaptive"], "--sampler dpm_adaptive chooses the number of its steps"),
        (["--resume"], "--plan with --resume"),
        (["--dry_run"], "--plan with --dry_run"),
    ],
)
def test_what_cannot_be_planned(txt2img: Callable[..., Result], more: list, words: str) -> None:
    refused(txt2img("--plan", *more), words)
