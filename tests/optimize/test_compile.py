"""`--compile`. The compiler's front half runs everywhere; the code it generates is for a GPU."""

import dis
import multiprocessing
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from compile_in_turn import compile_in
from networks import TINY_UNET, random_tensors, tiny_unet
from tiny_sampling import Recorder, normal, relative_difference, tiny_model
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from ldm.cache import cache_folder
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules import openaimodel
from ldm.optimize import compile as module
from ldm.optimize.compile import compile_model, compiled, first_compiles, tuning, uncompiled
from ldm.optimize.context import keep_context
from ldm.optimize.graph import graph_unet
from ldm.optimize.tiling import tile_first_stage, with_common_statistics
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
def runs(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[int]:
    """Models are traced as the compiler does it, in one piece; gives the number of each trace that ran."""
    torch.compiler.reset()
    inductor, backend = torch.compile, lookup_backend(getattr(request, "param", "eager"))
    numbers, runs = count(), []

    def numbered(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        number, forward = next(numbers), backend(graph, inputs)
        return lambda *args: (runs.append(number), forward(*args))[1]

    def compile(plain: Callable, *, dynamic: bool, fullgraph: bool, options: dict) -> Callable:
        assert (dynamic, fullgraph) == (False, True)
        return inductor(plain, dynamic=dynamic, fullgraph=fullgraph, backend=numbered)

    monkeypatch.setattr(torch, "compile", compile)
    return runs


@pytest.mark.parametrize("runs", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)], indirect=True)
def test_the_models_are_compiled_in_one_piece(model: LatentDiffusion, runs: list[int]) -> None:
    plain, reported = outputs(model), []
    compile_model(model, reported.append)
    results = outputs(model)
    assert reported == []
    assert runs == [0, 0, 1]
    assert all(relative_difference(a, b) < 2e-6 for a, b in zip(results, plain, strict=True))


def test_what_was_compiled_is_recorded(model: LatentDiffusion, runs: list[int]) -> None:
    """Recording turned autocast's cache off, for which the UNet was compiled once more."""
    plain, reported, recorder = outputs(model), [], Recorder()
    compile_model(model, reported.append)
    graph_unet(model, recorder)
    keep_context(model)
    keep_timesteps(model)
    results = [*outputs(model), *outputs(model)]
    assert reported == []
    assert all(relative_difference(a, b) < 2e-6 for a, b in zip(results, [*plain, *plain], strict=True))
    assert (recorder.captured, recorder.replayed) == (1, 4)
    assert runs == [0, 0, 0, 1, 0, 0, 1]


def test_where_compiling_fails_the_plain_model_is_called_and_that_is_reported(monkeypatch) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    attempts = []

    def broken(plain, **_):
        def forward(x: Tensor) -> Tensor:
            attempts.append(1)
            raise BackendCompilerFailed("inductor", RuntimeError("no working C++ compiler"), [])

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    reported = []
    forward = compiled(lambda x: x + 1, "UNet", reported.append)
    assert [forward(1), forward(2)] == [2, 3]
    assert len(attempts) == len(reported) == 1
    assert reported[0].startswith("--compile: the UNet is not compiled and goes on in plain PyTorch: ")
    assert "no working C++ compiler" in reported[0]


def test_memory_that_ends_while_compiling_is_no_failure_of_the_compiler(monkeypatch) -> None:
    """The batch was not halved, and the model was never compiled after that."""
    from torch._dynamo.exc import BackendCompilerFailed

    def full(plain, **_):
        def forward(x: Tensor) -> Tensor:
            if x > 1:
                raise BackendCompilerFailed("inductor", torch.OutOfMemoryError("CUDA"), []) from None
            if x < 0:
                raise BackendCompilerFailed("inductor", RuntimeError("no compiler"), []) from None
            return x + 1

        return forward

    monkeypatch.setattr(torch, "compile", full)
    reported = []
    forward = compiled(lambda x: x + 2, "UNet", reported.append)
    with pytest.raises(torch.OutOfMemoryError):
        forward(2)
    assert forward(1) == 2
    assert not any("is not compiled" in line for line in reported)
    try:
        raise torch.OutOfMemoryError("a larger batch")
    except torch.OutOfMemoryError:  # in whose handling the smaller one is compiled
        assert forward(-1) == 1
    assert any("is not compiled" in line and "no compiler" in line for line in reported)


@pytest.mark.parametrize("tiled_first", [True, False])
def test_tiles_are_decoded_by_the_compiled_decoder_with_common_statistics(
    model: LatentDiffusion, runs: list[int], tiled_first: bool
) -> None:
    """Code compiled for the whole image ran on tiles, or that of one image's statistics on all."""
    plain, reported = tiny_model(), []
    if tiled_first:
        tile_first_stage(model, tile=8, overlap=2)
    compile_model(model, reported.append)
    if not tiled_first:
        tile_first_stage(model, tile=8, overlap=2)
    tile_first_stage(plain, tile=8, overlap=2)
    small, large = normal(1, 4, 8, 8, seed=5), [normal(1, 4, 20, 12, seed=seed) * seed for seed in (1, 2)]
    with torch.inference_mode():
        for z in (small, *large, small):
            assert relative_difference(model.decode_first_stage(z), plain.decode_first_stage(z)) < 2e-6
    assert runs == [0, *2 * 6 * [1], 0]  # images reduced to a tile are decoded without
    assert reported == []


