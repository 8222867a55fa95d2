"""Hashes of checkpoints: those of other tools, and their cache."""

import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ldm.cache import cache_folder
from ldm.errors import InputError
from ldm.weights import hashes
from ldm.weights.hashes import FileHash, file_hash, known_hash, quick_hash, same_model

CONTENT = struct.pack("<I", 7) * 500_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "model.ckpt"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def computed(monkeypatch) -> list:
    """A list that grows by one with every file that is really read."""
    calls, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: calls.append(args) or digest(*args))
    return calls


def test_quick_hash(tmp_path, file):
    """A1111's `Model hash` before 2023: 64 KiB at 1 MiB. A short file would all hash to e3b0c442 there."""
    assert quick_hash(file) == hashlib.sha256(CONTENT[0x100000:0x110000]).hexdigest()[:8]
    (tmp_path / "short").write_bytes(b"abc")
    assert quick_hash(tmp_path / "short") == "ba7816bf"


def test_file_hash_is_computed_once(tmp_path, file, cache, computed):
    (tmp_path / "link").symlink_to(file)
    assert [file_hash(file), file_hash(str(file)), file_hash(tmp_path / "link")] == [SHA256[:10]] * 3
    assert len(computed) == 1
    status = file.stat()
    times = {"mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
    entry = {"size": len(CONTENT), "inode": status.st_ino, **times, "sha256": SHA256}
    assert json.loads(cache.read_text()) == {str(file.resolve()): entry}


@pytest.mark.parametrize("what", ["content", "size", "time"])
def test_a_changed_file_is_hashed_again(file, computed, what):
    file_hash(file)
    content = {"content": CONTENT[:-1] + b"x", "size": CONTENT[:-1], "time": CONTENT}[what]
    file.write_bytes(content)
    os.utime(file, ns=(0, 0 if what != "size" else file.stat().st_mtime_ns))
    assert file_hash(file) == hashlib.sha256(content).hexdigest()[:10]
    assert len(computed) == 2


def test_another_file_of_the_same_size_and_time_is_hashed_again(tmp_path, file, computed):
    """Renamed to the path of a known one it had that one's hash."""
    file_hash(file)
    other, status = tmp_path / "other", file.stat()
    other.write_bytes(b"x" * len(CONTENT))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)
    assert file_hash(file) == hashlib.sha256(b"x" * len(CONTENT)).hexdigest()[:10]
    assert len(computed) == 2


def test_a_file_that_changes_meanwhile_is_not_cached(file, cache, monkeypatch):
    digest = hashlib.file_digest

    def slow(stream, name):
        found = digest(stream, name)
        file.write_bytes(b"other")
        return found

    monkeypatch.setattr(hashlib, "file_digest", slow)
    assert file_hash(file) == SHA256[:10]
    assert not cache.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b'{"PATH": 3}',
        b'{"PATH": {"sha256": "0000000000"}}',
        *[b'{"PATH": {"size": SIZE, "mtime_ns": TIME, "sha256": %s}}' % bad for bad in (b"7", b'"x"', b"[]")],
    ],
)
def test_a_damaged_cache_is_ignored(file, cache, caplog, content):
    cache.parent.mkdir(parents=True)
    status = file.stat()
    for name, value in {"PATH": file.resolve(), "SIZE": status.st_size, "TIME": status.st_mtime_ns}.items():
        content = content.replace(name.encode(), str(value).encode())
    cache.write_bytes(content)
    assert file_hash(file) == SHA256[:10]
    assert json.loads(cache.read_text())[str(file.resolve())]["sha256"] == SHA256
    assert not caplog.messages


