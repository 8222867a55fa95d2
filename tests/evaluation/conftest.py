from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What happens in turn: a device where its float32 arithmetic is asked for, and "left" where that ends.

    A test adds what else it sees.
    """
    found: list[object] = []

    @contextmanager
    def arithmetic(device: torch.device) -> Iterator[None]:
        found.append(device)
        yield
        found.append("left")

    for place in ("ldm.pipeline.device", "ldm.evaluation.nearest"):
        monkeypatch.setattr(f"{place}.arithmetic", arithmetic)
    return found
