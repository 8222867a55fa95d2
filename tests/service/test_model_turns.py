"""Which request is next where not all models fit into memory, on a clock that only the tests move."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import pytest
import tiny_service
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_service import live
from tiny_service import held, request

from ldm.pipeline.options import RuntimeOptions
from ldm.service import engine as engine_module
from ldm.service.engine import Engine
from ldm.service.options import ServiceOptions
from ldm.service.queue import Waiting

LOAD, BATCH = 7.0, 1.0  # seconds


class Models:
    """What the engine asks of its models; to load one takes time and nothing else."""

    folders, runtime = (), RuntimeOptions()

    def __init__(self, service: "Simulated", most: int, seconds: float):
        self.service, self.most, self.seconds = service, most, seconds
        self.loaded, self.left, self.loaded_at, self.loads = [], {}, 0.0, 0

    def needs_room(self, name: str) -> bool:
        return name not in self.loaded and len(self.loaded) >= self.most

    def evicted(self, name: str) -> float:
        return self.left.get(name, float("-inf"))

    def seconds_to_load(self, name: str) -> float:
        return self.seconds

    def use(self, name: str) -> None:
        if name in self.loaded:
            self.loaded.remove(name)
        else:
            if len(self.loaded) >= self.most:
                self.left[self.loaded.pop(0)] = self.service.now
            self.service.now += self.seconds
            self.loaded_at = self.service.now
            self.loads += 1
        self.loaded.append(name)


class Simulated:
    """The engine's own choice of the next request, with time that passes for loads and batches alone."""

    def __init__(self, most: int = 1, seconds: float = LOAD, **options: object):
        self.now, self.jobs = 0.0, 0
        self.models = Models(self, most, seconds)
        self.engine = Engine(self.models, ServiceOptions(queue_size=1000, **options))
        self.engine._free_since = float("-inf")  # nobody is about to ask again
        self.models.use("a")
        self.now = self.models.loaded_at = 0.0
        self.models.loads = 0

    def put(self, client: str, model: str, size: int = 64, timeout: float = 600.0) -> None:
        self.jobs += 1
        job = SimpleNamespace(model=model, created=self.now, deadline=self.now + timeout)
        entry = SimpleNamespace(job=job)
        self.engine._queue.put([Waiting(client, self.jobs, (model, size), entry)])

    def serve(self, most: int = 8) -> list[Waiting]:
        """The next batch."""
        real = engine_module.time
        engine_module.time = SimpleNamespace(monotonic=lambda: self.now)
        try:
            first = self.engine._first()
        finally:
            engine_module.time = real
        taken = self.engine._queue.take(most, first)
        assert taken[0] is first
        self.models.use(first.entry.job.model)
        self.now += BATCH
        return taken

    def closed_loop(self, asking: Sequence[tuple[str, str]], batches: int) -> list[str]:
        """The models of so many batches, of clients that each ask for one model, again and again."""
        models = dict(asking)
        for client, model in asking:
            self.put(client, model)
        served = []
        for _ in range(batches):
            taken = self.serve(most=1)
            served.append(taken[0].entry.job.model)
            self.put(taken[0].client, models[taken[0].client])
        return served


ASKING = (("a1", "a"), ("b1", "b"), ("a2", "a"), ("b2", "b"))


def test_a_model_that_is_in_memory_goes_first_for_a_bounded_time() -> None:
    """Two clients, a model each, had one of them loaded for every batch."""
    simulated = Simulated()
    served = simulated.closed_loop(ASKING, 100)
    assert served == [*"a" * 30, *"b" * 30, *"a" * 30, *"b" * 10]  # a batch takes a second
    assert simulated.models.loads == 3


def test_strict_turns_can_be_had() -> None:
    simulated = Simulated(model_wait=0)
    assert simulated.closed_loop(ASKING, 20) == ["a", "b"] * 10
    assert simulated.models.loads == 19


@pytest.mark.parametrize("most", [2, 3])
def test_models_that_fit_together_take_strict_turns(most: int) -> None:
    """A model for which there is room is loaded when it is its turn."""
    simulated = Simulated(most=most)
    assert simulated.closed_loop(ASKING, 20) == ["a", "b"] * 10
    assert simulated.models.loads == 1


def test_everything_that_waits_for_a_new_model_profits() -> None:
    simulated = Simulated()
    for k in range(6):
        simulated.put(f"client{k}", "b")
    assert len(simulated.serve()) == 6
    assert simulated.models.loads == 1


def test_clients_take_turns_within_a_model() -> None:
    simulated = Simulated()
    for client, model in (("x", "b"), ("x", "a"), ("x", "a"), ("y", "a"), ("z", "b"), ("y", "a")):
        simulated.put(client, model)
    taken = [simulated.serve(most=1)[0] for _ in range(6)]
    # x's first one keeps its place while it is passed over, and x takes its turns with the others
    assert [(one.client, one.entry.job.model) for one in taken] == [
        *(("x", "a"), ("y", "a"), ("x", "a"), ("y", "a")),
        *(("z", "b"), ("x", "b")),
    ]


def test_one_client_alone_has_its_requests_ordered_too() -> None:
    """Behind a proxy, or without tokens, all users are one client."""
    simulated = Simulated()
    for k in range(8):
        simulated.put("all", "ab"[k % 2], size=64 + k)
    assert [simulated.serve()[0].entry.job.model for _ in range(8)] == [*"aaaabbbb"]
    assert simulated.models.loads == 1


