"""GroupNorm as one kernel with its neighbours. On a CPU Triton's interpreter runs the kernel."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_sampling import normal, relative_difference, tiny_model
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize import norm as module
from ldm.optimize.norm import forget_statistics, fuse_norms, take_statistics
from ldm.optimize.tiling import tile_first_stage

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which comes with torch on Linux")
@pytest.mark.parametrize("what", ["kernels", "model"])
def test_the_kernel_equals_torchs_to_rounding(what: str) -> None:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    script = Path(__file__).with_name("triton_norms.py")
    done = subprocess.run([sys.executable, script, what], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def outputs(model: LatentDiffusion) -> list[Tensor]:
    x, context, t = normal(2, 4, 8, 8), normal(2, 5, 32), torch.tensor([3.0, 500.0])
    with torch.inference_mode():
        return [model.apply_model(x, t, context), model.decode_first_stage(x)]


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Triton without a device that it knows; the notices."""
    reported: list[str] = []
    module.fused_group_norm.cache_clear()
    monkeypatch.setattr(module, "notice", reported.append)
    monkeypatch.setitem(sys.modules, "ldm.optimize.norm_kernels", None)
    return reported


def test_without_triton_the_model_stays_as_it_is(model: LatentDiffusion, no_kernel: list[str]) -> None:
    reported: list[str] = []
    assert not fuse_norms(model, reported.append)
    assert reported == ["no Triton GroupNorm here, going on without"]
    assert all(map(torch.equal, outputs(model), outputs(tiny_model())))


def test_a_kernel_that_fails_later_is_reported_once(
    model: LatentDiffusion, no_kernel: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "can_fuse", lambda device, dtype: True)
    assert fuse_norms(model)
    for result, plain in zip(outputs(model), outputs(tiny_model()), strict=True):
        assert relative_difference(result, plain) < 2e-6
    assert len(no_kernel) == 1
    assert no_kernel[0].startswith("no Triton GroupNorm, going on without: ")


def test_tiles_have_common_statistics_under_the_kernel(
    model: LatentDiffusion, no_kernel: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "can_fuse", lambda device, dtype: True)
    plain, z = tiny_model(), normal(1, 4, 20, 12)
    fuse_norms(model)
    for each in (plain, model):
        tile_first_stage(each, tile=8, overlap=2)
    with torch.inference_mode():
        assert relative_difference(model.decode_first_stage(z), plain.decode_first_stage(z)) < 2e-6


def test_norms_forget_statistics_and_keep_what_they_had(model: LatentDiffusion) -> None:
    decoder = model.first_stage_model.decoder
    other = decoder.norm_out.forward = lambda x: x
    norms = take_statistics(decoder)
    assert len(norms) > 5
    assert take_statistics(decoder) == []
    forget_statistics(norms)
    assert decoder.norm_out.forward is other
    assert not any({"forward", "statistics"} & vars(norm).keys() for norm in norms[:-1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_on_a_gpu_the_kernel_equals_torchs_to_rounding(model: LatentDiffusion, dtype: torch.dtype) -> None:
    from ldm.optimize.norm_kernels import group_norm

    model.to("cuda", dtype)
    assert fuse_norms(model)
    for b, c, h, w, offsets in [(2, 320, 64, 64, 2), (2, 2560, 8, 8, 1), (1, 128, 512, 512, None)]:
        x, weight, bias, offset = (
            normal(*size).to("cuda", dtype) for size in ((b, c, h, w), (c,), (c,), (offsets or 1, c))
        )
        arguments = (x, None if offsets is None else offset, 32, weight, bias, 1e-5, True)
        exact = module.plain_group_norm(*(a.double() if isinstance(a, Tensor) else a for a in arguments))
        assert relative_difference(group_norm(*arguments), exact) < (1e-5 if dtype == torch.float32 else 5e-3)
