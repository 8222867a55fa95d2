"""Keys and values that are computed once for a prompt: against the plain model, bit for bit."""

import pytest
import tiny
import torch
from test_graph import Recorder
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import BasicTransformerBlock
from ldm.optimize.context import MOST, keep_context
from ldm.optimize.graph import graph_unet
from ldm.sampling import Denoiser, default_trajectory, sample
from ldm.sampling.noise import ImageNoise
from ldm.util import instantiate_from_config


@pytest.fixture
def model() -> LatentDiffusion:
    model = instantiate_from_config(tiny.MODEL)
    model.load_state_dict(tiny.state_dict(), strict=False)
    return model.eval().requires_grad_(False)


def contexts(count: int, images: int = 1, tokens: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(images, tokens, 32, generator=generator) for _ in range(count)]


def pictures(model: LatentDiffusion, conds: list[Tensor], uncond: Tensor) -> list[Tensor]:
    """Latents of four guided steps for each prompt; guidance ends before the last."""
    made = []
    with torch.inference_mode():
        for cond in conds:
            denoiser = Denoiser(model, cond, uncond, 5.0, interval=(1.0, 1e9))
            run = default_trajectory(denoiser, "ddim", 4)
            made.append(sample(denoiser, "ddim", run, ImageNoise([7], (4, 8, 8), torch.device("cpu"))))
    return made


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
    plain = pictures(model, conds, uncond)
    layers = 2 * sum(isinstance(module, BasicTransformerBlock) for module in model.modules())
    undo = keep_context(model)
    calls = count_calls(monkeypatch)
    kept = pictures(model, conds, uncond)
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))
    # of both prompts with guidance, of the prompt alone without, for each of the two pictures
    assert calls == ([2] * layers + [1] * layers) * 2
    undo()
    assert not any("forward" in vars(module) for module in model.modules())


def test_recorded_steps_read_what_is_kept(model: LatentDiffusion) -> None:
    """A second prompt of the same shape goes where the first one was, which is where a recording reads."""
    uncond, *conds = contexts(4)
    plain = pictures(model, conds, uncond)
    recorder = Recorder()
    runner, undo_graph = graph_unet(model, recorder)
    undo = keep_context(model)
    kept = pictures(model, conds, uncond)
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))
    assert recorder.captured == len(runner.entries) == 2
    undo()
    undo_graph()
    assert not any("forward" in vars(module) for module in model.modules())


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
