"""The choice of kernels: measured once for a machine, remembered, and the same for all processes."""

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from ldm.modules.attention import CrossAttention
from ldm.optimize import kernels as module
from ldm.optimize.kernels import choose as choose_of_names
from ldm.optimize.kernels import fastest, fingerprint_of_layers


def choose(work: str, kernels: dict[str, Callable[[], None]]) -> str:
    return choose_of_names(work, list(kernels), lambda: kernels)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


class Clock:
    """A clock that only the kernels move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def taking(self, **seconds: float) -> dict[str, Callable[[], None]]:
        def call(name: str) -> None:
            self.calls.append(name)
            self.now += seconds[name]

        return {name: lambda name=name: call(name) for name in seconds}


def test_a_further_kernel_has_to_be_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert fastest(clock.taking(torch=1.0, onednn=0.99)) == "torch"
    assert fastest(clock.taking(torch=1.0, onednn=0.8, packed=0.79)) == "onednn"
    assert fastest(clock.taking(torch=1.0, onednn=1.2, packed=0.5)) == "packed"


def test_a_short_call_is_measured_until_it_is_at_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in rows was left out in one start of six: its first three calls of 2 ms were its slowest."""
    clock = Clock(monkeypatch)
    kernels = clock.taking(torch=2.4e-3, rows=1.8e-3)
    rows = kernels["rows"]

    def slow_at_first() -> None:
        rows()
        clock.now += 2e-3 if clock.calls.count("rows") <= 4 else 0

    assert fastest({**kernels, "rows": slow_at_first}) == "rows"
    assert clock.calls.count("torch") < 20
    clock.calls.clear()
    assert fastest(clock.taking(torch=1.0, rows=0.8)) == "rows"
    assert clock.calls.count("torch") == 1 + module.ROUNDS  # long ones are not called more often


def test_a_choice_is_measured_once(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    clock = Clock(monkeypatch)
    assert choose("rows", clock.taking(slow=2.0, fast=1.0)) == "fast"
    assert clock.calls
    clock.calls.clear()
    # other times by now: what was chosen stays, or the same command would give other bits
    assert choose("rows", clock.taking(slow=1.0, fast=2.0)) == "fast"
    assert not clock.calls
    assert choose("columns", clock.taking(slow=1.0, fast=2.0)) == "slow"
    assert set(*json.loads((folder / "kernels.json").read_text()).values()) == {"rows", "columns"}


def test_another_machine_measures_for_itself(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    clock = Clock(monkeypatch)
    for name, times in (("one", {"a": 1.0, "b": 2.0}), ("other", {"a": 2.0, "b": 1.0})):
        monkeypatch.setattr(module, "processor", lambda name=name: name)
        assert choose("rows", clock.taking(**times)) == min(times, key=times.get)
    assert len(json.loads((folder / "kernels.json").read_text())) == 2


@pytest.mark.parametrize("text", ["", "[]", "{", '{"machine": 3}'])
def test_a_damaged_file_is_written_anew(text: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    folder.mkdir()
    (folder / "kernels.json").write_text(text)
    clock = Clock(monkeypatch)
    assert choose("rows", clock.taking(a=2.0, b=1.0)) == "b"
    clock.calls.clear()
    assert choose("rows", clock.taking(a=1.0, b=2.0)) == "b"
    assert not clock.calls


def test_a_remembered_kernel_that_is_gone_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert choose("rows", clock.taking(a=2.0, b=1.0)) == "b"
    assert choose("rows", clock.taking(a=1.0, c=2.0)) == "a"


def test_a_folder_without_locks_waits_for_no_other_machine(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """A file stood in for the lock, and a machine that was switched off held it for ever."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", no_locks)
    folder.mkdir()
    (folder / "kernels.lock").write_text("1\nanother machine\n")
    assert choose("rows", Clock(monkeypatch).taking(a=2.0, b=1.0)) == "a"


def test_heads_and_functions_of_layers_are_told_apart() -> None:
    """Networks of other heads had one key, so that one's converted file was read for the other."""

    def network() -> nn.Module:
        return nn.Sequential(CrossAttention(16, 16, heads=2, dim_head=8), nn.Linear(16, 16))

    plain, again, other, changed = (network() for _ in range(4))
    other[0].heads = 4
    changed[1].forward = lambda x: x
    found = [fingerprint_of_layers(one) for one in (plain, again, other, changed)]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_where_nothing_can_be_kept_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A choice by chance would give other bits to the same command."""
    folder.write_text("a file in the place of the folder")
    clock = Clock(monkeypatch)
    assert choose("rows", clock.taking(a=2.0, b=1.0)) == "a"
    assert not clock.calls
