"""Keys and values that are computed once for a prompt: against the plain model, bit for bit."""

import pytest
import torch
from tiny_sampling import Recorder, contexts, guided_latents
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import BasicTransformerBlock
from ldm.optimize.context import MOST, keep_context
from ldm.optimize.graph import graph_unet


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each projection that a `KeptContext` computes."""
    calls, plain = [], torch.nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[1] == 32 and x.shape[1] == 5:  # a context
            calls.append(len(x))
        return plain(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    return calls


def test_a_run_computes_them_once_for_each_prompt(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    uncond, *conds = contexts(3)
    plain = guided_latents(model, conds, uncond)
    layers = 2 * sum(isinstance(module, BasicTransformerBlock) for module in model.modules())
    keep_context(model)
    calls = count_calls(monkeypatch)
    kept = guided_latents(model, conds, uncond)
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))
    # of both prompts with guidance, of the prompt alone without, for each of the two images
    assert calls == ([2] * layers + [1] * layers) * 2


@pytest.mark.parametrize("kept_first", [False, True])
def test_recorded_steps_read_what_is_kept(model: LatentDiffusion, kept_first: bool) -> None:
    """A second prompt of the same shape goes where the first one was, which is where a recording reads."""
    uncond, *conds = contexts(4)
    plain = guided_latents(model, conds, uncond)
    recorder = Recorder()
    if kept_first:
        keep_context(model)
    runner = graph_unet(model, recorder)
    if not kept_first:
        keep_context(model)
    kept = guided_latents(model, conds, uncond)
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))
    assert recorder.captured == len(runner.entries) == 2


def test_a_recording_does_not_read_what_is_kept_no_more(model: LatentDiffusion) -> None:
    """Calls beside the recordings, those with ControlNets, let keys and values go that a recording read."""
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])
    first, *others = [contexts(1, tokens=tokens)[0] for tokens in range(1, MOST + 2)]
    recorder = Recorder()
    keep_context(model)
    graph_unet(model, recorder)
    with torch.no_grad():
        before = model.apply_model(x, t, first)
        assert recorder.captured == 1
        for context in others:
            type(model).apply_model(model, x, t, context)
        assert torch.equal(model.apply_model(x, t, first), before)
    assert recorder.captured == 2


def test_shapes_come_and_go(model: LatentDiffusion) -> None:
    """More shapes of contexts than are kept, and the first again."""
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])
    sizes = [contexts(1, tokens=tokens)[0] for tokens in range(1, MOST + 3)]
    runs = [*sizes, sizes[0], sizes[-1]]
    with torch.inference_mode():
        plain = [model.apply_model(x, t, context) for context in runs]
        keep_context(model)
        kept = [model.apply_model(x, t, context) for context in runs]
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))


def test_with_gradients_nothing_is_kept(model: LatentDiffusion) -> None:
    context = contexts(1)[0].requires_grad_()
    keep_context(model)
    model.apply_model(torch.ones(1, 4, 8, 8), torch.tensor([3.0]), context).sum().backward()
    assert context.grad.abs().sum() > 0


def test_each_autocast_type_has_its_own(model: LatentDiffusion) -> None:
    """The dtype was not part of the key: keys and values in bfloat16 met queries in float16."""
    x, t, context = torch.ones(1, 4, 8, 8), torch.tensor([3.0]), contexts(1)[0]

    def outputs() -> list[Tensor]:
        found = []
        for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
            with torch.inference_mode(), torch.autocast("cpu", dtype=dtype):
                found.append(model.apply_model(x, t, context))
        return found

    plain = outputs()
    keep_context(model)
    kept = outputs()
    assert [a.dtype for a in kept] == [a.dtype for a in plain]
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))


@pytest.mark.parametrize("first", [True, False], ids=["the first context", "a later one"])
def test_memory_that_ends_half_way_leaves_no_mixture(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """Some layers had the new context's keys and values, and the old context was still taken for theirs."""
    x, t, (old, new) = torch.ones(1, 4, 8, 8), torch.tensor([3.0]), contexts(2)
    with torch.inference_mode():
        plain = [model.apply_model(x, t, context) for context in (old, new)]
        keep_context(model)
        if not first:
            model.apply_model(x, t, old)
        linear, calls = torch.nn.functional.linear, []

        def failing(*args: Tensor) -> Tensor:
            calls.append(args)
            if len(calls) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return linear(*args)

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", failing)
            with pytest.raises(torch.OutOfMemoryError):
                model.apply_model(x, t, new)
        found = [model.apply_model(x, t, context) for context in (old, new)]
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    context = new.clone().requires_grad_()  # no call is under way any more: the plain layers are called
    model.apply_model(x, t, context).sum().backward()
    assert context.grad.abs().sum() > 0
