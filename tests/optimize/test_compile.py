"""`--compile`. The compiler's front half runs everywhere; the code it generates is for a GPU."""

from functools import partial

import pytest
import torch
from tiny_sampling import Recorder, relative_difference
from torch import Tensor

from ldm.cache import cache_folder
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize.compile import compile_model, compiled
from ldm.optimize.context import keep_context
from ldm.optimize.graph import graph_unet
from ldm.optimize.timesteps import keep_timesteps


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def outputs(model: LatentDiffusion) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    device, dtype = model.device, next(model.model.parameters()).dtype
    x, context = (torch.randn(*size, generator=generator) for size in ((2, 4, 8, 8), (2, 5, 32)))
    x, context = x.to(device, dtype), context.to(device, dtype)
    with torch.inference_mode():
        steps = [model.apply_model(x, torch.full((2,), t, device=device), context) for t in (500.0, 3.0)]
        return [*steps, model.decode_first_stage(x)]


@pytest.fixture
def front_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace the model as the compiler does, in one piece, and run the trace as it is."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))


def test_the_models_are_compiled_in_one_piece(model: LatentDiffusion, front_half: None) -> None:
    plain, reported = outputs(model), []
    compile_model(model, reported.append)
    results = outputs(model)
    assert reported == []
    assert all(relative_difference(a, b) < 2e-6 for a, b in zip(results, plain, strict=True))


def test_what_was_compiled_is_recorded(model: LatentDiffusion, front_half: None) -> None:
    plain, reported, recorder = outputs(model), [], Recorder()
    compile_model(model, reported.append)
    graph_unet(model, recorder)
    keep_context(model)
    keep_timesteps(model)
    results = [*outputs(model), *outputs(model)]
    assert reported == []
    assert all(relative_difference(a, b) < 2e-6 for a, b in zip(results, [*plain, *plain], strict=True))
    assert (recorder.captured, recorder.replayed) == (1, 4)


def test_where_compiling_fails_the_plain_model_is_called_and_that_is_reported(monkeypatch) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    attempts = []

    def broken(plain):
        def forward(x: Tensor) -> Tensor:
            attempts.append(1)
            raise BackendCompilerFailed("inductor", RuntimeError("no working C++ compiler"), [])

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    reported = []
    forward = compiled(lambda x: x + 1, "UNet", reported.append)
    assert [forward(1), forward(2)] == [2, 3]
    assert len(attempts) == len(reported) == 1
    assert reported[0].startswith("--compile: the UNet goes on without: ")
    assert "no working C++ compiler" in reported[0]


def test_compiled_code_is_kept_in_the_users_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "stable-diffusion-toolkit"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_compiled_is_within_rounding(model: LatentDiffusion) -> None:
    model.to("cuda")
    plain, reported = outputs(model), []
    compile_model(model, reported.append)
    graph_unet(model)
    keep_context(model)
    for _ in range(3):
        assert all(relative_difference(a, b) < 1e-5 for a, b in zip(outputs(model), plain, strict=True))
    assert reported == []
