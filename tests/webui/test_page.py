"""What the page does with a job, without a browser."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_service

pytest.importorskip("gradio")

from ldm.pipeline.request import ImageRequest
from ldm.service.batch import Failure
from ldm.service.engine import Engine
from ldm.webui.files import Files
from ldm.webui.page import Page, Result, changes, image_of, progress_html, status_html


@pytest.fixture(scope="module")
def engine(model: tuple[Path, Path]) -> Iterator[Engine]:
    with tiny_service.running(model) as engine:
        yield engine


@pytest.fixture
def page(engine: Engine, tmp_path: Path) -> Page:
    return Page(engine, Files(), tmp_path)


def test_a_tab_that_is_closed_gives_its_place_up(page: Page, engine: Engine) -> None:
    mine, other = (engine.submit([tiny_service.request(steps=150)], client=name) for name in ("a", "b"))
    page.running = {"mine": mine, "other": other}
    results = {}
    for name in ("mine", "other"):
        page.folders.enter(name)
        with page.folders.adding(name, name) as results[name]:
            pass
    page.leave(SimpleNamespace(session_hash="mine"))
    page.leave(SimpleNamespace(session_hash="nobody"))
    assert mine.state == "cancelled"
    assert [path.exists() for path in results.values()] == [False, True]
    assert other.wait(60).state == "finished"


def test_a_job_that_nobody_listens_to_any_more_is_cancelled(page: Page, engine: Engine) -> None:
    blocks = page.blocks()
    assert blocks.analytics_enabled is False
    asked = {part: getattr(part, "value", None) for part in (*page.held.values(), *page.parts.values())}
    asked |= {page.results: [], page.held["steps"]: "150", page.parts["images"]: 16}

    async def abandon() -> object:
        updates = page.generate(asked, SimpleNamespace(session_hash="s", username=None))
        await anext(updates)
        await anext(updates)
        job = page.running["s"]
        await updates.aclose()
        return job

    assert asyncio.run(abandon()).state == "cancelled"
    assert page.running == {}


def test_an_open_tab_keeps_its_results(page: Page, tmp_path: Path) -> None:
    """gradio took results, and the images they start from, for temporary files of its own, and removed them
    under an open tab after two hours. What is gone all the same is in no gallery, where it was an error.
    """
    blocks = page.blocks()
    assert blocks.delete_cache[1] >= 7 * 24 * 3600
    there = tmp_path / "there" / "1.png"
    there.parent.mkdir()
    there.touch()
    before = [Result(str(file), "seed 1", "", ()) for file in (there, tmp_path / "gone" / "1.png")]
    asked = {part: getattr(part, "value", None) for part in (*page.held.values(), *page.parts.values())}
    asked |= {page.results: before, page.held["steps"]: "1"}

    async def last() -> dict:
        request = SimpleNamespace(session_hash="s", username=None)
        return [one async for one in page.generate(asked, request)][-1]

    update = asyncio.run(last())
    made, *others = update[page.results]
    assert others == before[:1]
    assert [file for file, _ in update[page.parts["gallery"]]["value"]] == [made.file, str(there)]
    sent = page.send(page.tasks[0], before, 1)
    assert "is there no more" in sent[page.parts["status"]]


def test_where_there_is_no_service_the_terminal_says_why(page: Page) -> None:
    """Users of the page were sent to the log of a service."""
    failure = Failure.of(RuntimeError("secret"))
    assert page._reason(failure.error) == "Sampling failed; the terminal in which the page runs says why."


@pytest.mark.parametrize("debug", [False, True])
def test_whatever_fails_the_page_can_be_used_again(
    page: Page, debug: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that could not be written left both buttons disabled, and nothing said why."""
    page.blocks()
    page.debug = debug
    asked = {part: getattr(part, "value", None) for part in (*page.held.values(), *page.parts.values())}
    asked |= {page.results: [], page.held["steps"]: "1"}

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(page, "_keep", fail)

    async def last() -> dict:
        request = SimpleNamespace(session_hash="s", username=None)
        return [one async for one in page.generate(asked, request)][-1]

    update = asyncio.run(last())
    assert update[page.parts["generate"]]["interactive"] is True
    assert "says why" in update[page.parts["status"]]
    assert "the page: OSError: the disk is full" in caplog.text
    assert ("Traceback" in caplog.text) is debug


