"""Memory on a CPU, counted in processes of their own."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize import memory as module
from ldm.optimize.memory import keep_memory, return_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_memory_of_freed_tensors_is_kept_for_the_next() -> None:
    """Counted in page faults of a process of its own: tensors of 64 MiB soon take no new pages.

    A small block behind the first ones can make their places too short for the next one's alignment.
    """
    code = """
import resource, torch
from ldm.optimize.memory import keep_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def taken():
    before = faults()
    torch.ones(2**24)
    return faults() - before
taken(); plain = taken()
if keep_memory():
    print(plain, min(taken() for _ in range(20)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if not run.stdout:
        pytest.skip("another C library than glibc")
    plain, kept = map(int, run.stdout.split())
    assert kept < 0.1 * plain


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_the_first_large_decode_gives_back_what_it_took_and_later_ones_keep_it() -> None:
    """Free memory between tensors in use could not serve larger ones: a process grew to 7.5 GB, not 6.3. But
    a process that made many images took the same memory anew for each: a quarter of a decode's time.
    """
    code = """
import resource, torch
from tiny_sampling import tiny_model
from ldm.optimize import memory as module
from ldm.optimize.memory import keep_memory, return_memory
from ldm.pipeline.memory import taken
plain, model = tiny_model(), tiny_model()
cpu = torch.device("cpu")
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def decode(model, side=64):
    before = taken(cpu), faults()
    with torch.inference_mode():
        model.decode_first_stage(torch.ones(1, 4, side, side))
    return (taken(cpu) - before[0]) / 2**20, faults() - before[1]
module.host_memory = lambda: (2**40, 2**40)
decode(plain, 4)
if keep_memory():
    return_memory(model)
    print(*decode(model), decode(plain)[0], min(decode(model)[1] for _ in range(5)))
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    if not run.stdout:
        pytest.skip("another C library than glibc")
    given_back, pages, kept, pages_again = map(float, run.stdout.split())
    assert given_back < 40 < 64 < kept  # MiB that a process grew by; a tensor of the last level has 32
    assert pages_again < 0.1 * pages


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The calls that give memory back, on a machine that has enough of it."""
    calls: list[int] = []
    library = SimpleNamespace(malloc_trim=calls.append)
    monkeypatch.setattr(module, "glibc", lambda: library)
    monkeypatch.setattr(module, "host_memory", lambda: (2**34, 2**33))
    return calls


def decode(model: LatentDiffusion, side: int, channels: int = 4) -> None:
    with torch.inference_mode():
        model.first_stage_model.decoder(torch.ones(1, channels, side, side))


def test_memory_is_given_back_around_large_decodes_and_before_large_layers(
    model: LatentDiffusion, trims: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    return_memory(model)
    decode(model, 8)
    assert trims == []  # too small to be worth it
    with pytest.raises(RuntimeError):
        decode(model, 64, channels=5)
    assert trims == [0, 0]  # before a decode and after it, though it failed
    monkeypatch.setitem(module.LARGE_INPUT, torch.nn.GroupNorm, 4 * 32 * 64 * 64)
    trims.clear()
    decode(model, 9)
    assert len(trims) == 5  # before the two norms of each of the last level's two blocks, and the last norm


def test_only_a_decode_larger_than_those_before_gives_memory_back(
    model: LatentDiffusion, trims: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    return_memory(model)
    with pytest.raises(RuntimeError):
        decode(model, 66, channels=5)
    found = []
    for side in (64, 64, 65, 64):
        trims.clear()
        decode(model, side)
        found.append(len(trims))
    assert found == [2, 0, 2, 0]
    monkeypatch.setattr(module, "host_memory", lambda: (2**34, 2**33 - 1))
    decode(model, 64)
    assert trims == [0, 0]  # less than half of the machine's memory is available


def test_without_glibc_memory_is_left_alone(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "glibc", lambda: None)
    assert not keep_memory()
    return_memory(model)
    assert not model.first_stage_model.decoder._forward_hooks
