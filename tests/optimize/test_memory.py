"""Memory on a CPU, counted in processes of their own."""

import subprocess
import sys
from pathlib import Path

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
def test_a_large_decode_gives_back_what_it_took() -> None:
    """Free memory between tensors in use could not serve larger ones: a process grew to 7.5 GB, not 6.3."""
    code = """
import torch
from tiny_sampling import tiny_model
from ldm.optimize.memory import keep_memory, return_memory
from ldm.pipeline.memory import taken
plain, model = tiny_model(), tiny_model()
cpu = torch.device("cpu")
def grown(model, side):
    before = taken(cpu)
    with torch.inference_mode():
        model.decode_first_stage(torch.ones(1, 4, side, side))
    return (taken(cpu) - before) / 2**20
grown(plain, 4)
if keep_memory():
    return_memory(model)
    given_back = max(grown(model, 64) for _ in range(2))
    print(given_back, grown(plain, 64))
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
    given_back, kept = map(float, run.stdout.split())
    assert given_back < 40 < 64 < kept  # MiB; a tensor of the last level has 32


def test_memory_is_given_back_around_large_decodes_and_before_large_layers(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Library:
        def malloc_trim(self, pad: int) -> int:
            calls.append(pad)
            return 1

    monkeypatch.setattr(module, "glibc", Library)
    return_memory(model)
    with torch.inference_mode():
        model.decode_first_stage(torch.ones(1, 4, 8, 8))
        assert calls == []  # too small to be worth it
        with pytest.raises(RuntimeError):
            model.first_stage_model.decoder(torch.ones(1, 5, 64, 64))
        assert calls == [0, 0]  # before a decode and after it, though it failed
        monkeypatch.setitem(module.LARGE_INPUT, torch.nn.GroupNorm, 4 * 32 * 64 * 64)
        model.decode_first_stage(torch.ones(1, 4, 8, 8))
        assert calls == [0] * 7  # the two norms of each of the last level's two blocks, and the last norm


def test_without_glibc_memory_is_left_alone(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "glibc", lambda: None)
    assert not keep_memory()
    return_memory(model)
    assert not model.first_stage_model.decoder._forward_hooks
