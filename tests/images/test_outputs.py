import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from image_files import noise as image
from PIL import Image

from ldm.errors import InputError
from ldm.images import outputs
from ldm.images.metadata import read_texts
from ldm.images.outputs import AGAIN, CannotWrite, OutputFolder, cannot_write, resumable

ROOT = Path(__file__).parents[2]
TEXTS = ("a cat\nSteps: 50", '{"prompt": "a cat"}')
TEMPORARY = ".0123456789ab.00000000000000000000000000000000.tmp"


def save(outdir: Path) -> str:
    return OutputFolder(outdir).save_image(image(), TEXTS).name


def files(outdir: Path) -> list[str]:
    """Every file below, hidden ones too."""
    return sorted(str(path.relative_to(outdir)) for path in outdir.rglob("*") if path.is_file())


def start_writer(outdir: Path, count: int, link: str = "os.link") -> subprocess.Popen:
    """A process that saves tiny images and prints each name; it begins on a line from stdin."""
    script = f"""
import errno, os, sys
import numpy as np
from ldm.images.outputs import OutputFolder
def no_links(*_): raise OSError(errno.EPERM, "Operation not permitted")
os.link = {link}
folder = OutputFolder(sys.argv[1])
sys.stdin.readline()
for index in range({count}):
    texts = f"{{os.getpid()}} {{index}}", "{{}}"
    image = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    print(folder.save_image(image, texts).name, flush=True)
"""
    return subprocess.Popen(
        [sys.executable, "-c", script, outdir],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# names


def test_names_of_the_original(tmp_path):
    outdir = tmp_path / "a" / "b"
    folder = OutputFolder(outdir)
    pixels = image()
    paths = [folder.save_image(pixels, TEXTS), folder.save_image(pixels, TEXTS)]
    paths.append(folder.save_grid(pixels, TEXTS))
    assert files(outdir) == ["grid-0000.png", "samples/00000.png", "samples/00001.png"]
    assert paths == [outdir / "samples/00000.png", outdir / "samples/00001.png", outdir / "grid-0000.png"]
    for path in paths:
        assert np.array_equal(np.asarray(Image.open(path)), pixels)


def test_a_deleted_file_does_not_cause_an_overwrite(tmp_path):
    """The original counted the files in the folder: with an early one deleted, it wrote over the last one."""
    folder = OutputFolder(tmp_path)
    for seed in range(3):
        folder.save_image(image(seed=seed), TEXTS)
        folder.save_grid(image(seed=seed), TEXTS)
    (tmp_path / "samples/00000.png").unlink()
    (tmp_path / "grid-0000.png").unlink()

    folder = OutputFolder(tmp_path)
    assert folder.save_image(image(), TEXTS).name == "00003.png"
    assert folder.save_grid(image(), TEXTS).name == "grid-0003.png"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples/00002.png")), image(seed=2))


def test_foreign_files_do_not_shift_the_numbers(tmp_path):
    """The original counted them as images and grids."""
    (tmp_path / "samples").mkdir()
    for name in (
        "notes.txt",
        "00003.gif",
        "abc.png",
        "00007 copy.png",
        "00005.png.bak",
        "7.png",
        "x00009.png",
        "٠٠٠٠٨.png",
    ):
        (tmp_path / "samples" / name).touch()
        (tmp_path / f"grid-{name}").touch()
    (tmp_path / "00012.png").touch()

    folder = OutputFolder(tmp_path)
    assert folder.save_image(image(), TEXTS).name == "00000.png"
    assert folder.save_grid(image(), TEXTS).name == "grid-0000.png"


def test_numbers_of_more_digits(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/99999.png").touch()
    (tmp_path / "grid-9999.png").touch()
    folder = OutputFolder(tmp_path)
    assert [folder.save_image(image(), TEXTS).name for _ in range(2)] == ["100000.png", "100001.png"]
    assert folder.save_grid(image(), TEXTS).name == "grid-10000.png"
    assert save(tmp_path) == "100002.png"


def test_texts_are_in_the_files(tmp_path):
    folder = OutputFolder(tmp_path, "jpg")
    assert read_texts(folder.save_image(image(), TEXTS)) == TEXTS
    assert read_texts(folder.save_grid(image(), None)) == (None, None)


def test_a_grid_whose_texts_no_jpeg_file_holds_is_png(tmp_path):
    """A run of a long prompt file ended in an error after its last image, and could never be finished."""
    folder = OutputFolder(tmp_path, "jpg")
    texts = "a cat\nSteps: 50", f'{{"prompt": "{"a cat " * 20_000}"}}'
    path = folder.save_grid(image(), texts)
    assert path.name == "grid-0000.png"
    assert read_texts(path) == texts
    with pytest.raises(InputError, match="do not fit into a JPEG file"):
        folder.save_image(image(), texts)


def test_an_equal_file_with_the_name_is_taken_again(tmp_path):
    """Its process ended between the file and its line of the manifest."""
    folder = OutputFolder(tmp_path)
    paths = [folder.save_image(image(seed=seed), TEXTS, "a/b", again=True) for seed in (0, 0, 1, 1)]
    assert [path.name for path in paths] == ["b.png", "b.png", "b-2.png", "b-2.png"]
    assert folder.save_image(image(), TEXTS, "a/b").name == "b-3.png"


def test_files_have_the_users_permissions(tmp_path):
    folder = OutputFolder(tmp_path)
    previous = os.umask(0o022)
    try:
        path = folder.save_image(image(), TEXTS)
    finally:
        os.umask(previous)
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_file_gets_a_name_that_is_free(tmp_path):
    for data in ("1", "2", "3"):
        (tmp_path / "source").write_text(data)
        outputs.rename_to_new(tmp_path / "source", tmp_path / "walk.mp4")
    names = ["walk-2.mp4", "walk-3.mp4", "walk.mp4"]
    assert files(tmp_path) == names
    assert [(tmp_path / name).read_text() for name in names] == ["2", "3", "1"]


# several writers, and interruptions


@pytest.mark.parametrize("link", ["os.link", "no_links"])
def test_two_processes_lose_nothing(tmp_path, link):
    """Two runs of the original into one folder wrote over each other's images."""
    writers = [start_writer(tmp_path, 30, link) for _ in range(2)]
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    names = [name for writer in writers for name in writer.communicate()[0].split()]
    assert [writer.returncode for writer in writers] == [0, 0]

    expected = [f"{number:05d}.png" for number in range(60)]
    assert sorted(names) == expected
    assert files(tmp_path / "samples") == expected
    texts = {read_texts(tmp_path / "samples" / name) for name in expected}
    assert len(texts) == 60


def test_a_killed_process_leaves_whole_images_only(tmp_path):
    for _ in range(4):
        writer = start_writer(tmp_path, 10_000)
        writer.stdin.write("go\n")
        writer.stdin.flush()
        for _ in range(5):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert writer.returncode == -signal.SIGKILL

    paths = sorted((tmp_path / "samples").glob("[0-9]*"))
    assert len(paths) >= 20
    assert [path.name for path in paths] == [f"{number:05d}.png" for number in range(len(paths))]
    for path in paths:
        assert Image.open(path).convert("RGB").size == (64, 64)


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_an_interrupted_save_leaves_no_file(tmp_path, monkeypatch, call):
    folder = OutputFolder(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        folder.save_image(image(), TEXTS)
    assert files(tmp_path) == []


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = OutputFolder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=rf"{tmp_path}/samples: No space left"):
            folder.save_image(image(), TEXTS)
    assert files(tmp_path) == []
    assert folder.save_image(image(), TEXTS).name == "00000.png"


@pytest.mark.parametrize("by", [AGAIN, "the same command", None])
def test_a_full_disk_advises_what_takes_a_run_up_again(by):
    """--resume, too, with --skip_save, and for compare.py, evaluate.py and the service, which have none."""
    for number, advice in [(errno.ENOSPC, "make room"), (errno.EACCES, "choose another folder")]:
        advice += f", and {by} makes what is missing" if by and number == errno.ENOSPC else ""
        with pytest.raises(CannotWrite, match=rf"; {advice}$"), resumable(by):
            raise cannot_write(Path("a"), OSError(number, os.strerror(number)))


def test_folders_that_cannot_be_written_are_refused_at_once(tmp_path, monkeypatch):
    """The original found out at the first image, minutes later."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/samples").write_text("mine")
    for outdir, message in [
        ("file", f"{tmp_path}/file: a file has that name"),
        ("file/below", f"{tmp_path}/file/below: Not a directory"),
        ("folder", f"{tmp_path}/folder/samples: a file has that name"),
        ("x" * 300, "x: File name too long"),
    ]:
        with pytest.raises(InputError, match=rf"cannot write to .*{message}; choose another folder"):
            OutputFolder(outdir)
    assert files(tmp_path) == ["file", "folder/samples"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_folder_that_takes_no_files_is_refused():
    """It exists, and root may do anything: only trying shows it."""
    with pytest.raises(InputError, match="cannot write to /proc: "):
        OutputFolder("/proc")


def test_a_run_lists_the_folder_once(tmp_path, monkeypatch):
    folder = OutputFolder(tmp_path)
    monkeypatch.delattr(os, "listdir")
    monkeypatch.delattr(os, "scandir")
    assert [folder.save_image(image(), TEXTS).name for _ in range(2)] == ["00000.png", "00001.png"]


# temporary files


def old(path: Path, seconds: int) -> Path:
    """A file that nobody has written to for so many seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    modified = path.stat().st_mtime - seconds
    os.utime(path, (modified, modified))
    return path


def test_temporary_files_of_dead_processes_are_removed(tmp_path):
    """They stayed if they came from another host, or if another process had the dead one's number by now."""
    host = os.uname().nodename if hasattr(os, "uname") else "here"
    names = [TEMPORARY, f".another.host.4242.{'0' * 32}.tmp", f".{host}.{os.getpid()}.{'0' * 32}.tmp"]
    for name in names:
        old(tmp_path / "samples" / name, 3600)
        old(tmp_path / name, 61)
    OutputFolder(tmp_path)
    assert files(tmp_path) == []


def test_temporary_files_of_living_processes_and_other_files_stay(tmp_path):
    kept = [old(tmp_path / "samples" / TEMPORARY, 30), old(tmp_path / TEMPORARY, -3600)]
    kept += [old(tmp_path / name, 3600) for name in (".notes.tmp", f"{'0' * 32}.tmp", f".{'0' * 32}.tmp")]
    OutputFolder(tmp_path)
    assert files(tmp_path) == sorted(str(path.relative_to(tmp_path)) for path in kept)


def test_the_age_of_temporary_files_is_by_the_file_systems_clock(tmp_path, monkeypatch):
    """A network drive's clock may differ from this host's by hours."""
    monkeypatch.setattr("time.time", lambda: pytest.fail("this host's clock was asked"))
    left = old(tmp_path / "samples" / TEMPORARY, 3600)
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **options: _slow_clock(stat(path, **options)))
    OutputFolder(tmp_path)
    assert not os.path.exists(left)


def _slow_clock(status: os.stat_result) -> os.stat_result:
    values = list(status)
    values[8] -= 7200  # st_mtime
    return os.stat_result(values)


def test_an_owners_temporary_files_are_removed_at_once(tmp_path):
    folder = OutputFolder(tmp_path)
    mine = [f".a.b.{'0' * 32}.tmp", f".a.b.{'1' * 32}.tmp"]
    others = [f".axb.{'0' * 32}.tmp", f".c.{'0' * 32}.tmp"]
    for name in (*mine, *others):
        (tmp_path / name).touch()
        (tmp_path / "samples" / name).touch()
    folder.clear("a.b")
    assert files(tmp_path) == sorted([*others, *(f"samples/{name}" for name in others)])
    folder.clear("a.b")


def test_temporary_files_carry_their_owner(tmp_path, monkeypatch):
    folder = OutputFolder(tmp_path)
    folder.owner = "run7"
    found = []
    monkeypatch.setattr(os, "fsync", lambda _: found.extend(files(tmp_path)))
    folder.save_image(image(), None)
    folder.save_grid(image(), None)
    assert [Path(name).name[:6] for name in found if name.endswith(".tmp")] == [".run7."] * 2
    assert OutputFolder(tmp_path).owner != OutputFolder(tmp_path).owner


# file systems without hard links


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_without_hard_links(tmp_path, monkeypatch, error):
    def no_links(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", no_links)
    folder = OutputFolder(tmp_path)
    (tmp_path / "samples/00001.png").write_text("mine")
    assert [folder.save_image(image(), TEXTS).name for _ in range(2)] == ["00000.png", "00002.png"]
    assert files(tmp_path) == ["samples/00000.png", "samples/00001.png", "samples/00002.png"]
    assert (tmp_path / "samples/00001.png").read_text() == "mine"


@pytest.mark.parametrize("links", [True, False])
def test_a_vanished_file_leaves_no_empty_one(tmp_path, monkeypatch, links):
    """Whatever `os.link` raised was taken for a file system without hard links: an empty image stayed."""

    def vanish(source, _):
        os.unlink(source)
        raise OSError(errno.ENOENT if links else errno.EPERM, "vanished")

    folder = OutputFolder(tmp_path)
    monkeypatch.setattr(os, "link", vanish)
    with pytest.raises(outputs.CannotWrite, match=r"cannot write to .*samples: (vanished|No such file)"):
        folder.save_image(image(), TEXTS)
    assert files(tmp_path) == []