@pytest.mark.parametrize("obstacle", ["folder is a file", "cache is a folder", "no home"])
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, file, cache, monkeypatch, obstacle, caplog):
    if obstacle == "folder is a file":
        (tmp_path / "cache").write_text("")
    elif obstacle == "cache is a folder":
        (cache / "x").mkdir(parents=True)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    assert file_hash(file) == SHA256[:10]
    assert not caplog.messages


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_entries_of_processes_at_once_are_all_kept(tmp_path, cache):
    """Without the lock, each would replace the file by one without the others' entries."""
    files = [tmp_path / f"{i}.ckpt" for i in range(24)]
    for i, path in enumerate(files):
        path.write_bytes(bytes([i]))
    threads = [threading.Thread(target=file_hash, args=(path,)) for path in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(cache.read_text()).keys() == {str(path.resolve()) for path in files}
    assert not cache.with_name("hashes.json.tmp").exists()


def test_cache_folder(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / "cache" / "stable-diffusion-toolkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "stable-diffusion-toolkit"


@pytest.mark.parametrize("function", [quick_hash, file_hash, lambda path: FileHash(path).result()])
def test_files_that_cannot_be_read(tmp_path, function):
    with pytest.raises(InputError, match="no checkpoint at"):
        function(tmp_path / "none")
    with pytest.raises(InputError, match="a folder"):
        function(tmp_path)
    with pytest.raises(InputError, match="cannot be opened: File name too long"):
        function(tmp_path / ("w" * 300))


@pytest.mark.parametrize(
    ("recorded", "same"),
    [
        (quick := hashlib.sha256(CONTENT[0x100000:0x110000]).hexdigest()[:8], True),
        (quick.upper(), True),
        (SHA256[:10], True),
        (SHA256[:10].upper(), True),
        (SHA256, True),
        (f" {SHA256.upper()} ", True),
        (SHA256[:8], False),
        ("0" * 8, False),
        ("0" * 10, False),
        (SHA256[:-1] + ("0" if SHA256[-1] != "0" else "1"), False),
        ("", None),
        ("sd-v1-4", None),
        (SHA256[:12], None),
        ("g" * 10, None),
    ],
)
def test_same_model(file, recorded, same):
    """The ten digits that today's tools record were taken for another model's."""
    assert same_model(recorded, file) is same


def test_same_model_of_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="no checkpoint at"):
        same_model("0" * 10, tmp_path / "none")


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Set it to let `file_hash` of FileHash go on."""
    event = threading.Event()
    monkeypatch.setattr(hashes, "file_hash", lambda path: event.wait(60) and file_hash(path))
    yield event
    event.set()


def test_file_hash_in_the_background(file, gate):
    """The constructor returns before the hash is known."""
    found = FileHash(file)
    early, late = [], []
    found.then(early.append)
    assert not early
    gate.set()
    assert found.result() == SHA256[:10]
    found.then(late.append)
    assert late == [SHA256[:10]]
    while not early:  # a thread waiting for the result may be woken before callbacks are called
        time.sleep(0.001)
    assert early == [SHA256[:10]]


def test_no_callback_without_a_hash(tmp_path, gate):
    found, calls = FileHash(tmp_path / "none"), []
    found.then(calls.append)
    gate.set()
    with pytest.raises(InputError):
        found.result()
    found.then(calls.append)
    assert not calls


def test_an_unfinished_hash_does_not_keep_the_program(file):
    """A thread that is no daemon would be waited for: here for ever."""
    program = (
        "import hashlib, sys, threading\n"
        "from ldm.weights.hashes import FileHash\n"
        "started = threading.Event()\n"
        "hashlib.file_digest = lambda *_: started.set() or threading.Event().wait()\n"
        "FileHash(sys.argv[1])\n"
        "started.wait()\n"
        "print('done')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, file], capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_hashing_needs_no_torch():
    """`--like` compares hashes before anything slow is imported."""
    program = "import sys; import ldm.weights.hashes; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_progress_and_what_is_known(file, computed):
    """A hash is known without a look at the file once it was computed, until the file changes."""
    assert known_hash(file) is None
    parts = []
    assert file_hash(file, parts.append) == SHA256[:10] == known_hash(file)
    assert sum(parts) == len(CONTENT)
    assert file_hash(file, parts.append) == SHA256[:10]
    assert (sum(parts), len(computed)) == (len(CONTENT), 1)
    os.utime(file, ns=(0, 0))
    assert known_hash(file) is None
    with pytest.raises(InputError, match="no checkpoint at"):
        known_hash(file.parent / "none")