@pytest.mark.parametrize(
    ("seconds", "timeout", "most"),
    [(7.0, 600.0, 30.0), (0.5, 600.0, 5.0), (0.0, 600.0, 0.0), (7.0, 20.0, 5.0), (7.0, 0.4, 0.1)],
)
def test_who_is_passed_over_has_the_time_for_it(seconds: float, timeout: float, most: float) -> None:
    """A request is passed over for ten times what loading takes, and a quarter of its timeout, at most,
    where no third model waits.
    """
    simulated = Simulated(seconds=seconds)
    simulated.put("b", "b", timeout=timeout)
    waited = 0.0
    for _ in range(100):
        simulated.put("a", "a")
        waited = simulated.now
        if simulated.serve()[0].client == "b":
            break
    assert most <= waited < most + BATCH  # a batch that runs ends before


def test_a_third_model_shortens_the_turns_of_the_others() -> None:
    """Each of three models waits for as long as each of two, and none has all the time."""
    served = Simulated().closed_loop((("a", "a"), ("b", "b"), ("c", "c")), 90)
    assert served == [*"a" * 15, *"b" * 15, *"c" * 15] * 2


def test_what_is_left_until_a_deadline_counts_from_the_last_load_on() -> None:
    simulated = Simulated()
    simulated.put("b", "b", timeout=120)
    simulated.now = simulated.models.loaded_at = simulated.models.left["b"] = 100.0
    # others had their turns, b is passed over 5 s of 20
    for client in "aaaaab":
        simulated.put("a", "a")
        assert simulated.serve()[0].client == client


def test_a_long_queue_does_not_have_models_loaded_in_turn() -> None:
    """Everybody waits for longer than `model_wait`: that alone must not bring strict turns back."""
    simulated = Simulated()
    for k in range(400):
        simulated.put(f"client{k % 8}", "ab"[k % 8 // 4], size=64 + k)
    for _ in range(400):
        simulated.serve()
    assert simulated.models.loads <= 400 * BATCH / 30 + 1


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    most=st.integers(1, 3),
    asking=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 2)), min_size=2, max_size=12),
    clients=st.integers(1, 5),
)
def test_nobody_starves(most: int, asking: list[tuple[str, int]], clients: int) -> None:
    """Every request is served in time, however many others keep coming.

    A client's requests for a model that was in memory took all its turns, so that another one never had any.
    """
    simulated = Simulated(most)
    for k, (model, size) in enumerate(asking):
        simulated.put(f"client{k % clients}", model, size)
    for _ in range(400):
        taken = simulated.serve(most=2)
        oldest = min(one.entry.job.created for one in [*taken, *simulated.engine._queue])
        assert simulated.now - oldest <= 2 * (60 + len(asking) * (LOAD + BATCH))
        for one in taken:
            simulated.put(one.client, *one.key)


@pytest.fixture
def two(model: tuple[Path, Path]) -> Callable[..., Engine]:
    """An engine of two models, of which one is in memory at a time and none is sampled with."""

    def made(**options: object) -> Engine:
        engine = tiny_service.engine(model, ("one", "two"), **options)
        engine.models.pipeline("one")
        engine.models.seconds_to_load = lambda name: LOAD
        return engine

    return made


def waiting(client: str, model: str) -> Waiting:
    now = time.monotonic()
    job = SimpleNamespace(model=model, created=now, deadline=now + 600)
    return Waiting(client, client, model, SimpleNamespace(job=job))


def test_who_was_just_answered_is_waited_for_before_another_model_is_loaded(two: Callable) -> None:
    """A client that asks again at once came 25 ms after the other one's model had begun to load."""
    engine = two()
    engine._free_since = time.monotonic() + 1e6
    with engine._changed:
        engine._queue.put([waiting("b", "two")])

        def again() -> None:
            with engine._changed:
                engine._queue.put([waiting("a", "one")])
                engine._changed.notify_all()

        thread = threading.Thread(target=again)
        thread.start()
        assert engine._first().client == "a"
    thread.join()


def test_that_wait_is_a_small_part_of_what_loading_takes(two: Callable) -> None:
    engine = two()
    engine._free_since = time.monotonic()
    assert 0.05 * LOAD - 0.1 < engine._until_load("two") <= 0.05 * LOAD
    engine._free_since -= 1
    assert engine._until_load("two") <= 0


@pytest.mark.parametrize("options", [{"model_wait": 0}, {"loaded_models": 2}])
def test_nobody_is_waited_for_where_turns_are_strict(two: Callable, options: dict) -> None:
    engine = two(**options)
    engine._free_since = time.monotonic() + 1e6
    engine._queue.put([waiting("b", "two")])
    assert engine._first().client == "b"


@pytest.mark.parametrize(("options", "loads"), [({}, 2), ({"model_wait": 0}, 9)])
def test_two_models_that_do_not_fit_are_loaded_as_seldom_as_can_be(
    model: tuple[Path, Path], options: dict, loads: int
) -> None:
    """Eight requests for two models in turn: real ones, and the loads that /metrics counts."""
    with live(model, ("one", "two"), loaded_models=1, **options) as (url, engine):
        engine.models.seconds_to_load = lambda name: LOAD  # of this model it is milliseconds
        order: list[str] = []
        with held(engine):
            jobs = [
                # sizes of their own, or they would be sampled together
                engine.submit([request(steps=1, width=16 + 8 * k)], client="ab"[k % 2], model=name)
                for k, name in enumerate(("two", "one") * 4)
            ]
            for job in jobs:
                job.listen(lambda job: order.append(job.model) if job.over else None)
        for job in jobs:
            assert job.wait(60).error is None
        figures = urlopen(f"{url}/metrics").read().decode().splitlines()
    found = {line.split()[0]: float(line.split()[1]) for line in figures if line.startswith("sd_model_")}
    assert found["sd_model_loads_total"] == loads
    assert found["sd_model_evictions_total"] == found["sd_model_loads_total"] - 1
    assert found["sd_model_load_seconds_total"] > 0
    if not options:
        assert order == ["one"] * 4 + ["two"] * 4
