"""Runs that survive faults: the manifest, --resume, kills, full disks, signals."""

import errno
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Result, refused
from run_helpers import data, manifest, start, wait_for

from ldm.errors import InputError
from ldm.images.outputs import CannotWrite, OutputFolder
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.runs import manifest as manifest_module
from ldm.runs.manifest import (
    LOCK,
    MANIFEST,
    RUNS,
    RunRecord,
    append,
    differences,
    folder_lock,
    move_lines,
    parts,
    read_lines,
    read_manifest,
    started_runs,
)

Command = Callable[..., Result]


@pytest.fixture
def txt2img(command: Command, model: tuple[Path, Path]) -> Command:
    """Run the command: two steps, three batches of two images of 16x16 pixels."""
    base = ["--config", model[0], "--ckpt", model[1], "--ddim_steps", 2, "--n_samples", 2, "--n_iter", 3]
    base += ["--prompt", "a cat", "--watermark", "none"]
    return lambda *argv, folder="out": command("txt2img", *base, *argv, folder=folder)


def test_every_image_has_its_line(txt2img: Command) -> None:
    result = txt2img("--seed", 7, "--negative_prompt", "a dog")
    lines = manifest(result.folder)
    assert [line["file"] for line in lines] == [f"samples/0000{k}.png" for k in range(6)]
    for k, (line, settings) in enumerate(zip(lines, result.settings, strict=True)):
        assert line.items() >= settings.items()
        assert (line["image"], line["seed"], line["nan"]) == (k, 7 + k, False)
        assert (line["negative_prompt"], line["seconds"] > 0) == ("a dog", True)


