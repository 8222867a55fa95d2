from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ldm.service.queue import ALPHA, FairQueue, Full, Waiting


def waiting(client: str, job: str, count: int = 1, key: Any = "key") -> list[Waiting]:
    return [Waiting(client, job, key, f"{job}.{k}") for k in range(count)]


def entries(taken: list[Waiting]) -> list[str]:
    return [one.entry for one in taken]


def test_clients_take_turns() -> None:
    queue = FairQueue(100)
    for k in range(3):
        queue.put(waiting("a", f"a{k}", key=k))
    queue.put(waiting("b", "b0", key="b"))
    queue.put(waiting("c", "c0", key="c"))
    led = [queue.take(8)[0].entry for _ in range(5)]
    assert led == ["a0.0", "b0.0", "c0.0", "a1.0", "a2.0"]
    assert queue.take(8) == []
    assert queue.first() is None


def test_who_gives_way_keeps_the_place() -> None:
    queue = FairQueue(100)
    queue.put(waiting("a", "a0", key="slow") + waiting("a", "a1", key="fast"))
    queue.put(waiting("b", "b0", 2, key="slow"))
    queue.put(waiting("c", "c0", key="fast"))

    def slow(one: Waiting) -> bool:
        return one.key == "slow"

    assert entries([*queue]) == ["a0.0", "a1.0", "b0.0", "b0.1", "c0.0"]
    assert queue.first(slow).entry == "a1.0"
    assert entries(queue.take(1, queue.first(slow))) == ["a1.0"]
    assert queue.first().entry == "b0.0"  # it was a's turn
    assert entries(queue.take(8, queue.first(slow))) == ["c0.0"]
    assert queue.first(slow).entry == "b0.0"  # nothing else waits
    assert entries(queue.take(8, queue.first(slow))) == ["b0.0", "b0.1", "a0.0"]
    assert queue.first(slow) is None


def test_a_request_that_has_left_leads_nothing() -> None:
    """Its job was cancelled after it had been chosen."""
    queue = FairQueue(100)
    queue.put(waiting("a", "a0"))
    queue.put(waiting("b", "b0"))
    first = queue.first()
    queue.discard("a0")
    assert queue.take(8, first) == []
    queue.put(waiting("a", "a0"))  # an equal one
    assert queue.take(8, first) == []
    assert entries(queue.take(8)) == ["b0.0", "a0.0"]


def test_what_is_left_of_a_batch_goes_to_all_in_turn() -> None:
    queue = FairQueue(100)
    queue.put(waiting("a", "a0", 2))
    queue.put(waiting("a", "a1", 3))
    queue.put(waiting("b", "b0", 3))
    queue.put(waiting("b", "b1", 1, key="other"))
    queue.put(waiting("c", "c0", 1))
    assert entries(queue.take(7)) == ["a0.0", "a0.1", "a1.0", "b0.0", "c0.0", "a1.1", "b0.1"]
    # although it was in the batch, it is b's turn
    assert entries(queue.take(7)) == ["b0.2", "a1.2"]
    assert entries(queue.take(7)) == ["b1.0"]


def test_a_job_of_several_keys_is_taken_in_parts() -> None:
    queue = FairQueue(100)
    queue.put([*waiting("a", "a0", 2), *waiting("a", "a0", 1, key="large")])
    assert [len(queue.take(8)) for _ in range(3)] == [2, 1, 0]


def test_a_jobs_place_is_free_once_it_is_discarded() -> None:
    queue = FairQueue(4)
    queue.put(waiting("a", "a0", 2))
    queue.put(waiting("b", "b0", 2))
    with pytest.raises(Full) as full:
        queue.put(waiting("c", "c0", 2))
    assert full.value.excess == 2
    assert queue.discard("a0") == 2
    assert queue.discard("a0") == 0
    queue.put(waiting("c", "c0", 2))
    assert entries(queue.take(8)) == ["b0.0", "b0.1", "c0.0", "c0.1"]


