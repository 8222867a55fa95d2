"""Deep features that are reused, tokens that are merged, and how near the images stay."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from tiny_sampling import Recorder, contexts, normal, tiny_model
from torch import Tensor

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.optimize.approximate import (
    merge_similar_tokens,
    merge_tokens,
    reuse_deep_features,
    widest_transformers,
)
from ldm.optimize.graph import Recording, graph_unet
from ldm.sampling import SAMPLERS, Denoiser
from ldm.sampling.run import default_trajectory


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def calls(model: LatentDiffusion, steps: list[float], batch: int = 1, seed: int = 0) -> list[Tensor]:
    """The UNet's outputs for fresh latents at each timestep."""
    context = normal(batch, 77, 32)
    return [
        model.apply_model(normal(batch, 4, 6, 5, seed=seed + n), torch.full((batch,), t), context)
        for n, t in enumerate(steps)
    ]


def computed(model: LatentDiffusion, work: Callable[[], object]) -> list[bool]:
    """For each call of the UNet whether its deep features were computed."""
    unet, seen = model.model.diffusion_model, []
    hooks = [
        unet.register_forward_pre_hook(lambda *_: seen.append(False)),
        unet.middle_block.register_forward_pre_hook(lambda *_: seen.__setitem__(-1, True)),
    ]
    work()
    for hook in hooks:
        hook.remove()
    return seen


def test_deep_features_of_every_call_are_the_plain_result() -> None:
    model, steps = tiny_model(), [900.0, 500.0, 400.0, 1.0]
    expected = calls(model, steps)
    reuse_deep_features(model, 1)
    assert all(torch.equal(a, b) for a, b in zip(calls(model, steps), expected, strict=True))


def test_deep_features_are_computed_at_every_third_call() -> None:
    model, steps = tiny_model(), [900.0, 700.0, 500.0, 300.0, 1.0]
    expected = calls(model, steps)
    reuse_deep_features(model, 3)
    results = []
    assert computed(model, lambda: results.extend(calls(model, steps))) == [True, False, False, True, False]
    exact = [torch.equal(a, b) for a, b in zip(results, expected, strict=True)]
    assert exact == [True, False, False, True, False]


@pytest.mark.parametrize(
    ("steps", "anew"),
    [
        ([900.0, 500.0, 900.0, 500.0], [True, False, True, False]),  # the next image
        ([900.0, 900.0, 900.0], [True, True, True]),  # images of one step each
        ([900.0, 100.0, 600.0, 300.0], [True, False, True, False]),  # the next run starts lower
        ([900.0, 500.0, 500.0, 1.0], [True, False, False, False]),  # a sampler that calls twice at a level
    ],
)
def test_a_run_begins_with_features_of_its_own(steps: list[float], anew: list[bool]) -> None:
    model = tiny_model()
    reuse_deep_features(model, 9)
    assert computed(model, lambda: calls(model, steps)) == anew


