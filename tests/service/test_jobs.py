import threading
from types import SimpleNamespace

import numpy as np
import pytest

from ldm.service.errors import Cancelled, DeadlinePassed, ServiceError, UnknownJob
from ldm.service.jobs import Job, Jobs


def job(client: str = "a", timeout: float = 60.0) -> Job:
    return Job(client, "tiny", (), timeout)


def image(size: int = 16) -> SimpleNamespace:
    return SimpleNamespace(pixels=np.zeros((size, size, 3), np.uint8), depth=None, painted=None, controls=())


def test_a_job_runs_and_finishes() -> None:
    one, seen = job(), []
    one.listen(lambda job: seen.append((job.state, job.progress, job.preview)))
    one.run()
    one.show(0.5, b"preview")
    one.show(0.25)  # as where a batch begins again
    assert one.finish((image(),))
    assert seen == [
        ("running", 0.0, None),
        ("running", 0.5, b"preview"),
        ("running", 0.5, b"preview"),
        ("finished", 1.0, None),
    ]
    assert one.over
    assert len(one.images) == 1
    assert one.error is None
    assert one.wait(0) is one
    assert one.seconds == one.ended - one.created


@pytest.mark.parametrize(
    ("end", "state", "error"),
    [(Job.cancel, "cancelled", Cancelled), (Job.expire, "failed", DeadlinePassed)],
)
def test_what_is_over_stays_as_it_is(end, state: str, error: type[ServiceError]) -> None:
    one = job(timeout=2.5)
    assert end(one)
    assert one.state == state
    assert isinstance(one.error, error)
    assert not one.finish((image(),))
    assert not one.cancel()
    assert not one.expire()
    one.run()
    one.show(0.9)
    assert (one.state, one.images, one.progress) == (state, (), 0.0)


def test_whoever_waits_goes_on_whatever_fails_at_the_end() -> None:
    """An error while a job made room left its clients waiting for ever."""
    one = job()
    one._on_over = lambda job: 1 / 0
    with pytest.raises(ZeroDivisionError):
        one.cancel()
    assert one._over.is_set()


def test_what_is_kept_with_a_job_counts() -> None:
    """The bytes of encoded files were kept as long as their job and counted nowhere."""
    jobs = Jobs(most_bytes=2000)
    made = [job(), job()]
    for one in made:
        jobs.add(one)
        one.finish((image(),))  # 768 bytes
    jobs.tidy()
    assert len(jobs) == 2
    made[1].held_bytes += 500
    jobs.tidy()
    with pytest.raises(UnknownJob):
        jobs.get(made[0].id, "a")
    assert jobs.get(made[1].id, "a") is made[1]


def test_a_deadline_is_named() -> None:
    one = job(timeout=2.5)
    one.expire()
    assert "within 2.5 s" in one.error.message
    assert one.error.status == 504


def test_who_listens_too_late_is_called_at_once() -> None:
    one, seen = job(), []
    one.cancel()
    end = one.listen(seen.append)
    assert seen == [one]
    end()


def test_who_stops_listening_hears_nothing() -> None:
    one, seen = job(), []
    one.listen(seen.append)()
    one.cancel()
    assert seen == []


def test_a_listener_that_fails_harms_nobody() -> None:
    one, seen = job(), []

    def fails(job: Job) -> None:
        raise RuntimeError("the event loop is closed")

    one.listen(fails)
    one.listen(seen.append)
    assert one.finish(())
    assert seen == [one]


def test_of_many_ends_at_once_one_counts() -> None:
    for _ in range(20):
        one, start, ends = job(), threading.Barrier(8), []

        def end(k: int, one=one, start=start, ends=ends) -> None:
            start.wait()
            if one.cancel() if k % 2 else one.finish((image(),)):
                ends.append(one.state)

        threads = [threading.Thread(target=end, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ends == [one.state]
        assert (one.error is None) == (one.state == "finished")


def test_wait_ends_with_the_job() -> None:
    one = job()
    assert not one.wait(0.01).over
    threading.Timer(0.01, one.cancel).start()
    assert one.wait(60).over


def test_a_job_of_another_client_is_unknown() -> None:
    jobs, one = Jobs(), job("a")
    jobs.add(one)
    assert jobs.get(one.id, "a") is one
    with pytest.raises(UnknownJob) as other:
        jobs.get(one.id, "b")
    with pytest.raises(UnknownJob) as never:
        jobs.get("0" * 32, "b")
    assert other.value.message.replace(one.id, "0" * 32) == never.value.message
    one.cancel()
    assert jobs.get(one.id, "a") is one
    with pytest.raises(UnknownJob):
        jobs.get(one.id, "b")


def test_ids_cannot_be_guessed() -> None:
    ids = {job().id for _ in range(100)}
    assert len(ids) == 100
    assert all(len(id) == 32 for id in ids)


def test_jobs_that_are_over_are_kept_in_bounds() -> None:
    jobs = Jobs(most=3, most_bytes=10 * 16 * 16 * 3, seconds=1e9)
    ended = []
    for _ in range(10):
        ended.append(job())
        jobs.add(ended[-1])
        ended[-1].finish((image(),))
    going = job()
    jobs.add(going)
    assert len(jobs) == 4
    assert jobs.active() == [going]
    with pytest.raises(UnknownJob):
        jobs.get(ended[0].id, "a")
    assert jobs.get(ended[-1].id, "a") is ended[-1]
    large = job()
    jobs.add(large)
    large.finish((image(100),))  # by itself too large: it goes, and the older ones with it
    jobs.tidy()
    assert len(jobs) == 1
    assert jobs.active() == [going]


def test_jobs_that_are_over_are_kept_for_a_while() -> None:
    jobs, one, going = Jobs(seconds=1.0), job(), job()
    jobs.add(one)
    jobs.add(going)
    one.finish(())
    assert jobs.get(one.id, "a") is one
    one.ended -= 1.1
    with pytest.raises(UnknownJob):
        jobs.get(one.id, "a")
    assert jobs.get(going.id, "a") is going
