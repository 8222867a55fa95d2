"""Averages of weights: names, warm-up, and the way there and back."""

import pytest
import torch
from golden_files import manifest
from torch import nn

from ldm.modules.ema import LitEma


class Nested(nn.Module):
    """Two trainable weights and a frozen one."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.blocks[1].requires_grad_(False)


def test_ema_names_have_no_dots():
    assert list(dict(LitEma(Nested()).named_buffers())) == ["decay", "num_updates", "gain", "blocks0weight"]


def test_ema_names_of_a_checkpoint():
    unet = [name for name in manifest("mini-v1-ema") if name.startswith("model.")]
    mangled = {f"model_ema.{name.removeprefix('model.').replace('.', '')}" for name in unet}
    assert len(mangled) == len(unet)
    averages = {name for name in manifest("mini-v1-ema") if name.startswith("model_ema.")}
    assert averages - mangled == {"model_ema.decay", "model_ema.num_updates"}


def test_ema_decay_warms_up():
    model = Nested()
    model.gain.data.fill_(0.0)
    ema = LitEma(model, decay=0.25)
    model.gain.data.fill_(1.0)
    expected = 0.0
    for n in range(1, 5):
        ema(model)
        decay = min(0.25, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay)
        assert ema.gain.item() == pytest.approx(expected, rel=1e-6)
        assert ema.num_updates.item() == n
    assert (1 + 1) / (10 + 1) < 0.25 < (1 + 4) / (10 + 4)


def test_ema_copy_store_restore():
    model = Nested()
    ema = LitEma(model)
    averages = [model.blocks[0].weight.item(), model.gain.item()]
    frozen = model.blocks[1].weight.item()
    model.blocks[0].weight.data.fill_(5.0)
    model.gain.data.fill_(6.0)
    ema.store(model)
    ema.copy_to(model)
    assert [model.blocks[0].weight.item(), model.gain.item()] == averages
    ema.restore(model)
    assert [model.blocks[0].weight.item(), model.gain.item()] == [5, 6]
    assert model.blocks[1].weight.item() == frozen
