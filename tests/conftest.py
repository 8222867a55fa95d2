import functools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may download anything
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-")  # nor touch the user's cache
sys.path.insert(0, str(Path(__file__).parent))

import tiny
from commands import SCRIPTS, Result, lines, script
from golden_files import manifest, pseudo_state_dict
from safetensors.torch import save_file

from ldm.cli import entry
from ldm.log import LOG
from ldm.modules.encoders import modules as encoders

CLIPTokenizer = functools.cache(encoders.CLIPTokenizer)  # it takes longer to make than a tiny image


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)  # others may still write to it


@pytest.fixture(autouse=True, scope="session")
def exit_is_seen() -> Iterator[None]:
    """`os._exit` in the process of the tests would end it, and all its tests, without a word."""
    process, end = os.getpid(), os._exit

    def exit_elsewhere(code: int) -> None:
        if os.getpid() != process:  # a forked one
            end(code)
        raise AssertionError(f"the code under test ends the process of the tests with code {code}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "_exit", exit_elsewhere)
        yield


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Each test leaves the log as it found it. One of them silenced all that came after it on its worker."""
    before = LOG.handlers[:], LOG.propagate, LOG.level, LOG.disabled
    yield
    LOG.handlers[:], LOG.propagate, level, LOG.disabled = before
    LOG.setLevel(level)
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True, scope="session")
def no_power_cut() -> Iterator[None]:
    """Nothing in this process waits for the disk, which only a power cut could show; other processes do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(config, weights) of the miniature in tiny.py."""
    folder = tmp_path_factory.mktemp("tiny")
    return tiny.write_config(folder / "tiny.yaml"), tiny.write_weights(folder / "tiny.safetensors")


@pytest.fixture(scope="session")
def mini_v1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The stand-in weights of which the golden images were made: half a gigabyte."""
    path = tmp_path_factory.mktemp("mini-v1") / "mini-v1.safetensors"
    save_file(pseudo_state_dict(manifest("mini-v1")), path)
    yield path
    path.unlink()


@pytest.fixture
def weights_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before the checkpoint's values are read."""
    unread = "ldm.pipeline.pipeline.load_model"
    monkeypatch.setattr(unread, lambda *_, **__: pytest.fail("the checkpoint is read"))


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Runs scripts/<name>.py in this process, its results in a folder of `tmp_path`."""
    monkeypatch.setattr(encoders, "CLIPTokenizer", CLIPTokenizer)

    def call(name: str, *argv: object, folder: str = "out") -> Result:
        makes_images = ("txt2img", "img2img", "inpaint", "depth2img", "upscale", "compare")
        if name in makes_images and "--safety" not in argv:
            argv = (*argv, "--safety", "off")  # it would say that there is no checker
        words = [str(SCRIPTS / f"{name}.py"), "--outdir", str(tmp_path / folder), *map(str, argv)]
        monkeypatch.setattr(sys, "argv", words)
        try:
            code = entry.run(script(name).main)
        except SystemExit as end:  # argparse
            code = end.code
        out, err = capsys.readouterr()
        return Result(code, out.splitlines(), lines(err), tmp_path / folder)

    return call
