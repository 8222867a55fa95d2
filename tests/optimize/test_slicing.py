"""Attention in slices, against the whole matrix."""

from collections.abc import Iterator

import pytest
import torch
from tiny_sampling import normal, tiny_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.model import AttnBlock
from ldm.optimize.slicing import slice_attention, sliced_attention


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

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
        # as on a device without fused kernels; inference mode would hide the operations of attention
        with torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Largest() as largest:
            return [
                model.apply_model(x, t, context),
                model.first_stage_model.decoder.mid(h),
            ], largest.elements

    expected, plain = work()
    slice_attention(model, limit)
    results, sliced = work()
    assert plain == 32**4  # the autoencoder's one head over all pixels
    # the UNet's features: the attention matrix is no longer the largest
    assert sliced <= 2 * 16 * 16 * 8 * 32
    for result, whole in zip(results, expected, strict=True):
        torch.testing.assert_close(result, whole, rtol=1e-6, atol=1e-6 * whole.abs().max().item())


def test_only_this_models_attention_is_sliced() -> None:
    model, other = tiny_model(), tiny_model()
    slice_attention(model)
    kinds = {type(module) for module in model.modules() if "attend" in vars(module)}
    assert kinds == {CrossAttention, AttnBlock}
    assert not any("attend" in vars(module) for module in other.modules())


def test_a_slice_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        slice_attention(tiny_model(), 0)
