"""Content moderation: a hook that is asked about prompts before sampling and about images after it.

A URL is asked as Azure AI Content Safety is: `text:analyze` and `image:analyze` of its REST API, version
2024-09-01, whose answer has a severity of 0 to 7 for each category of harm. A callable is asked as
`function(what, content)`: "prompt" and a text, or "image" and the bytes of a PNG file. It returns None where
there is nothing to object to, else a text, the reason, which the client reads.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import inspect
import io
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from ldm.errors import FieldError, InputError
from ldm.log import LOG, notice, one_line
from ldm.pipeline.settings.guidance import CFG_PP_SCALE
from ldm.service.errors import LimitExceeded, Refused, ServiceError, about_image
from ldm.service.options import ServiceOptions, is_loopback

if TYPE_CHECKING:
    import httpx2

    from ldm.pipeline.request import ImageRequest

PROMPT, IMAGE = "prompt", "image"
ALLOWED, REFUSED, FAILED_OPEN, FAILED_CLOSED = "allowed", "refused", "failed_open", "failed_closed"
OUTCOMES = (ALLOWED, REFUSED, FAILED_OPEN, FAILED_CLOSED)

KEY = "CONTENT_SAFETY_KEY"  # the environment variable of Azure's own examples
API_VERSION = "2024-09-01"
LONGEST_TEXT = 10_000  # characters of one text:analyze
LARGEST_IMAGE = 4_000_000  # bytes of one image:analyze, which takes sides of 50 to 7200 pixels
SIDES = (50, 2048)  # in pixels; what is larger than the second is scaled down to it

MOST_TEXTS = 32  # that are asked about for one prompt, which may read otherwise at each step
THREADS = 16  # calls of a plain function at a time; one that never returns keeps its place
# Questions about prompts at a time. More would only wait for a thread within their deadlines, and the other
# threads are left for images, which have been sampled already.
PROMPTS = THREADS // 2
LONGEST_REASON = 200  # characters
ROUNDING = 1e-6  # of a sum of weights

Ask = Callable[[str, Any], Awaitable[str | None]]


@dataclass(frozen=True)
class Verdict:
    """What became of one question: `what` was asked about, its outcome (of `OUTCOMES`), and why."""

    what: str
    outcome: str
    reason: str = ""

    @property
    def refused(self) -> bool:
        """Whether the prompt or image must not pass: it was objected to, or a closed hook failed."""
        return self.outcome in (REFUSED, FAILED_CLOSED)

    @property
    def error(self) -> ServiceError | None:
        """The error for the client: 400 for a refusal, 503 where a closed moderation gave no answer."""
        if self.outcome == REFUSED:
            return Refused(f"the {self.what} was refused by content moderation: {self.reason}")
        if self.outcome == FAILED_CLOSED:
            message = "content moderation gave no answer, without which nothing is served; try again later"
            return ServiceError(message, status=503, code="moderation_unavailable")
        return None


class NoAnswer(Exception):
    """The hook failed, or said something that is no answer."""


class Moderation:
    """Asks the hook, within `deadline` seconds for each question, and counts every verdict.

    Without a hook everything is allowed and nothing is counted. A question that fails or takes too long is
    allowed or not by `failure`, "open" or "closed". `counts` has the number of verdicts for each
    (what, outcome). Nothing here blocks the event loop.
    """

    def __init__(
        self,
        ask: Ask | None,
        *,
        deadline: float = 5.0,
        failure: str = "closed",
        close: Callable[[], Awaitable[None]] | None = None,
    ):
        self._ask, self._close = ask, close
        self._places = asyncio.Semaphore(PROMPTS)
        self.deadline, self.failure = deadline, failure
        self.counts: Counter[tuple[str, str]] = Counter()
        if ask:
            self.counts.update({(what, outcome): 0 for what in (PROMPT, IMAGE) for outcome in OUTCOMES})

    @classmethod
    def of(cls, options: ServiceOptions, environ: Mapping[str, str] = os.environ) -> Moderation:
        """The moderation that the options name; FieldError for a hook that cannot be used."""
        if options.moderate is None:
            return cls(None)
        rules = {"deadline": options.moderate_deadline, "failure": options.moderate_failure}
        if "://" in options.moderate:
            hook = ContentSafety(options.moderate, environ.get(KEY), options.moderate_severity)
            return cls(hook.ask, close=hook.close, **rules)
        return cls(asker(callable_named(options.moderate)), **rules)

    @property
    def enabled(self) -> bool:
        return self._ask is not None

    async def check_prompt(self, texts: Iterable[str], before: Callable[[], None] = lambda: None) -> Verdict:
        """The gravest verdict on prompts that belong together.

        Few prompts are asked about at a time, and the others wait as long as it takes: `before` is called
        before each question, and may raise where the answer is of no use any more.
        """
        asked: list[asyncio.Task[Verdict]] = []
        try:
            for text in dict.fromkeys(texts):
                if text.strip():
                    asked.append(await self._begin(text, before))
            verdicts = await asyncio.gather(*asked)
        finally:
            for question in asked:
                question.cancel()  # one that is over stays as it is
        gravest = sorted(verdicts, key=lambda verdict: (not verdict.refused, verdict.outcome == ALLOWED))
        return gravest[0] if gravest else Verdict(PROMPT, ALLOWED)

    async def _begin(self, text: str, before: Callable[[], None]) -> asyncio.Task[Verdict]:
        """The question about a prompt, once there is a place for it."""
        await self._places.acquire()
        try:
            before()
        except BaseException:
            self._places.release()
            raise
        question = asyncio.create_task(self._check(PROMPT, text))
        question.add_done_callback(lambda _: self._places.release())
        return question

    async def check_image(self, png: bytes) -> Verdict:
        """The verdict on an image, given as a PNG file."""
        return await self._check(IMAGE, png)

    async def close(self) -> None:
        """Give up the connections."""
        if self._close:
            await self._close()

    async def _check(self, what: str, content: str | bytes) -> Verdict:
        if self._ask is None:
            return Verdict(what, ALLOWED)
        try:
            async with asyncio.timeout(self.deadline):
                reason = await self._ask(what, content)
            outcome = REFUSED if reason else ALLOWED
        except Exception as error:  # whatever a user's function raises
            outcome = FAILED_OPEN if self.failure == "open" else FAILED_CLOSED
            reason = f"no answer in {self.deadline:g} s" if isinstance(error, TimeoutError) else str(error)
            LOG.debug("moderation failed", exc_info=True)
            notice(f"moderation of the {what} failed, {self.failure}: {_short(reason)}")
        self.counts[what, outcome] += 1
        return Verdict(what, outcome, _short(reason or ""))


def prompts_of(requests: Iterable[ImageRequest]) -> list[str]:
    """The distinct texts that images of these requests would show: as they are written, and as the text
    encoder reads them at each step, which may join a word that the prompt writes in parts.

    Negative prompts usually name what is unwanted, and a moderation would object to just that. They are among
    the texts only where an image shows them. LimitExceeded for a prompt that becomes too many texts.
    """
    texts: dict[str, str] = {}
    for k, request in enumerate(requests):
        with about_image(k):
            texts |= _distinct(chain((request.prompt, request.prompt_to), request.readings()))
            if shows_negative(request):
                texts |= _distinct(chain((request.negative_prompt,), request.readings(negative=True)))
    return [text for folded, text in texts.items() if folded]


def _distinct(texts: Iterable[str]) -> dict[str, str]:
    """Texts, and what the tokenizer makes of their HTML entities, by themselves with white space folded."""
    from ldm.modules.encoders.tokenizer import mended

    found: dict[str, str] = {}
    for text in texts:
        if (folded := " ".join(text.split())) not in found:
            plain = mended(text)
            found |= {folded: text, " ".join(plain.split()): plain}
        if len(found) > MOST_TEXTS:
            raise LimitExceeded(
                f"prompt: over its steps it becomes more than {MOST_TEXTS} texts, and content moderation is "
                "asked about each; take fewer schedules and alternations"
            )
    return found


def shows_negative(request: ImageRequest) -> bool:
    """Whether an image shows its negative prompt.

    Guidance leaves 1 - scale x the sum of the prompt's weights of it, which are 1 in all as a rule. A scale
    that is left to the model is at least 1, and 1 stands for it in the steps that are not guided.
    """
    scales = [request.scale]
    if request.scale is None:
        scales = [CFG_PP_SCALE if request.cfg_pp else 1.0]
    if (request.guidance_start, request.guidance_end) != (0.0, 1.0):
        scales.append(1.0)
    return any(scale * request.total_weight < 1 - ROUNDING for scale in scales)


def callable_named(name: str) -> Callable[..., Any]:
    """The callable of "package.module:function"; FieldError if there is none."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise FieldError("{moderate} {given!r}: give a URL, or package.module:function", given=name)
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the module raises while it is imported
        why = one_line(f"{type(error).__name__}: {error}")
        raise FieldError("{moderate} {given}: {why}", given=name, why=why) from error
    if not callable(found):
        raise FieldError("{moderate} {given}: it cannot be called", given=name)
    return found


