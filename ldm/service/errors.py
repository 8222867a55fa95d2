"""Errors that a client of the service is meant to read. Each contract writes them in a form of its own."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import FieldError, InputError

# Folders of an absolute path: in quotes they may have spaces.
FOLDERS = re.compile(r"""(?<=['"])/(?:[^/'"]+/)+|(?<![\w.])/(?:[^\s/'",;:()]+/)+""")


class ServiceError(Exception):
    """A request that is not served: an HTTP status, a code for programs and one line for people.

    `headers` belong to the answer. `number` says which image of the request, from 0, it is about, if it is
    about a single one.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 500,
        code: str = "internal_error",
        headers: Mapping[str, str] | None = None,
        number: int | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.code, self.number = message, status, code, number
        self.headers: dict[str, str] = dict(headers or {})

    def __copy__(self) -> ServiceError:
        """The same error without its traceback, for an answer that adds headers of its own."""
        twin = type(self).__new__(type(self), *self.args)
        vars(twin).update(vars(self), headers=dict(self.headers))
        return twin


class BadRequest(ServiceError):
    """A value that is malformed or out of range.

    `spelled`, if it is there, gives the message with another name for each setting.
    """

    spelled: Callable[[Callable[[str], str]], str] | None

    def __init__(self, message: str, *, code: str = "invalid_request"):
        super().__init__(message, status=422, code=code)
        self.spelled = None


class LimitExceeded(ServiceError):
    """More than this service makes for anybody: pixels, steps, images (422) or bytes (413)."""

    def __init__(self, message: str, *, status: int = 422):
        super().__init__(message, status=status, code="limit_exceeded")


class UnknownModel(ServiceError):
    def __init__(self, name: str, choices: Iterable[str]):
        message = f"no model {_short(name)}; choose from {', '.join(choices)}"
        super().__init__(message, status=404, code="unknown_model")


class UnknownJob(ServiceError):
    """No job of this client has the id; whether another one's has is not said."""

    def __init__(self, id: str):
        message = f"no job {_short(id)}: it never was, or its result is no longer kept"
        super().__init__(message, status=404, code="unknown_job")


class QueueFull(ServiceError):
    """`seconds` are those after which there may be room."""

    def __init__(self, seconds: float):
        wait = max(1, math.ceil(seconds))
        super().__init__(
            f"too many images are waiting; try again in {wait} s",
            status=429,
            code="queue_full",
            headers={"Retry-After": str(wait)},
        )


class Draining(ServiceError):
    def __init__(self, message: str = "the service is about to end and takes no further requests"):
        super().__init__(message, status=503, code="draining")


class DeadlinePassed(ServiceError):
    def __init__(self, seconds: float):
        message = f"the request was not finished within {seconds:g} s"
        super().__init__(message, status=504, code="deadline_passed")


class Cancelled(ServiceError):
    def __init__(self) -> None:
        super().__init__("the request was cancelled", status=499, code="cancelled")


class Refused(ServiceError):
    """What the moderation does not let pass."""

    def __init__(self, message: str = "the request was refused by content moderation"):
        super().__init__(message, status=400, code="content_policy")


class OutOfMemory(ServiceError):
    """Not even one image of this request fits into the device's memory: a smaller one may."""

    def __init__(self, message: str):
        super().__init__(message, status=422, code="out_of_memory")


def from_input_error(error: InputError, folders: Iterable[Path] = ()) -> BadRequest:
    """The error for a client: one line, in which files go by their names alone, wherever they lie.

    `folders` are the service's own, relative ones and names with spaces among them, which the message alone
    would not show to be folders. A FieldError names its fields as ImageRequest does; `in_names` changes that.
    """
    folders = tuple(folders)

    def spelled(spell: Callable[[str], str]) -> str:
        text = error.spelled(spell) if isinstance(error, FieldError) else str(error)
        return without_places(" ".join(text.splitlines()), folders)

    found = BadRequest(spelled(lambda name: name))
    if isinstance(error, FieldError):
        found.spelled = spelled
    return found


def renamed(error: ServiceError, names: Mapping[str, str]) -> ServiceError:
    """The error with a contract's names, by ours, for the settings in its message.

    Where the message is a plain text, these are the setting that it begins with, and those whose names have
    an underscore, as no other word has.
    """
    if isinstance(error, BadRequest) and error.spelled:
        return reworded(error, error.spelled(lambda name: names.get(name, name)))
    if not names:
        return error
    anywhere = "".join(rf"|\b{name}\b" for name in names if "_" in name)
    pattern = rf"^(?:{'|'.join(names)})(?=[: ]){anywhere}"
    return reworded(error, re.sub(pattern, lambda match: names[match[0]], error.message))


def reworded(error: ServiceError, message: str) -> ServiceError:
    """The same error with another message."""
    found = copy.copy(error)
    found.message, found.args = message, (message,)
    if isinstance(found, BadRequest):
        found.spelled = None
    return found


@contextmanager
def in_names(names: Mapping[str, str]) -> Iterator[None]:
    """Inside, errors name settings as a contract does: `names` has its names by ours."""
    try:
        yield
    except ServiceError as error:
        raise renamed(error, names) from error


@contextmanager
def about_image(number: int) -> Iterator[None]:
    """Inside, errors say which image of a request they are about."""
    try:
        yield
    except ServiceError as error:
        error.number = number
        raise


def without_places(text: str, folders: Iterable[Path] = ()) -> str:
    """A text in which files go by their names alone."""
    spelled = {str(one) for folder in folders for one in (folder, folder.absolute(), folder.resolve())}
    for place in sorted(spelled - {".", "/"}, key=len, reverse=True):
        text = re.sub(rf"(?<![\w./-]){re.escape(place)}/+", "", text)
        if "/" in place:  # a single word may stand for something else
            text = re.sub(rf"(?<![\w./-]){re.escape(place)}(?![\w-])", "the service's folder", text)
    return FOLDERS.sub("", text)


def _short(text: str) -> str:
    """A client's text, as a part of a message: quoted, on one line, and no longer than it has to be."""
    return repr(text if len(text) <= 80 else f"{text[:79]}…")
