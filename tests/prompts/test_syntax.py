"""The prompt language: tables made by hand from the web UI's documentation and its published examples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.errors import FieldError
from ldm.pipeline import ImageRequest
from ldm.prompts.syntax import (
    PromptError,
    changes,
    check,
    composed,
    parse,
    schedule,
    switching,
    text_at,
    weighted,
)

WEIGHTS = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
    "": [("", 1.0)],
    "[a]": [("a", 1 / 1.1)],
    "((a))": [("a", 1.1 * 1.1)],
    "(a:1.0) cat": [("a cat", 1.0)],
    "(a cat : 1.2 )": [("a cat ", 1.2)],
    "(a:-0.5)": [("a", -0.5)],
    "(a:b:1.2)": [("a:b", 1.2)],
    "closed) twice]": [("closed) twice]", 1.0)],
    "9:16": [("9:16", 1.0)],
    ":1.2)": [(":1.2)", 1.0)],
    r"a\\b": [(r"a\b", 1.0)],
    r"(16\:9)": [("16:9", 1.1)],
    r"(a (b:1.5):2)": [("a ", 2.0), ("b", 3.0)],
}


@pytest.mark.parametrize("text", WEIGHTS)
def test_weights(text: str) -> None:
    assert weighted(text) == (tuple(WEIGHTS[text]),)


@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("a BREAK b", [[("a", 1.0)], [("b", 1.0)]]),
        ("a\nBREAK\nb BREAK c", [[("a", 1.0)], [("b", 1.0)], [("c", 1.0)]]),
        ("(a BREAK b:1.2)", [[("a", 1.2)], [("b", 1.2)]]),
        ("BREAK b", [[("", 1.0)], [("b", 1.0)]]),
        ("a BREAK", [[("a", 1.0)], [("", 1.0)]]),
        ("BREAKFAST break", [[("BREAKFAST break", 1.0)]]),
    ],
)
def test_break(text: str, sections: list) -> None:
    assert [list(section) for section in weighted(text)] == sections


TEN = {  # over 10 steps
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a|(b:1.1)]": [(k, "(b:1.1)" if k % 2 == 0 else "a") for k in range(1, 11)],
    "[fe|]male": [(k, "male" if k % 2 == 0 else "female") for k in range(1, 11)],
    "[fe|||]male": [(k, "female" if k % 4 == 1 else "male") for k in range(1, 11)],
    "a [b::4]": [(4, "a b"), (10, "a ")],
    "[a:b:1.0]": [(10, "a")],
    "[a:b:0]": [(10, "b")],
    "[a:b:99]": [(10, "a")],
    "[a:b:-1]": [(10, "b")],
    "[a:b:1e999]": [(10, "a")],
    r"\[a:b:3\]": [(10, r"\[a:b:3\]")],
    "a | b": [(10, "a | b")],
}


@pytest.mark.parametrize("text", TEN)
def test_schedules(text: str) -> None:
    assert schedule(text, 10) == tuple(TEN[text])
    for last, expected in TEN[text]:
        assert text_at(parse(text).items, last, 10) == expected


def test_the_schedule_of_the_web_uis_documentation() -> None:
    text = (
        "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75]"
        "[ in foreground::0.6][ in background:0.25] [shoddy:masterful:0.5]"
    )
    begin = "fantasy landscape with a"
    assert schedule(text, 100) == (
        (25, f"{begin} mountain and an oak in foreground shoddy"),
        (50, f"{begin} lake and an oak in foreground in background shoddy"),
        (60, f"{begin} lake and an oak in foreground in background masterful"),
        (75, f"{begin} lake and an oak in background masterful"),
        (100, f"{begin} lake and a christmas tree in background masterful"),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a [b:.5] c", [(10, "a b c")]),
        ("a [b:1.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [b:7] c", [(10, "a b c")]),
    ],
)
def test_in_a_second_pass_shares_go_on_from_1(text: str, expected: list) -> None:
    assert schedule(text, 10, second=True) == tuple(expected)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a cat AND a dog", [("a cat", 1.0), (" a dog", 1.0)]),
        ("a cat :1.2 AND a dog:0.5 AND c : -2. ", [("a cat", 1.2), (" a dog", 0.5), (" c", -2.0)]),
        ("a AND AND b", [("a", 1.0), ("", 1.0), (" b", 1.0)]),
        ("SAND and hAND", [("SAND and hAND", 1.0)]),
        ("(a:1.2) AND b", [("(a:1.2)", 1.0), (" b", 1.0)]),
        (r"ratio 16\:9", [(r"ratio 16\:9", 1.0)]),
    ],
)
def test_composition(text: str, parts: list) -> None:
    assert composed(text) == tuple(parts)


@pytest.mark.parametrize(
    ("text", "shown", "why"),
    [
        ("a (cat:x) on", "'a (cat:^x) on'", "a weight such as 1.2 is expected"),
        ("(a:)", "'(a:^)'", "a weight"),
        ("(a:1.2.3)", "'(a:^1.2.3)'", "the weight 1.2.3 is no number"),
        ("(a:99999)", "'(^a:99999)'", "beyond 10,000"),
        ("[a:b]", "'[a:^b]'", "a step, or a share"),
        ("[a:b:c:3]", "'[a:b:c^:3]'", "two colons"),
        ("[a|b:3]", "'[a|b^:3]'", "do not mix"),
        ("a | b [c:3]", "'a ^| b [c:3]'", "a bar outside"),
        ("b [c:3] \\", r"'b [c:3] ^\\'", "a backslash"),
        ("a [(b:x):(c:y):3]", "'a (b:^x)'", "a weight"),
        ("[a|[b|(c:y)]]", "'(c:^y)'", "a weight"),
    ],
)
def test_a_mistake_is_shown_with_its_place(text: str, shown: str, why: str) -> None:
    with pytest.raises(PromptError) as caught:
        check(text)
    assert shown in str(caught.value)
    assert why in str(caught.value)
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(FieldError, match=rf"^{name}: (character \d+, )?at the \^"):
            ImageRequest(prompt_syntax="a1111", **{name: text})
    assert ImageRequest(text).texts(1, 1).parts == ((text, 1.0),)  # without the language it is a text


@pytest.mark.parametrize(
    "text", ["(a", "a)", "[a", "a]]", "((a]", "[(a])", "a:b", "::", "|", "[]", "()", "a\\"]
)
def test_what_the_web_ui_forgives_is_no_mistake(text: str) -> None:
    check(text)


def test_texts_of_a_request() -> None:
    assert [changes(text) for text in ("[a|b]", "[a:b:3]", "[a]", "a")] == [True, True, False, False]
    request = ImageRequest(
        "a [cat:dog:0.5] AND <lora:x:0.5> b:2", negative_prompt="[c|d] AND e", prompt_syntax="a1111", steps=4
    )
    assert request.parts == 2
    assert [text.parts[0] for text in (request.texts(k, 4) for k in (1, 2, 3, 4))] == [
        ("a cat", 1.0),
        ("a cat", 1.0),
        ("a dog", 1.0),
        ("a dog", 1.0),
    ]
    assert request.texts(1, 4).parts[1][1] == 2.0
    assert "lora" not in request.texts(1, 4).parts[1][0]
    assert request.texts(2, 4).negative == "d AND e"  # as in the web UI AND is a word there
    assert len(request.all_texts()) == 4
    assert ImageRequest("a cat", prompt_syntax="a1111").parts == 0
    assert ImageRequest("a cat:1.5", prompt_syntax="a1111").parts == 1


MARKS = st.text(alphabet="ab 13.:|()[]\\\n", max_size=40) | st.lists(
    st.sampled_from(
        ["[", "]", "(", ")", ":", "|", "a", " ", "0.5", "3", "BREAK", " AND ", "[a:b:2]", "[a|b]", "\\"]
    ),
    max_size=30,
).map("".join)


@given(MARKS)
def test_any_text_is_read_or_refused(text: str) -> None:
    """No traceback; what is read at any step is made of the text's own characters."""
    try:
        check(text)
    except PromptError as error:
        lines = str(error).splitlines()
        assert len(lines) == 1
        return
    for part, weight in composed(text):
        assert abs(weight) <= 1e4
        for _, reading in schedule(part, 7):
            assert set(reading) <= set(text)
            try:
                sections = weighted(reading)
            except PromptError:  # of alternatives that are fine by themselves
                continue
            assert all(section for section in sections)


