import json
from pathlib import Path

import pytest

from ldm.errors import InputError
from ldm.service.logs import JsonLog


def test_an_event_is_one_line_of_json(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonLog(str(path))
    log.write("request", status=200, seconds=0.1234567, client=None, sizes=(1, 2))
    log.write("end")
    first, second = map(json.loads, path.read_text().splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {"event": "request", "status": 200, "seconds": 0.123457, "sizes": [1, 2]}
    assert second["event"] == "end"


@pytest.mark.parametrize("text", ["a\nb", 'x"}\r\n{"event": "forged"}', "\u2028\u2029\x85\x0b", "\x1b[2J"])
def test_what_clients_write_begins_no_line_and_moves_no_cursor(tmp_path: Path, text: str) -> None:
    path = tmp_path / "log.jsonl"
    JsonLog(str(path)).write("request", path=text)
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["path"] == text
    assert line.isascii()
    assert line.isprintable()


def test_long_texts_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    JsonLog(str(path)).write("request", path="x" * 1_000_000)
    assert path.stat().st_size < 4000


def test_prompts_are_left_out_unless_asked_for() -> None:
    assert JsonLog().texts(["secret"]) is None
    assert JsonLog(prompts=True).texts(["secret"]) == ["secret"]


def test_without_a_file_the_log_is_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    JsonLog().write("request", status=200)
    assert json.loads(capsys.readouterr().err)["status"] == 200


def test_an_existing_log_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for _ in range(2):
        log = JsonLog(str(path))
        log.write("start")
        log.close()
    assert len(path.read_text().splitlines()) == 2


def test_a_log_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--log_file"):
        JsonLog(str(tmp_path / "none" / "log.jsonl"))


def test_a_disk_that_fills_up_later_is_one_line_and_the_service_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = JsonLog(str(tmp_path / "log.jsonl"))
    log.close()
    for _ in range(3):
        log.write("request")
    assert len(caplog.records) == 1
    assert "goes on without its log" in caplog.text