def asker(function: Callable[..., Any]) -> Ask:
    """The question to a user's function: a coroutine function is awaited, a plain one has a thread."""
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    )
    slots = asyncio.Semaphore(THREADS)

    async def ask(what: str, content: Any) -> str | None:
        try:
            answer = await (
                function(what, content) if is_async else _in_thread(slots, function, what, content)
            )
        except NoAnswer:
            raise
        except Exception as error:
            raise _failed(error) from error
        if answer is None or (isinstance(answer, str) and answer.strip()):
            return answer
        raise NoAnswer(
            f"the function returned an object of type {type(answer).__name__}: None lets pass, a text is the "
            "reason of a refusal"
        )

    return ask


def _failed(error: BaseException) -> NoAnswer:
    """What is said of a function that raised: not its message, in which the prompt may be."""
    failed = NoAnswer(f"the function raised {type(error).__name__} (--debug shows it)")
    failed.__cause__ = error
    return failed


async def _in_thread(slots: asyncio.Semaphore, function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns in a thread that does not keep the process alive should it never end."""
    loop = asyncio.get_running_loop()
    answer = loop.create_future()
    await slots.acquire()

    def work() -> None:
        result = error = None
        try:
            result = function(*args)
        except BaseException as raised:
            error = _failed(raised)

        def hand_over() -> None:
            slots.release()
            if answer.done():  # its deadline has passed
                return
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(error)

        with suppress(RuntimeError):  # the event loop has ended meanwhile
            loop.call_soon_threadsafe(hand_over)

    threading.Thread(target=work, name="moderation", daemon=True).start()
    return await answer


class ContentSafety:
    """Azure AI Content Safety, or a service of the same requests. `key` goes into a header, if there is one.

    A severity of `threshold` or more in any category, or a hit of a blocklist, is refused.
    FieldError for an address that cannot be used.
    """

    def __init__(self, address: str, key: str | None, threshold: int):
        self.base, self.version = _base_and_version(address, key)
        self.threshold = threshold
        self._headers = {"Ocp-Apim-Subscription-Key": key} if key else {}
        self._client: httpx2.AsyncClient | None = None
        try:
            import httpx2
        except ImportError:
            raise InputError('--moderate URL needs httpx2: pip install -e ".[service]"') from None
        # The certificates are read once, here, which takes longer than the event loop may wait.
        context = httpx2.create_ssl_context() if self.base.startswith("https") else False
        self._open = lambda: httpx2.AsyncClient(headers=self._headers, timeout=None, verify=context)

    async def ask(self, what: str, content: Any) -> str | None:
        """Why the content is refused, None if it is not; NoAnswer if the service does not say."""
        if what == IMAGE:
            file = await asyncio.to_thread(fitted, content)
            return await self._analyze("image", {"image": {"content": base64.b64encode(file).decode()}})
        for start in range(0, len(content), LONGEST_TEXT):
            part = content[start : start + LONGEST_TEXT]
            if reason := await self._analyze("text", {"text": part}):
                return reason
        return None

    async def close(self) -> None:
        if self._client:
            await self._client.aclose()
            self._client = None

    async def _analyze(self, kind: str, body: dict[str, Any]) -> str | None:
        import httpx2

        self._client = self._client or self._open()
        url = f"{self.base}/contentsafety/{kind}:analyze"
        while True:  # the deadline ends it
            try:
                answer = await self._client.post(
                    url,
                    params={"api-version": self.version},
                    json=body | {"outputType": "FourSeverityLevels"},
                )
            except httpx2.HTTPError as error:
                raise NoAnswer(f"{type(error).__name__}: {error}") from error
            if answer.status_code != 429:
                break
            await asyncio.sleep(_seconds(answer.headers.get("Retry-After")))
        if answer.status_code != 200:
            raise NoAnswer(f"{kind}:analyze answered with status {answer.status_code}")
        try:
            return objection(answer.json(), self.threshold)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise NoAnswer(f"{kind}:analyze answered with something else than categoriesAnalysis") from error


def objection(answer: dict[str, Any], threshold: int) -> str | None:
    """The categories of an answer whose severity is at least the threshold, in words; None without any."""
    severities = {one["category"]: int(one["severity"]) for one in answer["categoriesAnalysis"]}
    if not severities:
        raise ValueError("no category was looked at")
    found = [f"{category} (severity {n})" for category, n in severities.items() if n >= threshold]
    found += [f"blocklist {hit['blocklistName']}" for hit in answer.get("blocklistsMatch") or ()]
    return ", ".join(found) or None


def fitted(png: bytes) -> bytes:
    """An image file in the sides and bytes that image:analyze takes: the file itself, or a copy of it."""
    from PIL import Image

    least, most = SIDES
    image = Image.open(io.BytesIO(png))
    if len(png) <= LARGEST_IMAGE and min(image.size) >= least and max(image.size) <= most:
        return png
    image = image.convert("RGB")
    factor = min(1.0, most / max(image.size))
    size = [max(least, round(side * factor)) for side in image.size]
    file = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(file, format="JPEG", quality=90)
    return file.getvalue()


def _base_and_version(address: str, key: str | None) -> tuple[str, str]:
    try:
        url = urlsplit(address)
        query = dict(parse_qsl(url.query))
        host, _ = url.hostname, url.port
    except ValueError as error:
        raise FieldError("{moderate}: {why}", why=str(error)) from None
    if url.scheme not in ("http", "https") or not host:
        raise FieldError("{moderate} {given}: give http:// or https:// and a host", given=address)
    if url.username is not None or set(query) - {"api-version"}:
        message = "{moderate}: the address has a secret; its key belongs into the environment variable {key}"
        raise FieldError(message, key=KEY)
    if key and url.scheme == "http" and not is_loopback(host):
        raise FieldError("{moderate} {given}: with a key it has to be https://", given=address)
    if host.endswith(".cognitiveservices.azure.com") and not key:
        raise FieldError("{moderate} {given}: set the environment variable {key}", given=address, key=KEY)
    path = url.path.rstrip("/").removesuffix("/contentsafety")
    return urlunsplit((url.scheme, url.netloc, path, "", "")), query.get("api-version", API_VERSION)


def _seconds(retry_after: str | None) -> float:
    """The seconds of a Retry-After header; 1 where it has none, or a date."""
    try:
        return min(max(float(retry_after or 1), 0.1), 60.0)
    except ValueError:
        return 1.0


def _short(reason: str) -> str:
    line = one_line(reason)
    return line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 1]}…"
