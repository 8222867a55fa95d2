"""Which options do what to a model: on the CPU, with stand-ins where only a GPU would do."""

from types import SimpleNamespace

import pytest
import torch
from tiny_sampling import Recorder, contexts, guided_latents, normal, relative_difference, tiny_model
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize import apply as module
from ldm.optimize import graph, openvino
from ldm.optimize.apply import apply, check_options, speed_up
from ldm.optimize.approximate import reuse_deep_features, widest_transformers

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))
DEFAULTS = {
    "attention_slicing": False,
    "vae_tiling": False,
    "tome": 0.0,
    "deepcache": 1,
    "low_vram": None,
    "eager": False,
    "compile": False,
    "precision": None,
    "kernels": "measured",
    "graphs": False,
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


def test_options_without_an_effect_on_a_cpu_are_reported(
    model: LatentDiffusion, notices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    apply(model, options(compile=True, low_vram="max", precision="autocast"), CPU)
    assert notices == [
        "--precision autocast: on a CPU all is computed in float32, as with full",
        "--low_vram: on a CPU there is only one memory, and nothing to save",
        "--compile: on a CPU it takes OpenVINO: pip install openvino; going on without",
    ]
    assert "first_stage_to" not in vars(model)


def test_tokens_that_are_not_there_are_not_merged(model: LatentDiffusion, notices: list[str]) -> None:
    """--tome did nothing for the x4 upscaler's UNet, which has no attention at its top, and said nothing."""
    unet = model.model.diffusion_model
    for transformer in widest_transformers(unet):
        for block in transformer.transformer_blocks:
            block.disable_self_attn = True
    apply(model, options(eager=True, tome=0.5), CPU)
    assert notices == [
        "--tome: this model has no self-attention at the latents' resolution; going on without"
    ]


def test_a_gpu_runs_the_plain_model_unless_asked(model: LatentDiffusion) -> None:
    """What has never run on a GPU must not be its default."""
    speed_up(model, options(), CUDA)
    assert not overridden(model)


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
    """--compile was ignored without a word, then --graphs and --kernels."""
    apply(other, options(), CPU)
    assert notices == []
    apply(other, options(compile=True, graphs=True, kernels="onednn"), CPU)
    assert [line.split()[0] for line in notices] == ["--compile", "--graphs", "--kernels"]
    assert all("OtherUNet" in line for line in notices)
    assert not overridden(other.model)  # whereas a large decode gives memory back, whatever the UNet


@pytest.mark.parametrize("changes", [{"tome": 0.5}, {"deepcache": 2}])
def test_approximations_need_our_unet(other: LatentDiffusion, changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match="--tome and --deepcache are for the UNet of this toolkit"):
        apply(other, options(**changes), CPU)


def test_graphs_change_no_bit(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps recorded, keys, values and timesteps kept, with a recorder that runs on a CPU."""
    recorder = Recorder()
    monkeypatch.setattr(graph, "CudaCapture", lambda device: recorder)
    uncond, *conds = contexts(4)
    speed_up(model, options(graphs=True), CUDA)
    kept, plain = (guided_latents(each, conds, uncond) for each in (model, tiny_model()))
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))
    assert recorder.captured == 2  # with guidance and without
    assert recorder.replayed == 4 * len(conds)


def test_whole_and_shallow_calls_are_recorded(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepCache gave up the graphs: one recording cannot hold what differs from step to step."""
    recorder = Recorder()
    monkeypatch.setattr(graph, "CudaCapture", lambda device: recorder)
    plain = tiny_model()
    apply(plain, options(deepcache=2, eager=True), CPU)
    speed_up(model, options(graphs=True), CUDA)
    reuse_deep_features(model, 2)
    uncond, *conds = contexts(3)
    found, expected = (guided_latents(each, conds, uncond) for each in (model, plain))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert recorder.captured == 4  # with guidance and without, whole and shallow
    assert recorder.replayed == 4 * len(conds)


def test_autocast_reads_copies_of_the_weights(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "CudaCapture", lambda device: Recorder())
    casts = []
    monkeypatch.setattr(module, "keep_casts", casts.append)
    speed_up(model, options(precision="half", graphs=True), CUDA)
    assert casts == []
    speed_up(model, options(precision="autocast", graphs=True), CUDA)
    assert casts == [model]


def test_graphs_and_kernels_without_an_effect_are_reported(
    model: LatentDiffusion, notices: list[str]
) -> None:
    apply(model, options(graphs=True, eager=True, kernels="onednn"), CPU)
    assert len(notices) == 2
    assert notices[0].startswith("--graphs: a cpu device records no steps")
    assert notices[1].startswith("--kernels onednn: for a CPU without --eager")


def test_graphs_need_weights_that_stay() -> None:
    with pytest.raises(InputError, match="--graphs and --low_vram exclude each other"):
        check_options(options(graphs=True, low_vram="max"), CUDA)
