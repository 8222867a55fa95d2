"""The command of the page; what the page does is tested in tests/webui."""

import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from commands import SCRIPTS, script
from live_page import page

from ldm.cli import entry

pytest.importorskip("gradio")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--host", "0.0.0.0"], ["--host 0.0.0.0 can be reached from other machines", "--auth_file"]),
        (["--port", "70000"], ["--port", "70000 is not a whole number in range"]),
        (["--auth_file", "missing.txt"], ["--auth_file missing.txt: No such file"]),
        (["--model", "sd"], ["--model 'sd': give NAME=CKPT[,CONFIG]"]),
        (["--model", "a=missing.ckpt"], ["missing.ckpt"]),
        (["--lora_folder", "missing"], ["--lora_folder missing is no folder"]),
        (["--sign", "cert.pem", "key.pem"], ["--sign cert.pem", "No such file"]),
        (["--drain", "1"], ["unrecognized arguments: --drain"]),
        (["--moderate_severity", "1"], ["unrecognized arguments: --moderate_severity"]),
        (["--max_images", "0"], ["--max_images", "0 is not a whole number in range"]),
        (["--token_file", "x"], ["unrecognized arguments: --token_file"]),
        (["--share"], ["unrecognized arguments: --share"]),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["webui.py", *argv])
    assert entry.run(script("webui").main) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    for word in words:
        assert word in err


def test_a_missing_package_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without gradio the command said only that there was no module named starlette."""
    monkeypatch.setattr(entry, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["webui.py"])
    assert entry.run(script("webui").main) == 2
    err = capsys.readouterr().err.strip()
    assert err.endswith('gradio, fastapi, uvicorn, prometheus_client missing: pip install -e ".[webui]"')


def test_help_speaks_of_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Its options stood under "sampling", in the words of a service for programs."""
    with pytest.raises(SystemExit):
        script("webui").main(["--help"])
    out = capsys.readouterr().out
    page = out.partition("\npage:\n")[2].partition("\n\n")[0]
    for option in ("--host", "--port", "--auth_file", "--queue_size", "--max_images", "--sign"):
        assert f"  {option} " in page
    assert "429" not in out
    assert "client" not in out
    assert "(256)" in page


def test_help_needs_neither_torch_nor_gradio() -> None:
    path = str(SCRIPTS / "webui.py")
    code = (
        "import runpy, sys\n"
        "sys.argv = ['webui.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({path!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    print('loaded:', sorted({'torch', 'gradio', 'uvicorn', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--auth_file" in ended.stdout
    assert "loaded: []" in ended.stdout


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_the_page_is_served_until_it_is_asked_to_end(
    model: tuple[Path, Path], tmp_path: Path, asked: signal.Signals
) -> None:
    """With a tab open the terminal had a traceback of the stream that keeps its session."""
    with page(model, tmp_path) as (process, address):
        with urllib.request.urlopen(address) as answer:
            assert answer.status == 200
        with socket.socket() as other:
            assert other.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) == 0
        assert list(tmp_path.glob("page-*"))
        with urllib.request.urlopen(f"{address}/gradio_api/heartbeat/one") as tab:
            assert tab.readline() == b"data: ALIVE\n"
            process.send_signal(asked)
            out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("", "", 0)
    assert not list(tmp_path.glob("page-*"))  # with all that was uploaded and made
