import subprocess
import sys
import unicodedata
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.errors import InputError
from ldm.images.names import FIELDS, INTEGERS, check_template, file_name, unique_names

ROOT = Path(__file__).parents[2]
FACTS = {
    "number": 7,
    "image": 2,
    "seed": 42,
    "prompt": "A red: cube, 日本 हिन्दी",
    "negative_prompt": "",
    "sampler": "dpmpp_2m",
    "steps": 50,
    "scale": 7.5,
    "width": 512,
    "height": 768,
    "strength": None,
    "model": "v1-5.ema",
    "model_hash": "81761151",
}


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{number:05}", "00007"),
        ("{image:03}_{seed}", "002_42"),
        ("{prompt}", "A-red-cube,-日本-हिन्दी"),
        ("{model}/{width}x{height}/{sampler} {steps}, {scale}", "v1-5.ema/512x768/dpmpp_2m 50, 7.5"),
        ("{model_hash}-{strength}-{negative_prompt}", "81761151-none-none"),
        ("[{seed}] it's #1 & only", "[42] it's #1 & only"),
        (" {seed}. / {number} ", "42/7"),
        ("plain", "plain"),
    ],
)
def test_names(template, name):
    check_template(template)
    assert file_name(template, FACTS) == name


@pytest.mark.parametrize("name", ["nul .txt", "CONIN$", "conout$.x", "aux.a.b", "com¹", "lpt9 "])
def test_names_of_devices(name):
    check_template(name)
    assert file_name(name, {}) == f"_{name.strip()}"


def test_every_field_has_a_name():
    for field in FIELDS:
        check_template(f"{{{field}}}")
        assert file_name(f"{{{field}}}", FACTS)
        assert file_name(f"{{{field}}}", {}) == "none"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("", "it is empty"),
        (" ", "it is empty"),
        ("{nubmer}", "'{nubmer}' is no field; there are {number}, {image}, {seed}, {prompt}"),
        ("{}", "'{}' is no field"),
        ("{0}", "'{0}' is no field"),
        ("{ seed }", "'{ seed }' is no field"),
        ("{seed.__class__}", "'{seed.__class__}' is no field"),
        ("{seed[0]}", "'{seed[0]}' is no field"),
        ("{seed!r}", "'{seed!r}' is no field"),
        ("{\n}", "'{\\n}' is no field"),
        ("{seed", "a { without its other half"),
        ("seed}", "a } without its other half"),
        ("{{seed}}", "a { without its other half"),
        ("{seed:{steps}}", "a { without its other half"),
        ("{see/d}", "a { without its other half"),
        ("{seed:5}", "after : stands a width such as 05"),
        ("{seed:}", "after : stands a width such as 05"),
        ("{seed:0100}", "after : stands a width such as 05"),
        ("{seed:0٣}", "after : stands a width such as 05"),
        ("{scale:05}", "of number, image, seed, steps, width, height alone"),
        ("{prompt:05}", "after : stands a width such as 05"),
        ("/tmp/{seed}", "an absolute path"),
        ("C:{seed}", "':' cannot be in file names"),
        ("a\\b", "'\\\\' cannot be in file names"),
        ("a\0", "'\\x00' cannot be in file names"),
        ("a\nb", "'\\n' cannot be in file names"),
        ("a\u202eb", "'\\u202e' cannot be in file names"),
        ("a\ud800", "'\\ud800' cannot be in file names"),
        ("../{seed}", "'..' as a folder or file"),
        ("a/..", "'..' as a folder or file"),
        ("./a", "'.' as a folder or file"),
        ("a//b", "'' as a folder or file"),
        ("a/", "'' as a folder or file"),
        ("a/. /b", "'. ' as a folder or file"),
        (".{seed}", "begins with '.'"),
        ("a/ .b", "begins with '.'"),
        ("~/{seed}", "begins with '~'"),
        ("-{seed}", "begins with '-'"),
        ("{seed}.png", "leave out '.png': --format adds it"),
        ("{seed}.JPEG .", "leave out '.JPEG'"),
        ("a.webp", "leave out '.webp'"),
        ("a" * 101, "more than 100 bytes of its own"),
        ("/".join("a" * 9), "8 folders in each other; 7 are the most"),
    ],
)
def test_bad_templates_are_named(template, words):
    with pytest.raises(InputError) as caught:
        check_template(template)
    message = str(caught.value)
    assert message.startswith(f"--filename {template!r}: ")
    assert words in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("../../etc/passwd", "etc_passwd"),
        ("C:\\Windows\\x", "C_Windows_x"),
        ("a\tb \r\n c", "a-b-c"),
        ('<b>"?" *|', "b"),
        ("'quoted', (weights:1.2) + more=5_6", "'quoted',-(weights_1.2)-+-more=5_6"),
        ("--outdir", "outdir"),
        (".hidden ...", "hidden"),
        ("e\u0301\u202etxt.exe", "é_txt.exe"),
        ("\ud83d🎸\0", "none"),
        ("🎸 guitar ❤\ufe0f", "guitar"),
        ("\u3164\u115f", "none"),
        ("con", "_con"),
        ("NUL.tar.gz", "_NUL.tar.gz"),
        ("LPT¹", "_LPT¹"),
        ("COM10", "COM10"),
        ("nul .txt", "nul-.txt"),
        ("conin$", "conin"),
        ("icon.con", "icon.con"),
        ("  ", "none"),
    ],
)
def test_text_is_made_fit_for_a_name(text, name):
    assert file_name("{prompt}", {"prompt": text}) == name


