"""Weights that are on the device only while they are used, on the CPU as the device."""

from collections.abc import Iterator

import pytest
import torch
from tiny_sampling import normal, tiny_model
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize.offload import ALIGNMENT, PlainTransfer, Transfer, offload, unet_units
from ldm.optimize.tiling import tile_first_stage

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


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
    """The results of everything that a run calls, twice."""
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
    offload(model, CPU, by_layer, SlowTransfer())
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_run_with_offloading(by_layer: bool) -> None:
    model = tiny_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = work(model)
    offload(model, CPU, by_layer, SlowTransfer())
    assert all(torch.equal(a, b) for a, b in zip(work(model), expected, strict=True))
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
    offload(model, CPU, by_layer=True, transfer=SlowTransfer())
    with pytest.raises(RuntimeError):
        model.apply_model(x, t, normal(1, 77, 31))
    assert torch.equal(model.apply_model(x, t, context), expected)


def test_the_order_of_weights_in_memory_stays() -> None:
    model = tiny_model().to(memory_format=torch.channels_last)
    conv = model.model.diffusion_model.input_blocks[0][0]
    stride = conv.weight.stride()
    offload(model, CPU, by_layer=True)
    assert conv.weight.stride() == stride


@pytest.mark.parametrize("tiled_first", [False, True])
def test_tiles_and_offloading_together(tiled_first: bool) -> None:
    model, tiled, z = tiny_model(), tiny_model(), normal(1, 4, 12, 12)
    tile_first_stage(tiled, 8, 2)
    steps = [
        lambda: tile_first_stage(model, 8, 2),
        lambda: offload(model, CPU, transfer=SlowTransfer()),
    ]
    for step in steps if tiled_first else reversed(steps):
        step()
    assert torch.equal(model.decode_first_stage(z), tiled.decode_first_stage(z))


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("transfer", [PlainTransfer, SlowTransfer])
def test_a_new_precision_of_the_first_stage_lasts(by_layer: bool, transfer: type[Transfer]) -> None:
    """The half precision weights in host memory came back for every batch, which was then decoded twice."""
    z = normal(1, 4, 6, 5)
    model, plain = tiny_model(), tiny_model()
    for each in (model, plain):
        with torch.inference_mode(False):
            each.bfloat16()
    with torch.inference_mode(False):
        plain.first_stage_model.float()
    expected = plain.decode_first_stage(z)
    offload(model, CPU, by_layer, transfer())
    for _ in range(2):  # with the first stage on the device, and with another part there
        assert model.decode_first_stage(z).dtype == torch.bfloat16
        model.get_learned_conditioning(["a cat"])
    model.decode_first_stage(z)
    model.first_stage_to(torch.float32)
    for _ in range(2):
        assert torch.equal(model.decode_first_stage(z), expected)
        assert {p.dtype for p in model.first_stage_model.parameters()} == {torch.float32}
        context = model.get_learned_conditioning(["a cat"])  # the first stage leaves the device
        assert {p.dtype for p in model.first_stage_model.parameters()} == {torch.float32}
        assert model.apply_model(z, torch.tensor([3.0]), context).dtype == torch.bfloat16
    assert torch.equal(context, plain.get_learned_conditioning(["a cat"]))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("by_layer", [False, True])
def test_offloading_on_a_gpu_gives_the_same_bits(by_layer: bool) -> None:
    device = torch.device("cuda", torch.cuda.current_device())  # "cuda" alone equals no tensor's device
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
