import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import SCRIPTS, lines, script

from ldm.cli import entry
from ldm.service.server import listen


@contextmanager
def started(*argv: object) -> Iterator[tuple[subprocess.Popen, int]]:
    """A process of serve.py that serves, and its port."""
    command = [sys.executable, SCRIPTS / "serve.py", "--port", 0, "--safety", "off", *argv]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    try:
        seen = []
        for line in process.stderr:
            seen.append(line)
            if found := re.search(r"serving .* on http://127\.0\.0\.1:(\d+)", line):
                yield process, int(found[1])
                return
        raise AssertionError("".join(seen))
    finally:
        process.kill()
        process.wait()


def ask(port: int, method: str, path: str, **values: object) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request(method, path, json.dumps(values) if values else None)
    return connection.getresponse()


def test_a_signal_lets_jobs_finish_and_refuses_new_ones(model: tuple[Path, Path], tmp_path: Path) -> None:
    config, weights = model
    log = tmp_path / "log.jsonl"
    given = ("--model", f"tiny={weights},{config}", "--log_file", log, "--max_steps", 400, "--drain", 600)
    with started(*given, "--device", "cpu") as (process, port):
        assert json.load(ask(port, "GET", "/models"))["models"][0]["name"] == "tiny"
        job = json.load(ask(port, "POST", "/generate", prompt="a", steps=200, wait=False))
        events = ask(port, "GET", f"/jobs/{job['id']}/events")
        process.send_signal(signal.SIGTERM)
        while ask(port, "GET", "/ready").status == 200:
            pass
        refused = ask(port, "POST", "/generate", prompt="a", steps=1)
        assert refused.status == 503
        assert json.load(refused)["error"]["code"] == "draining"
        assert '"state": "finished"' in events.read().decode().rstrip().splitlines()[-1]
        assert process.wait(600) == 0
        rest = process.stderr.read()
    assert "Traceback" not in rest
    assert "SIGTERM: jobs may finish within 600 s" in rest
    assert json.loads(log.read_text().splitlines()[-1])["event"] in ("drained", "request")


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line with which a command ends, its exit code being 2."""
    words = [str(SCRIPTS / "serve.py"), *map(str, argv)]
    monkeypatch.setattr(sys, "argv", words)
    try:
        code = entry.run(script("serve").main)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    (line,) = lines(err)
    assert (code, out) == (2, "")
    assert line.startswith("serve.py: error: ")
    return line


def test_what_cannot_be_served_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def check(words: str, *argv: object) -> None:
        assert words in refused(monkeypatch, capsys, *argv)

    empty = tmp_path / "tokens"
    empty.touch()
    check("--host 0.0.0.0 can be reached from other machines: give --token_file", "--host", "0.0.0.0")
    check("argument --port: 99999", "--port", 99999)
    check("--model 'tiny': give NAME=CKPT[,CONFIG]", "--port", 0, "--model", "tiny")
    check("no-such-file.ckpt", "--port", 0, "--model", "tiny=no-such-file.ckpt")
    check("--token_file", "--port", 0, "--token_file", empty)
    check("--log_file", "--port", 0, "--log_file", tmp_path / "none" / "log")
    check("--moderate", "--port", 0, "--moderate", "no_such_module:check")
    for option in ("--lora_folder", "--embedding_folder", "--control_folder"):
        check(f"{option} /no/such is no folder", "--port", 0, option, "/no/such")
    with listen("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        check(f"--port {port}: Address already in use", "--port", port)


def test_a_missing_package_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "find_spec", lambda name: None)
    line = refused(monkeypatch, capsys, "--port", 0)
    assert 'pip install -e ".[service]"' in line
    assert "uvicorn" in line


def test_help_needs_neither_torch_nor_the_web_packages() -> None:
    code = (
        "import sys; sys.argv = ['serve.py', '--help']; import runpy\n"
        "try: runpy.run_path(PATH, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'fastapi', 'uvicorn', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    ).replace("PATH", repr(str(SCRIPTS / "serve.py")))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "--token_file" in result.stdout
