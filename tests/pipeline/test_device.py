"""Which device computes, and in which precision."""

from collections.abc import Iterator

import pytest
import torch

from ldm.errors import FieldError
from ldm.models.diffusion.ddpm import like_weights
from ldm.pipeline.device import arithmetic, choose_device, precision_on, weights_dtype


def test_half_is_the_default_on_a_gpu() -> None:
    for device, precision in (("cpu", "full"), ("cuda", "half"), ("mps", "full")):
        assert precision_on(torch.device(device), None) == precision
        assert precision_on(torch.device(device), "bf16") == "bf16"


def test_autocast_on_a_cpu_is_recorded_as_what_it_is() -> None:
    """Images of float32 recorded autocast."""
    assert precision_on(torch.device("cpu"), "autocast") == "full"
    assert precision_on(torch.device("cuda"), "autocast") == "autocast"


def test_types_of_weights() -> None:
    assert [weights_dtype(name) for name in ("full", "autocast")] == [None, None]
    assert [weights_dtype(name) for name in ("half", "bf16")] == [torch.float16, torch.bfloat16]


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(
        FieldError, match=r"^device cuda:2 is not there; this machine has cuda, cuda:0, cuda:1, cpu$"
    ):
        choose_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("mps")


def test_sampling_is_in_single_precision_over_weights_of_half() -> None:
    x = torch.ones(2, dtype=torch.float32)
    half = torch.nn.Linear(2, 2).half()
    assert like_weights(x, half).dtype == torch.float16
    cond = like_weights({"c_crossattn": [x], "c_adm": torch.tensor([1])}, half)
    assert (cond["c_crossattn"][0].dtype, cond["c_adm"].dtype) == (torch.float16, torch.int64)


def cuda_settings() -> tuple:
    backends = torch.backends
    return (
        *(each.fp32_precision for each in (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)),
        torch.get_float32_matmul_precision(),
        backends.cudnn.allow_tf32,  # an error where the old and the new setting contradict each other
        backends.cuda.matmul.allow_tf32,
        backends.cudnn.benchmark,
    )


@pytest.fixture
def float32_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("matmul", ["highest", "high"])
@pytest.mark.usefixtures("float32_products")
def test_float32_on_cuda_is_no_tf32_and_nothing_is_left_changed(matmul: str) -> None:
    """cuDNN's convolutions of float32 weights were TF32, as torch has it where nobody says otherwise."""
    torch.set_float32_matmul_precision(matmul)
    before = cuda_settings()
    with arithmetic(torch.device("cpu")):
        assert cuda_settings() == before
    with arithmetic(torch.device("cuda")):
        assert cuda_settings() == ("ieee", "ieee", "ieee", "highest", False, False, True)
    assert cuda_settings() == before


@pytest.mark.parametrize("setting", ["cudnn", "algorithms"])
def test_where_torch_is_deterministic_no_kernel_is_measured(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting == "cudnn":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with arithmetic(torch.device("cuda")):
        assert not torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.benchmark
