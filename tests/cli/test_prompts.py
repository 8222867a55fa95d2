"""Prompt files: plain lines and JSON lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_lines import json_lines

from ldm.cli.prompts import read_prompts
from ldm.errors import InputError

ROOT = Path(__file__).parents[2]


def read(tmp_path: Path, data: bytes) -> list[str]:
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    return [line.prompt for line in read_prompts(str(path))]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False], ids=["last line ended", "last line open"])
def test_line_ends_of_every_system(tmp_path, end, last):
    assert read(tmp_path, ("a cat" + end + "a dog" + end * last).encode()) == ["a cat", "a dog"]


def test_byte_order_marks_are_no_part_of_a_prompt(tmp_path):
    """Also in the middle, where `cat a.txt b.txt` leaves one."""
    assert read(tmp_path, "\ufeffa cat\r\n\ufeffa dog\r\n\ufeff\r\n".encode()) == ["a cat", "a dog"]


def test_blank_lines_are_skipped(tmp_path):
    """The original made an image of the empty prompt for each."""
    assert read(tmp_path, b"\na cat\n\n  \t\na dog\n\n") == ["a cat", "a dog"]


def test_lines_stay_as_they_are(tmp_path):
    assert read(tmp_path, b'  a  "cat", 8k # really\t\n') == ['  a  "cat", 8k # really\t']


def test_utf8_in_any_locale(tmp_path):
    """The original decoded the file in the encoding of the user's locale: garbage or a crash beyond ASCII."""
    path = tmp_path / "prompts.txt"
    path.write_text("café 夜 🎸\n", encoding="utf-8")
    read = "from ldm.cli.prompts import read_prompts"
    script = f"import sys; {read}; print(ascii(read_prompts(sys.argv[1])[0].prompt))"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", script, path], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == ascii("café 夜 🎸")


@pytest.mark.parametrize(
    ("data", "line", "byte"),
    [
        (b"a cat\r\ncaf\xe9\r\n", 2, "0xe9"),
        (b"\xef\xbb\xbfa cat\n\n\ncaf\xe9", 4, "0xe9"),
        ("a cat\n".encode("utf-16"), 1, "0xff"),
        ("a cat\na dog\n".encode("utf-16-be"), 1, "0x00"),
        (b"a cat\n\0\n", 2, "0x00"),
        (b"PK\x03\x04\0\0", 1, "0x00"),
    ],
)
def test_other_encodings_and_binary_files_are_refused(tmp_path, data, line, byte):
    with pytest.raises(InputError, match=rf"prompts\.txt: line {line} holds the byte {byte}, .* UTF-8"):
        read(tmp_path, data)


@pytest.mark.parametrize("data", [b"", b"\n\r\n  \n", b"\xef\xbb\xbf"])
def test_a_file_without_prompts_is_refused(tmp_path, data):
    with pytest.raises(InputError, match=r"prompts\.txt: no prompt in it"):
        read(tmp_path, data)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"--from-file .*nowhere\.txt: No such file"):
        read_prompts(str(tmp_path / "nowhere.txt"))
    with pytest.raises(InputError, match=r"--from-file .*: Is a directory"):
        read_prompts(str(tmp_path))


def test_json_lines(tmp_path):
    (tmp_path / "p.txt").write_text(
        '{"prompt": "a cat", "seed": 7, "sampler": "Euler a"}\n\n{"prompt": "{}"}\n'
    )
    first, second = read_prompts(str(tmp_path / "p.txt"))
    assert (first.prompt, dict(first.options)) == ("a cat", {"seed": 7, "sampler": "Euler a"})
    assert (second.prompt, second.options) == ("{}", ())
    assert second.place.endswith("p.txt, line 3")


def test_switches_and_lists(tmp_path):
    """A switch could not be given at all, and a list only as text."""
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a", "zero_snr": true, "timesteps": [900, 400.5]}\n{"prompt": "b", "sigmas": [3, 0]}\n'
    )
    first, second = read_prompts(str(tmp_path / "p.jsonl"))
    assert dict(first.options) == {"zero_snr": True, "timesteps": (900, 400.5)}
    assert dict(second.options) == {"sigmas": (3, 0)}


