"""Products added to packed weights, against the same sums of plain matrices."""

import pytest
import torch

from ldm.optimize import packed as module
from ldm.optimize.layers import has_onednn
from ldm.optimize.packed import (
    dense,
    dense_halves,
    halves_plus_product,
    pack,
    pack_halves,
    plus_product,
    rows_in_block,
)

pytestmark = pytest.mark.skipif(not has_onednn(torch.float32), reason="oneDNN does not run here")


def matrices(rows: int, columns: int, rank: int = 5) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + columns)
    shapes = (rows, columns), (rows, rank), (rank, columns)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (320, 768), (128, 33), (96, 1), (17, 33)])
def test_a_product_is_added_in_the_packed_order(rows: int, columns: int) -> None:
    weight, up, down = matrices(rows, columns)
    packed = pack(weight)
    total = plus_product(packed, up, down)
    assert (total is None) == (rows_in_block(rows, columns) is None)
    if total is not None:
        torch.testing.assert_close(dense(total), weight + up @ down)
        x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
        ours = torch.ops.mkldnn._linear_pointwise(x, total, None, "none", [], "none")
        torch.testing.assert_close(ours, x @ (weight + up @ down).T, rtol=1e-3, atol=1e-3)
    assert torch.equal(dense(packed), weight)  # which goes back on when the LoRA is taken off


def test_halves_are_added_to_by_the_halves_of_the_rows() -> None:
    weight, up, down = matrices(256, 64)
    sums = halves_plus_product(pack_halves(weight), up, down)
    if sums is None:
        pytest.skip("oneDNN has another order on this processor")
    torch.testing.assert_close(dense_halves(sums), weight + up @ down)


def test_another_order_or_type_has_no_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, up, down = matrices(128, 64)
    if has_onednn(torch.bfloat16):
        assert plus_product(pack(weight.bfloat16()), up, down) is None
    rows_in_block.cache_clear()
    monkeypatch.setattr(module, "BLOCKS", (7,))
    try:
        assert plus_product(pack(weight), up, down) is None
        assert halves_plus_product(pack_halves(weight), up, down) is None
    finally:
        rows_in_block.cache_clear()


def test_a_torch_without_the_operators_has_no_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(packed: torch.Tensor) -> torch.Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute 'data_ptr'")

    weight, up, down = matrices(128, 64)
    rows_in_block.cache_clear()
    monkeypatch.setattr(module, "_memory", missing)
    try:
        assert plus_product(pack(weight), up, down) is None
    finally:
        rows_in_block.cache_clear()
