"""Files with a line NAME:SECRET for each client or user."""

from collections.abc import Iterator
from typing import NamedTuple

from ldm.errors import InputError


class Credential(NamedTuple):
    name: str
    secret: str
    place: str  # where it stands, for error messages, which never show the secret


def read_credentials(path: str, option: str, form: str) -> Iterator[Credential]:
    """The names and secrets of a file, without spaces around them; `form` is such as "USER:PASSWORD".

    Blank lines, and those that begin with #, say nothing. InputError, which names `option`, for a file that
    cannot be read, has no such line, or has one of another form.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{option} {path} is no UTF-8 text") from error
    numbered = [(number, line) for number, line in enumerate(map(str.strip, lines), 1) if line]
    numbered = [(number, line) for number, line in numbered if not line.startswith("#")]
    if not numbered:
        raise InputError(f"{option} {path} holds no line {form}")
    for number, line in numbered:
        name, _, secret = (part.strip() for part in line.partition(":"))
        place = f"{option} {path}, line {number}"
        if not (name and secret):
            raise InputError(f"{place}: give {form}")
        yield Credential(name, secret, place)
