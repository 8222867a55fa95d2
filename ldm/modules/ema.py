"""Exponential moving average of weights."""

import torch
from torch import nn


class LitEma(nn.Module):
    """Averages of a model's trainable weights, kept as float32 buffers named as in original checkpoints.

    A buffer's name is the weight's without dots. After n updates the decay is min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        super().__init__()
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0, dtype=torch.int32))
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                self.register_buffer(name.replace(".", ""), weight.detach().clone())
        self.stored: list[torch.Tensor] = []

    def pairs(self, model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(average, weight) of every averaged weight."""
        averages = dict(self.named_buffers())
        named = ((name.replace(".", ""), weight) for name, weight in model.named_parameters())
        return [(averages[name], weight) for name, weight in named if name in averages]

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move the averages towards the model's weights."""
        self.num_updates += 1
        n = self.num_updates.item()
        decay = min(self.decay.item(), (1 + n) / (10 + n))
        for average, weight in self.pairs(model):
            average.lerp_(weight, 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for average, weight in self.pairs(model):
            weight.copy_(average)

    def store(self, model: nn.Module) -> None:
        self.stored = [weight.detach().clone() for _, weight in self.pairs(model)]

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        for stored, (_, weight) in zip(self.stored, self.pairs(model), strict=True):
            weight.copy_(stored)
        self.stored = []