def test_json_text_with_unicode_line_ends(tmp_path):
    """Half a line was no JSON: an error, or in a file without .jsonl a prompt of half a JSON object."""
    prompts = ["a\u2028cat", "a\x85dog\u2029"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    assert read(tmp_path, "\r\n".join(lines).encode()) == prompts


def test_a_json_file_is_no_list_of_prompts(tmp_path):
    """Each line of a file of JSON that has several was taken for a prompt."""
    (tmp_path / "p.json").write_text('[\n  {"prompt": "a cat"},\n  {"prompt": "a dog"}\n]\n')
    with pytest.raises(InputError, match=r"p\.json, line 1: no JSON object such as"):
        read_prompts(str(tmp_path / "p.json"))


def test_prompts_that_begin_with_a_brace_are_prompts(tmp_path):
    assert read(tmp_path, b"{a cat|a dog}\n[1, 2]\n7\n") == ["{a cat|a dog}", "[1, 2]", "7"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a cat", "no JSON object such as"),
        ('{"prompt": "a cat"', "no JSON object"),
        ('{"seed": 7}', 'its "prompt" is missing'),
        ('{"prompt": 7}', 'its "prompt" is missing or no text'),
        ('{"prompt": "a", "seed": null}', "the seed null is no number or text"),
        ('{"prompt": "a", "seed": true}', "the seed true is no number"),
        ('{"prompt": "a", "steps": [1]}', "the steps [1] is no number"),
        ('{"prompt": "a", "timesteps": [1, true]}', "the timesteps [1, true] is no number"),
        ('{"prompt": "a", "sigmas": [[1]]}', "the sigmas [[1]] is no number"),
        ('{"prompt": "a", "timesteps": true}', "the timesteps true is no number"),
        ('{"prompt": "a", "zero_snr": [true]}', "the zero_snr [true] is no number"),
        ('{"prompt": "a", "zero_snr": null}', "the zero_snr null is no number"),
        ("[" * 100_000, "no JSON object"),
        ('{"prompt": "a", "seed": 1, "seed": 2}', "it has seed more than once"),
        ('{"prompt": "a", "prompt": "b"}', "it has prompt more than once"),
        ('{"prompt": "a", "a\\nb": 1, "a\\nb": 1}', "it has a\\nb more than once"),
        ('{"prompt": "a", "a\\nb": []}', "the a\\nb [] is no number"),
        ('{"prompt": "a", "seed": [' + "1, " * 9999 + "1]}", "1, 1, 1 is no number or text"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, line, words):
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "a"}}\n\n{line}\n')
    with pytest.raises(InputError) as error:
        read_prompts(str(tmp_path / "p.jsonl"))
    assert words in str(error.value)
    assert "p.jsonl, line 3" in str(error.value)


def test_an_option_twice_in_the_first_line_is_refused_in_any_file(tmp_path):
    """The last one was taken without a word, whichever was meant."""
    with pytest.raises(InputError, match=r"prompts\.txt, line 1: it has seed more than once; give it once"):
        read(tmp_path, b'{"prompt": "a", "seed": 1, "seed": 1}\n')


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
FUZZED = st.sampled_from(["prompt", "seed", "zero_snr", "timesteps", "a\nb"])


@settings(max_examples=400, deadline=None)
@given(
    data=st.binary(max_size=200)
    | st.text(max_size=200).map(str.encode)
    | json_lines(st.dictionaries(FUZZED | st.text(), JSON, max_size=3)),
    name=st.sampled_from(["p.jsonl", "p.txt"]),
)
def test_any_file_is_prompts_or_one_error(tmp_path_factory, data, name):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(data)
    try:
        lines = read_prompts(str(path))
    except InputError as error:
        message = str(error)
        assert message.startswith(f"--from-file {path}"), message
        assert len(message.splitlines()) == 1
        assert len(message) < len(str(path)) + 300
        return
    assert lines
    for line in lines:
        assert isinstance(line.prompt, str)
        assert hash(line.options) is not None
        assert all(type(value) in (str, int, float, bool, tuple) for _, value in line.options)
