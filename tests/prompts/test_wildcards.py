"""Choices and wildcards: what a template may become, and what is refused."""

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ldm.errors import InputError
from ldm.prompts.wildcards import MAX_COUNT, MAX_SIZE, Wildcards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Lists of colours and shapes, one of which draws from the other."""
    (tmp_path / "lists" / "warm").mkdir(parents=True)
    (tmp_path / "lists/colours.txt").write_bytes("\ufeff# cold ones\r\nblue\r\n\r\n  green \r\n".encode())
    (tmp_path / "lists/warm/colours.txt").write_text("red\n3::dark {red|orange}\n")
    (tmp_path / "lists/things.txt").write_text("__colours__ cube\n__warm/colours__ cone")
    return tmp_path / "lists"


def expand(text: str, folder: Path | None = None) -> list[str]:
    """All expansions; every one that is drawn is among them, and they are as many as was counted."""
    template = Wildcards(folder).template(text)
    found = template.all()
    drawn = {template.draw(Random(seed)) for seed in range(60)}
    assert drawn <= set(found)
    assert template.count >= len(found)
    assert template.parsed.size >= max(map(len, found))
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", ["a cat"]),
        ("", [""]),
        ("a {red|blue} {cat|dog}", ["a red cat", "a red dog", "a blue cat", "a blue dog"]),
        ("{a|{b|c}d}", ["a", "bd", "cd"]),
        ("{a|a}", ["a"]),
        ("a {very |}big cat", ["a very big cat", "a big cat"]),
        ("{}", [""]),
        ("{2$$a|b}", ["a, b", "b, a"]),
        ("{2$$ and $$a|b}", ["a and b", "b and a"]),
        ("{1-2$$ and $$a|b}", ["a", "b", "a and b", "b and a"]),
        ("{-1$$a|b}", ["a", "b"]),
        ("{0-1$$a|b}", ["", "a", "b"]),
        ("{1-$$a|b}", ["a", "b", "a, b", "b, a"]),
        ("{5$$a|b}", ["a, b", "b, a"]),  # as many as there are
        ("{2$$|$$a|b}", ["a|b", "b|a"]),
        ("{0.5::a|2::b|0::c}", ["a", "b"]),
        ("{a|b}x::y", ["ax::y", "bx::y"]),
        (r"\{a\|b\} \__c__ \(d:1.2\)", [r"{a|b} __c__ \(d:1.2\)"]),
        ("a __ b ___", ["a __ b ___"]),
        # the prompt language's own
        ("[a|b] {c|d}", ["[a|b] c", "[a|b] d"]),
        ("{[a|b]|c}", ["[a|b]", "c"]),
        ("[{a|b}|c::0.5]", ["[a|c::0.5]", "[b|c::0.5]"]),
        ("{x [{a|b}|c] y|d}", ["x [a|c] y", "x [b|c] y", "d"]),
        ("{[a|b}", ["[a", "b"]),  # a [ that stays open is no bracket
        ("({a|b}:1.2) <lora:x:0.5>", ["(a:1.2) <lora:x:0.5>", "(b:1.2) <lora:x:0.5>"]),
    ],
)
def test_choices(text: str, expected: list[str]) -> None:
    assert expand(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a __colours__ cat", ["a blue cat", "a green cat"]),
        ("__warm/colours__", ["red", "dark red", "dark orange"]),
        ("__*colours__", ["blue", "green"]),
        ("__**colours__", ["blue", "green", "red", "dark red", "dark orange"]),
        ("__things__", ["blue cube", "green cube", "red cone", "dark red cone", "dark orange cone"]),
        ("{2$$+$$__colours__}", ["blue+green", "green+blue"]),
        ("{__colours__|white}", ["blue", "green", "white"]),
    ],
)
def test_wildcards(folder: Path, text: str, expected: list[str]) -> None:
    assert expand(text, folder) == expected


def test_every_combination_is_counted() -> None:
    wildcards = Wildcards()
    for text in ("{2-3$$a|b|{c|d}|e}", "{a|b}{c|d|e}", "{0-$$a|b|c}"):
        template = wildcards.template(text)
        assert template.count == len(template.all()), text
    assert wildcards.template("{a|b}" * 30).count == 2**30
    assert wildcards.template("{a|b}" * 900).count == MAX_COUNT


def test_draws_follow_the_weights_and_the_seed() -> None:
    template = Wildcards().template("{3::a|b} {2$$8::a|b|c}")
    drawn = [template.draw(Random(seed)) for seed in range(2000)]
    first = Counter(one[0] for one in drawn)
    assert 0.7 < first["a"] / 2000 < 0.8
    assert sum("a" in one[2:] for one in drawn) / 2000 > 0.9
    assert all(one[2] != one[5] for one in drawn)
    # recorded: a seed means the same prompt in every version of Python
    assert drawn[:4] == ["b a, c", "b a, b", "b a, c", "a a, c"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a {b|c", r"a { without its } (\{ stands for itself): character 3, at the ^: 'a ^{b|c'"),
        ("a b} c", r"a } without its { (\} stands for itself): character 4, at the ^: 'a b^} c'"),
        ("{[a}]}", "a } without its {"),
        ("x" * 99 + "{" + "y" * 99, "character 100, at the ^: '…" + "x" * 30 + "^{" + "y" * 29 + "…'"),
        ("a\n{", r"'a\n^{'"),
        ("{" * 60 + "}" * 60, "more than 50 braces within each other: character 51"),
        ("${x=a}", "${…} is a variable"),
        ("{3-2$$a|b|c}", "3-2$$: the first number is above the second: character 1"),
        ("{0::a}", "all options have the weight 0: character 1"),
        ("{much::a|b}", "the weight 'much' is no number from 0 on: character 2, at the ^: '{^much::a|b}'"),
        ("{a|-1::b}", "the weight '-1' is no number from 0 on: character 4"),
        ("{500$$" + "|" * 500 + "}", "500 options at once, 100 are the most"),
        ("{90$$" + f"{'x' * 300}|" * 100 + "}", "can become longer than 20,000 characters"),
        ("a __b__", "__b__ is a wildcard, and there are none without wildcards DIR: character 3"),
    ],
)
def test_malformed_templates(text: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        Wildcards().template(text)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "a __colour__",
            "no wildcard file colour.txt in {folder}; the nearest are colours, warm/colours: character 3",
        ),
        ("__warm/color__", "the nearest are warm/colours"),
        ("__thing__", "the nearest are things"),
        ("__zzz__", "there are colours, things, warm/colours: character 1"),
        ("__z*__", "no wildcard file z*.txt"),
        ("__warm/../colours__", "no wildcard file warm/../colours.txt"),
        ("__*a*a*a*a*__", "more than 4 stars"),
    ],
)
def test_unknown_wildcards(folder: Path, text: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        Wildcards(folder).template(text)
    assert words.format(folder=folder) in str(error.value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a": "__b__", "b": "x\n__c__", "c": "__a__"}, "circular wildcards in {folder}: a -> b -> c -> a"),
        ({"a": "__a__"}, "a -> a"),
        ({"a": "x\n__**__"}, "circular wildcards in {folder}: a -> a"),
        ({"a": "x\n{y"}, "{folder}/a.txt, line 2: a {{ without its }}"),
        ({"a": "__b__", "b": "\n__bb__"}, "{folder}/b.txt, line 2: no wildcard file bb.txt in {folder}; the"),
        ({"a": "x::y"}, "{folder}/a.txt, line 1: the weight 'x' is no number"),
        ({"a": "# x\n\n"}, "the wildcard file {folder}/a.txt has no line to choose from"),
        ({"a": ""}, "has no line to choose from"),
        (
            {"a": b"x\ncaf\xe9"},
            "the wildcard file {folder}/a.txt is no UTF-8 text: line 2 holds the byte 0xe9",
        ),
        ({"a": "x".encode("utf-16")}, "line 1 holds the byte 0xff"),
        ({"a": b"x\0"}, "line 1 holds the byte 0x00"),
        ({}, "wildcards {folder}: no .txt file in it"),
        # each file doubles the length of the one before
        ({str(i): "__{0}____{0}__".format(i + 1) for i in range(30)} | {"a": "__0__", "30": "x"}, "longer"),
        ({str(i): f"__{i + 1}__" for i in range(200)} | {"a": "__0__", "200": "x"}, "more than 50"),
    ],
)
def test_broken_files(tmp_path: Path, files: dict[str, str | bytes], words: str) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    for name, data in files.items():
        (folder / f"{name}.txt").write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(InputError) as error:
        Wildcards(folder).template("__a__")
    assert words.format(folder=folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"wildcards .*/none: the folder is not there"):
        Wildcards(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file; give a folder"):
        Wildcards(tmp_path / "file")


PIECES = st.sampled_from(
    [
        *(
            "{",
            "}",
            "|",
            "[",
            "]",
            "__",
            "_",
            "$$",
            "2$$",
            "1-3$$",
            "-$$",
            "0.5::",
            "x::",
            "\\",
            "${",
            "a",
            " ",
        ),
        *(
            "__a__",
            "__b__",
            "__d/c__",
            "__*__",
            "__**__",
            "{a|b}",
            "{2$$, $$a|b}",
            "#",
            "\n",
            "é",
            "\0",
            "\ud800",
        ),
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=3), max_size=14).map("".join)


@settings(max_examples=300, deadline=None)
@given(prompt=TEXTS, a=TEXTS, b=TEXTS, c=TEXTS | st.binary(max_size=9))
@example(prompt="__a__", a="__b____b__" * 9, b="__d/c__{2$$__d/c__}" * 9, c="{|}" * 99)
@example(prompt="__" * 5000 + "{[" * 5000, a="__ a" * 2000, b="[|" * 5000, c=b"")
def test_no_template_runs_away(tmp_path_factory, prompt, a, b, c) -> None:
    """It is refused, or whatever it becomes has its size and is among all combinations."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "d").mkdir()
    for name, data in (("a", a), ("b", b), ("d/c", c)):
        path = folder / f"{name}.txt"
        path.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
    try:
        template = Wildcards(folder).template(prompt)
    except InputError:
        return
    drawn = [template.draw(Random(seed)) for seed in range(5)]
    assert drawn[0] == template.draw(Random(0))
    assert all(len(one) <= max(MAX_SIZE, len(prompt)) for one in drawn)
    if template.count <= 500:
        found = template.all()
        assert 1 <= len(found) <= template.count
        assert set(drawn) <= set(found)
