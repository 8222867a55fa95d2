import threading
from collections.abc import Iterator

import pytest

from ldm.pipeline.pipeline import Pipeline


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Batches wait for this event before they are sampled."""
    opened, plain = threading.Event(), Pipeline.batches

    def waiting(self: Pipeline, *args: object, **more: object) -> object:
        assert opened.wait(60)
        return plain(self, *args, **more)

    monkeypatch.setattr(Pipeline, "batches", waiting)
    yield opened
    opened.set()
