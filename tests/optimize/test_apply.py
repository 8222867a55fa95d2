"""Which options do what to a model: on the CPU, with stand-ins where only a GPU would do."""

from types import SimpleNamespace

import pytest
import torch
from tiny_sampling import Recorder, contexts, guided_latents, normal, relative_difference, tiny_model
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize import apply as module
from ldm.optimize import graph
from ldm.optimize.apply import apply, check_options, speed_up

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))
DEFAULTS = {
    "attention_slicing": False,
    "vae_tiling": False,
    "tome": 0.0,
    "deepcache": 1,
    "low_vram": None,
    "eager": False,
    "compile": False,
}


def options(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(**(DEFAULTS | changes))


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(module, "notice", found.append)
    return found


def outputs(model: LatentDiffusion) -> list[Tensor]:
    context, x = normal(2, 5, 32), normal(2, 4, 8, 8)
    with torch.inference_mode():
        return [model.apply_model(x, torch.tensor([3.0, 3.0]), context), model.decode_first_stage(x[:1])]


def overridden(model: LatentDiffusion) -> bool:
    names = {"forward", "run", "attend", "encode_first_stage", "decode_first_stage", "first_stage_to"}
    return any(names & vars(layer).keys() or layer._forward_pre_hooks for layer in model.modules())


class OtherUNet(nn.Module):
    """The UNet of another package."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor | None = None) -> Tensor:
        return self.layer(x)


@pytest.fixture
def other(model: LatentDiffusion) -> LatentDiffusion:
    model.model.diffusion_model = OtherUNet()
    return model


def test_the_defaults_change_rounding_only(model: LatentDiffusion, notices: list[str]) -> None:
    expected = outputs(model)
    apply(model, options(), CPU)
    assert overridden(model)
    assert all(relative_difference(a, b) < 2e-6 for a, b in zip(outputs(model), expected, strict=True))
    assert notices == []


def test_eager_leaves_the_model_as_it_is(model: LatentDiffusion, notices: list[str]) -> None:
    apply(model, options(eager=True), CPU)
    assert not overridden(model)
    assert notices == []


@pytest.mark.parametrize(
    "changes", [{"attention_slicing": True}, {"vae_tiling": True}, {"tome": 0.5}, {"deepcache": 2}]
)
def test_each_option_reaches_the_model_and_goes_with_eager(
    model: LatentDiffusion, changes: dict[str, object]
) -> None:
    apply(model, options(eager=True, **changes), CPU)
    assert overridden(model)


@pytest.mark.parametrize("device", [CUDA, MPS])
@pytest.mark.parametrize("low_vram", ["parts", "max"])
def test_compile_and_low_vram_exclude_each_other(
    model: LatentDiffusion, device: torch.device, low_vram: str
) -> None:
    """--compile was ignored without a word."""
    wrong = options(compile=True, low_vram=low_vram, attention_slicing=True)
    with pytest.raises(InputError, match="--compile and --low_vram"):
        check_options(wrong, device)
    with pytest.raises(InputError, match="--compile and --low_vram"):
        apply(model, wrong, device)
    assert not overridden(model)


def test_options_without_an_effect_on_a_cpu_are_reported(model: LatentDiffusion, notices: list[str]) -> None:
    apply(model, options(compile=True, low_vram="max"), CPU)
    assert notices == [
        "--low_vram: on a CPU there is only one memory, and nothing to save",
        "--compile: on a CPU it is no faster than what is done without it",
    ]
    assert "first_stage_to" not in vars(model)


@pytest.mark.parametrize(("low_vram", "by_layer"), [("parts", False), ("max", True)])
def test_low_vram_offloads_and_does_nothing_else(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch, low_vram: str, by_layer: bool
) -> None:
    calls = []
    monkeypatch.setattr(module, "offload", lambda *args, **kwargs: calls.append((args, kwargs)))
    apply(model, options(low_vram=low_vram), CUDA)
    assert calls == [((model, CUDA), {"by_layer": by_layer})]
    assert not overridden(model)


def test_the_unet_of_another_package_stays_as_it_is(other: LatentDiffusion, notices: list[str]) -> None:
    """--compile was ignored without a word."""
    apply(other, options(), CPU)
    assert notices == []
    apply(other, options(compile=True), CPU)
    assert len(notices) == 1
    assert "--compile" in notices[0]
    assert "OtherUNet" in notices[0]
    assert not overridden(other)


@pytest.mark.parametrize("changes", [{"tome": 0.5}, {"deepcache": 2}])
def test_approximations_need_our_unet(other: LatentDiffusion, changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match="--tome and --deepcache are for the UNet of this toolkit"):
        apply(other, options(**changes), CPU)


def test_the_defaults_of_a_gpu_change_no_bit(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps recorded, keys, values and timesteps kept, with a recorder that runs on a CPU."""
    recorder = Recorder()
    monkeypatch.setattr(graph, "CudaCapture", lambda device: recorder)
    uncond, *conds = contexts(4)
    speed_up(model, options(), CUDA)
    kept, plain = (guided_latents(each, conds, uncond) for each in (model, tiny_model()))
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))
    assert recorder.captured == 2  # with guidance and without
    assert recorder.replayed == 4 * len(conds)


def test_deep_features_are_not_recorded(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(graph, "CudaCapture", lambda device: recorder)
    speed_up(model, options(deepcache=2), CUDA)
    uncond, *conds = contexts(2)
    guided_latents(model, conds, uncond)
    assert recorder.captured == 0
