"""Recorded calls: on a CPU a stand-in for CUDA shows what goes in and out; on a GPU the bits are compared."""

from collections.abc import Callable

import pytest
import torch
from tiny_sampling import Recorder
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize.context import keep_context
from ldm.optimize.graph import CudaCapture, GraphRunner, Recording, graph_unet
from ldm.optimize.timesteps import keep_timesteps


class Function:
    """x * 2 + t, or x * 2; remembers the addresses it read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __call__(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        self.read.append(x.data_ptr())
        return x * 2 if t is None else x * 2 + t


def runner(
    most: int = 4, capture: Callable | None = None
) -> tuple[GraphRunner, Function, Recorder, list[str]]:
    function, recorder, reported = Function(), Recorder(), []
    return GraphRunner(function, capture or recorder, most, reported.append), function, recorder, reported


@pytest.fixture(params=[torch.inference_mode, torch.no_grad], ids=["inference_mode", "no_grad"])
def without_gradients(request: pytest.FixtureRequest) -> Callable:
    return request.param


def test_inputs_are_copied_into_the_recordings_own_buffers(without_gradients: Callable) -> None:
    run, function, recorder, _ = runner()
    with without_gradients():
        for value in (1.0, 2.0, 3.0):
            x, t = torch.full((2, 3), value), torch.tensor([[10 * value]])
            assert torch.equal(run(x=x, t=t), x * 2 + t)
            assert x.data_ptr() not in function.read
    assert (recorder.captured, recorder.replayed) == (1, 3)
    assert len(set(function.read)) == 1


def test_a_result_is_the_callers_own() -> None:
    run, *_ = runner()
    with torch.inference_mode():
        first = run(x=torch.ones(4))
        second = run(x=torch.zeros(4))
        assert first.tolist() == [2.0] * 4
        second += 5
        assert run(x=torch.ones(4)).tolist() == [2.0] * 4


def test_a_call_within_inference_mode_and_one_outside_share_a_recording() -> None:
    run, _, recorder, _ = runner()
    with torch.inference_mode():
        run(x=torch.ones(4))
    with torch.no_grad():
        result = run(x=torch.ones(4))
        result += 1
    assert recorder.captured == 1


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.ones(3, 4)},
        {"x": torch.ones(2, 4, dtype=torch.float64)},
        {"x": torch.ones(4, 2).t()},
        {"x": torch.ones(2, 4), "t": torch.ones(1)},
        {"x": torch.ones(2, 4), "t": None},
    ],
    ids=["shape", "dtype", "strides", "another input", "an input that is None"],
)
def test_another_kind_of_inputs_is_recorded_anew(other: dict[str, Tensor | None]) -> None:
    run, function, recorder, _ = runner()
    with torch.no_grad():
        run(x=torch.ones(2, 4))
        assert torch.equal(run(**other), function(**other))
        assert recorder.captured == 2
        run(x=torch.zeros(2, 4))
        run(**other)
    assert recorder.captured == 2


def test_autocast_is_recorded_anew() -> None:
    function = lambda x: x @ x  # noqa: E731
    recorder = Recorder()
    run = GraphRunner(function, recorder, report=pytest.fail)
    with torch.no_grad():
        assert run(x=torch.ones(4, 4)).dtype == torch.float32
        with torch.autocast("cpu"):
            assert run(x=torch.ones(4, 4)).dtype == torch.bfloat16
        assert run(x=torch.ones(4, 4)).dtype == torch.float32
    assert recorder.captured == 2


def test_the_recordings_used_last_are_kept() -> None:
    run, _, recorder, _ = runner(most=2)

    def call(n: int) -> int:
        """How many recordings this one made."""
        before = recorder.captured
        with torch.no_grad():
            assert run(x=torch.ones(n)).shape == (n,)
        return recorder.captured - before

    assert [call(n) for n in (1, 2, 1, 3)] == [1, 1, 0, 1]
    assert len(run.entries) == 2
    assert [call(n) for n in (1, 3, 2)] == [0, 0, 1]
    run.clear()
    assert len(run.entries) == 0


def test_where_recording_fails_the_function_is_called_and_that_is_reported_once() -> None:
    attempts = []

    def broken(call: Callable[[], Tensor]) -> Recording:
        attempts.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    run, function, _, reported = runner(capture=broken)
    with torch.no_grad():
        for n in (2, 2, 3):
            x = torch.ones(n)
            assert torch.equal(run(x=x), x * 2)
    assert function.read[-1] == x.data_ptr()
    assert len(attempts) == 2  # once a kind
    assert reported == ["no CUDA graph, going on without: operation not permitted when stream is capturing"]


def test_memory_that_ends_during_a_recording_is_taken_from_the_others() -> None:
    recorder, reported = Recorder(), []

    def capture(call: Callable[[], Tensor]) -> Recording:
        if recorder.captured == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return recorder(call)

    run = GraphRunner(Function(), capture, report=reported.append)
    with torch.no_grad():
        run(x=torch.ones(2))
        assert run(x=torch.ones(3)).tolist() == [2.0] * 3
    assert [entry is None for entry in run.entries.values()] == [True]
    assert reported == ["no CUDA graph, going on without: not enough memory"]


def test_an_error_of_the_function_itself_is_not_hidden() -> None:
    def wrong(x: Tensor) -> Tensor:
        raise RuntimeError("sizes do not match")

    run = GraphRunner(wrong, Recorder(), report=lambda _: None)
    with torch.no_grad(), pytest.raises(RuntimeError, match="sizes do not match"):
        run(x=torch.ones(2))


def test_with_gradients_nothing_is_recorded() -> None:
    run, _, recorder, _ = runner()
    x = torch.ones(3, requires_grad=True)
    run(x=x).sum().backward()
    assert x.grad.tolist() == [2.0] * 3
    assert recorder.captured == 0


def steps(model: LatentDiffusion, batch: int = 2) -> list[Tensor]:
    device, dtype = model.device, next(model.model.parameters()).dtype
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 4, 8, 6, generator=generator).to(device, dtype)
    context = torch.randn(batch, 77, 32, generator=generator).to(device, dtype)
    results = []
    with torch.inference_mode():
        for t in (981.0, 500.5, 1.0):
            x = model.apply_model(x, torch.full((batch,), t, device=device), context)
            results.append(x)
    return results


def test_the_unets_steps_are_replayed(model: LatentDiffusion) -> None:
    recorder = Recorder()
    expected = [*steps(model), *steps(model, 1)]
    run = graph_unet(model, recorder)
    for _ in range(2):
        got = [*steps(model), *steps(model, 1)]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert (recorder.captured, recorder.replayed) == (2, 12)
    run.clear()
    assert torch.equal(steps(model)[-1], expected[2])
    assert recorder.captured == 3


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kept", [False, True], ids=["alone", "with what is kept"])
def test_on_a_gpu_a_replay_has_the_bits_of_the_eager_call(
    model: LatentDiffusion, dtype: torch.dtype, kept: bool
) -> None:
    model.to("cuda", dtype)
    expected = [*steps(model), *steps(model, 1)]
    graph_unet(model)
    if kept:
        keep_context(model)
        keep_timesteps(model)
    for _ in range(3):
        got = [*steps(model), *steps(model, 1)]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@needs_cuda
def test_on_a_gpu_what_cannot_be_recorded_is_called() -> None:
    reported = []
    run = GraphRunner(lambda x: x * x.sum().item(), CudaCapture(torch.device("cuda")), report=reported.append)
    with torch.no_grad():
        assert run(x=torch.ones(2, device="cuda")).tolist() == [2.0, 2.0]
        assert run(x=torch.full((2,), 2.0, device="cuda")).tolist() == [8.0, 8.0]
    assert len(reported) == 1
