"""Captions of a file, and the choice among them."""

import json
import random
from pathlib import Path

import pytest

from ldm.errors import InputError
from ldm.evaluation.captions import choose, read_captions


def coco(path: Path, captions: list[str]) -> Path:
    notes = [{"image_id": k // 5, "id": k, "caption": text} for k, text in enumerate(captions)]
    path.write_text(json.dumps({"info": {}, "images": [], "annotations": notes}))
    return path


def test_coco_and_text(tmp_path: Path) -> None:
    captions = ["A cat.", "A dog \n", "A cat.", "  two   birds"]
    wanted = ["A cat.", "A dog", "two birds"]
    assert read_captions(coco(tmp_path / "captions.json", captions)) == wanted
    (tmp_path / "prompts.txt").write_bytes("\ufeffA cat.\r\n\r\nA dog\r\n two   birds".encode())
    assert read_captions(tmp_path / "prompts.txt") == wanted


def test_what_ends_a_line_for_unicode_alone_is_within_a_prompt(tmp_path: Path) -> None:
    """A prompt with U+2028 or U+0085, as copied from other programs, became two."""
    content = "a cat\u2028and a dog\r\na red\x85cube\ntwo\x0bbirds"
    (tmp_path / "prompts.txt").write_bytes(content.encode())
    assert read_captions(tmp_path / "prompts.txt") == ["a cat and a dog", "a red cube", "two birds"]


def test_the_choice_is_stable_and_has_no_repeats() -> None:
    captions = [f"a photo of {k} things" for k in range(1000)]
    chosen = choose(captions, 100, 42)
    assert chosen[:3] == ["a photo of 686 things", "a photo of 256 things", "a photo of 981 things"]
    assert len(set(chosen)) == 100
    shuffled = [*captions, *captions[:50]]
    random.Random(0).shuffle(shuffled)
    assert choose(shuffled, 100, 42) == chosen
    assert choose(captions, 10, 42) == chosen[:10]
    assert choose(captions, 100, 43) != chosen


def test_fewer_than_asked() -> None:
    with pytest.raises(InputError, match="images 3: captions has 2 different prompts"):
        choose(["a cat", "a dog", "a cat"], 3, 0)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"annotations": [{"bbox": [1, 2]}]}', 'annotations without "caption", the first at 0'),
        (b'{"images": []}', 'no list of "annotations"'),
        (b'["a cat"]', 'no list of "annotations"'),
        (b'{"annotations": ["a cat"]}', 'annotations without "caption"'),
        (b'{"annotations": []}', "no captions"),
        (b'{"annotations"', "is no JSON"),
        (b"\xff\xfe", "is no UTF-8 text"),
    ],
)
def test_another_form(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "captions.json").write_bytes(content)
    with pytest.raises(InputError) as error:
        read_captions(tmp_path / "captions.json")
    assert why in str(error.value)
    assert "captions_val2017.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json cannot be opened: No such file"):
        read_captions(tmp_path / "absent.json")
