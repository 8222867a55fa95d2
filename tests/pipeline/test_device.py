"""Which device computes, and in which precision."""

import pytest
import torch

from ldm.errors import FieldError
from ldm.models.diffusion.ddpm import like_weights
from ldm.pipeline.device import choose_device, precision_on, weights_dtype


def test_half_is_the_default_on_a_gpu() -> None:
    for device, precision in (("cpu", "full"), ("cuda", "half"), ("mps", "full")):
        assert precision_on(torch.device(device), None) == precision
        assert precision_on(torch.device(device), "bf16") == "bf16"


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
