"""Calls of a small UNet in one thread: which ones, and that nothing of it stays behind."""

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from tiny_sampling import normal, relative_difference

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.optimize import threads as module
from ldm.optimize.calls import call_states
from ldm.optimize.threads import ALL, ONE, OneThread, count_weights, use_one_thread

Kernels = Callable[[], Mapping[str, Callable[[], object]]]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is measured, one thread being faster for batches of at most 4."""
    found: list[str] = []

    def choose(work: str, names: tuple[str, ...], kernels: Kernels) -> str:
        assert set(kernels()) == set(names)
        found.append(work)
        return ONE if int(work.split(", ")[2].split("x")[0]) <= 4 else ALL

    monkeypatch.setattr(module, "choose", choose)
    return found


def numbers_of_threads(model: LatentDiffusion) -> list[int]:
    """The number of threads in each of the UNet's calls, from now on."""
    found: list[int] = []
    model.model.diffusion_model.input_blocks[0].register_forward_hook(
        lambda *_: found.append(torch.get_num_threads())
    )
    return found


def call(model: LatentDiffusion, batch: int, side: int = 8) -> torch.Tensor:
    with torch.inference_mode():
        return model.apply_model(normal(batch, 4, side, side), torch.zeros(batch), normal(batch, 5, 32))


def use(model: LatentDiffusion) -> None:
    use_one_thread(model, count_weights(model.model.diffusion_model))


def test_calls_up_to_the_measured_size_run_in_one_thread(model: LatentDiffusion, measured: list[str]) -> None:
    """A single image of the bundled model was drawn at 30 steps a second by two threads, and at 49 by one."""
    model.image_size = 8
    plain = call(model, 2)
    use(model)
    assert [work.split(", ")[2] for work in measured] == ["2x8x8", "4x8x8", "8x8x8"]
    found = numbers_of_threads(model)
    results = [call(model, batch, side) for batch, side in ((2, 8), (1, 16), (4, 8), (6, 8), (4, 16))]
    assert found == [1, 1, 1, 2, 2]
    assert torch.get_num_threads() == 2
    assert relative_difference(results[0], plain) < 2e-6


def test_the_number_is_put_back_after_a_failure(model: LatentDiffusion) -> None:
    OneThread(model.model.diffusion_model, 10**6)
    with pytest.raises(RuntimeError), torch.inference_mode():
        model.apply_model(normal(1, 5, 8, 8), torch.zeros(1), normal(1, 5, 32))  # a channel too many
    assert torch.get_num_threads() == 2


def test_large_models_labels_and_single_threads_are_left_alone(
    model: LatentDiffusion, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = model.model.diffusion_model
    model.image_size = 64
    use_one_thread(model, 860_000_000)  # as v1 has
    model.image_size = 8
    monkeypatch.setattr(unet, "num_classes", 1000)
    use(model)
    monkeypatch.setattr(unet, "num_classes", None)
    torch.set_num_threads(1)
    use(model)
    assert not measured
    assert not call_states(unet)


def test_both_are_really_measured(model: LatentDiffusion) -> None:
    found = numbers_of_threads(model)
    for one in module.calls(model.model.diffusion_model, 2, 8).values():
        one()
    assert found == [2, 1]
    assert torch.get_num_threads() == 2