def test_a_tab_that_is_closed_while_its_images_are_written_leaves_none(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tab that was closed after its job, and before its images were written, left them on the disk."""
    page.blocks()
    asked = {part: getattr(part, "value", None) for part in (*page.held.values(), *page.parts.values())}
    asked |= {page.results: [], page.held["steps"]: "1"}
    request, keep = SimpleNamespace(session_hash="s", username=None), page._keep
    found = []

    def late(*given: object) -> object:
        page.leave(request)
        found.extend(keep(*given))
        return found

    monkeypatch.setattr(page, "_keep", late)

    async def ask() -> None:
        async for _ in page.generate(asked, request):
            pass

    asyncio.run(ask())
    assert len(found) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_sheet_of_too_many_images_is_refused_before_its_requests_are_made(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request was made for each of a sheet's cells, a million of them, before the limit was looked at."""
    page.blocks()
    asked = {part: getattr(part, "value", None) for part in (*page.held.values(), *page.parts.values())}
    asked |= {page.results: [], page.parts["x_values"]: "1," * 1000, page.parts["y_values"]: "ddim," * 1000}
    made = []
    monkeypatch.setattr("ldm.webui.page.sheet_of", lambda *given: made.append(given))

    async def last() -> dict:
        request = SimpleNamespace(session_hash="s", username=None)
        return [one async for one in page.draw_sheet(asked, request)][-1]

    words = "the sheet has 1,000 columns and 1,000 rows, which are 1,000,000 images; the most is 16"
    assert words in asyncio.run(last())[page.parts["status"]]
    assert made == []


@pytest.mark.parametrize("where", ["prompt", "axis"])
def test_a_text_that_is_too_long_is_refused_before_it_is_parsed(page: Page, where: str) -> None:
    """Another client than the browser need not keep to the limit: 40,000 characters took 11 s."""
    page.blocks()
    asked = {part: getattr(part, "value", None) for part in (*page.held.values(), *page.parts.values())}
    long = "[a:b:" * 4000
    asked |= {page.results: [], page.parts["x"]: "negative_prompt", page.parts["x_values"]: "a"}
    asked[page.held["negative_prompt"] if where == "prompt" else page.parts["x_values"]] = long

    async def last() -> dict:
        request = SimpleNamespace(session_hash="s", username=None)
        return [one async for one in page.draw_sheet(asked, request)][-1]

    assert "20,000 characters are more than" in asyncio.run(last())[page.parts["status"]]


def test_images_and_sheets_are_signed(engine: Engine, tmp_path: Path) -> None:
    """--sign was an option that did nothing."""

    def sign(data: bytes, format: str, settings: dict) -> bytes:
        return data + f"signed {format} {settings['seed']}".encode()

    page = Page(engine, Files(), tmp_path, signer=sign)
    page.blocks()
    asked = {part: getattr(part, "value", None) for part in (*page.held.values(), *page.parts.values())}
    asked |= {page.results: [], page.held["seed"]: "7", page.parts["x_values"]: "1, 2"}
    asked |= {page.held["steps"]: "1"}

    async def file_of(work: object) -> bytes:
        request = SimpleNamespace(session_hash="s", username=None)
        last = [update async for update in work(asked, request)][-1]
        return Path(last[page.results][0].file).read_bytes()

    for work in (page.generate, page.draw_sheet):
        assert asyncio.run(file_of(work)).endswith(b"signed png 7")


def test_changes_of_a_job_hold_no_thread(engine: Engine) -> None:
    async def seen() -> int:
        job = engine.submit([tiny_service.request(steps=150)], client="a", preview=True)
        count = 0
        async for _ in changes(job):
            count += 1
        assert job.state == "finished"
        assert job._listeners == []
        return count

    assert asyncio.run(seen()) >= 1


def test_only_the_tasks_that_a_model_can_do_are_offered(page: Page) -> None:
    assert [task.name for task in page.tasks] == ["text", "image", "inpaint"]  # the miniature is for text
    assert page.models["inpaint"] == ["tiny"]


def test_each_image_has_its_own_seeds() -> None:
    request = ImageRequest("a", seed=2**63 - 1, variation_seed=5, variation_strength=0.5)
    assert [(one.seed, one.variation_seed) for one in (image_of(request, k) for k in range(2))] == [
        (2**63 - 1, 5),
        (0, 6),
    ]


def test_nothing_that_a_user_types_becomes_html(engine: Engine) -> None:
    assert "<script>" not in status_html("<script>alert(1)</script>", "error")
    job = engine.submit([tiny_service.request()], client="a").wait(60)
    assert 'value="1.000"' in progress_html(job)


@pytest.mark.parametrize(("ahead", "words"), [(0, "for the model"), (1, "1 image is"), (2, "2 images are")])
def test_a_job_that_waits_says_how_many_are_ahead(ahead: int, words: str) -> None:
    job = SimpleNamespace(state="queued", position=ahead, progress=0.0, preview=None)
    assert words in progress_html(job)
