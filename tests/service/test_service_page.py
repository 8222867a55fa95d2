"""docs/service.md: its lines run as they are written, on the bundled model."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm.cli.parser import serve_parser
from ldm.fields import settings_of
from ldm.service.options import ServiceOptions

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/service.md").read_text()
ADDRESS = "127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def test_commands_are_taken() -> None:
    commands = re.findall(r"^(?:\w+=\S+ )?python scripts/serve\.py(.*)$", PAGE, re.M)
    assert len(commands) >= 4
    for command in commands:
        given = vars(serve_parser().parse_args(shlex.split(command)))
        ServiceOptions(**{name: given[name] for name in settings_of(ServiceOptions) if name in given})


def test_options_that_are_named_exist() -> None:
    known = {flag for action in serve_parser()._actions for flag in action.option_strings}
    named = set(re.findall(r"`(--[a-z_]+)", PAGE)) - {
        "--like",
        "--batch_size",
        "--format",
    }  # the last is podman's
    assert named <= known


def test_figures_that_are_named_exist() -> None:
    source = (ROOT / "ldm/service/metrics.py").read_text()
    counted = (ROOT / "ldm/service/engine.py").read_text()
    for name in re.findall(r"\bsd_\w+", PAGE):
        name = name.removesuffix("_total")
        assert f'"{name}"' in source or f'"{name.removeprefix("sd_")}":' in counted, name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_requests_run_as_they_are_written(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import service

    clients = {name: find_spec(name) is not None for name in ("openai", "webuiapi")}
    shell, python = blocks("bash"), [code for code in blocks("python") if ADDRESS in code or "port=" in code]
    assert (len(shell), len(python)) == (3, 3)

    def run(*command: str, text: str) -> None:
        here = text.replace(ADDRESS, f"127.0.0.1:{server.port}").replace("port=8000", f"port={server.port}")
        env: dict[str, Any] = os.environ | {"NO_PROXY": "*"}
        done = subprocess.run([*command, here], cwd=tmp_path, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr

    with service.serving(tmp_path) as server:
        for text in shell:
            run("bash", "-ec", text=text.replace("curl -s", "curl -sS --fail-with-body"))
        for code in python:
            if all(
                found for name, found in clients.items() if f"import {name}" in code or f"from {name}" in code
            ):
                run(sys.executable, "-c", text=code)
    for path in tmp_path.glob("*.png"):
        Image.open(path).load()
    names = {path.name for path in tmp_path.iterdir()}
    assert {"cube.png", "answers.json", "webui.json"} <= names
    assert len([name for name in names if name.startswith("green-")]) == 2
    for name, found in clients.items():
        assert not found or f"{name}.png" in names


def test_the_function_of_moderation_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    from ldm.service.moderation import Moderation

    (code,) = [code for code in blocks("python") if "def check" in code]
    (tmp_path / "rules_of_the_page.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    hook = Moderation.of(ServiceOptions(moderate="rules_of_the_page:check"))
    assert asyncio.run(hook.check_prompt(["A Knife"])).outcome == "refused"
    assert asyncio.run(hook.check_prompt(["a cube"])).outcome == "allowed"
    assert asyncio.run(hook.check_image(b"")).outcome == "allowed"