def test_position_is_about_the_number_of_images_ahead() -> None:
    queue = FairQueue(100)
    queue.put(waiting("a", "a0", 3))
    queue.put(waiting("a", "a1", 1))
    queue.put(waiting("b", "b0", 1))
    assert (queue.ahead("a0"), queue.ahead("a1"), queue.ahead("b0")) == (1, 4, 1)
    assert queue.ahead("unknown") == 0


def test_nobody_can_fill_a_large_queue_alone() -> None:
    queue = FairQueue(64)
    for k in range(57):
        queue.put(waiting("hog", f"hog{k}"))
    with pytest.raises(Full):
        queue.put(waiting("hog", "one more"))
    queue.put(waiting("other", "other"))


@pytest.mark.parametrize("size", range(1, ALPHA + 1))
def test_one_client_can_fill_a_small_queue(size: int) -> None:
    queue = FairQueue(size)
    for k in range(size):
        queue.put(waiting("a", f"a{k}"))
    with pytest.raises(Full):
        queue.put(waiting("a", "one more"))


@given(size=st.integers(1, 200), count=st.integers(1, 200))
def test_who_has_nothing_waiting_may_have_all_that_is_free(size: int, count: int) -> None:
    queue = FairQueue(size)
    if count > size:
        with pytest.raises(Full):
            queue.put(waiting("a", "a0", count))
    else:
        queue.put(waiting("a", "a0", count))
        assert len(queue) == count


CLIENTS, KEYS = ["a", "b", "c", "d"], ["small", "large"]


class Clients(RuleBasedStateMachine):
    """Clients that put in, discard and are served, in any order."""

    def __init__(self):
        super().__init__()
        self.queue: FairQueue[str] = FairQueue(30)
        self.model: dict[str, list[Waiting]] = {client: [] for client in CLIENTS}
        self.jobs = 0
        self.passed: Counter[str] = Counter()  # batches that others led, since a client began to wait

    @rule(client=st.sampled_from(CLIENTS), keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=9))
    def put(self, client: str, keys: list[str]) -> None:
        self.jobs += 1
        new = [Waiting(client, self.jobs, key, f"{self.jobs}.{k}") for k, key in enumerate(keys)]
        before, own = sum(map(len, self.model.values())), len(self.model[client])
        left = 30 - before - len(new)
        try:
            self.queue.put(new)
        except Full:
            assert left < 0 or (own and own + len(new) > ALPHA * (left + 1))
            assert len(self.queue) == before  # all or none
            return
        assert left >= 0
        if not own:
            self.passed[client] = 0
        self.model[client] += new

    @rule(most=st.integers(1, 12))
    def take(self, most: int) -> None:
        expected = self.queue.first()
        taken = self.queue.take(most)
        if not any(self.model.values()):
            assert taken == []
            assert expected is None
            return
        lead = taken[0]
        assert lead == expected == self.model[lead.client][0]  # its oldest
        assert len(taken) <= most
        assert len({one.key for one in taken}) == 1
        assert len(set(taken)) == len(taken)
        for one in taken:
            own = [each for each in self.model[one.client] if each.key == lead.key]
            mine = [each for each in taken if each.client == one.client]
            assert mine == own[: len(mine)]  # in their order
        if len(taken) < most:  # then none was left that fits
            assert sum(one.key == lead.key for own in self.model.values() for one in own) == len(taken)
        for client, own in self.model.items():
            if own and client != lead.client:
                self.passed[client] += 1
                assert self.passed[client] < len(CLIENTS)  # nobody is passed over twice by the same client
        self.passed[lead.client] = 0
        for one in taken:
            self.model[one.client].remove(one)

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        jobs = sorted({one.job for own in self.model.values() for one in own})
        if jobs:
            job = data.draw(st.sampled_from(jobs))
            count = sum(one.job == job for own in self.model.values() for one in own)
            assert self.queue.discard(job) == count
            self.model = {
                client: [one for one in own if one.job != job] for client, own in self.model.items()
            }

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        assert len(self.queue) == sum(map(len, self.model.values())) <= 30


Clients.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestClients = Clients.TestCase