def test_another_shape_begins_anew() -> None:
    model = tiny_model()
    reuse_deep_features(model, 9)
    # guidance that ends within the run
    assert computed(model, lambda: [calls(model, [900.0, 500.0], 2), calls(model, [300.0, 1.0])]) == [
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("scale", [5.0, 1.0], ids=["guided", "unguided"])
def test_a_run_uses_no_features_of_another_run(scale: float) -> None:
    """Image to image that started where the run before had ended got the features of that run's image."""
    model, plain = tiny_model(), tiny_model()
    reuse_deep_features(model, 9)
    uncond, cond, other = contexts(3)

    def denoised(model: LatentDiffusion, cond: Tensor, sigmas: list[float]) -> Tensor:
        denoiser = Denoiser(model, cond.clone(), uncond, scale)  # batches never share a tensor
        for sigma in sigmas:
            x0 = denoiser(normal(1, 4, 8, 8, seed=len(sigmas)) * sigma, sigma)
        return x0

    denoised(model, cond, [14.0, 2.0])
    for start in (2.0, 1.0):  # lower than the first level of the run before, and not above its last
        assert torch.equal(denoised(model, other, [start]), denoised(plain, other, [start]))


def test_the_decision_reads_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU was waited for in every call, for its timestep."""
    model = tiny_model()
    reuse_deep_features(model, 2)
    cond, uncond = contexts(2)

    def work() -> list[bool]:
        denoiser = Denoiser(model, cond.clone(), uncond, 5.0)
        return computed(model, lambda: [denoiser(normal(1, 4, 8, 8), sigma) for sigma in (9.0, 3.0, 1.0)])

    assert work() == [True, False, True]
    for name in ("item", "tolist", "__bool__", "__float__"):
        monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("a tensor is read on the host"))
    assert work() == [True, False, True]


def test_recorded_calls_reuse_features(model: LatentDiffusion) -> None:
    """Of each shape, through images whose shapes take turns and a memory that is cleared in between."""
    plain, recorder = tiny_model(), Recorder()
    reuse_deep_features(plain, 3)
    reuse_deep_features(model, 3)
    runner = graph_unet(model, recorder)
    steps = [900.0, 700.0, 500.0, 300.0, 1.0]
    for batch in (1, 2, 1):
        found, expected = (calls(each, steps, batch, seed=batch) for each in (model, plain))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert recorder.captured == 4
    runner.clear()
    assert all(map(torch.equal, calls(model, steps, 2), calls(plain, steps, 2)))
    assert recorder.captured == 6


@pytest.mark.parametrize("failing", [1, 2], ids=["whole calls", "calls in between"])
def test_one_sort_of_call_may_not_be_recorded(model: LatentDiffusion, failing: int) -> None:
    """A recording of calls in between reads the features of plain whole calls, and the other way round."""

    class Capture(Recorder):
        attempts = 0

        def __call__(self, call: Callable[[], Tensor]) -> Recording:
            self.attempts += 1
            if self.attempts == failing:
                raise RuntimeError("not to be recorded")
            return super().__call__(call)

    plain, steps = tiny_model(), [900.0, 700.0, 500.0, 300.0, 1.0]
    reuse_deep_features(plain, 2)
    reuse_deep_features(model, 2)
    graph_unet(model, Capture())
    for seed in (1, 2):
        assert all(map(torch.equal, calls(model, steps, seed=seed), calls(plain, steps, seed=seed)))
    address = model.model.diffusion_model.forward.__self__.current.last.data_ptr()
    calls(model, steps)
    assert model.model.diffusion_model.forward.__self__.current.last.data_ptr() == address


def test_class_labels_are_part_of_a_run() -> None:
    with torch.inference_mode(False):
        unet = UNetModel(4, 32, 4, 1, [1], [1], num_classes=5, num_heads=2, context_dim=32, num_groups=8)
    reuse_deep_features(SimpleNamespace(model=SimpleNamespace(diffusion_model=unet)), 9)
    x, context, seen = normal(1, 4, 8, 8), contexts(1)[0], []
    unet.middle_block.register_forward_pre_hook(lambda *_: seen.append(t))
    labels = [torch.tensor([0]), torch.tensor([1])]
    for t, label in ((900.0, 0), (500.0, 0), (400.0, 1), (300.0, 1)):
        unet(x, torch.tensor([t]), context, labels[label])
    assert seen == [900.0, 400.0]


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7), (1, 3), (2, 1)])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_merged_tokens_are_averages_of_their_own(height: int, width: int, ratio: float) -> None:
    x = normal(2, height * width, 8)
    tokens, found = merge_tokens(x, height, width, ratio)
    stay = -(-height // 2) * -(-width // 2)
    count = min(int(ratio * height * width), height * width - stay)
    assert tokens.shape == (2, height * width - count, 8)
    for sample, places, merged in zip(x, found, tokens, strict=True):
        assert set(places.tolist()) == set(range(len(merged)))
        for place, token in enumerate(merged):
            torch.testing.assert_close(token, sample[places == place].mean(dim=0))


def test_the_most_alike_tokens_are_merged() -> None:
    x = torch.eye(4)[None]
    x[0, 3] = x[0, 0] * 3  # as the top left, but for its length
    tokens, found = merge_tokens(x, 2, 2, 0.25)
    assert tokens[0, 0].tolist() == [2.0, 0.0, 0.0, 0.0]
    assert found[0, 0] == found[0, 3] == 0


def test_no_merging_is_the_plain_result() -> None:
    model = tiny_model()
    expected = calls(model, [500.0])
    merge_similar_tokens(model, 0)
    assert torch.equal(calls(model, [500.0])[0], expected[0])


def test_only_self_attention_at_the_latents_resolution_is_merged() -> None:
    model = tiny_model()
    unet = model.model.diffusion_model
    expected = calls(model, [500.0])
    merge_similar_tokens(model, 0.5)
    widest = widest_transformers(unet)
    assert len(widest) == 3
    for layer in unet.modules():
        if isinstance(layer, SpatialTransformer):
            merged = ["forward" in vars(block.attn1) for block in layer.transformer_blocks]
            assert merged == [layer in widest]
    tokens = []
    hook = (
        widest[0]
        .transformer_blocks[0]
        .attn1.to_q.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
    )
    results = calls(model, [500.0])
    hook.remove()
    assert tokens == [15]
    assert 0 < (results[0] - expected[0]).abs().max() < expected[0].abs().max()


@pytest.mark.parametrize("ratio", [-0.1, 0.8])
def test_a_share_out_of_range_is_an_error(ratio: float) -> None:
    with pytest.raises(InputError, match="merged tokens"):
        merge_similar_tokens(tiny_model(), ratio)


def test_features_for_no_call_are_an_error() -> None:
    with pytest.raises(InputError, match="at least 1"):
        reuse_deep_features(tiny_model(), 0)


def images(model: LatentDiffusion) -> Tensor:
    prompts = ["a red cube left of a blue sphere on a grey background", "a small green cone"]
    denoiser = Denoiser(
        model, model.get_learned_conditioning(prompts), model.get_learned_conditioning([""]), 3.0
    )
    run = default_trajectory(denoiser, "ddim", 20)
    x = normal(2, 4, 8, 8) * (1 + run.sigmas[0] ** 2) ** 0.5
    latents = SAMPLERS["ddim"](denoiser, x, run.sigmas) * (1 + run.sigmas[-1] ** 2) ** -0.5
    return model.decode_first_stage(latents).clamp(-1, 1)


@pytest.fixture(scope="module")
def exact_images(loaded_bundled: LatentDiffusion) -> Tensor:
    with torch.inference_mode():
        return images(loaded_bundled)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("apply", "floor"),  # dB of the worse of two images; measured 31.8, 29.8 and 29.7
    [
        (lambda model: reuse_deep_features(model, 2), 29),
        (lambda model: reuse_deep_features(model, 3), 27),
        (lambda model: merge_similar_tokens(model, 0.5), 28),
    ],
    ids=["deepcache 2", "deepcache 3", "tome 0.5"],
)
def test_images_stay_near_the_exact_ones(
    bundled: LatentDiffusion, exact_images: Tensor, apply: Callable, floor: float
) -> None:
    apply(bundled)
    error = (images(bundled) - exact_images).square().mean(dim=(1, 2, 3))
    assert (10 * torch.log10(4 / error)).min() > floor
