"""PageOptions: where the page is found, and who may see it. Imports no torch."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ldm.errors import FieldError, InputError
from ldm.fields import check_fields, setting, settings_of
from ldm.service.credentials import read_credentials
from ldm.service.options import ServiceOptions, is_loopback

# What a page leaves of ServiceOptions, whose other fields are options of the page, too: it has no tokens, its
# answers are no bodies of HTTP requests, and whoever ends it does not wait.
NOT_OF_A_PAGE = (
    *("host", "port", "token_file", "log_prompts", "log_file"),
    *("moderate", "moderate_deadline", "moderate_failure", "moderate_severity", "drain"),
)


def _of_service(name: str, help: str, **facts: Any) -> Any:
    """A field of ServiceOptions in the words of a page, with another default if one is given."""
    each = settings_of(ServiceOptions)[name]
    default = facts.pop("default", each.default)
    return field(default=default, metadata={"setting": replace(each, help=help, **facts)})


@dataclass(frozen=True)
class PageLimits(ServiceOptions):
    """The options of a page's engine; a sheet is one request of many images."""

    queue_size: int = _of_service(
        "queue_size", "images that may wait; a request for more is refused", default=256
    )
    deadline: float = _of_service(
        "deadline", "seconds after which images are given up, the time that they waited included"
    )
    max_body: float = _of_service("max_body", "largest file that can be dropped onto the page")
    max_images: int = _of_service("max_images", "most images at a time, such as those of a sheet", default=64)
    lora_folder: str | None = _of_service(
        "lora_folder",
        "the folder of the LoRAs that the page offers beside the bundled one",
        default_text="models/loras",
    )
    embedding_folder: str | None = _of_service(
        "embedding_folder", "the folder of the textual inversions that the page offers"
    )
    control_folder: str | None = _of_service(
        "control_folder", "a folder of ControlNets that the page offers beside the bundled ones"
    )


@dataclass(frozen=True)
class PageOptions:
    """Address and users of the page. A host beyond this machine needs `auth_file`."""

    host: str = setting("127.0.0.1", "address to listen at; one beyond this machine needs --auth_file")
    port: int = setting(7860, "port to listen at; 0 takes a free one", low=0, high=65_535)
    auth_file: str | None = setting(
        None, "a file with a line USER:PASSWORD for each user; the page then asks for them", metavar="FILE"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.auth_file is None and not is_loopback(self.host):
            raise FieldError(
                "{host} {given} can be reached from other machines: give {auth_file}, too", given=self.host
            )


def read_users(path: str) -> dict[str, str]:
    """Passwords by user, of a file with a line USER:PASSWORD each. InputError.

    Blank lines, and those that begin with #, say nothing.
    """
    found: dict[str, str] = {}
    for user, password, place in read_credentials(path, "--auth_file", "USER:PASSWORD"):
        if user in found:
            raise InputError(f"{place}: the user {user} is there already")
        found[user] = password
    return found


def password_check(users: dict[str, str]) -> Callable[[str, str], bool]:
    """Whether a user has a password; in the same time for any user and any wrong password."""

    def check(user: str, password: str) -> bool:
        known = users.get(user)
        wanted = password + " " if known is None else known  # which nothing equals
        return hmac.compare_digest(wanted.encode(), password.encode())

    return check