def test_tiles_that_one_request_asks_for(model: LatentDiffusion, runs: list[int]) -> None:
    def in_tiles(model: LatentDiffusion, z: Tensor) -> Tensor:
        return with_common_statistics(model.first_stage_model, model.decode_first_stage, z, 8, 2, 1, 8)

    small, large = normal(1, 4, 8, 8), normal(1, 4, 20, 12)
    compile_model(model)
    with torch.inference_mode():
        plain = tiny_model()
        for z in (small, large, small):
            assert relative_difference(in_tiles(model, z), in_tiles(plain, z)) < 2e-6
    assert runs == [0, *6 * [1], 0]


def test_inside_uncompiled_the_plain_function_is_called(runs: list[int]) -> None:
    double = compiled(lambda x: 2 * x, "double")
    with uncompiled():
        assert double(torch.ones(1)) == 2
    assert runs == []
    assert double(torch.ones(1)) == 2
    assert runs == [0]


UNETS = {
    "v1": ({}, None),
    "x4": (  # which has v2's linear layers, too
        {"num_classes": 10, "disable_self_attentions": [True, False], "use_linear_in_transformer": True},
        torch.tensor([3, 3]),
    ),
}


@pytest.mark.parametrize("family", UNETS)
def test_a_unet_is_one_graph(family: str) -> None:
    """torch 2.11's compiler cannot follow a `match` by classes, and left the UNet in pieces."""
    changes, y = UNETS[family]
    torch.compiler.reset()
    x, context = random_tensors((2, 4, 6, 6), (2, 5, 6))
    with torch.inference_mode():
        found = torch._dynamo.explain(tiny_unet(**TINY_UNET | changes))(
            x, torch.tensor([3.0, 3.0]), context, y
        )
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    for layer in vars(openaimodel).values():
        if isinstance(layer, type) and issubclass(layer, torch.nn.Module) and "forward" in vars(layer):
            names = [instruction.opname for instruction in dis.get_instructions(layer.forward)]
            assert "MATCH_CLASS" not in names


def test_options_that_this_torch_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to compile with an option that it does not know."""
    monkeypatch.setitem(module.TUNED, "an_option_of_tomorrow", True)
    assert tuning()["max_autotune"]
    assert "an_option_of_tomorrow" not in tuning()
    torch.compile(lambda x: x, options=tuning())


def test_beyond_the_limit_of_shapes_others_run_uncompiled(runs: list[int]) -> None:
    reported: list[str] = []
    double = compiled(lambda x: 2 * x, "double", reported.append)
    for _ in range(2):
        for size in range(1, 12):
            assert double(torch.ones(size)).tolist() == [2.0] * size
    assert reported == ["--compile: the double is compiled for 8 shapes; others run uncompiled"]
    assert runs == [*range(8), *range(8)]


def test_of_several_processes_the_first_compiles_alone(tmp_path: Path) -> None:
    """Each of a run's processes compiled the same, at the same time."""
    other = multiprocessing.get_context("spawn").Process(target=compile_in, args=(tmp_path,))
    with first_compiles("UNet", "key"):
        other.start()
        while other.is_alive() and not (tmp_path / "reported").exists():
            time.sleep(0.05)
        assert not (tmp_path / "compiled").exists()
    other.join()
    assert (tmp_path / "compiled").exists()
    assert (tmp_path / "reported").read_text().endswith("another process compiles the UNet; waiting for it")

    inside, reported = [], []
    with first_compiles("UNet", "key", reported.append), first_compiles("UNet", "key", reported.append):
        inside.append(1)  # it is on the disk: nobody waits
    assert inside == [1]
    assert reported == []


def test_one_that_fails_leaves_the_compiling_to_the_next(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), first_compiles("UNet", "key"):
        raise ZeroDivisionError
    assert not list(tmp_path.glob("**/*.done"))
    with first_compiles("UNet", "key"):
        pass
    assert len(list(tmp_path.glob("**/*.done"))) == 1


def test_a_cache_that_cannot_be_written_holds_nobody_up(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    with first_compiles("UNet", "key"):
        pass


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_without_a_home_folder_nobody_waits(model: LatentDiffusion, monkeypatch) -> None:
    monkeypatch.setattr(module, "cache_folder", no_home)
    compile_model(model)  # with a folder that the user chose
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compile_model(model)  # torch chooses the folder
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with first_compiles("UNet", "key"):
        pass


def test_a_disk_that_is_full_after_compiling_ends_nothing(monkeypatch) -> None:
    def touch(path: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "touch", touch)
    for _ in range(2):
        with first_compiles("UNet", "key"):
            pass


def test_compiled_code_is_kept_in_the_users_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "stable-diffusion-toolkit"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_compiled_is_within_rounding(model: LatentDiffusion) -> None:
    model.to("cuda")
    plain, reported = outputs(model), []
    compile_model(model, reported.append, fused_norms=model.model.diffusion_model.dtype != torch.float32)
    graph_unet(model)
    keep_context(model)
    for _ in range(3):
        assert all(relative_difference(a, b) < 1e-5 for a, b in zip(outputs(model), plain, strict=True))
    assert reported == []
