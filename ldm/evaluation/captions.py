"""The prompts of an evaluation: captions of a file, of which a seed chooses some. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ldm.errors import FieldError
from ldm.weights.files import user_file

EXPECTED = (
    "captions_val2017.json of COCO (annotations_trainval2017.zip, cocodataset.org/#download), or a text file "
    "with a prompt on each line"
)


def read_captions(path: str | Path) -> list[str]:
    """The different captions of a file, in its order, with single spaces between words.

    A `.json` file has COCO's form, {"annotations": [{"caption": "…"}, …]}; any other is UTF-8 text with a
    prompt on each line, of which empty ones are skipped. Only \\n and \\r\\n end a line: what else
    Unicode counts as line ends may be within a prompt. FieldError names `captions`.
    """
    path = Path(path)
    try:
        with user_file(path):
            text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refused(path, f"is no UTF-8 text (byte {error.start})") from error
    found = _coco(path, text) if path.suffix.lower() == ".json" else text.split("\n")
    captions = list(dict.fromkeys(words for line in found if (words := " ".join(line.split()))))
    if not captions:
        raise _refused(path, "has no captions")
    return captions


def choose(captions: list[str], count: int, seed: int) -> list[str]:
    """`count` different captions, in an order that depends on the seed and the captions alone.

    They are the first of all by the SHA-256 of seed and caption. So neither the order of the file nor the
    version of a library decides, and fewer captions are the first of more. FieldError if there are fewer.
    """
    different = list(dict.fromkeys(captions))
    if len(different) < count:
        raise FieldError(
            "{images} {count}: {captions} has {there} different prompts", count=count, there=len(different)
        )
    return sorted(different, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())[:count]


def _coco(path: Path, text: str) -> list[str]:
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise _refused(path, f"is no JSON ({error})") from error
    notes = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(notes, list):
        raise _refused(path, 'has no list of "annotations"')
    captions = [note.get("caption") if isinstance(note, dict) else None for note in notes]
    if bad := [k for k, caption in enumerate(captions) if not isinstance(caption, str)]:
        raise _refused(path, f'has annotations without "caption", the first at {bad[0]}')
    return captions


def _refused(path: Path, why: str) -> FieldError:
    return FieldError("{captions} {path} {why}: give {expected}", path=path, why=why, expected=EXPECTED)