@given(st.text(alphabet="abc ,.;-'\"", max_size=60))
def test_a_text_without_marks_is_itself(text: str) -> None:
    assert weighted(text) == (((text, 1.0),),)
    assert schedule(text, 3) == ((3, text),)


def test_a_thousand_brackets() -> None:
    nested = "[" * 1000 + "a" + ":3]" * 1000
    assert schedule(nested, 5) == ((3, ""), (5, "a"))
    assert weighted("(" * 90 + "a" + ")" * 90)[0][0][1] == pytest.approx(1.1**90)


@pytest.mark.parametrize(
    ("prompt", "place"),
    [
        ("a (b:x)", "character 6, at"),
        ("a (b:x) AND c", "character 6, at"),
        ("a (b:x) <lora:c:1>", "character 6, at"),
        ("c AND a (b:x)", "prompt: at"),
        ("<lora:c:1> a (b:x)", "prompt: at"),
        ("[c:(b:x):3]", "prompt: at"),
    ],
)
def test_characters_are_counted_in_the_whole_prompt_or_not_at_all(prompt: str, place: str) -> None:
    """The number was that of the part behind an AND, and of the prompt without its LoRA tags."""
    with pytest.raises(FieldError, match=r"\(b:\^x\)") as caught:
        ImageRequest(prompt, prompt_syntax="a1111")
    assert place in str(caught.value)


def test_when_texts_switch() -> None:
    assert switching(("a", "[b:c:9]"), 4) == ()
    assert switching(("[a:b:2]", "[c:d:0.5]"), 4) == switching(("[e::2]",), 4) == ((2, 0), (4, 1))
    assert switching(("[a:b:1]", "[c:d:3]"), 4) == ((1, 0), (3, 1), (4, 2))
    assert switching(("[a|b]",), 4) == ((1, 0), (2, 1), (3, 0), (4, 1))
    assert switching(("[a|a|b]",), 4) == ((2, 0), (3, 1), (4, 0))
    assert switching(("[a:b:0.5]",), 4, second=True) == ()
    assert switching(("[a:b:1.5]",), 4, second=True) == ((2, 0), (4, 1))


@pytest.mark.parametrize(
    ("text", "steps", "second", "last"),
    [
        ("[a:b:0.58]", 50, False, 29),
        ("[a:b:0.29]", 100, False, 29),
        ("[a:b:1.4]", 10, True, 4),
        ("[a:b:0.59]", 49, False, 28),
    ],
)
def test_floats_make_no_step_earlier(text: str, steps: int, second: bool, last: int) -> None:
    """0.58 x 50 was 28.999999 and so 28, where --strength 0.58 of 50 steps runs 29."""
    assert schedule(text, steps, second) == ((last, "a"), (steps, "b"))