def test_a_line_is_there_as_soon_as_its_image(txt2img: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, seen = LatentDiffusion.decode_first_stage, []

    def watched(self, latents):
        end = time.monotonic() + 30
        while len(manifest(folder)) < 2 * len(seen) and time.monotonic() < end:
            time.sleep(0.01)  # files are written while the next batch is sampled
        seen.append(len(manifest(folder)))
        return decode(self, latents)

    folder = txt2img().folder.with_name("watched")
    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", watched)
    txt2img(folder="watched")
    assert seen == [0, 2, 4]


def test_nan_images_are_in_the_manifest(txt2img: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = LatentDiffusion.decode_first_stage
    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", lambda self, z: decode(self, z) * float("nan"))
    result = txt2img()
    assert (result.code, result.files) == (1, [])
    assert [(line["file"], line["nan"]) for line in manifest(result.folder)] == [(None, True)] * 6
    assert txt2img("--resume").code == 1  # they are made again
    assert len(manifest(result.folder)) == 12


def test_torn_lines_are_closed_off(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST
    append(path, {"image": 0})
    with path.open("ab") as file:
        file.write(b'{"image": 1, "pro')
    append(path, {"image": 2})
    assert [line["image"] for line in read_lines(path)] == [0, 2]


def test_a_process_of_a_team_syncs_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync for each of 1,280 images/s cost 64 workers 6 % of their time; the lines are all written."""
    clock, synced = [100.0], []
    monkeypatch.setattr("ldm.runs.manifest.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("ldm.runs.manifest.os.fsync", synced.append)
    record = pickle.loads(pickle.dumps(RunRecord(tmp_path, {"steps": 5}, 40)))
    for k in range(40):
        record.add(k, None, {})
        clock[0] += 0.1
    assert len(synced) == 4
    assert [line["image"] for line in read_lines(record.manifest)] == list(range(40))


def test_differences_are_said_in_words() -> None:
    words = differences({"steps": 50, "scale": 7.5, "a": 1}, {"steps": 20, "scale": 7.5, "b": "x" * 80})
    assert words.startswith("steps 50, now 20; a 1, now null; b null, now")
    assert len(words) < 120


def test_missing_images_among_many_lines(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, {"steps": 5}, 5000)
    record.start(0)
    (tmp_path / "x.png").touch()
    lines = [{"run": record.run, "image": k, "file": "x.png", "prompt": "a"} for k in range(0, 5000, 2)]
    (tmp_path / MANIFEST).write_text("\n".join(map(json.dumps, lines)))
    with record.ending():
        pass
    again = RunRecord(tmp_path, {"steps": 5}, 5000)
    with again.ending():
        assert again.resume()
        assert again.missing() == list(range(1, 5000, 2))


def test_the_manifest_is_read_line_by_line(tmp_path: Path) -> None:
    """The whole file, and a copy of each of its lines, was in memory: gigabytes for a million images."""
    record = RunRecord(tmp_path, {"steps": 5}, 20_000)
    (tmp_path / "samples").mkdir()
    with (tmp_path / MANIFEST).open("w") as file:
        for k in range(20_000):
            line = {"run": record.run, "image": k, "file": f"samples/{k % 10}.png", "prompt": "x" * 1000}
            file.write(json.dumps(line) + "\n")
    for k in range(9):
        (tmp_path / f"samples/{k}.png").touch()
    tracemalloc.start()
    record.refresh()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.5 * (tmp_path / MANIFEST).stat().st_size
    assert record.missing() == list(range(9, 20_000, 10))


def test_a_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image's file was asked for, which takes minutes for a million of them on a network drive."""
    record = RunRecord(tmp_path, {}, 100)
    (tmp_path / "samples").mkdir()
    for k in range(100):
        (tmp_path / f"samples/{k}.png").touch()
        record.add(k, f"samples/{k}.png", {})
    asked = []
    monkeypatch.setattr(Path, "exists", lambda self: asked.append(self))
    record.refresh()
    assert (record.missing(), asked) == ([], [])


def other_process(record: RunRecord) -> RunRecord:
    """The record as another process of the run gets it."""
    return pickle.loads(pickle.dumps(record))


def test_each_process_has_a_file_of_its_own(tmp_path: Path) -> None:
    """In one file for all they waited for each other, and network drives lost lines."""
    record = RunRecord(tmp_path, {"steps": 5}, 6)
    with record.ending():
        record.start(0)
        others = [other_process(record) for _ in range(2)]
        record.add(0, None, {})
        for k, other in enumerate([*others, *others], 1):
            other.add(k, None, {}, failed=k == 4)
        assert [line["image"] for line in read_lines(tmp_path / MANIFEST)] == [0]
        assert sorted(line["image"] for line in read_manifest(tmp_path)) == [0, 1, 2, 3, 4]
        assert len(parts(tmp_path, record.run)) == 2
        assert parts(tmp_path, "0" * 12) == []
        record.gather()
        assert parts(tmp_path) == []
        assert sorted(record.done) == [0, 1, 2, 3, 4]
        others[0].add(5, None, {})  # of a process that was taken for dead
    assert sorted(line["image"] for line in read_lines(tmp_path / MANIFEST)) == [0, 1, 2, 3, 4, 5]
    assert [path.name for path in tmp_path.glob(".run-*")] == []


def test_another_process_is_not_sent_what_only_rank_0_needs(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, {"steps": 5}, 10_000, [{"prompt": "x" * 1000}] * 10_000)
    record.done = {k: f"samples/{k}.png" for k in range(5_000)}
    data = pickle.dumps(record)
    assert len(data) < 10 * 10_000
    assert list(pickle.loads(data).missing()) == list(range(5_000, 10_000))


LINES = b'{"image": 1}\n{"image": 2}\n'


@pytest.mark.parametrize("before", [b"", b'{"image": 0}\n', b'{"image": 0}\n{"im'])
def test_moving_lines_goes_on_where_it_was_interrupted(tmp_path: Path, before: bytes) -> None:
    """At whatever byte of the manifest a process was killed, no line is lost and none is there twice."""
    begin = len(before) + (not before.endswith(b"\n") and before != b"")
    closed = before.ljust(begin, b"\n")
    manifest, part = tmp_path / MANIFEST, tmp_path / f".run-{'1' * 12}.{'a' * 32}.jsonl"
    manifest.write_bytes(before)
    part.write_bytes(LINES)
    move_lines(part, manifest)
    assert manifest.read_bytes() == closed + LINES
    for written in range(len(LINES) + 1):
        manifest.write_bytes(closed + LINES[:written])
        part.with_suffix(f".at-{begin}.jsonl").write_bytes(LINES)
        (left,) = parts(tmp_path, "1" * 12)
        move_lines(left, manifest)
        assert manifest.read_bytes() == closed + LINES
        assert parts(tmp_path) == []


def test_lines_are_moved_though_another_run_has_written_meanwhile(tmp_path: Path) -> None:
    manifest, part = tmp_path / MANIFEST, tmp_path / f".run-{'1' * 12}.{'a' * 32}.at-0.jsonl"
    manifest.write_bytes(LINES[:20])
    append(manifest, {"image": 9})
    part.write_bytes(LINES)
    move_lines(part, manifest)
    assert {line["image"] for line in read_lines(manifest)} == {1, 2, 9}
    manifest.write_bytes(LINES + b'{"image": 9}\n')  # all were moved before
    part.write_bytes(LINES)
    move_lines(part, manifest)
    assert [line["image"] for line in read_lines(manifest)] == [1, 2, 9]
    assert parts(tmp_path) == []


def test_readers_miss_no_line_that_is_being_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest was read first: lines that were moved into it meanwhile were in neither."""
    record = RunRecord(tmp_path, {}, 4)
    others = [other_process(record) for _ in range(3)]
    for k, one in enumerate([record, *others]):
        one.add(k, None, {})
    for part in parts(tmp_path):
        lines = read_manifest(tmp_path)
        found = {next(lines)["image"]}
        move_lines(part, tmp_path / MANIFEST)
        assert found | {line["image"] for line in lines} == {0, 1, 2, 3}
    named = others[0].manifest.with_suffix(".at-0.jsonl")
    others[0].add(4, None, {})
    read = manifest_module.read_lines

    def rename_first(path: Path) -> Iterator[dict]:
        if path == others[0].manifest:
            path.rename(named)
        return read(path)

    monkeypatch.setattr(manifest_module, "read_lines", rename_first)
    assert {line["image"] for line in read_manifest(tmp_path)} == {0, 1, 2, 3, 4}


def test_a_part_that_another_process_has_moved_is_no_error(tmp_path: Path) -> None:
    """Two processes may move the lines of a dead run: one that takes it up, and one that starts another."""
    for name in (f".run-{'1' * 12}.{'a' * 32}.jsonl", f".run-{'1' * 12}.{'a' * 32}.at-0.jsonl"):
        move_lines(tmp_path / name, tmp_path / MANIFEST)
    assert (tmp_path / MANIFEST).read_bytes() == b""


def test_a_network_drives_old_listing_hides_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS lists a folder as it was up to a minute ago, until this machine changes something in it."""
    record = RunRecord(tmp_path, {}, 2)
    old, listdir, unlink = os.listdir(tmp_path), os.listdir, Path.unlink
    other_process(record).add(1, None, {})

    def change(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        monkeypatch.setattr(os, "listdir", listdir)

    monkeypatch.setattr(Path, "unlink", change)
    monkeypatch.setattr(os, "listdir", lambda path: old)
    assert parts(tmp_path) == []
    record.gather()
    assert record.missing() == [0]
    assert {path.name for path in tmp_path.iterdir()} == {MANIFEST, LOCK}


def test_a_full_disk_keeps_the_lines_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = RunRecord(tmp_path, {"steps": 5}, 2)
    with record.ending():
        record.start(0)
        other_process(record).add(1, None, {})
        with monkeypatch.context() as patch:
            patch.setattr("shutil.copyfileobj", full)
            with pytest.raises(CannotWrite, match="No space left"):
                record.gather()
        assert [line["image"] for line in read_manifest(tmp_path)] == [1]
    assert [line["image"] for line in read_lines(tmp_path / MANIFEST)] == [1]


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


DEAD = """
import os, sys
from pathlib import Path
from ldm.runs.manifest import RunRecord
record = RunRecord(Path(sys.argv[1]), {"steps": 5}, 10)
record.start(0)
os._exit(9)
"""


def test_numbers_are_claimed_by_living_runs_alone(tmp_path: Path) -> None:
    """What a run that was killed had claimed was never free again."""
    assert subprocess.run([sys.executable, "-c", DEAD, str(tmp_path)]).returncode == 9
    first, second, third = (RunRecord(tmp_path, {"steps": steps}, 10) for steps in (1, 2, 3))
    with first.ending():
        first.start(0)
        assert first.first == 0
        with second.ending():
            second.start(0)
            assert second.first == 10
        with third.ending():
            third.start(0)
            assert third.first == 10
    with second.ending():
        second.start(5)
        assert second.first == 5


DEAD_TEAM = """
import os, pickle, sys
from pathlib import Path
from ldm.runs.manifest import RunRecord
record = RunRecord(Path(sys.argv[1]), {"steps": 5}, 6)
record.start(0)
others = [pickle.loads(pickle.dumps(record)) for _ in range(2)]
for k, one in enumerate([record, *others, *others]):
    one.add(k, None, {})
with others[0].manifest.open("ab") as file:
    file.write(b'{"run": "' + record.run.encode() + b'", "image": 5, "fi')
os._exit(9)
"""


def test_a_killed_run_of_many_is_taken_up_with_the_lines_of_all(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", DEAD_TEAM, str(tmp_path)]).returncode == 9
    assert [line["image"] for line in read_lines(tmp_path / MANIFEST)] == [0]
    record = RunRecord(tmp_path, {"steps": 5}, 6)
    with record.ending():
        assert record.resume()
        assert record.missing() == [5]
        record.add(5, None, {})
    assert sorted(line["image"] for line in read_lines(tmp_path / MANIFEST)) == list(range(6))
    assert parts(tmp_path) == []


def test_the_lines_of_a_killed_run_are_moved_when_another_starts(tmp_path: Path) -> None:
    """They stayed in hidden files for good where nobody took the run up. Those of a living run stay."""
    living = RunRecord(tmp_path, {"steps": 5}, 2)
    with living.ending():
        living.start(0)
        other_process(living).add(1, None, {})
        (own,) = parts(tmp_path)
        assert subprocess.run([sys.executable, "-c", DEAD_TEAM, str(tmp_path)]).returncode == 9
        foreign = tmp_path / f".run-{'f' * 12}.{'0' * 32}.jsonl"
        foreign.mkdir()
        next_one = RunRecord(tmp_path, {"steps": 6}, 1)
        with next_one.ending():
            next_one.start(10)
            assert sorted(line["image"] for line in read_lines(tmp_path / MANIFEST)) == [0, 1, 2, 3, 4]
            left = [path for path in parts(tmp_path) if path.is_file()]
            assert left == [own]


def test_a_living_run_is_not_taken_up_and_keeps_its_numbers(tmp_path: Path) -> None:
    """Two processes made the same images. The refused one must not end the run of the other."""
    living, other, third = (RunRecord(tmp_path, {"steps": 1}, 10) for _ in range(3))
    with living.ending():
        living.start(0)
        with pytest.raises(InputError, match="that run is still going on, as process"), other.ending():
            other.resume()
        with third.ending():
            third.start(0)
            assert third.first == 10
    with other.ending():
        assert other.resume()
        assert other.missing() == list(range(10))


def test_a_record_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    """One line that names the file, and no image counts as done whose line is not there."""
    (tmp_path / MANIFEST).mkdir()
    record = RunRecord(tmp_path, {}, 2)
    with pytest.raises(CannotWrite, match=f"cannot write to .*{MANIFEST}: Is a directory"):
        record.add(0, "samples/00000.png", {})
    assert record.missing() == [0, 1]
    with pytest.raises(InputError, match=f"cannot read .*{MANIFEST}: Is a directory"):
        record.refresh()
    (tmp_path / RUNS).mkdir()
    with pytest.raises(InputError, match=f"cannot read .*{RUNS}: Is a directory"), record.ending():
        record.start(0)
    with pytest.raises(InputError, match=f"cannot read .*{RUNS}: Is a directory"):
        started_runs(tmp_path)


@pytest.mark.parametrize("rng", ["image", "compvis"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_is_the_undisturbed_one(txt2img, monkeypatch, rng, stop) -> None:
    """Interrupted in any batch; also where a batch was half saved."""
    argv = ["--rng", rng, "--ddim_eta", 0.5]
    whole = data(txt2img(*argv, folder="whole").folder)
    decode, calls = LatentDiffusion.decode_first_stage, []

    def interrupted(self, latents):
        calls.append(latents)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", interrupted)
    result = txt2img(*argv)
    assert result.code == 130
    lines = (result.folder / MANIFEST).read_bytes().splitlines(keepends=True) if stop > 1 else []
    if stop == 3:  # the last image has its file, but its line is torn
        (result.folder / MANIFEST).write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", decode)
    again = txt2img(*argv, "--resume")
    assert (again.code, again.err) == (0, [])
    assert data(again.folder) == whole
    assert sorted(line["image"] for line in manifest(again.folder)) == list(range(6))
    assert txt2img(*argv, "--resume").err == ["all 6 images are there"]
    assert data(again.folder) == whole


def test_resume_in_an_empty_folder_starts(txt2img: Command) -> None:
    first = txt2img("--resume")
    assert (first.code, first.err) == (0, [f"--resume: {first.folder} has no run yet; a new one begins"])
    assert len(txt2img().paths) == 12


def test_images_without_the_record_of_their_runs_are_not_made_again(txt2img: Command) -> None:
    """`cp -r a/* b` leaves the hidden file behind: --resume made all images again without a word."""
    first = txt2img()
    (first.folder / RUNS).unlink()
    before = data(first.folder)
    result = txt2img("--resume")
    assert (result.code, len(result.err)) == (2, 1)
    assert f"{first.folder} has images, but not the hidden file {RUNS}" in result.err[0]
    assert data(first.folder) == before


def test_a_services_images_are_no_run(tmp_path: Path) -> None:
    append(tmp_path / MANIFEST, {"run": "1" * 12, "image": 0, "file": "samples/00000.png", "job": "a"})
    record = RunRecord(tmp_path, {}, 1)
    with record.ending():
        assert not record.resume()


def test_lines_that_are_no_images_are_passed_over(tmp_path: Path) -> None:
    """One line without a file ended --resume with a KeyError, and so did one in the record of runs."""
    first = RunRecord(tmp_path, {"steps": 5}, 3)
    with first.ending():
        first.start(0)
        first.add(0, None, {})
    for line in ({"image": 1}, {"file": None}, {"image": "1", "file": None}, {"image": 1, "file": 1}):
        append(tmp_path / MANIFEST, {"run": first.run} | line)
    for line in ({"settings": {}}, {"first": 0}, {"ended": True}):
        append(tmp_path / RUNS, line)
    record = RunRecord(tmp_path, {"steps": 5}, 3)
    with record.ending():
        assert record.resume()
        assert record.missing() == [1, 2]
    assert [line["image"] for line in read_manifest(tmp_path)] == [0]
    other = RunRecord(tmp_path, {"steps": 6}, 3)
    with other.ending():
        other.start(3)


def test_what_was_left_to_chance_is_that_of_the_run_that_agrees(tmp_path: Path) -> None:
    """It was that of the folder's last run, and the run before could not be taken up any more."""
    runs = [
        ({"steps": 4, "seed": 7, "batch_size": 2}, {}),
        ({"steps": 4, "seed": 8, "batch_size": 2}, {"prompt": "b"}),
        ({"steps": 4, "seed": 9}, {}),
        ({"steps": 2, "seed": 10, "batch_size": 3}, {}),
    ]
    for settings, line in runs:
        record = RunRecord(tmp_path, settings, 1, [line])
        with record.ending():
            record.start(0)

    def earlier(chosen: str, line: dict | None = None, **settings: object) -> tuple:
        found = RunRecord(tmp_path, settings, 0, [line or {}]).earlier(chosen.split())
        return found["seed"], found.get("batch_size")

    assert earlier("seed", steps=4, seed=-1, batch_size=2) == (7, 2)
    assert earlier("seed", {"prompt": "b"}, steps=4, seed=-1, batch_size=2) == (8, 2)
    assert earlier("seed", steps=4, seed=-1) == (9, None)
    assert earlier("seed batch_size", steps=4, seed=-1, batch_size="auto") == (7, 2)
    assert earlier("batch_size", steps=4, seed=7, batch_size="auto") == (7, 2)
    assert earlier("seed", steps=5, seed=-1) == (10, 3)
    assert RunRecord(tmp_path / "new", {}, 0).earlier(["seed"]) == {}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--scale 3", "scale 7.5, now 3.0"),
        ("--ddim_steps 3 --prompt x", "steps 2, now 3"),
        ("--n_iter 4", "n_iter"),
        ("--skip_save", "--resume with --skip_save"),
    ],
)
def test_other_settings_are_refused(txt2img: Command, argv: str, words: str) -> None:
    before = data(txt2img().folder)
    result = txt2img("--resume", *argv.split())
    assert (result.code, len(result.err)) == (2, 1)
    assert words in result.err[0]
    assert data(result.folder) == before


def test_a_random_seed_is_taken_up_again(txt2img: Command) -> None:
    first = txt2img("--seed", -1)
    first.paths[-1].unlink()
    again = txt2img("--seed", -1, "--resume")
    assert again.code == 0
    assert again.settings[-1]["seed"] == first.settings[0]["seed"] + 5 if first.settings else True
    assert len(again.paths) == 6
    # though another run has come after it
    txt2img("--seed", -1, "--prompt", "a dog", "--n_iter", 1)
    first.paths[5].unlink()
    assert txt2img("--seed", -1, "--resume").err == []
    assert len(again.paths) == 8


def test_a_new_run_does_not_touch_an_older_one(txt2img: Command) -> None:
    first = data(txt2img().folder)
    second = txt2img("--seed", 9)
    assert data(second.folder).items() >= first.items()
    assert len(second.paths) == 12
    assert len({line["run"] for line in manifest(second.folder)}) == 2


def test_json_lines_have_options_of_their_own(txt2img: Command, tmp_path: Path) -> None:
    lines = [
        {"prompt": "a cat"},
        {"prompt": "a dog", "seed": 7, "steps": 3, "scale": 5, "sampler": "Euler a", "H": 24},
        {"prompt": "a bird"},
        {"prompt": "a cow", "negative_prompt": "a dog", "seed": 9},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["--from-file", tmp_path / "p.jsonl", "--n_iter", 2]
    result = txt2img(*argv)
    assert (result.code, result.err) == (0, [])
    found = [(s["prompt"], s["seed"], s["steps"], s["scale"], s["sampler"]) for s in result.settings]
    first = (
        ("a cat", 42, 2, 7.5, "ddim"),
        ("a dog", 7, 3, 5.0, "euler_ancestral"),
        ("a bird", 44, 2, 7.5, "ddim"),
    )
    assert found[:3] == list(first)
    assert [seed for _, seed, *_ in found] == [42, 7, 44, 9, 46, 8, 48, 10]
    assert result.settings[3]["negative_prompt"] == "a dog"
    assert [image.shape for image in result.images[:3]] == [(16, 16, 3), (24, 16, 3), (16, 16, 3)]
    alone = txt2img(
        "--prompt",
        "a dog",
        *["--seed", "7", "--steps", "3", "--scale", "5", "--sampler", "euler_ancestral"],
        *["--H", "24", "--n_samples", "1", "--n_iter", "1"],
        folder="alone",
    )
    assert abs(alone.images[0] - result.images[1]).max() <= 1
    again = txt2img(*argv, "--resume")
    assert again.err == ["all 8 images are there"]


def test_repeat(txt2img: Command, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text('{"prompt": "a cat", "seed": 5}\n{"prompt": "a dog"}\n')
    result = txt2img("--from-file", tmp_path / "p.txt", "--repeat", 2, "--n_iter", 1)
    assert [(s["prompt"], s["seed"]) for s in result.settings] == [
        ("a cat", 5),
        ("a cat", 6),
        ("a dog", 44),
        ("a dog", 45),
    ]


def test_prompts_from_standard_input(model: tuple[Path, Path], tmp_path: Path) -> None:
    run = start(tmp_path / "out", model, "--n_iter", 1, "--from-file", "-", stdin=subprocess.PIPE)
    run.communicate("a cat\na dog\n")
    assert run.returncode == 0
    assert [line["prompt"] for line in manifest(tmp_path / "out")] == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            {"prompt": "a", "steps": 0},
            "line 2: argument --ddim_steps/--steps: 0 is not a whole number in range",
        ),
        ({"prompt": "a", "sampler": "eulr"}, "line 2: --sampler eulr is not known"),
        (
            {"prompt": "a", "outdir": "x"},
            "line 2: no option 'outdir' for a line; there are prompt, negative_",
        ),
        ({"prompt": "a", "H": 20}, "line 2: --H 20 is not a multiple of 8"),
        ({"prompt": "a", "seed": -1}, "line 2: a seed of -1"),
        ({"prompt": "a", "strength": 0.5}, "line 2: no option 'strength'"),
        ({"prompt": "a", "scale": "x"}, "line 2: argument --scale: x is not a number"),
    ],
)
@pytest.mark.usefixtures("weights_unread")
def test_bad_lines_are_named_before_anything_runs(txt2img, tmp_path, line, words) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "a"}}\n{json.dumps(line)}\n')
    refused(txt2img("--from-file", tmp_path / "p.jsonl"), words)


@pytest.mark.slow
def test_killed_again_and_again(model: tuple[Path, Path], tmp_path: Path) -> None:
    """200 images, killed at 6 random moments: the files of a run that nothing disturbed, and none twice."""
    assert start(tmp_path / "whole", model).wait() == 0
    rng = random.Random(0)
    folder, kills = tmp_path / "out", 0
    while kills < 6:
        done = len(manifest(folder))
        run = start(folder, model, "--resume")
        target = min(190, done + rng.randint(1, 30))
        wait_for(folder, target)
        time.sleep(rng.random() * 0.05)
        run.kill()
        run.communicate()
        kills += 1
    run = start(folder, model, "--resume")
    run.communicate()
    assert run.returncode == 0
    assert data(folder) == data(tmp_path / "whole")
    lines = manifest(folder)
    assert sorted(line["image"] for line in lines) == list(range(200))
    assert len({line["run"] for line in lines}) == 1


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_after_the_images_in_hand(model, tmp_path, name) -> None:
    run = start(tmp_path / "out", model)
    wait_for(tmp_path / "out", 1)
    run.send_signal(getattr(signal, name))
    _, err = run.communicate(timeout=300)
    assert run.returncode == 130
    assert "ending after the images in hand; once more ends at once" in err
    assert "are missing; the same command with --resume makes them" in err
    lines = manifest(tmp_path / "out")
    assert 0 < len(lines) < 200
    assert len(lines) % 4 == 0
    assert sorted(line["file"] for line in lines) == sorted(data(tmp_path / "out"))


def limit_files(size: int) -> Callable[[], None]:
    """What a child process calls to have no file grow beyond a size: the system's answer to a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_ends_the_run_with_its_images_intact(model, tmp_path) -> None:
    """Here the manifest meets the limit first; every image is whole, and --resume goes on."""
    folder = tmp_path / "out"
    run = start(folder, model, preexec_fn=limit_files(20_000))
    _, err = run.communicate(timeout=60)
    assert run.returncode in (1, 2)
    assert "File too large" in err
    assert "Traceback" not in err
    files = data(folder)
    assert 0 < len(files) < 200
    again = start(folder, model, "--resume")
    again.communicate()
    assert again.returncode == 0
    whole = data(folder)
    assert whole.items() >= files.items()
    assert len([name for name in whole if name.startswith("samples/")]) == 200


def test_two_runs_at_once_number_their_files_without_gaps(model, tmp_path) -> None:
    runs = [start(tmp_path / "out", model, "--n_iter", 10, "--seed", seed) for seed in (1, 1000)]
    assert [run.wait() for run in runs] == [0, 0]
    names = sorted(name for name in data(tmp_path / "out") if name.startswith("samples/"))
    assert names == [f"samples/{k:05}.png" for k in range(80)]
    lines = manifest(tmp_path / "out")
    assert sorted(line["file"] for line in lines) == names


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_memory_stays_flat_over_thousands_of_images(model, tmp_path) -> None:
    """After 3,000 images within 4 % of what it is after 500."""
    run = start(tmp_path, model, "--n_samples", 50, "--n_iter", 66, "--ddim_steps", 1)
    path, seen = tmp_path / MANIFEST, {}
    end = time.monotonic() + 300
    while len(seen) < 2 and time.monotonic() < end and run.poll() is None:
        images = path.read_bytes().count(b"\n") if path.exists() else 0
        if images >= (3000 if seen else 500):
            seen[images] = resident(run.pid)
        time.sleep(0.02)
    _, err = run.communicate()
    assert (run.returncode, len(seen)) == (0, 2), err[-300:]
    before, after = seen.values()
    assert after < 1.04 * before
    assert len(list((tmp_path / "samples").glob("*.png"))) == 3300


def test_grids_are_paged(txt2img: Command) -> None:
    """Images that are saved are not kept: their grids are made from the files, 64 at a time."""
    result = txt2img("--n_iter", 40, "--n_samples", 4, "--ddim_steps", 1)
    assert [name for name in result.files if name.startswith("grid")] == [
        f"grid-000{k}.png" for k in range(3)
    ]
    assert len(result.paths) == 160


def test_a_failed_write_is_recorded_and_the_run_goes_on(txt2img, monkeypatch) -> None:
    link, calls = os.link, []

    def unreliable(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return link(source, target)

    touch = Path.touch

    def no_touch(self, *args, **options):
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return touch(self, *args, **options)

    monkeypatch.setattr(os, "link", unreliable)
    monkeypatch.setattr(Path, "touch", no_touch)
    result = txt2img()
    assert result.code == 1
    assert result.err[-1] == "1 of 6 images failed: manifest.jsonl says which"
    assert len(result.paths) == 5
    assert [line["image"] for line in manifest(result.folder) if "error" in line] == [1]
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(Path, "touch", touch)
    assert (txt2img("--resume").code, len(txt2img("--resume").paths)) == (0, 6)


def test_refusals_leave_no_record(txt2img: Command, tmp_path: Path) -> None:
    refused(txt2img("--ckpt", tmp_path / "nowhere.ckpt"), "no checkpoint at")
    assert not (tmp_path / "out" / RUNS).exists()


def test_files_of_a_run_that_ended_meanwhile_are_seen(tmp_path: Path) -> None:
    """A run that ended after another had listed the folder, and before that began, lost its numbers to it."""
    folder = OutputFolder(tmp_path)
    (tmp_path / "samples/00003.png").touch()
    record = RunRecord(tmp_path, {"steps": 5}, 2)
    with record.ending():
        record.start(folder.next_number)
    assert record.first == 4


def test_no_lock_outlives_its_process_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """filelock put a file in place of a lock that Lustre has not; all waited for it once its node died."""

    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", missing)
    with folder_lock(tmp_path):
        assert not (tmp_path / LOCK).exists() or not (tmp_path / LOCK).read_bytes()  # no owner stands in it
        with folder_lock(tmp_path):
            append(tmp_path / RUNS, {"run": "a"})
    assert list(read_lines(tmp_path / RUNS)) == [{"run": "a"}]
