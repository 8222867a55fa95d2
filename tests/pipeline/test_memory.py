"""Readings of memory, and the batch that fits into it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.machine import host_memory
from ldm.pipeline import memory

CPU = torch.device("cpu")


def test_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def largest(first: int, second: int, left: float, most: int = 64) -> int:
        held = iter([first, second])
        monkeypatch.setattr(memory, "taken", lambda device: next(held))
        monkeypatch.setattr(memory, "left", lambda device: left / memory.MARGIN)
        return memory.largest_batch(made.append, CPU, most)

    assert largest(1000, 1100, 1050) == 12
    assert made == [1, 2]
    assert largest(1000, 1100, 1050, most=5) == 5
    assert largest(1000, 1100, 0) == 2
    assert largest(1000, 1000, 10**9) == 64
    assert largest(1000, 1000, 10**9, most=1) == 1


def test_readings_of_this_machine() -> None:
    held = torch.ones(2**26)
    assert held.nbytes < memory.taken(CPU) < 2**45
    assert 0 < memory.left(CPU) < 2**50
    total, available = host_memory()
    assert held.nbytes < total < 2**50
    assert 0 < available <= total


def test_the_peak_of_this_process() -> None:
    """In a process of its own. Its peak began with that of the one that had started it: gigabytes here."""
    code = """
import torch
from ldm.machine import host_memory
from ldm.pipeline import memory
before = memory.peak_memory(torch.device("cpu"))
memory.reset_peak_memory(torch.device("cpu"))
assert before > 2**20
held = torch.ones(2**26)  # 256 MB
after = memory.peak_memory(torch.device("cpu"))
assert before + 2**27 < after
print(before, after)
"""
    held = torch.ones(2**28)  # 1 GB
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, _ = map(int, done.stdout.split())
    status = Path("/proc/self/status")
    if status.exists() and "VmHWM" in status.read_text():
        assert before < held.nbytes


def test_the_memory_of_the_machine_is_read_without_torch() -> None:
    """The installation check works where torch does not."""
    code = "import sys, ldm.machine as m; m.host_memory(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_errors_are_no_lack_of_memory() -> None:
    assert not memory.is_out_of_memory(RuntimeError("shape '[2]' is invalid for input of size 3"))
    assert not memory.is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


def test_a_batch_on_a_cpu_leaves_its_memory_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --eager the memory of a batch had gone back to the system, so that any number seemed to fit."""
    made: list[object] = []
    monkeypatch.setattr("ldm.optimize.memory.keep_memory", lambda: made.append("kept"))
    memory.largest_batch(made.append, CPU, 4)
    assert made == ["kept", 1, 2]
