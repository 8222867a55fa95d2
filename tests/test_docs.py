"""The README and docs/: links lead somewhere, commands are taken by their programs, tables are the code's."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Result, script

from ldm.cli.arguments import parse
from ldm.cli.tables import COMMANDS, options_page
from ldm.fields import listed_by_name
from ldm.pipeline.request import ImageRequest
from ldm.sampling.catalogue import SAMPLERS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {f"{name}.py": parser for name, parser in COMMANDS.items()}


def commands(page: Path) -> list[str]:
    """What a page shows to be typed: lines of code blocks and code in the text that start a script."""
    text = page.read_text().replace("\\\n", " ")
    found = re.findall(r"^(python (?:scripts|benchmarks)/.+)$", text, re.M)
    found += [" ".join(code.split()) for code in re.findall(r"`(python (?:scripts|benchmarks)/[^`]+)`", text)]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_taken(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of every command is one that its program has, with a value that it takes."""
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        _, path, *argv = shlex.split(command)
        assert (ROOT / path).exists(), command
        name = Path(path).name
        if "--help" in argv or "--list_samplers" in argv or any("outputs/" in word for word in argv[1:2]):
            continue  # ends at once, or needs the files of a command before it
        argv = [word.replace("outputs/small/samples/00000.png", "assets/init.png") for word in argv]
        if name in PARSERS:
            parse(PARSERS[name](), argv).request  # noqa: B018
        elif name == "compare.py":
            script("compare").parse(argv)


def test_prompt_files_are_as_shown(
    command: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page showed images that its command does not draw, and JSON lines that no command took."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/prompt-files.md").read_text()
    argv, lines = re.search(r"^python scripts/txt2img\.py (.+)\n((?:\d.*\n)+)", text, re.M).groups()
    assert command("txt2img", *shlex.split(argv)).out == lines.splitlines()
    files = re.findall(r"`(\w+)\.py --from-file \w+\.jsonl`[^`]*```\n((?:\{.*\}\n)+)```", text)
    assert [name for name, _ in files] == ["txt2img", "inpaint"]
    for name, lines in files:
        (tmp_path / "lines.jsonl").write_text(lines)
        argv = ["--from-file", tmp_path / "lines.jsonl", "--n_iter", 1, "--dry_run"]
        result = command(name, *argv)
        assert (result.code, len(result.out)) == (0, lines.count("\n")), result.err


def test_the_table_of_options_is_the_codes() -> None:
    assert (ROOT / "docs/options.md").read_text() == options_page(), (
        "python -m ldm.cli.tables > docs/options.md"
    )


def test_the_options_of_lines_are_taken() -> None:
    """`init-img` was among them, which is no name in a line."""
    text = options_page().partition("without the dashes: ")[2].partition("\n")[0]
    names = re.findall("`([^`]+)`", text)
    assert {"init_img", "H", "ddim_steps"} <= set(names) <= set(listed_by_name(ImageRequest))


def test_every_option_has_a_row() -> None:
    page = options_page()
    for make in PARSERS.values():
        for action in make()._actions:
            if action.dest != "help":
                assert f"`{action.option_strings[0]}" in page


def test_cells_of_the_tables_are_whole() -> None:
    """`{red|blue}` was three columns, and `__name__` bold."""
    rows = [line for line in options_page().splitlines() if line.startswith("| `")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)
    assert any(r"{red\|blue}" in row for row in rows)
    assert any(r"\_\_name\_\_" in row for row in rows)


def test_options_of_compare_and_walk_have_rows() -> None:
    page = options_page().partition("## `compare.py`")[2]
    for flag in ("--x", "--y", "--z", "--prompts", "--seeds", "--frames", "--loop", "--fps"):
        assert f"| `{flag}" in page


def test_the_page_of_samplers_says_where_the_noise_is() -> None:
    """In the words of --list_samplers."""
    rows = (ROOT / "docs/samplers.md").read_text().splitlines()
    for name, facts in SAMPLERS.items():
        noise = "" if facts.stochastic == "never" else facts.stochastic
        found = next(
            row.split("|")[4].replace("`", "").strip() for row in rows if re.match(rf"\| `{name}`", row)
        )
        assert found == noise, name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
