"""Seamless images: layers that see the opposite edge, and what becomes of the edges of an image."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Result, refused
from tiny_sampling import Recorder, normal, relative_difference, tiny_model
from torch import Tensor, nn

from ldm.errors import FieldError
from ldm.images.pixels import to_float
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize import norm, winograd
from ldm.optimize.graph import graph_unet
from ldm.optimize.guidance import share_prefix
from ldm.optimize.layers import FOLDED, KERNELS, has_onednn, use_kernels
from ldm.optimize.norm import fuse_norms
from ldm.optimize.tiling import tile_first_stage
from ldm.pipeline import ImageRequest, Pipeline
from ldm.pipeline.drawing import seamless as drawing_seamless
from ldm.pipeline.first_stage import FirstStage
from ldm.pipeline.seams import cropped, decode, dims_of, extended, seamless
from ldm.sampling.denoiser import timesteps

Load = Callable[..., Pipeline]
AXES = {"x": (3,), "y": (2,), "both": (3, 2)}


@pytest.fixture(params=["eager", "folded", "onednn", "winograd", "fused norms"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LatentDiffusion:
    """The miniature with plain layers, and with each kind of fast ones."""
    model = tiny_model()
    if request.param == "fused norms":  # of --compile on a GPU, here with torch's own kernels
        monkeypatch.setattr(norm, "can_fuse", lambda device, dtype: True)
        monkeypatch.setattr(norm, "fused_group_norm", lambda: norm.plain_group_norm)
        assert fuse_norms(model)
    elif request.param != "eager":
        if request.param != "folded" and not has_onednn(torch.float32):
            pytest.skip("this processor or torch has no oneDNN")
        monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 32)  # the miniature's are few
        use_kernels(model, KERNELS.get(request.param, FOLDED))
        share_prefix(model)
    return model


@pytest.fixture(scope="module")
def bundled() -> Pipeline:
    return Pipeline.load(safety="off")


def networks(model: LatentDiffusion) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor, int, int]]:
    """Each network as a function, its input, by how much that is rolled, and the output with it."""
    context, t = normal(2, 5, 32, seed=1), timesteps(400.0, 2, torch.device("cpu"), True)
    return {
        "unet": (lambda x: model.apply_model(x, t, context), normal(1, 4, 6, 8).expand(2, -1, -1, -1), 2, 2),
        "decoder": (model.decode_first_stage, normal(1, 4, 3, 5), 1, 8),
        "encoder": (lambda x: model.encode_first_stage(x).mean, normal(1, 3, 24, 40), 8, 1),
    }


@torch.inference_mode()
@pytest.mark.parametrize("tiling", AXES)
def test_an_image_that_is_rolled_is_drawn_rolled(fast: LatentDiffusion, tiling: str) -> None:
    dims = dims_of(tiling)
    assert sorted(dims) == sorted(AXES[tiling])
    for name, (function, x, shift, moved) in networks(fast).items():
        plain = function(x)
        with seamless(fast, dims, dims):
            whole = function(x)
            for dim in (2, 3):
                rolled = function(x.roll(shift, dim))
                same = relative_difference(rolled, whole.roll(moved, dim)) < 1e-5
                assert same == (dim in dims), (name, dim)
        assert relative_difference(plain, whole) > 1e-3, name
        assert torch.equal(function(x), plain), name  # taken off again, to the bit


@torch.inference_mode()
def test_it_is_torchs_circular_padding() -> None:
    model, reference = tiny_model(), tiny_model()
    for module in reference.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    for name in ("unet", "decoder"):
        function, x, *_ = networks(model)[name]
        with seamless(model, (2, 3), (2, 3)):
            assert relative_difference(function(x), networks(reference)[name][0](x)) < 1e-6


@torch.inference_mode()
def test_layers_have_their_own_methods_again(fast: LatentDiffusion) -> None:
    def own() -> list[dict[str, object]]:
        return [
            {name: value for name, value in vars(module).items() if "forward" in name}
            for module in fast.modules()
        ]

    before = own()
    with seamless(fast, (3,), (3,)):
        assert own() != before
    assert own() == before


@torch.inference_mode()
def test_steps_are_recorded_anew() -> None:
    model, plain = tiny_model(), tiny_model()
    graph_unet(model, Recorder())
    function, x, *_ = networks(model)["unet"]
    expected, _, *_ = networks(plain)["unet"]
    for dims in ((), (3,), (), (2, 3)):
        with seamless(model, dims, dims), seamless(plain, dims, dims):
            assert torch.equal(function(x), expected(x))
            assert torch.equal(function(x), expected(x))  # replayed


def test_a_small_map_goes_around_more_than_once() -> None:
    x = torch.arange(3.0).reshape(1, 1, 1, 3)
    assert extended(x, 4, (3,)).flatten().tolist() == [2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert torch.equal(cropped(extended(x, 4, (2, 3)), 4, (2, 3)), x)
    last = normal(1, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    assert extended(last, 2, (2, 3)).is_contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def test_tiles_of_the_autoencoder_go_on_beyond_the_edges() -> None:
    """Each of them ends somewhere in the image, so that none may continue in itself."""
    model, stage = tiny_model(), FirstStage(tiny_model())
    z = normal(1, 4, 8, 80)
    expected = decode(FirstStage(model), z, 0, (3,), in_tiles=False)
    tile_first_stage(stage.model)

    def error(dims: tuple[int, ...]) -> float:
        """At the edges, where only the continuation tells the two apart."""
        found = decode(stage, z, 0, dims, in_tiles=True)
        assert found.shape == expected.shape
        return max(relative_difference(found[..., edge], expected[..., edge]) for edge in (0, -1))

    assert error((3,)) < 0.5 * error(())


# On the bundled model


def jumps(pixels: np.ndarray, axis: int) -> np.ndarray:
    """Mean differences between neighbouring rows (0) or columns (1); the last is across the seam."""
    values = pixels.astype(float)
    others = tuple(i for i in range(3) if i != axis)
    return np.abs(np.roll(values, -1, axis) - values).mean(axis=others)


@pytest.fixture(scope="module")
def drawn(bundled: Pipeline) -> dict[str, list[np.ndarray]]:
    requests = [
        ImageRequest("a red cube left of a blue sphere", seed=seed, steps=10, tiling=tiling)
        for tiling in ("none", *AXES)
        for seed in range(3)
    ]
    images = [image.pixels for image in bundled.generate(requests)]
    return {tiling: images[3 * k : 3 * k + 3] for k, tiling in enumerate(("none", *AXES))}


@pytest.mark.parametrize("tiling", AXES)
def test_edges_continue(drawn: dict[str, list[np.ndarray]], tiling: str) -> None:
    for dim in AXES[tiling]:
        axis = dim - 2
        for pixels in drawn[tiling]:
            across, inside = np.split(jumps(pixels, axis)[::-1], [1])
            assert across[0] <= inside.max()
        seams = [np.mean([jumps(pixels, axis)[-1] for pixels in drawn[which]]) for which in ("none", tiling)]
        assert seams[1] < seams[0]  # the floor is the same on both sides anyway, below and above it is not
    if tiling != "x":
        assert seams[1] < 0.25 * seams[0]


def test_an_image_alone_is_the_image_of_a_mixed_batch(load: Load, bundled: Pipeline) -> None:
    requests = [
        ImageRequest("a cat", seed=k, steps=2, tiling=tiling, sampler="euler_ancestral")
        for k, tiling in enumerate(("none", "x", "x", "both", "none", "x"))
    ]
    pipeline = load(batch_size=3)
    together = [image.pixels for image in pipeline.generate(requests)]
    for request, pixels in zip(requests, together, strict=True):
        (alone,) = pipeline.generate([request])
        assert np.abs(alone.pixels.astype(int) - pixels).max() <= 1
    assert not np.array_equal(together[1], next(pipeline.generate([requests[1].twin(tiling="none")])).pixels)


def test_an_init_image_continues_too(load: Load) -> None:
    """Rolled by a multiple of what the UNet halves, it is its latents, rolled."""
    pipeline = load()
    x = to_float([np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)])
    request = ImageRequest("", height=16, width=32, tiling="x")
    with torch.inference_mode(), drawing_seamless(pipeline, request):
        a = pipeline.first_stage.encode([x[0]]).mean
        b = pipeline.first_stage.encode([x[0].roll(8, 2)]).mean
    assert relative_difference(b, a.roll(1, 3)) < 1e-5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tiling": "z"}, "invalid choice: 'z' (choose from none, x, y, both)"),
        ({"tiling": "x", "init_img": "a.png", "strength": 1, "outpaint": (8, 0, 0, 0)}, "outpaint"),
        ({"tiling": "x", "init_img": "a.png", "strength": 1, "mask": "b", "crop_to_mask": 8}, "crop_to_mask"),
        ({"tiling": "x", "init_img": "a.png", "noise_level": 20}, "noise_level"),
        ({"panorama": True, "init_img": "a.png", "noise_level": 20}, "noise_level"),
    ],
)
def test_settings_that_do_not_go_together(values: dict[str, object], words: str) -> None:
    with pytest.raises(FieldError, match=r"tiling|panorama") as error:
        ImageRequest("a cat", **values)
    assert words in str(error.value)


def test_bad_lines_on_the_command_line(
    command: Callable[..., Result], model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "model", property(lambda self: pytest.fail("the model was loaded")))
    base = ("txt2img", "--config", model[0], "--ckpt", model[1], "--device", "cpu")
    refused(command(*base, "--tiling", "x", "--compile"), "--tiling x with --compile on a CPU")
    refused(command(*base, "--tiling", "left"), "argument --tiling", "'left'", "'x'", "'both'")
    refused(command(*base, "--panorama", "--deepcache", 3), "--panorama with --deepcache 3")
