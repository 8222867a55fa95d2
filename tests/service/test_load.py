"""The benchmark of the service in little: load, kill, cancelling, batches. No time is asserted."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
service = importlib.import_module("service")
pytestmark = pytest.mark.slow

CLIENTS, QUEUE = 24, 8


@pytest.fixture(scope="module")
def arguments(model: tuple[Path, Path]) -> tuple[str, ...]:
    config, weights = model
    return ("--model", f"tiny={weights},{config}", "--device", "cpu", "--safety", "off")


@pytest.fixture(scope="module")
def running(arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A service with a short queue, and a token for each client."""
    limits = ("--queue_size", str(QUEUE), "--max_images", str(QUEUE))
    with service.serving(tmp_path_factory.mktemp("service"), *arguments, *limits, clients=CLIENTS) as started:
        yield started


@pytest.fixture
def shared(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's parts use the service that runs already."""
    monkeypatch.setattr(service, "serving", lambda *_, **__: nullcontext(running))


@pytest.mark.usefixtures("shared")
def test_more_clients_than_the_queue_holds(tmp_path: Path) -> None:
    """None is lost, none is answered twice, and every answer is the image that was asked for."""
    (row,) = service.measure_load(tmp_path, CLIENTS, QUEUE, each=1)
    assert row.met, row.values
    assert row.values["answered"] == row.values["images made"] == CLIENTS


@pytest.mark.usefixtures("shared")
def test_cancelled_jobs_and_clients_that_went_away_free_their_place(tmp_path: Path) -> None:
    (row,) = service.measure_cancel(tmp_path, QUEUE)
    assert row.met, row.values
    assert set(row.values["states"]) == {"cancelled"}


@pytest.mark.usefixtures("shared")
def test_batched_answers_equal_single_ones(tmp_path: Path) -> None:
    (row,) = service.measure_equal(tmp_path, steps=4)
    assert row.met, row.values


def test_killed_under_load_and_started_again(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (row,) = service.measure_kill(tmp_path, *arguments, clients=8, each=4)
    assert row.met, row.values
    assert row.values["tally"]["connection lost"]
    assert row.values["files"]


def test_an_answer_of_another_request_is_noticed(tmp_path: Path) -> None:
    """What the proofs above rest on."""
    import numpy as np

    from ldm.images.metadata import encode_image
    from ldm.pipeline.infotext import image_texts
    from ldm.pipeline.request import ImageRequest

    asked = service.request(1)
    settings = ImageRequest(**asked, height=8, width=8).settings()
    file = encode_image(np.zeros((8, 8, 3), np.uint8), image_texts(settings))
    assert service.mismatch(asked, file) is None
    assert "number 2" in service.mismatch(service.request(2), file)
