"""File names from templates: `{number:05}-{prompt}` gives "00007-a-red-cube".

Names are fit for any system: whatever a prompt holds, the path stays in its folder, can be created on Linux,
macOS and Windows, and is not hidden. Imports neither torch nor numpy, and pathvalidate only at need.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.errors import InputError

INTEGERS = ("number", "image", "seed", "steps", "width", "height")  # may have a width, as {number:05}
FIELDS = (
    "number",  # of the file in its folder
    "image",  # number within the run
    "seed",
    "prompt",
    "negative_prompt",
    "sampler",
    "steps",
    "scale",
    "width",
    "height",
    "strength",
    "init_img",  # the init image's file name without its suffix
    "model",  # the checkpoint's file name without its suffix
    "model_hash",
)
NONE = "none"  # what an empty or missing field says
MAX_PARTS = 8  # folders, and the file
MAX_BYTES = 200  # of a part: file systems end at 255, and a number and the suffix may follow
MAX_LITERAL = 100  # bytes of a part that are the template's own
MAX_TEXT = 1000  # characters of a field that are looked at

PLAIN = "-_.,'()+="  # what a field's text keeps besides letters and digits
RESERVED_TOO = ("CONIN$", "CONOUT$")  # on Windows, besides those that pathvalidate knows
LONGEST_RESERVED = len("CONOUT$")
# Letters and marks for Unicode, and nothing to the eye: fillers, variation selectors.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
FIELD = re.compile(r"\{([^{}]*)\}")
SUFFIX = re.compile(r"\.(png|jpe?g|webp)(?=[. ]*\Z)", re.I)


def check_template(text: str) -> None:
    """InputError if a template cannot be used, on whatever system.

    It is a relative path without suffix, in which / makes folders, {name} is one of FIELDS, and {name:05} an
    integer with zeros in front.
    """

    def refused(why: str) -> InputError:
        return InputError(f"--filename {text!r}: {why}")

    if not text.strip():
        raise refused("it is empty; {number:05} is the usual one")
    if text.startswith("/"):
        raise refused("an absolute path; files go into --outdir, so leave out the first /")
    parts = text.split("/")
    if len(parts) > MAX_PARTS:
        raise refused(f"{len(parts) - 1} folders in each other; {MAX_PARTS - 1} are the most")
    for part in parts:
        for inner in FIELD.findall(part):
            name, colon, width = inner.partition(":")
            if name not in FIELDS:
                fields = ", ".join(f"{{{field}}}" for field in FIELDS)
                raise refused(f"{'{' + inner + '}'!r} is no field; there are {fields}")
            if colon and not (name in INTEGERS and re.fullmatch("0[1-9][0-9]?", width)):
                integers = ", ".join(INTEGERS)
                raise refused(
                    f"{'{' + inner + '}'!r}: after : stands a width such as 05, of {integers} alone"
                )
        literal = FIELD.sub("", part)
        if wrong := [c for c in literal if c in "{}"]:
            raise refused(f"a {wrong[0]} without its other half; a field is written {{seed}}")
        if wrong := [c for c in literal if not _is_allowed(c)]:
            raise refused(f"{wrong[0]!r} cannot be in file names everywhere; / makes folders")
        if not part.strip(" ."):
            raise refused(f"{part!r} as a folder or file; each part between / needs a name")
        if part.lstrip()[0] in ".~-":
            raise refused(f"a name that begins with {part.lstrip()[0]!r} is hidden, or no name to a shell")
        if len(literal.encode()) > MAX_LITERAL:
            raise refused(f"{part!r} has more than {MAX_LITERAL} bytes of its own; shorten it")
    if suffix := SUFFIX.search(text):
        raise refused(f"leave out {suffix[0]!r}: --format adds it, and chooses among png, jpg and webp")


def file_name(template: str, facts: Mapping[str, Any]) -> str:
    """The relative path, without suffix, of the image that has these facts, by FIELDS; others are ignored.

    The template has passed `check_template`. Of text there remain letters and digits of any script and
    "-_.,'()+="; blanks become "-" and anything else "_". What is missing, None or empty is "none". Where a
    part would be longer than MAX_BYTES, its longest texts are cut, so that the numbers stay.
    """
    return "/".join(_part(part, facts) for part in template.split("/"))


def unique_names(names: Iterable[str]) -> list[str]:
    """The names, all different: what is taken becomes name-2, name-3, … in order of appearance.

    Two names that only a case-sensitive file system distinguishes count as one.
    """
    unique, taken, latest = [], set(), {}
    for name in names:
        candidate, i = name, latest.get(_key(name), 1)
        while _key(candidate) in taken:
            i += 1
            candidate = f"{name}-{i}"
        latest[_key(name)] = i
        taken.add(_key(candidate))
        unique.append(candidate)
    return unique


def _key(name: str) -> str:
    """The same for all names that some file system takes for one."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def _part(part: str, facts: Mapping[str, Any]) -> str:
    pieces = FIELD.split(part)  # literal, field, literal, field, …, literal
    numbers = {i: _number(pieces[i], facts) for i in range(1, len(pieces), 2)}
    texts = {
        i: _plain(facts.get(pieces[i].partition(":")[0])) for i, number in numbers.items() if number is None
    }
    for i, number in numbers.items():
        pieces[i] = number
    for most in range(MAX_BYTES, 0, -1):  # bytes of each text
        for i, text in texts.items():
            pieces[i] = _cut(text, most)
        name = "".join(pieces)
        if len(name.encode()) < MAX_BYTES:
            break
    # a number may have as many zeros as to fill the rest; one byte is left for the _
    name = _cut(unicodedata.normalize("NFC", name), MAX_BYTES - 1).strip(" .") or NONE
    return f"_{name}" if _is_reserved(name) else name


def _is_allowed(character: str) -> bool:
    """Whether a character can be part of a file name on any system."""
    from pathvalidate import is_valid_filename

    return character.isprintable() and is_valid_filename(f"a{character}a", "universal", fs_encoding="utf-8")


def _is_reserved(name: str) -> bool:
    """Whether a name of allowed characters means a device on Windows, as "nul.txt" and "nul .txt" do."""
    stem = name.partition(".")[0].rstrip(" ")
    if not stem[:1].isalpha() or len(stem) > LONGEST_RESERVED:  # thousands of names: most need no look
        return False
    from pathvalidate import is_valid_filename

    return not is_valid_filename(
        stem, "universal", fs_encoding="utf-8", additional_reserved_names=RESERVED_TOO
    )


def _number(field: str, facts: Mapping[str, Any]) -> str | None:
    """A field's number as text; None if it is no number."""
    name, _, width = field.partition(":")
    value = facts.get(name)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and value.bit_length() <= 64:  # Python refuses to write very large ones
        return f"{value:{width}d}"
    return None


def _plain(value: Any) -> str:
    """Text that can be part of any name; not empty."""
    if not isinstance(value, str):
        return NONE
    text = INVISIBLE.sub("", unicodedata.normalize("NFC", value[:MAX_TEXT]))
    text = "".join(" " if c.isspace() else c if _is_plain(c) else "?" for c in text)
    text = re.sub("[ ?]+", lambda run: "-" if " " in run[0] else "_", text)
    return text.strip("-_.,") or NONE


def _is_plain(character: str) -> bool:
    return character in PLAIN or unicodedata.category(character)[0] in "LMN"  # letter, its mark, number


def _cut(text: str, most: int) -> str:
    """The beginning of a text, at most so many bytes of UTF-8, without an end that looks torn."""
    if len(text.encode()) <= most:
        return text
    return text.encode()[:most].decode(errors="ignore").rstrip("-_.,")
