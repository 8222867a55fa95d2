"""Recorded calls: on a CPU a stand-in for CUDA shows what goes in and out; on a GPU the bits are compared."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tiny_sampling import Recorder, contexts, guided_latents, normal, tiny_model
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize.context import keep_context
from ldm.optimize.graph import (
    Capture,
    CudaCapture,
    GraphRunner,
    Recording,
    flatten,
    free_recordings,
    graph_unet,
    unflatten,
)
from ldm.optimize.timesteps import keep_timesteps
from ldm.sampling import Denoiser


class Function:
    """x * 2 + t, or x * 2; remembers the addresses it read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __call__(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        self.read.append(x.data_ptr())
        return x * 2 if t is None else x * 2 + t


class Failing(Recorder):
    """Fails with `error` in some of its captures, by their number from 1."""

    def __init__(self, error: RuntimeError, *numbers: int):
        super().__init__()
        self.error, self.numbers, self.attempts = error, numbers, 0

    def __call__(self, call: Callable[[], Tensor]) -> Recording:
        self.attempts += 1
        if self.attempts in self.numbers:
            raise self.error
        return super().__call__(call)


def runner(
    most: int = 4, capture: Capture | None = None
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


def test_what_is_fixed_is_recorded_anew() -> None:
    recorder = Recorder()
    run = GraphRunner(lambda factor, *, x: x * factor, recorder, report=pytest.fail)
    with torch.no_grad():
        found = [run(factor, x=torch.ones(2)).tolist() for factor in (2, 3, 2)]
    assert found == [[2.0] * 2, [3.0] * 2, [2.0] * 2]
    assert recorder.captured == 2


def test_recordings_are_dropped_together() -> None:
    """torch frees, with one recording, the cuBLAS workspace that the others of its stream read."""
    run, _, recorder, _ = runner(most=2)

    def call(n: int) -> int:
        """How many recordings this one made."""
        before = recorder.captured
        with torch.no_grad():
            assert run(x=torch.ones(n)).shape == (n,)
        return recorder.captured - before

    assert [call(n) for n in (1, 2, 1)] == [1, 1, 0]
    assert (call(3), len(run.entries), recorder.renewed) == (1, 1, 1)
    assert [call(n) for n in (1, 3)] == [1, 0]
    run.clear()
    assert (len(run.entries), recorder.renewed) == (0, 2)


def test_where_recording_fails_the_function_is_called_and_that_is_reported_once() -> None:
    broken = Failing(RuntimeError("operation not permitted when stream is capturing\nand more"), 1, 2)
    run, function, _, reported = runner(capture=broken)
    with torch.no_grad():
        for n in (2, 2, 3):
            x = torch.ones(n)
            assert torch.equal(run(x=x), x * 2)
    assert function.read[-1] == x.data_ptr()
    assert broken.attempts == 2  # once a kind
    assert reported == ["no CUDA graph, going on without: operation not permitted when stream is capturing"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no")])
def test_a_recording_that_fails_ends_its_generation(error: RuntimeError) -> None:
    """The plain call may need the others' memory, and what they share is freed with the one that failed."""
    failing = Failing(error, 2)
    run, *_, reported = runner(capture=failing)
    with torch.no_grad():
        run(x=torch.ones(2))
        assert run(x=torch.ones(3)).tolist() == [2.0] * 3
        assert [entry is None for entry in run.entries.values()] == [True]
        assert failing.renewed == 1
        assert run(x=torch.ones(2)).tolist() == [2.0] * 2
    assert [entry is None for entry in run.entries.values()] == [True, False]
    reason = "not enough memory" if isinstance(error, torch.OutOfMemoryError) else "no"
    assert reported == [f"no CUDA graph, going on without: {reason}"]


def test_memory_that_ends_in_a_call_is_taken_from_the_recordings() -> None:
    """That of the size that did not fit was still held while a smaller batch was tried."""
    large = []

    def function(x: Tensor) -> Tensor:
        if len(x) == 3 and large:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x * 2

    recorder = Recorder()
    run = GraphRunner(function, recorder, report=pytest.fail)
    with torch.no_grad():
        run(x=torch.ones(2))
        run(x=torch.ones(3))
        large.append(True)  # the replay, and a call in its place, fail
        with pytest.raises(torch.OutOfMemoryError):
            run(x=torch.ones(3))
        assert (len(run.entries), recorder.renewed) == (0, 1)
        assert run(x=torch.ones(2)).tolist() == [2.0] * 2


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


class FakeCuda:
    """What `CudaCapture` calls of torch.cuda, with the traps of torch 2.11 in place, or without those."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, traps: bool = True):
        self.traps = traps
        self.current = self.default = SimpleNamespace(wait_stream=lambda other: None)
        self.users: dict[int, int] = {}  # recordings of each pool
        self.capturing = False
        self.allocating: int | None = None  # the pool that the allocator is in
        self.log: list[tuple[int, object, object]] = []  # pool, stream and current stream of each capture
        for name in (
            "graph_pool_handle",
            "Stream",
            "CUDAGraph",
            "device",
            "current_stream",
            "current_device",
            "stream",
            "graph",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, getattr(self, name.removeprefix("_cuda_")), raising=False)

    def graph_pool_handle(self) -> int:
        self.users[len(self.users)] = 0
        return len(self.users) - 1

    def Stream(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: None)

    def CUDAGraph(self) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: None)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    def current_stream(self) -> object:
        return self.current

    def current_device(self) -> int:
        return 0

    def endAllocateToPool(self, device: int, pool: int) -> None:
        if self.allocating != pool:
            raise RuntimeError("not currently recording to mempool_id")
        self.allocating = None

    def releasePool(self, device: int, pool: int) -> None:
        self.users[pool] -= 1

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: SimpleNamespace, pool: int, stream: object) -> Iterator[None]:
        if self.users[pool] < 0:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        assert self.current is not self.default
        self.log.append((pool, stream, self.current))
        self.current, self.capturing, self.allocating = SimpleNamespace(), True, pool
        self.users[pool] += 1
        try:
            yield
        except RuntimeError:
            if not self.traps:
                self.current, self.allocating = stream, None
                self.users[pool] -= 1
            raise
        finally:
            self.capturing = False
        self.current, self.allocating = stream, None

    def free(self) -> None:
        """All recordings are gone."""
        self.users = {pool: -1 if count else 0 for pool, count in self.users.items()}


def test_after_a_clear_another_pool_is_recorded_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that has lost its recordings is not taken again: every recording failed from then on."""
    cuda = FakeCuda(monkeypatch)
    run = GraphRunner(Function(), CudaCapture(torch.device("cuda")), report=pytest.fail)
    with torch.no_grad():
        for n in (1, 2):
            run(x=torch.ones(n))
        run.clear()
        cuda.free()
        run(x=torch.ones(1))
    (pool, stream, _), second, (new_pool, new_stream, _) = cuda.log
    assert second[:2] == (pool, stream)
    assert new_pool != pool
    assert new_stream is not stream
    assert all(at is stream for _, stream, at in cuda.log)  # the warm-up was there, too
    assert cuda.current is cuda.default


@pytest.mark.parametrize("traps", [True, False], ids=["torch 2.11", "torch 2.12"])
def test_a_failed_recording_leaves_stream_and_allocator(monkeypatch: pytest.MonkeyPatch, traps: bool) -> None:
    """Before torch 2.12 everything after it went to the recording's stream, and no memory came back."""
    cuda, reported = FakeCuda(monkeypatch, traps), []

    def function(x: Tensor) -> Tensor:
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x * 2

    run = GraphRunner(function, CudaCapture(torch.device("cuda")), report=reported.append)
    with torch.no_grad():
        assert run(x=torch.ones(2)).tolist() == [2.0] * 2
    assert cuda.current is cuda.default
    assert cuda.allocating is None
    assert set(cuda.users.values()) == {0}
    assert len(reported) == 1


def test_conditions_by_name() -> None:
    a, b, c = torch.rand(3, 2)
    cond = {"c_crossattn": [a, b], "c_concat": [c], "c_adm": b}
    assert list(flatten(cond)) == ["c_crossattn.0", "c_crossattn.1", "c_concat.0", "c_adm"]
    assert unflatten(flatten(cond)) == cond
    assert unflatten(flatten({"c_crossattn": [a], "c_concat": []})) == {"c_crossattn": [a]}


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("scale", [1.0, 5.0, [5.0, 2.0]], ids=["unguided", "one scale", "a scale for each"])
@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_a_denoisers_whole_step_is_one_replay(
    model: LatentDiffusion, parameterization: str, scale: float | list[float], rescale: float
) -> None:
    """Latents scaled, the UNet, guidance, x0: with the bits of the steps one by one."""
    plain, recorder = tiny_model(), Recorder()
    plain.parameterization = model.parameterization = parameterization
    graph_unet(model, recorder)
    cond, uncond = contexts(2, images=2)
    results = []
    with torch.inference_mode():
        for each in (plain, model):
            denoise = Denoiser(each, cond, uncond, scale, rescale=rescale)
            results.append([denoise(normal(2, 4, 8, 6) * sigma, sigma) for sigma in (14.0, 3.3, 0.1)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (recorder.captured, recorder.replayed) == (1, 3)


def test_recordings_can_be_freed(model: LatentDiffusion) -> None:
    recorder, (uncond, *conds) = Recorder(), contexts(2)
    free_recordings(model)  # there are none
    runner = graph_unet(model, recorder)
    guided_latents(model, conds, uncond)
    assert len(runner.entries) == 2
    free_recordings(model)
    assert (len(runner.entries), recorder.renewed) == (0, 1)


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
def test_on_a_gpu_a_denoisers_step_has_the_bits_of_the_eager_one(model: LatentDiffusion) -> None:
    """Over prompts, with guidance and without, and after the recordings were freed."""
    uncond, *conds = (context.cuda().half() for context in contexts(4))
    model.to("cuda", torch.float16)

    def latents() -> list[Tensor]:
        with torch.inference_mode():
            denoisers = [Denoiser(model, cond, uncond, 5.0, interval=(1.0, 1e9)) for cond in conds]
            x = normal(1, 4, 8, 8).cuda()
            return [denoise(x * sigma, sigma) for denoise in denoisers for sigma in (14.0, 3.3, 0.1)]

    expected = latents()
    graph_unet(model)
    keep_context(model)
    keep_timesteps(model)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(latents(), expected, strict=True))
        free_recordings(model)


@needs_cuda
def test_on_a_gpu_recordings_that_come_and_go(model: LatentDiffusion) -> None:
    """More kinds than are kept, each cleared generation with a pool of its own."""
    model.to("cuda", torch.float16)
    expected = {batch: steps(model, batch) for batch in (1, 2, 3)}
    graph_unet(model, most=2)
    for batch in (1, 2, 3, 1, 3, 2):
        assert all(torch.equal(a, b) for a, b in zip(steps(model, batch), expected[batch], strict=True))


@needs_cuda
def test_on_a_gpu_what_cannot_be_recorded_is_called() -> None:
    reported = []
    run = GraphRunner(lambda x: x * x.sum().item(), CudaCapture(torch.device("cuda")), report=reported.append)
    stream = torch.cuda.current_stream()
    with torch.no_grad():
        assert run(x=torch.ones(2, device="cuda")).tolist() == [2.0, 2.0]
        assert torch.cuda.current_stream() == stream
        assert run(x=torch.full((2,), 2.0, device="cuda")).tolist() == [8.0, 8.0]
    assert len(reported) == 1
