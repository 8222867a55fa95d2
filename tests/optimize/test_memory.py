"""Tiles, slices and offloaded weights: the same picture from less memory."""

import functools
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.model import AttnBlock
from ldm.optimize.memory import peak_memory, reset_peak_memory
from ldm.optimize.offload import ALIGNMENT, offload, unet_units
from ldm.optimize.slicing import slice_attention, sliced_attention
from ldm.optimize.tiling import spans, tile_first_stage
from ldm.scenes import scenes
from ldm.util import instantiate_from_config
from ldm.weights.loading import BUNDLED_CONFIG, BUNDLED_WEIGHTS, find, load_model, read_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def tiny_model() -> LatentDiffusion:
    with torch.inference_mode(False):
        model = instantiate_from_config(tiny.MODEL)
        model.load_state_dict(tiny.state_dict())
        return model.eval().requires_grad_(False)


@functools.cache
def bundled() -> LatentDiffusion:
    with torch.inference_mode(False):
        return load_model(read_config(find(BUNDLED_CONFIG)), find(BUNDLED_WEIGHTS))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def psnr(a: Tensor, b: Tensor) -> float:
    """Of pictures in [-1, 1]."""
    return 10 * torch.log10(4 / (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean()).item()


# tiles


@pytest.mark.parametrize(("tile", "overlap"), [(64, 16), (8, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("scale", [1, 8])
def test_the_weights_of_tiles_add_up_to_one(tile: int, overlap: int, scale: int) -> None:
    for length in range(1, 4 * tile):
        total, previous = torch.zeros(length * scale), None
        for span in spans(length, tile, overlap, scale):
            assert span.stop - span.start == min(tile, length)
            assert previous is None or previous.stop - span.start >= overlap
            assert span.weight.min() >= 0
            total[span.of(scale)] += span.weight
            previous = span
        assert previous.stop == length
        torch.testing.assert_close(total, torch.ones_like(total))


def test_tiles_are_as_few_as_the_overlap_allows() -> None:
    assert [len(spans(length, 64, 16, 1)) for length in (1, 64, 65, 112, 113, 160)] == [1, 1, 2, 2, 3, 3]


def test_a_picture_within_one_tile_is_decoded_and_encoded_as_without_tiles() -> None:
    model, z, x = tiny_model(), normal(2, 4, 8, 5), normal(2, 3, 64, 40)
    decoded, posterior = model.decode_first_stage(z), model.encode_first_stage(x)
    tile_first_stage(model, tile=8, overlap=2)
    assert torch.equal(model.decode_first_stage(z), decoded)
    assert torch.equal(model.encode_first_stage(x).mean, posterior.mean)
    assert torch.equal(model.encode_first_stage(x).logvar, posterior.logvar)


@pytest.mark.parametrize("size", [(9, 8), (17, 23), (3, 40), (1, 9)])
def test_tiles_of_any_picture_in_a_batch(size: tuple[int, int]) -> None:
    model = tiny_model()
    h, w = size
    tile_first_stage(model, tile=8, overlap=2)
    z, x = normal(3, 4, h, w), normal(3, 3, 8 * h, 8 * w)
    decoded, posterior = model.decode_first_stage(z), model.encode_first_stage(x)
    assert decoded.shape == (3, 3, 8 * h, 8 * w)
    assert posterior.mean.shape == posterior.logvar.shape == z.shape
    assert decoded.isfinite().all()
    # an image does not depend on its company
    assert torch.equal(decoded[1:2], model.decode_first_stage(z[1:2]))
    assert torch.equal(posterior.mean[1:2], model.encode_first_stage(x[1:2]).mean)


def picture(side: int) -> Tensor:
    rng = np.random.default_rng(3)
    pixels = scenes.render(scenes.random_scene(rng), rng, side)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_tiles_against_the_whole_picture() -> None:
    model, x = bundled(), picture(512)
    posterior = model.encode_first_stage(x)
    z = model.get_first_stage_encoding(posterior.mode())
    whole = model.decode_first_stage(z)
    undo = tile_first_stage(model, tile=32, overlap=8)
    try:
        tiled, tiled_posterior = model.decode_first_stage(z), model.encode_first_stage(x)
    finally:
        undo()
    assert torch.equal(model.decode_first_stage(z), whole)  # undone
    assert psnr(tiled, whole) > 40  # measured 43.6
    error = (tiled_posterior.mean - posterior.mean).square().mean() / posterior.mean.var()
    assert -10 * torch.log10(error) > 30

    # no seams: where tiles meet, steps from pixel to pixel are the whole picture's to a grey level, and no
    # larger than anywhere else
    steps = (tiled.diff(dim=3) - whole.diff(dim=3)).square().mean(dim=(0, 1, 2)).sqrt() * 127.5
    seam = torch.zeros(len(steps), dtype=torch.bool)
    for left, right in pairwise(spans(64, 32, 8, 8)):
        middle = (left.stop + right.start) * 4
        seam[middle - 33 : middle + 33] = True
    assert steps[seam].max() < 1  # measured 0.74; tiles on their own, put side by side, are 35 apart
    assert steps[seam].max() <= steps[~seam].max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiles_in_half_precision(dtype: torch.dtype) -> None:
    model, z = tiny_model(), normal(1, 4, 12, 12)
    tile_first_stage(model, tile=8, overlap=2)
    expected = model.decode_first_stage(z)
    with torch.inference_mode(False):
        model.to(dtype)
    decoded = model.decode_first_stage(z.to(dtype))
    assert decoded.dtype == dtype
    assert (decoded.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_the_statistics_are_forgotten_when_a_tile_fails() -> None:
    model, z = tiny_model(), normal(1, 4, 12, 12)
    plain = model.decode_first_stage
    calls = []

    def failing(z: Tensor) -> Tensor:
        calls.append(z.shape)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return plain(z)

    whole = model.decode_first_stage(z)
    model.decode_first_stage = failing
    tile_first_stage(model, tile=8, overlap=2)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.decode_first_stage(z)
    assert calls == [(1, 4, 8, 8)] * 3
    assert torch.equal(plain(z), whole)


@pytest.mark.parametrize(("tile", "overlap"), [(64, 0), (64, 22), (2, 1), (0, 0)])
def test_an_overlap_that_cannot_be_blended_is_an_error(tile: int, overlap: int) -> None:
    with pytest.raises(InputError, match="overlap"):
        tile_first_stage(tiny_model(), tile, overlap)


# slices


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("limit", [1, 700, 2 * 2 * 49 * 7, 10**9])
def test_slices_of_attention_equal_the_whole(limit: int) -> None:
    q, k, v = normal(2, 2, 49, 16), normal(2, 2, 49, 16, seed=1), normal(2, 2, 49, 16, seed=2)
    attend = nn.functional.scaled_dot_product_attention
    sliced = sliced_attention(attend, limit, q, k, v)
    torch.testing.assert_close(sliced, attend(q, k, v), rtol=1e-6, atol=1e-6)


def test_slices_bound_the_attention_matrix_of_unet_and_autoencoder() -> None:
    model, limit = tiny_model(), 2**14
    x, t, context, h = (
        normal(2, 4, 16, 16),
        torch.tensor([7.0, 900.0]),
        normal(2, 77, 32),
        normal(1, 32, 32, 32),
    )

    def work() -> tuple[list[Tensor], int]:
        # as on a device without fused kernels; inference mode would hide what attention is made of
        with torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Largest() as largest:
            return [
                model.apply_model(x, t, context),
                model.first_stage_model.decoder.mid(h),
            ], largest.elements

    expected, plain = work()
    undo = slice_attention(model, limit)
    results, sliced = work()
    assert plain == 32**4  # the autoencoder's one head over all pixels
    assert (
        sliced <= 2 * 16 * 16 * 8 * 32
    )  # the UNet's features: the attention matrix is no longer the largest
    for result, whole in zip(results, expected, strict=True):
        torch.testing.assert_close(result, whole, rtol=1e-6, atol=1e-6 * whole.abs().max().item())
    undo()
    assert not any("attend" in vars(module) for module in model.modules())


def test_only_this_models_attention_is_sliced() -> None:
    model, other = tiny_model(), tiny_model()
    slice_attention(model)
    kinds = {type(module) for module in model.modules() if "attend" in vars(module)}
    assert kinds == {CrossAttention, AttnBlock}
    assert not any("attend" in vars(module) for module in other.modules())


def test_a_slice_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        slice_attention(tiny_model(), 0)


# offloading


class SlowTransfer:
    """Copies that arrive only when they are waited for; until then their target holds NaN."""

    def __init__(self) -> None:
        self.begun: list[tuple[Tensor, Tensor]] = []
        self.blocks: dict[int, int] = {}  # bytes by address
        self.copies = 0

    def copy(self, source: Tensor, target: Tensor) -> None:
        assert source.data_ptr() not in self.blocks, "a block of the device is no source"
        target.fill_(255)
        self.begun.append((source, target))
        self.copies += 1

    def join(self) -> None:
        for source, target in self.begun:
            target.copy_(source)
        self.begun.clear()


def work(model: LatentDiffusion) -> list[Tensor]:
    """Twice what a run calls."""
    results = []
    for seed in (1, 2):
        context = model.get_learned_conditioning([f"a house {seed}"])
        x = normal(1, 4, 8, 6, seed=seed)
        for step in (900.0, 500.0, 1.0):
            x = model.apply_model(x, torch.tensor([step]), context)
        decoded = model.decode_first_stage(x)
        results += [context, x, decoded, model.encode_first_stage(decoded).mean]
    return results


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_weights_give_the_same_bits(by_layer: bool, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    context, z = normal(2, 77, 32).to(dtype), normal(2, 4, 8, 6).to(dtype)

    def results() -> list[Tensor]:
        eps = model.apply_model(z, torch.tensor([3.0, 99.0]), context)
        return [model.get_learned_conditioning(["a cat"]), eps, eps * 2, model.decode_first_stage(z)]

    expected = results()
    undo = offload(model, CPU, by_layer, SlowTransfer())
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
    undo()
    assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_run_with_offloading(by_layer: bool) -> None:
    model = tiny_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = work(model)
    undo = offload(model, CPU, by_layer, SlowTransfer())
    assert all(torch.equal(a, b) for a, b in zip(work(model), expected, strict=True))
    undo()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not {"apply_model", "decode_first_stage", "get_learned_conditioning"} & vars(model).keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_one_part_at_a_time_is_on_the_device() -> None:
    model, transfer = tiny_model(), SlowTransfer()
    offload(model, CPU, transfer=transfer)
    parts = {"text": model.cond_stage_model, "unet": model.model, "vae": model.first_stage_model}
    homes = {name: {p.data_ptr() for p in part.parameters()} for name, part in parts.items()}

    def away() -> list[str]:
        return [n for n, part in parts.items() if not {p.data_ptr() for p in part.parameters()} <= homes[n]]

    assert away() == []
    context = model.get_learned_conditioning(["a cat"])
    assert away() == ["text"]
    for _ in range(3):
        x = model.apply_model(normal(1, 4, 8, 8), torch.tensor([3.0]), context)
        assert away() == ["unet"]
    model.decode_first_stage(x)
    assert away() == ["vae"]
    assert transfer.copies == 3  # the UNet stayed for its three calls


def test_two_blocks_of_the_unet_at_a_time_are_on_the_device() -> None:
    model, transfer = tiny_model(), SlowTransfer()
    units = unet_units(model.model.diffusion_model)
    largest = max(
        sum(-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in unit.state_dict().values()) for unit in units
    )
    homes = []
    seen = []

    def watch(*_: object) -> None:
        away = [n for n, unit in enumerate(units) if {p.data_ptr() for p in unit.parameters()} - homes[n]]
        storages = {
            p.untyped_storage().data_ptr(): len(p.untyped_storage())
            for n in away
            for p in units[n].parameters()
        }
        seen.append(away)
        assert list(storages.values()) == [largest]

    offload(model, CPU, by_layer=True, transfer=transfer)
    homes += [{p.data_ptr() for p in unit.parameters()} for unit in units]
    hooks = [unit.register_forward_pre_hook(watch) for unit in units]
    for _ in range(2):
        model.apply_model(normal(1, 4, 8, 8), torch.tensor([3.0]), normal(1, 77, 32))
    assert seen == [[n] for n in range(len(units))] * 2
    assert transfer.copies == 2 * len(units) + 1  # the last prefetch is for a step that does not come
    for hook in hooks:
        hook.remove()


def test_a_block_out_of_turn_is_fetched() -> None:
    model = tiny_model()
    unet = model.model.diffusion_model
    h, emb, context = normal(1, 4, 8, 8), normal(1, 128), normal(1, 77, 32)
    expected = unet.input_blocks[0](h, emb, context)
    offload(model, CPU, by_layer=True, transfer=SlowTransfer())
    model.apply_model(h, torch.tensor([3.0]), context)
    for _ in range(2):
        assert torch.equal(unet.input_blocks[0](h, emb, context), expected)


def test_an_error_within_a_block_leaves_the_model_usable() -> None:
    model = tiny_model()
    x, t, context = normal(1, 4, 8, 8), torch.tensor([3.0]), normal(1, 77, 32)
    expected = model.apply_model(x, t, context)
    undo = offload(model, CPU, by_layer=True, transfer=SlowTransfer())
    with pytest.raises(RuntimeError):
        model.apply_model(x, t, normal(1, 77, 31))
    assert torch.equal(model.apply_model(x, t, context), expected)
    undo()
    assert torch.equal(model.apply_model(x, t, context), expected)


def test_the_order_of_weights_in_memory_stays() -> None:
    model = tiny_model().to(memory_format=torch.channels_last)
    conv = model.model.diffusion_model.input_blocks[0][0]
    stride = conv.weight.stride()
    offload(model, CPU, by_layer=True)
    assert conv.weight.stride() == stride


@pytest.mark.parametrize("tiled_first", [False, True])
def test_tiles_and_offloading_together(tiled_first: bool) -> None:
    model, z = tiny_model(), normal(1, 4, 12, 12)
    tile = functools.partial(tile_first_stage, model, 8, 2)
    move = functools.partial(offload, model, CPU, transfer=SlowTransfer())
    undo = tile()
    expected = model.decode_first_stage(z)
    undo()
    steps: list[Callable] = [tile, move] if tiled_first else [move, tile]
    undos = [step() for step in steps]
    assert torch.equal(model.decode_first_stage(z), expected)
    for undo in reversed(undos):
        undo()
    assert "decode_first_stage" not in vars(model)


def test_the_peak_of_this_process() -> None:
    before = peak_memory(CPU)
    reset_peak_memory(CPU)
    assert before > 2**20
    torch.ones(before // 4 + 2**24)  # more bytes than ever
    assert peak_memory(CPU) > before


# on a GPU


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("by_layer", [False, True])
def test_offloading_on_a_gpu_gives_the_same_bits(by_layer: bool) -> None:
    device = torch.device("cuda")
    model = tiny_model().half().to(device)
    z, t, context = (
        value.to(device) for value in (normal(2, 4, 16, 16), torch.tensor([3.0, 9.0]), normal(2, 77, 32))
    )
    z, context = z.half(), context.half()
    expected = [model.apply_model(z, t, context), model.decode_first_stage(z)]
    model.cpu()
    offload(model, device, by_layer)
    assert model.device == device
    for _ in range(5):
        got = [model.apply_model(z, t, context), model.decode_first_stage(z)]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