@pytest.mark.parametrize("word", ["cube ", "日本", "हिन्दी "])
def test_a_long_prompt_is_cut_and_the_numbers_stay(word):
    facts = {"prompt": word * 3000, "negative_prompt": "blue", "seed": 2**63 - 1, "number": 3}
    name = file_name("{number:05}-{prompt}-{negative_prompt}-{seed}", facts)
    assert name.startswith(f"00003-{word.strip()}")
    assert name.endswith(f"-blue-{2**63 - 1}")
    assert 190 < len(name.encode()) <= 200
    facts["negative_prompt"] = facts["prompt"]
    start, *_, seed = file_name("{prompt}+{negative_prompt}+{seed}", facts).split("+")
    assert 80 < len(start.encode()) < 100
    assert seed == str(2**63 - 1)


def test_more_zeros_than_a_name_holds():
    assert len(file_name("{seed:099}" * 3, FACTS)) <= 200


def test_values_that_no_run_has():
    """Python raises ValueError for the decimal digits of a very large number."""
    for value in (10**5000, -(10**5000), [1], {"a": 1}, b"x", object()):
        assert file_name("{seed}-{seed:05}-{prompt}", {"seed": value, "prompt": value}) == "none-none-none"


def test_unique_names():
    assert unique_names(["a", "b", "a", "a"]) == ["a", "b", "a-2", "a-3"]
    assert unique_names(["a", "a", "a-2", "a"]) == ["a", "a-2", "a-2-2", "a-3"]
    assert unique_names(["a-2", "a", "a"]) == ["a-2", "a", "a-3"]
    assert unique_names(["Straße", "STRASSE", "e\u0301", "É"]) == ["Straße", "STRASSE-2", "e\u0301", "É-2"]
    assert unique_names([]) == []


def test_unique_names_of_many_alike():
    """Counting from 2 for each would take minutes."""
    names = unique_names(["a"] * 100_000)
    assert names[-1] == "a-100000"


def test_imports_neither_torch_nor_numpy():
    script = "import sys, ldm.images.names; assert not {'torch', 'numpy', 'pathvalidate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


ANY_TEXT = st.text(st.characters(), max_size=60)  # lone surrogates, too
NASTY = st.sampled_from(["..", "/", "\\", "\0", "CON", " ", ".", "~", "-", "\u202e", "a" * 300, "日" * 300])
TEXT = ANY_TEXT | st.lists(NASTY | ANY_TEXT, max_size=5).map("".join)
VALUE = TEXT | st.integers() | st.floats() | st.none() | st.booleans()
PIECES = st.sampled_from(
    [f"{{{field}}}" for field in FIELDS] + [f"{{{field}:05}}" for field in INTEGERS] + ["/", "-", ".", " "]
)
TEMPLATE = st.lists(PIECES | st.text(max_size=5), min_size=1, max_size=8).map("".join)


def refusal(template: str) -> str:
    """The message of check_template, empty if the template is fine."""
    try:
        check_template(template)
    except InputError as error:
        return str(error)
    return ""


@settings(max_examples=400, deadline=None)
@given(template=TEMPLATE | TEXT, facts=st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, VALUE)))
def test_any_facts_make_a_file_inside_the_folder(tmp_path_factory, template, facts):
    if message := refusal(template):
        assert len(message.splitlines()) == 1
        return
    name = file_name(template, facts)
    assert name == file_name(template, facts)
    assert name == unicodedata.normalize("NFC", name)
    assert not PurePosixPath(name).is_absolute()
    assert not PureWindowsPath(name).anchor
    parts = name.split("/")
    assert len(parts) == template.count("/") + 1
    for part in parts:
        assert 0 < len(part.encode()) <= 200
        assert part == part.strip(" .")
        assert part.isprintable()
        assert not set(part) & set('<>:"\\|?*')
        assert not PureWindowsPath(part).is_reserved()
    folder = tmp_path_factory.mktemp("names")
    path = folder / f"{name}-12345.webp"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(exist_ok=False)
    assert path.resolve().is_relative_to(folder.resolve())
    assert [found for found in folder.rglob("*") if found.is_file()] == [path]


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_any_text_keeps_the_seed(text):
    assert file_name("{prompt}-{seed}", {"prompt": text, "seed": 2**63 - 1}).endswith(f"-{2**63 - 1}")


@settings(max_examples=300, deadline=None)
@given(names=st.lists(st.sampled_from(["a", "A", "a-2", "A-2-2", "a-3", "ß", "SS"]) | st.text(max_size=3)))
def test_unique_names_are_unique(names):
    unique = unique_names(names)
    assert len(unique) == len({name.casefold() for name in unique}) == len(names)
    assert unique == [*unique_names(names[:-1]), *unique[-1:]]
    assert all(new == old or new.startswith(f"{old}-") for new, old in zip(unique, names, strict=True))
