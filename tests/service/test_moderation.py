"""The moderation hook: what it asks, what becomes of its answers, and what where there is none."""

import asyncio
import base64
import io
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm.errors import InputError
from ldm.pipeline.request import ImageRequest
from ldm.service.errors import LimitExceeded
from ldm.service.moderation import (
    API_VERSION,
    KEY,
    LARGEST_IMAGE,
    PROMPTS,
    THREADS,
    Moderation,
    asker,
    fitted,
    prompts_of,
)
from ldm.service.options import ServiceOptions

AZURE = "https://name.cognitiveservices.azure.com"


def png(width: int = 64, height: int = 64) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, height), 80).convert("RGB").save(file, "PNG")
    return file.getvalue()


def severities(severity: int) -> dict[str, Any]:
    names = ("Hate", "SelfHarm", "Sexual", "Violence")
    return {"categoriesAnalysis": [{"category": n, "severity": severity * (n == "Violence")} for n in names]}


@contextmanager
def content_safety(answer: Callable[[dict], tuple[int, Any]]) -> Iterator[tuple[str, list]]:
    """A service in Azure's shape on loopback: its address, and what it was asked (path, headers, body)."""
    asked: list[tuple[str, dict, dict]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, dict(self.headers), body))
            status, content = answer(body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def asked_about(hook: Moderation, *texts: str, image: bytes | None = None) -> Any:
    async def ask() -> Any:
        try:
            return await (hook.check_image(image) if image else hook.check_prompt(texts))
        finally:
            await hook.close()

    return asyncio.run(ask())


def of_url(address: str, **choices: Any) -> Moderation:
    return Moderation.of(ServiceOptions(moderate=address, **choices), {KEY: "secret"})


def test_without_a_hook_everything_passes_uncounted() -> None:
    hook = Moderation.of(ServiceOptions())
    assert not hook.enabled
    assert not asked_about(hook, "a red cube").refused
    assert hook.counts == {}


def test_the_url_is_asked_as_azure_content_safety() -> None:
    """The request shapes of text:analyze and image:analyze; the key is a header, from the environment."""
    with content_safety(lambda body: (200, severities(0))) as (address, asked):
        assert not asked_about(of_url(address), "a red cube", "a red cube", " ").refused
        file = png()
        assert not asked_about(of_url(f"{address}/contentsafety/?api-version=2023-10-01"), image=file).refused
    (path, headers, body), (image_path, _, image_body) = asked
    assert path == f"/contentsafety/text:analyze?api-version={API_VERSION}"
    assert headers["Ocp-Apim-Subscription-Key"] == "secret"
    assert body == {"text": "a red cube", "outputType": "FourSeverityLevels"}
    assert image_path == "/contentsafety/image:analyze?api-version=2023-10-01"
    assert base64.b64decode(image_body["image"]["content"]) == file


@pytest.mark.parametrize(("severity", "threshold", "refused"), [(2, 4, False), (4, 4, True), (2, 2, True)])
def test_a_severity_from_the_threshold_on_is_refused(severity: int, threshold: int, refused: bool) -> None:
    with content_safety(lambda body: (200, severities(severity))) as (address, _):
        hook = of_url(address, moderate_severity=threshold)
        verdict = asked_about(hook, "a duel")
    assert verdict.refused is refused
    assert hook.counts["prompt", "refused" if refused else "allowed"] == 1
    if refused:
        assert (verdict.error.status, verdict.error.code) == (400, "content_policy")
        assert f"Violence (severity {severity})" in verdict.error.message


def test_blocklists_and_long_texts() -> None:
    """A text is asked about in parts of the length that the service takes; the last one counts, too."""

    def answer(body: dict) -> tuple[int, Any]:
        hit = {"blocklistName": "names", "blocklistItemId": "1", "blocklistItemText": "x"}
        return 200, severities(0) | {"blocklistsMatch": [hit] * ("forbidden" in body["text"])}

    with content_safety(answer) as (address, asked):
        verdict = asked_about(of_url(address), "a" * 20_000 + "forbidden")
    assert verdict.refused
    assert verdict.reason == "blocklist names"
    assert [len(body["text"]) for _, _, body in asked] == [10_000, 10_000, 9]


@pytest.mark.parametrize("failure", ["open", "closed"])
@pytest.mark.parametrize(
    "answer",
    [(500, {}), (401, {}), (200, b"<html>"), (200, {}), (200, []), (200, {"categoriesAnalysis": []})],
    ids=["500", "401", "no JSON", "empty", "a list", "no category"],
)
def test_what_is_no_answer_is_a_failure(
    answer: tuple[int, Any], failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    with content_safety(lambda body: answer) as (address, _), caplog.at_level(logging.WARNING):
        hook = of_url(address, moderate_failure=failure)
        verdict = asked_about(hook, "a secret prompt")
    assert verdict.refused is (failure == "closed")
    assert verdict.outcome == f"failed_{failure}"
    assert hook.counts["prompt", f"failed_{failure}"] == 1
    assert verdict.error is None or verdict.error.status == 503
    assert "moderation of the prompt failed" in caplog.text
    assert "secret" not in caplog.text


def test_nobody_there_is_a_failure() -> None:
    with content_safety(lambda body: (200, severities(0))) as (address, _):
        pass
    assert asked_about(of_url(address), "a cube").outcome == "failed_closed"


def test_too_many_requests_are_asked_again() -> None:
    answers = iter([(429, {}), (429, {}), (200, severities(6))])
    with content_safety(lambda body: next(answers)) as (address, asked):
        assert asked_about(of_url(address), "a duel").outcome == "refused"
    assert len(asked) == 3


@pytest.mark.parametrize("size", [(16, 16), (3000, 40), (1800, 1800)])
def test_images_are_brought_into_the_services_limits(size: tuple[int, int]) -> None:
    file = png(*size)
    sent = fitted(file)
    image = Image.open(io.BytesIO(sent))
    assert len(sent) <= LARGEST_IMAGE
    assert 50 <= min(image.size) <= max(image.size) <= 2048
    assert fitted(sent) == sent


def module(path: Path, monkeypatch: pytest.MonkeyPatch, text: str, function: str = "check") -> str:
    """`text` as an importable module; the name of its function as --moderate takes it."""
    name = f"rules_{path.name.replace('-', '_')}"
    (path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(path)
    sys.modules.pop(name, None)
    return f"{name}:{function}"


SYNC = """
def check(what, content):
    if what == "prompt":
        return "no knives" if "knife" in content else None
    return None if content.startswith(b"\\x89PNG") else "no PNG"
"""


@pytest.mark.parametrize("text", [SYNC, SYNC.replace("def", "async def")], ids=["plain", "async"])
def test_a_function_is_asked(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module(tmp_path, monkeypatch, text)
    hook = Moderation.of(ServiceOptions(moderate=name))
    assert not asked_about(hook, "a cube", "a sphere").refused
    verdict = asked_about(hook, "a cube", "a knife")
    assert verdict.error.message == "the prompt was refused by content moderation: no knives"
    assert not asked_about(hook, image=png()).refused
    assert asked_about(hook, image=b"GIF").refused
    assert {key: n for key, n in hook.counts.items() if n} == {
        ("prompt", "allowed"): 3,
        ("prompt", "refused"): 1,
        ("image", "allowed"): 1,
        ("image", "refused"): 1,
    }


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return True", "type bool"),
        ("return ''", "type str"),
        ("raise OSError('about ' + content.upper())", "the function raised OSError"),
        ("raise SystemExit", "SystemExit"),
        ("raise StopIteration", "StopIteration"),
    ],
)
def test_a_function_that_fails(
    body: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`return True` may mean that the prompt is fine or that it is not: it is no answer."""
    name = module(tmp_path, monkeypatch, f"def check(what, content):\n    {body}\n")
    with caplog.at_level(logging.WARNING):
        assert asked_about(Moderation.of(ServiceOptions(moderate=name)), "a cube").outcome == "failed_closed"
    assert why in caplog.text
    assert "a cube" not in caplog.text.lower()  # a message has it in any form: KeyError's is a repr


def test_a_function_that_blocks_stops_neither_the_event_loop_nor_the_answer() -> None:
    release, ticks = threading.Event(), []

    def blocks(what: str, content: Any) -> None:
        release.wait(30)

    async def ask() -> Any:
        hook = Moderation(asker(blocks), deadline=0.05)

        async def tick() -> None:
            while True:
                ticks.append(1)
                await asyncio.sleep(0.005)

        ticking = asyncio.create_task(tick())
        verdict = await hook.check_prompt(["a cube"])
        ticking.cancel()
        return verdict

    try:
        assert asyncio.run(ask()).outcome == "failed_closed"
    finally:
        release.set()
    assert len(ticks) > 1


def test_threads_that_never_return_are_not_followed_by_ever_more() -> None:
    release, started = threading.Event(), []

    def blocks(what: str, content: Any) -> None:
        started.append(1)
        release.wait(30)

    async def ask() -> list[Any]:
        hook = Moderation(asker(blocks), deadline=0.1)
        return await asyncio.gather(*(hook.check_image(b"") for _ in range(THREADS + 20)))

    try:
        assert {verdict.outcome for verdict in asyncio.run(ask())} == {"failed_closed"}
        assert len(started) == THREADS
    finally:
        release.set()


def test_few_prompts_are_asked_about_at_a_time() -> None:
    """Prompts of 16 requests, two texts each, waited for a thread within their deadlines: half of them failed
    without having been asked about.
    """
    running, most = [], []

    async def slow(what: str, content: Any) -> None:
        running.append(1)
        most.append(len(running))
        await asyncio.sleep(0.01)
        running.pop()

    async def ask() -> list[Any]:
        hook = Moderation(slow)
        return await asyncio.gather(*(hook.check_prompt([f"a {k}", f"b {k}"]) for k in range(THREADS)))

    assert {verdict.outcome for verdict in asyncio.run(ask())} == {"allowed"}
    assert max(most) == PROMPTS


def test_images_do_not_wait_for_prompts() -> None:
    """Prompts took all threads, so that an image that had been sampled was lost without being asked about."""
    release = threading.Event()

    def slow(what: str, content: Any) -> None:
        if what == "prompt":
            release.wait(30)

    async def ask() -> tuple[Any, list[Any]]:
        hook = Moderation(asker(slow), deadline=20)
        prompts = [asyncio.create_task(hook.check_prompt([f"a {k}", f"b {k}"])) for k in range(THREADS)]
        await asyncio.sleep(0.1)
        image = await hook.check_image(b"")
        assert not any(prompt.done() for prompt in prompts)
        release.set()
        return image, await asyncio.gather(*prompts)

    try:
        image, prompts = asyncio.run(ask())
    finally:
        release.set()
    assert {verdict.outcome for verdict in (image, *prompts)} == {"allowed"}


def test_what_is_of_no_use_any_more_is_not_asked_about() -> None:
    """Nothing was looked at again after the wait for a place. What `before` raises ends all questions."""
    asked, raised = [], []

    async def hook(what: str, content: Any) -> None:
        asked.append(content)
        await asyncio.sleep(0.01)

    def before() -> None:
        if len(asked) >= PROMPTS:
            raised.append(1)
            raise TimeoutError("too late")

    async def ask() -> None:
        moderation = Moderation(hook)
        with pytest.raises(TimeoutError, match="too late"):
            await moderation.check_prompt(map(str, range(PROMPTS + 5)), before)
        verdict = await moderation.check_prompt(map(str, range(PROMPTS + 5)))  # all places are free again
        assert verdict.outcome == "allowed"

    asyncio.run(ask())
    assert len(raised) == 1
    assert len(asked) == 2 * PROMPTS + 5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nothing", "package.module:function"),
        ("no_such_module_here:check", "no_such_module_here"),
        ("json:no_such_function", "no_such_function"),
        ("json:__name__", "cannot be called"),
        ("ftp://host", "http:// or https://"),
        ("https://", "http:// or https://"),
        ("https://host:99999", "Port"),
        ("https://user:password@host", KEY),
        ("https://host?subscription-key=password", KEY),
        ("http://host.example", "https://"),
    ],
)
def test_bad_hooks_are_one_line_before_the_start(given: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        of_url(given)
    assert words in str(error.value)
    assert "password" not in str(error.value)
    assert "\n" not in str(error.value)


def test_azure_needs_its_key() -> None:
    with pytest.raises(InputError, match=KEY):
        Moderation.of(ServiceOptions(moderate=AZURE), {})
    assert of_url(AZURE).enabled


def test_a_negative_prompt_is_asked_about_where_the_image_shows_it() -> None:
    """At a scale of 0 the image is of the negative prompt alone."""
    requests = [ImageRequest("a", negative_prompt="b"), ImageRequest("a", negative_prompt="c", scale=0.0)]
    assert prompts_of(requests) == ["a", "c"]
    assert prompts_of([ImageRequest("a", prompt_to="d", prompt_mix=0.5)]) == ["a", "d"]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"prompt": "a:0 AND b:0", "scale": 7.5}, True),
        ({"prompt": "a:1 AND b:-1", "scale": 7.5}, True),
        ({"prompt": "a:0.1 AND b:0.1", "scale": 4.0}, True),
        ({"prompt": "a:0.1", "scale": 7.5, "guidance_start": 0.5}, True),
        ({"prompt": "a:0.1"}, True),
        ({"prompt": "a", "cfg_pp": True}, True),
        ({"prompt": "a AND b", "scale": 0.6}, False),
        ({"prompt": "a:0.2", "scale": 7.5}, False),
        ({"prompt": "a"}, False),
    ],
)
def test_weights_decide_what_is_left_of_a_negative_prompt(values: dict, shown: bool) -> None:
    """The image of `a:0 AND b:0` is that of the negative prompt at any scale, and only the scale was looked
    at.
    """
    request = ImageRequest(negative_prompt="c", prompt_syntax="a1111", **values)
    assert ("c" in prompts_of([request])) is shown


@pytest.mark.parametrize(
    "prompt",
    [
        "a red kni[fe:0] on grass",
        "a red [kni|kni]fe on grass",
        "a red [x:kni:1]fe on grass",
        "a red kni(fe:1) on grass",
        r"a red kni\fe on grass",
        "a red kni<lora:none:0>fe on grass",
        "a cube AND a red kni[fe:0]:0.5 on grass",
        "a red kni&#102;e on grass",
    ],
)
def test_a_word_that_is_written_in_parts_is_asked_about_whole(prompt: str) -> None:
    """The image is exactly that of the word, about which nobody was asked. The prompt itself is asked about,
    too.
    """
    texts = prompts_of([ImageRequest(prompt, prompt_syntax="a1111")])
    assert texts[0] == prompt
    assert any("red knife" in " ".join(text.split()) for text in texts[1:])
    hidden = ImageRequest("a", negative_prompt=prompt, prompt_syntax="a1111", scale=0.0)
    assert any("red knife" in " ".join(text.split()) for text in prompts_of([hidden]))


def test_a_word_of_the_second_pass_is_asked_about() -> None:
    """Shares of the steps above 1 are those of the second pass."""
    values = {"prompt_syntax": "a1111", "steps": 10, "hires": 2.0}
    assert "a knife" in prompts_of([ImageRequest("a kni[x:fe:1.4]", **values)])
    assert "a knife" not in prompts_of([ImageRequest("a kni[x:fe:1.4]", **(values | {"hires": None}))])


def test_a_prompt_without_marks_is_asked_about_once() -> None:
    """So is one whose alternatives come again; the texts of one prompt have a limit, for the hook's sake."""
    assert prompts_of([ImageRequest("a  cat ", prompt_syntax="a1111")] * 3) == ["a  cat "]
    turns = ImageRequest("[a|b] cat", prompt_syntax="a1111", steps=150)
    assert prompts_of([turns]) == ["[a|b] cat", "a cat", "b cat"]
    many = ImageRequest(" ".join(f"[a{k}:{k}]" for k in range(40)), prompt_syntax="a1111")
    with pytest.raises(LimitExceeded, match="more than 32 texts"):
        prompts_of([many])


# In the contracts


@pytest.fixture(scope="module")
def answers(model: tuple[Path, Path]) -> Iterator[Callable[..., Any]]:
    """Asks a service of which the moderation says this about prompts and about images."""
    from starlette.testclient import TestClient
    from tiny_service import running

    from ldm.service.app import Service, create_app

    with running(model) as engine:

        def ask(path: str, body: Any, prompt: str | None = None, image: str | None = None) -> Any:
            async def verdict(what: str, content: Any) -> str | None:
                return prompt if what == "prompt" else image

            service = Service(engine, ServiceOptions(), moderation=Moderation(verdict))
            with TestClient(create_app(service), base_url="http://localhost") as client:
                return client.post(path, json=body), service.moderation.counts

        yield ask


SCORE = {"input_data": {"columns": ["prompt"], "data": ["a cube"], "parameters": {"num_inference_steps": 2}}}
SMALL = {"prompt": "a cube", "steps": 2}
CONTRACTS = {
    "/generate": SMALL,
    "/score": SCORE,
    "/v1/images/generations": SMALL,
    "/sdapi/v1/txt2img": SMALL | {"width": 16, "height": 16},
}


@pytest.mark.parametrize("path", CONTRACTS)
def test_a_refused_prompt_is_an_error_of_each_contract(path: str, answers: Callable) -> None:
    found, counts = answers(path, CONTRACTS[path], prompt="no cubes")
    assert found.status_code == 400, found.text
    assert "no cubes" in found.text
    assert counts["prompt", "refused"] == 1
    assert counts["image", "allowed"] == counts["image", "refused"] == 0  # nothing was sampled


def test_a_refused_image_is_black_in_azures_contract(answers: Callable) -> None:
    found, counts = answers("/score", SCORE, image="no cubes")
    (line,) = found.json()
    image = Image.open(io.BytesIO(base64.b64decode(line["generated_image"])))
    assert line["nsfw_content_detected"] is True
    assert image.getextrema() == ((0, 0),) * 3
    assert counts["image", "refused"] == 1
    found, _ = answers("/score", SCORE)
    assert found.json()[0]["nsfw_content_detected"] is False


@pytest.mark.parametrize("path", [path for path in CONTRACTS if path != "/score"])
def test_a_refused_image_is_an_error_elsewhere(path: str, answers: Callable) -> None:
    found, _ = answers(path, CONTRACTS[path], image="no cubes")
    assert "no cubes" in found.text
    assert base64.b64encode(b"\x89PNG").decode().rstrip("=")[:5] not in found.text
    allowed, _ = answers(path, CONTRACTS[path])
    assert allowed.status_code == 200
    assert base64.b64encode(b"\x89PNG").decode().rstrip("=")[:5] in allowed.text
